"""Compiled kernels on disk: whose files are read, what a damaged one does, and what happens where none can be kept."""

import concurrent.futures
import ctypes
import errno
import functools
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from brainmass_kernels.codegen import kernel_cache

DATA = bytes(range(256)) * 40
ROOT = Path(__file__).parents[1]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The usual folder, which is not made yet, and the one for temporary files around the other."""
    monkeypatch.setenv("BRAINMASS_KERNELS_CACHE", str(tmp_path / "kernels"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(kernel_cache, "_warned", False)
    return tmp_path / "kernels", tmp_path / "tmp" / f"brainmass_kernels-{os.geteuid()}"


def mode(path) -> int:
    return path.stat().st_mode & 0o777


def cannot_keep():
    return pytest.warns(RuntimeWarning, match=r"cannot be kept.*\$BRAINMASS_KERNELS_CACHE")


# Reading and writing ------------------------------------------------------------------------------------------------


def test_what_is_kept_is_found_again_and_is_private(places):
    assert kernel_cache.load("a") is None
    kernel_cache.keep("a", DATA)
    assert kernel_cache.load("a") == DATA
    assert kernel_cache.load("b") is None
    kernel_cache.keep("a", b"")
    assert kernel_cache.load("a") == b""
    assert mode(places[0]) == 0o700
    assert [(p.name, mode(p)) for p in places[0].iterdir()] == [("a", 0o600)]
    assert not places[1].exists()


def test_a_damaged_file_is_not_read_and_is_replaced(places):
    kernel_cache.keep("a", DATA)
    kernel_cache.keep("b", DATA[::-1])
    file = places[0] / "a"
    whole = file.read_bytes()
    damaged = [whole[:n] for n in (0, 1, 10, 20, 40, 52, len(whole) // 2, len(whole) - 1)]
    damaged += [whole + b"x", b"\x80\x04K\x01.", (places[0] / "b").read_bytes()]
    for place in range(0, len(whole), 97):
        damaged.append(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    for held in damaged:
        file.write_bytes(held)
        assert kernel_cache.load("a") is None
    kernel_cache.keep("a", DATA)
    assert kernel_cache.load("a") == DATA


def test_many_writers_leave_one_good_file(places):
    def write_and_read(k):
        kernel_cache.keep("a", DATA)
        return kernel_cache.load("a") == DATA

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        assert all(pool.map(write_and_read, range(100)))
    assert [p.name for p in places[0].iterdir()] == ["a"]


# Others -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o707])
def test_a_folder_that_others_write_to_is_not_used(places, bits):
    kernel_cache.keep("a", DATA)
    places[0].chmod(bits)
    assert kernel_cache.load("a") is None
    with cannot_keep():
        kernel_cache.keep("a", b"new")
    assert kernel_cache.load("a") == b"new"
    places[0].chmod(0o700)
    assert kernel_cache.load("a") == DATA


@pytest.mark.parametrize("bits", [0o620, 0o602])
def test_a_file_that_others_write_to_is_not_read_but_replaced(places, bits):
    kernel_cache.keep("a", DATA)
    (places[0] / "a").chmod(bits)
    assert kernel_cache.load("a") is None
    kernel_cache.keep("a", DATA)
    assert kernel_cache.load("a") == DATA


@pytest.mark.parametrize("what", ["kernels", "a"])
def test_what_another_user_owns_is_not_read_and_what_root_owns_is(places, monkeypatch, what):
    kernel_cache.keep("a", DATA)
    stat = os.fstat

    def owned_by(number):
        def fstat(descriptor):
            status = list(stat(descriptor))
            if os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) == what:
                status[4] = number
            return os.stat_result(status)

        return fstat

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("this system does not say what a descriptor is of")
    monkeypatch.setattr(os, "fstat", owned_by(os.geteuid() + 12345))
    assert kernel_cache.load("a") is None
    monkeypatch.setattr(os, "fstat", owned_by(0))
    assert kernel_cache.load("a") == DATA


def test_a_link_in_the_folder_for_temporary_files_is_not_followed(places, monkeypatch, tmp_path):
    monkeypatch.setenv("BRAINMASS_KERNELS_CACHE", os.devnull)
    (tmp_path / "of another").mkdir(mode=0o700)
    places[1].symlink_to(tmp_path / "of another")
    with cannot_keep():
        kernel_cache.keep("a", DATA)
    assert not list((tmp_path / "of another").iterdir())


def test_a_link_of_the_users_own_is_followed(places, monkeypatch, tmp_path):
    (tmp_path / "large disk").mkdir(mode=0o700)
    places[0].symlink_to(tmp_path / "large disk")
    kernel_cache.keep("a", DATA)
    assert kernel_cache.load("a") == DATA
    assert (tmp_path / "large disk" / "a").exists()


# Where nothing can be kept ------------------------------------------------------------------------------------------


def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_one_warning_and_leaves_nothing(places, monkeypatch):
    monkeypatch.setattr(os, "replace", full)
    with cannot_keep() as said:
        kernel_cache.keep("a", DATA)
    assert os.strerror(errno.ENOSPC) in str(said[0].message)
    assert "Each process compiles its own" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel_cache.keep("b", DATA)
    assert not [*places[0].iterdir(), *places[1].iterdir()]


def test_without_a_home_kernels_are_kept_with_temporary_files(places, monkeypatch):
    monkeypatch.delenv("BRAINMASS_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with cannot_keep() as said:
        kernel_cache.keep("a", DATA)
    assert str(places[1]) in str(said[0].message)
    assert mode(places[1]) == 0o700
    # A later process says it too.
    monkeypatch.setattr(kernel_cache, "_warned", False)
    with cannot_keep():
        assert kernel_cache.load("a") == DATA


def test_what_was_kept_with_temporary_files_moves_to_its_place(places, monkeypatch):
    with monkeypatch.context() as patch, cannot_keep():
        patch.setenv("BRAINMASS_KERNELS_CACHE", os.devnull)
        kernel_cache.keep("a", DATA)
    assert not places[0].exists()
    assert kernel_cache.load("a") == DATA
    assert (places[0] / "a").exists()


def test_there_may_be_no_folder_for_temporary_files_either(places, monkeypatch):
    monkeypatch.setenv("BRAINMASS_KERNELS_CACHE", os.devnull)
    monkeypatch.setattr(tempfile, "gettempdir", full)
    assert kernel_cache.load("a") is None
    with cannot_keep():
        kernel_cache.keep("a", DATA)


# Sources ------------------------------------------------------------------------------------------------------------


def test_a_module_of_a_source_needs_no_file(places):
    text = "def twice(x):\n    return x + x\n"
    made = kernel_cache.module("brainmass_kernels_test_of_sources", text)
    assert made.twice(2) == 4
    assert inspect.getsource(made.twice) == text
    assert sys.modules.pop(made.__name__) is made
    assert not places[0].exists()


# Machine code --------------------------------------------------------------------------------------------------------


@pytest.fixture
def entry(places, monkeypatch):
    """Make a small kernel: its C function, and how often LLVM compiled for it."""
    machine = pytest.importorskip("brainmass_kernels.backends.numba.machine")
    compile_one, count = machine.Machine.compile, []
    monkeypatch.setattr(machine.Machine, "compile", lambda *args: (count.append(1), compile_one(*args))[1])

    def made(number):
        # Each process loads a name once; as if this one were new.
        monkeypatch.setattr(machine, "_ADDRESSES", {})
        monkeypatch.setattr(machine, "machine", functools.cache(machine.Machine))
        name, before = f"brainmass_kernels_test_{number}", len(count)
        text = f"define i64 @{name}(i64 %x) {{\n  %y = sub i64 %x, {number}\n  ret i64 %y\n}}\n"
        address = machine.function(name, lambda: text)
        kept.append(machine.machine())
        return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address), len(count) - before

    kept = []
    return made


def test_what_was_compiled_is_loaded_and_compiles_what_is_damaged(entry, places, monkeypatch):
    handler, compiled = entry(3)
    assert (handler(10), compiled) == (7, 1)
    handler, compiled = entry(3)
    assert (handler(10), compiled) == (7, 0)
    (file,) = places[0].iterdir()
    for held in (file.read_bytes()[:-1], pickle.dumps(print), b""):
        file.write_bytes(held)
        handler, compiled = entry(3)
        assert (handler(10), compiled) == (7, 1)
        assert entry(3)[1] == 0
    assert list(places[0].iterdir()) == [file]


def test_nothing_planted_in_a_cache_runs(entry, places, tmp_path):
    entry(4)
    (file,) = places[0].iterdir()

    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    kernel_cache.keep(file.name, pickle.dumps(Planted()))
    file.chmod(0o666)
    assert entry(4)[1] == 1
    kernel_cache.keep(file.name, pickle.dumps(Planted()))
    places[0].chmod(0o777)
    with cannot_keep():
        assert entry(4)[1] == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("what", ["llvmlite", "package", "processor", "features", "optimisation"])
def test_code_of_other_versions_and_machines_is_apart(entry, monkeypatch, what):
    machine = pytest.importorskip("brainmass_kernels.backends.numba.machine")
    before = machine._surroundings()
    assert before == machine._surroundings()
    if what == "package":
        monkeypatch.setattr(machine, "__version__", "0")
    elif what in ("processor", "features"):
        monkeypatch.setattr(machine.machine(), what, "another")
    elif what == "optimisation":
        monkeypatch.setattr(machine, "LEVEL", 0)
    else:
        monkeypatch.setattr(machine.llvmlite, "__version__", "0")
    assert machine._surroundings() != before


# Processes ----------------------------------------------------------------------------------------------------------

RUN = """
import sys, tempfile, warnings
import brainunit as u, numpy as np
import brainmass_kernels as bk
if len(sys.argv) > 1:
    tempfile.tempdir = sys.argv[1]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for y in (np.ones(2), np.ones(3)):
        result = bk.simulate(bk.VanDerPol(), 20, 0.5 * u.ms, initial={"x": y}, implementation="numba")
print(float(result["x"][-1, 0]), len([w for w in said if "$BRAINMASS_KERNELS_CACHE" in str(w.message)]))
"""


def start(cache, *arguments, **keywords):
    env = {**os.environ, "BRAINMASS_KERNELS_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, **keywords)


def said_by(process) -> tuple[float, int]:
    """The last state of the run, and how many warnings named the variable."""
    out, _ = process.communicate()
    assert process.returncode == 0
    state, warned = out.split()
    return float(state), int(warned)


def as_anyone():
    """Root may write everywhere, until it gives up that right: PR_CAPBSET_DROP of CAP_DAC_OVERRIDE."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_a_process_without_any_folder_runs(tmp_path):
    pytest.importorskip("llvmlite")
    state, warned = said_by(start(os.devnull, os.devnull))
    assert abs(state) > 0.5
    assert warned == 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="rights are given up as Linux has it")
def test_a_cache_that_is_read_only_is_read(tmp_path):
    """As in the image of a container; and where it lacks a kernel, that is kept with temporary files."""
    pytest.importorskip("llvmlite")
    cache, empty, temporary = (tmp_path / name for name in ("filled", "empty", "tmp"))
    empty.mkdir(mode=0o555)
    temporary.mkdir()
    right = said_by(start(cache, temporary))
    for path in (*cache.iterdir(), cache):
        path.chmod(path.stat().st_mode & 0o555)
    assert said_by(start(cache, temporary, preexec_fn=as_anyone)) == right == (right[0], 0)
    assert not list(temporary.iterdir())
    assert said_by(start(empty, temporary, preexec_fn=as_anyone)) == (right[0], 1)
    (found,) = temporary.iterdir()
    assert [p.name for p in found.iterdir()] == [p.name for p in cache.iterdir()]


@pytest.mark.slow
def test_ten_processes_that_compile_one_kernel_leave_one_good_file(tmp_path):
    pytest.importorskip("llvmlite")
    found = {said_by(process) for process in [start(tmp_path / "kernels") for _ in range(10)]}
    assert len(found) == 1
    assert found.pop()[1] == 0
    files = sorted((tmp_path / "kernels").iterdir())
    before = [(p.name, p.stat().st_mtime_ns) for p in files]
    # A loop, and the programs around it; no part of a file is left.
    assert sum("_forward_" in p.name for p in files) == 1
    assert {p.suffix for p in files} == {".kernel"}
    said_by(start(tmp_path / "kernels"))
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "kernels").iterdir()) == before
