"""brainmass's own test files, with the functions of this package put in place of those of brainmass.

The wheel has the files but not their conftest: the fixtures below are ours.
"""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

brainmass = pytest.importorskip("brainmass")
THEIRS = pathlib.Path(brainmass.__file__).parent

FIXTURES = """
import brainmass, brainstate, brainunit as u, numpy as np, pytest
import brainmass_kernels as bk

used = set()


def ours(function):
    def call(*arguments, **keywords):
        used.add(function.__name__)
        return function(*arguments, **keywords)

    return call


@pytest.fixture(autouse=True)
def environment():
    brainstate.environ.set(dt=0.1 * u.ms)  # some tests take it away


@pytest.fixture
def dt():
    return 0.1 * u.ms


@pytest.fixture
def seeded():
    brainstate.random.seed(0)


@pytest.fixture
def connectome():
    rng = np.random.default_rng(0)
    weights = rng.uniform(size=(4, 4)) * (1.0 - np.eye(4))
    lengths = rng.uniform(0.5, 2.0, (4, 4))
    return {"SC": weights, "delay": lengths * u.ms, "dist": lengths, "n": 4}


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"used: {' '.join(sorted(used))}")
"""

UTILITIES = """
from brainmass import utils
for name in ("sys2nd", "sigmoid", "bounded_input", "process_sequence"):
    setattr(utils, name, ours(getattr(bk, name)))
"""

SIMULATOR = """
def fused(model, dt=None):
    made = bk.fuse(model, dt, allow_fallback=True)
    run = made.run

    def noted(*arguments, **keywords):
        result = run(*arguments, **keywords)
        used.add("fallback" if made.fallback else "fuse")
        return result

    made.run = noted
    return made


brainmass.Simulator = fused
"""

JANSEN_RIT = """
from brainmass import JansenRitStep


def rate(self, v):
    return ours(bk.sigmoid)(v, self.s_max.value(), self.v0.value(), self.r.value() / u.mV)


def pyramidal(self, Mv, M, E, I, inp):
    return ours(bk.sys2nd)(self.Ae.value(), self.be.value(), self.fr_scale(self.S(E - I + inp)), M, Mv)


def excitatory(self, Ev, M, E, inp=0.0 * u.Hz):
    C = self.C.value()
    drive = inp + C * self.a2.value() * self.S(C * self.a1.value() * M)
    return ours(bk.sys2nd)(self.Ae.value(), self.be.value(), self.fr_scale(drive), E, Ev)


def inhibitory(self, Iv, M, I, inp):
    C = self.C.value()
    drive = C * self.a4.value() * self.S(C * self.a3.value() * M + inp)
    return ours(bk.sys2nd)(self.Ai.value(), self.bi.value(), self.fr_scale(drive), I, Iv)


JansenRitStep.S, JansenRitStep.dMv, JansenRitStep.dEv, JansenRitStep.dIv = rate, pyramidal, excitatory, inhibitory
"""

REPETITION_TIMES = """
import jax


def update(self, *given):
    used.add("fuse")
    dt = brainstate.environ.get_dt()
    run = bk.fuse(self, dt).run(dt, inputs=lambda i, t: given, init_states=False)
    return jax.tree.map(lambda x: x[0], run["output"])


brainmass.JansenRitTR.update = lambda self, input, record_state=False, iter_input=False: update(
    self, input, record_state, iter_input
)
"""

FILES = {
    "utils_test.py": (UTILITIES, {"sys2nd", "sigmoid", "bounded_input", "process_sequence"}),
    "simulator_test.py": (SIMULATOR, {"fuse"}),
    "network_test.py": (SIMULATOR, {"fuse"}),
    "jansen_rit/step_test.py": (JANSEN_RIT, {"sys2nd", "sigmoid"}),
    "jansen_rit/tr_test.py": (REPETITION_TIMES, {"fuse"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_their_tests_pass(file, tmp_path):
    if not (THEIRS / file).exists():
        pytest.skip(f"this wheel of brainmass has no {file}")
    replaced, expected = FILES[file]
    shutil.copy(THEIRS / file, tmp_path / "test_theirs.py")
    (tmp_path / "conftest.py").write_text(FIXTURES + replaced)
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "test_theirs.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert re.search(r"^\d+ passed", printed, re.M), printed
    assert set(re.search(r"^used: (.*)$", printed, re.M)[1].split()) == expected, printed
