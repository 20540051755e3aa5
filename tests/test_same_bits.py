"""The same arguments, versions and machine: the same bits, whatever the process, the threads, and what is kept."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("llvmlite")

SCRIPT = pathlib.Path(__file__).with_name("same_bits.py")


def told(folder, number: int, threads: int, *more: str) -> dict[str, str]:
    """What a process of its own prints; the cache of kernels is shared, so that the first one finds it cold."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONHASHSEED": str(number), "BRAINMASS_KERNELS_CACHE": str(folder.parent / "kernels")}
    call = [sys.executable, SCRIPT, str(threads), *more]
    done = subprocess.run(call, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_same(found):
    different = {name for each in found for name in each if each[name] != found[0][name]}
    assert not different


def test_two_processes_have_the_same_bits(tmp_path):
    """One with a cold cache and all threads, one with a warm cache and one thread."""
    assert_same([told(tmp_path / "a", 0, 2), told(tmp_path / "b", 1, 1)])


@pytest.mark.slow
def test_six_processes_have_the_same_bits_and_fits(tmp_path):
    assert_same([told(tmp_path / str(k), k, 1 + k % 2, "more") for k in range(6)])
