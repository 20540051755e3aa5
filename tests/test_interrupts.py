"""Ctrl-C: heard once and soon, wherever it falls; a command line ends with 130, and what is on disk is whole."""

import _thread
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brainmass_kernels import interrupts

BAD = ("Segmentation", "Fatal Python error", "Exception ignored in:")  # not: in an atexit callback, which is JAX's


def library(source: str, **more):
    """A function `work` as of a module of JAX's, which may lose an interrupt."""
    scope = {"__name__": "jax.lossy", "signal": signal, "time": time, **more}
    exec(source, scope)
    return scope["work"]


def wait(seconds: float = 30.0) -> None:
    """What takes long, in Python."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _heeded():
    """A shell that started these tests in the background lets them, and what they start, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestHeard:
    @pytest.fixture(autouse=True)
    def _as_before(self):
        hook = sys.unraisablehook
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        yield
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert sys.unraisablehook is hook

    def test_at_once_where_it_can_be(self):
        source = "def work():\n    signal.raise_signal(signal.SIGINT)\n    late.append(1)\n"
        late = []
        with pytest.raises(KeyboardInterrupt):
            interrupts.interruptible(library(source, late=late))()
        assert not late

    def test_in_the_callback_of_a_weak_reference(self, monkeypatch):
        told, late = [], []
        monkeypatch.setattr(sys, "unraisablehook", told.append)

        def work():
            thing = threading.Event()
            kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
            del thing
            wait()
            late.append(kept)

        with pytest.raises(KeyboardInterrupt):
            interrupts.interruptible(work)()
        assert not told
        assert not late

    def test_where_a_bare_except_passes_over_it(self):
        source = (
            "def work():\n    try:\n        signal.raise_signal(signal.SIGINT)\n    except:\n        lost.append(1)\n"
            "    wait()\n    lost.append(2)\n"
        )
        lost = []
        with pytest.raises(KeyboardInterrupt):
            interrupts.interruptible(library(source, lost=lost, wait=wait))()
        assert lost == [1]

    def test_where_it_becomes_another_error(self):
        source = (
            "def work():\n    try:\n        signal.raise_signal(signal.SIGINT)\n    except KeyboardInterrupt:\n"
            "        raise ValueError('cannot be hashed')\n"
        )
        with pytest.raises(KeyboardInterrupt) as raised:
            interrupts.interruptible(library(source))()
        assert isinstance(raised.value.__cause__, ValueError)

    def test_what_cleans_up_is_not_interrupted_again(self):
        source = (
            "def work():\n    try:\n        signal.raise_signal(signal.SIGINT)\n    finally:\n        time.sleep(0.3)\n"
            "        done.append(1)\n"
        )
        done = []
        with pytest.raises(KeyboardInterrupt):
            interrupts.interruptible(library(source, done=done))()
        assert done == [1]

    def test_code_of_the_users_may_handle_it(self):
        def callback():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                return "stopped"

        def work():
            answer = callback()
            wait(0.3)
            return answer

        assert interrupts.interruptible(work)() == "stopped"

    def test_what_runs_after_an_interrupt_can_be_interrupted(self):
        late = []
        source = "def work():\n    signal.raise_signal(signal.SIGINT)\n    wait()\n    late.append(1)\n"

        def report():
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                interrupts.interruptible(library(source, wait=wait, late=late))()

        with pytest.raises(KeyboardInterrupt):
            report()
        assert not late

    def test_a_handler_of_the_users_stays(self):
        seen = []
        before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        try:
            interrupts.interruptible(lambda: signal.raise_signal(signal.SIGINT))()
        finally:
            signal.signal(signal.SIGINT, before)
        assert seen == [1]

    def test_other_threads_are_left_alone(self):
        found = []
        thread = threading.Thread(target=lambda: found.append(interrupts.interruptible(lambda: 3)()))
        thread.start()
        thread.join()
        assert found == [3]

    def test_llvm_is_not_left_while_it_hands_modules_over(self):
        source = "def work():\n    signal.raise_signal(signal.SIGINT)\n    done.append(1)\n"
        done = []
        hand_over = library(source, __name__="llvmlite.binding.executionengine", done=done)
        with pytest.raises(KeyboardInterrupt):
            interrupts.interruptible(lambda: [hand_over(), wait()])()
        assert done == [1]

    def test_a_compiler_is_not_left(self):
        """XLA goes on with the module of a caller that was interrupted, so the caller stays until it is done."""

        def long(x):
            for k in range(300):
                x = jnp.sin(x) * jnp.cos(x + k)
            return x

        lowered = jax.jit(long).lower(jnp.ones(3))
        compiling = threading.Event()

        def work():
            compiling.set()
            return lowered.compile()

        def interrupt():
            compiling.wait()
            for _ in range(2000):
                frame = sys._current_frames()[threading.main_thread().ident]
                if any(interrupts._compiles(at) for at in interrupts._callers(frame)):
                    return _thread.interrupt_main()
                time.sleep(0.0005)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt) as raised:
            interrupts.interruptible(work)()
        thread.join()
        names = [entry.name for entry in raised.traceback]
        assert not any(name.startswith("backend_compile") for name in names), names


# Processes ----------------------------------------------------------------------------------------------------------


def bound() -> float:
    """Seconds in which a process is to end: two where it has the cores for itself."""
    return 2.0 * (1.0 + os.getloadavg()[0] / (os.cpu_count() or 1))


class Process:
    """A program in a folder, to be interrupted; a command line where the first word is no file."""

    def __init__(self, folder: pathlib.Path, *words: str, **more: str):
        self.folder, self.command = folder, not words[0].endswith(".py")
        program = ["-m", "brainmass_kernels.cli", *words] if self.command else [*words]
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "BRAINMASS_KERNELS_CACHE": str(folder / "kernels")}
        environment |= more
        self.error = folder / "stderr.txt"
        with open(self.error, "w") as file:
            self.running = subprocess.Popen(
                [sys.executable, *program], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=file, text=True
            )

    def line(self) -> str:
        """The next that it prints."""
        return self.running.stdout.readline()

    def ended(self, after: float) -> bool:
        try:
            self.running.wait(after)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, *numbers: int, pause: float = 0.0) -> int:
        """Send signals; the exit status, of a process that ended in time and without a crash."""
        began = time.monotonic()
        for number in numbers:
            self.running.send_signal(number)
            time.sleep(pause)
        try:
            self.printed, _ = self.running.communicate(timeout=120)
        finally:
            self.running.kill()
        took, told = time.monotonic() - began, self.error.read_text()
        assert not any(bad in told for bad in BAD), told
        assert took < bound(), (took, told)
        return self.running.returncode


@pytest.mark.parametrize("pause", [0.0, 0.05, 0.3])
def test_a_command_line_that_has_done_its_work_is_no_failure_afterwards(tmp_path, pause):
    """Python's and XLA's clean-up takes a moment, in which a signal killed the process."""
    command = Process(tmp_path, "implementations")
    while "scan" not in command.line():
        pass
    time.sleep(pause)
    if command.running.poll() is None:
        assert command.end(signal.SIGINT) in (0, 130)
    else:
        assert command.running.returncode == 0


LONG = """
import sys
import brainunit as u
import numpy as np
import brainmass_kernels as bk

model = bk.JansenRit(C=np.linspace(100, 160, 64))
run = dict(record=[bk.Mean()], implementation="numba")
bk.simulate(model, 1000, 0.5 * u.ms, every=500, **run)["eeg_mean"].mantissa.block_until_ready()
found = bk.simulate(model, 400_000_000, 0.5 * u.ms, every=1_000_000, **run)["eeg_mean"].mantissa
print("running", flush=True)
found.block_until_ready()
"""


def test_a_script_does_not_wait_for_the_run_it_left(tmp_path):
    (tmp_path / "script.py").write_text(LONG)
    script = Process(tmp_path, "script.py")
    assert script.line() == "running\n", script.error.read_text()
    time.sleep(0.2)
    assert script.end(signal.SIGINT) == -signal.SIGINT
    assert "KeyboardInterrupt" in script.error.read_text()


SWEEP = ["sweep", "--over", "E_inp=100:300:64", "--over", "C=110:150:64", "--chunk", "64", "--duration", "20", "--dt"]
SWEEP += ["0.1", "--out", "grid.npz"]


@pytest.mark.parametrize(
    ("numbers", "status"), [((signal.SIGTERM,), 143), ((signal.SIGINT, signal.SIGINT), 130)], ids=["term", "int twice"]
)
def test_a_command_line_ends_on_a_signal(tmp_path, numbers, status):
    sweep = Process(tmp_path, *SWEEP)
    assert "chunk 1 of 64" in sweep.line(), sweep.error.read_text()
    assert sweep.end(*numbers, pause=0.05) == status
    told = sweep.error.read_text()
    # XLA tells of compilations that are slow on a busy machine.
    assert told.count("brainmass-kernels: interrupted") == 1, told
    assert "Traceback" not in told, told
    check_sweep(tmp_path)


def test_a_command_line_ends_while_it_imports(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'jax':\n"
        "            print('begun', flush=True)\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    sweep = Process(tmp_path, *SWEEP, PYTHONPATH=path)
    assert sweep.line() == "begun\n"
    assert sweep.end(signal.SIGINT) == 130
    assert sweep.error.read_text() == "brainmass-kernels: interrupted\n"


def check_sweep(folder: pathlib.Path) -> None:
    for path in folder.glob("grid.npz.parts/chunk*.npz"):
        with np.load(path) as chunk:
            assert all(np.asarray(chunk[name]).size for name in chunk.files)
    for path in folder.glob("grid.npz.parts/sweep.json"):
        assert json.loads(path.read_text())["sweep"]


def check_fit(folder: pathlib.Path) -> None:
    for path in folder.glob("fit.part.json"):
        assert json.loads(path.read_text())["losses"]


FIT = ["fit", "--starts", "4", "--screen", "0", "--realisations", "2", "--duration", "6", "--steps", "200", "--quiet"]
FIT += ["--checkpoint", "fit.part.json"]
FITTING = """
import brainunit as u
import jax
import brainmass_kernels as bk

fit, target, key = bk.fit, bk.spectra.resting_meg(), jax.random.key(0)
print("script begun", flush=True)
fit(
    bk.JansenRit(), target, {"be": (40.0, 200.0), "E_inp": (20.0, 800.0)},
    inputs={"E_inp": 220 * u.Hz}, noise={"E_inp": 2.0 * u.Hz * u.second**0.5}, key=key, starts=4,
    realisations=2, duration=6 * u.second, steps=200, patience=200, checkpoint="fit.part.json",
)
print("script done")
"""
SIMULATING = """
import brainunit as u
import jax
import numpy as np
import brainmass_kernels as bk

simulate, keys = bk.simulate, [jax.random.key(seed) for seed in range(40)]
print("script begun", flush=True)
for seed in range(40):
    found = simulate(
        bk.JansenRit(C=np.linspace(100, 160, 64 + 64 * (seed % 4))), 20_000 + 1000 * seed, 0.5 * u.ms,
        noise={"E_inp": 2.0 * u.Hz * u.second**0.5}, key=keys[seed], record=[bk.Mean()],
        implementation="numba",
    )
    np.asarray(found["eeg_mean"].mantissa)
print("script done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["simulate", "fit", "sweep", "fitting script"])
def test_at_any_moment(tmp_path, what):
    """Six moments, kernels compiled anew each time.

    Of a command line from its first import on; of a script from the package's call on, as JAX loses what falls into its
    callbacks before that.
    """
    scripts = {"simulate": SIMULATING, "fitting script": FITTING}
    words = {"fit": FIT, "sweep": [*SWEEP[:-4], "--dt", "0.5", "--out", "grid.npz"]}.get(what, ["script.py"])

    def begun(name: str) -> Process:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "script.py").write_text(scripts.get(what, ""))
        process = Process(folder, *words)
        if not process.command:
            assert process.line() == "script begun\n", process.error.read_text()
        return process

    began, whole = time.monotonic(), begun("whole")
    began = began if whole.command else time.monotonic()
    whole.running.communicate(timeout=500)
    assert whole.running.returncode == 0, whole.error.read_text()
    length, interrupted = time.monotonic() - began, 0
    for k in range(6):
        process = begun(f"moment{k}")
        if process.ended(after=length * (k + 0.7) / 7):
            process.running.communicate()
            continue
        status = process.end(signal.SIGINT)
        told = process.error.read_text()
        # What is interrupted while Python itself shuts down dies of the signal, which a shell calls 130 too; or Python
        # tells of it and goes on, if it runs what a module registered for the end (JAX clears its caches then).
        expected = {
            -signal.SIGINT,
            *([130] if process.command else []),
            *([0] if "script done" in process.printed else []),
        }
        assert status in expected, (k, status, told)
        interrupted += 1
        check_fit(process.folder)
        check_sweep(process.folder)
    assert interrupted >= 4
