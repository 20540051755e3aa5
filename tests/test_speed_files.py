"""The speed comparisons of benchmarks/ still run; nothing is timed here."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OPS = ["sigmoid-sigmoid-1024", "sys2nd-sys2nd-1024", "sigmoid_sys2nd-chosen-1024", "sigmoid_sys2nd-scan-1"]
RUNS = ["lax.scan-forward", "brainmass.Simulator-forward", "brainstate for_loop-gradient"]
CASES = [f"benchmarks/test_op_speed.py::test_op[{op}]" for op in OPS]
CASES += [f"benchmarks/test_simulate_speed.py::test_simulate[{run} 1 x 1,000 exp_euler]" for run in RUNS]


def run(program: str, *cases: str) -> str:
    """What pytest prints of these cases, in a process of its own that has run ``program`` first."""
    pytest.importorskip("pytest_benchmark")
    code = f"{program}\nimport sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "--benchmark-disable", *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_they_run():
    pytest.importorskip("brainmass")
    printed = run("", *CASES)
    assert re.search(rf"^{len(CASES)} passed", printed, re.M), printed


def test_a_wrong_result_is_not_timed():
    other_scheme = """
from brainmass_kernels import bench
right = bench.fused
bench.fused = lambda case, name: right(case._replace(scheme="euler"), name)
"""
    printed = run(other_scheme, "benchmarks/test_simulate_speed.py::test_simulate[scan-forward 1 x 1,000 exp_euler]")
    assert "AGREES" in printed
    assert re.search(r"^1 failed", printed, re.M), printed


def test_what_a_benchmark_lacks_is_said():
    if importlib.util.find_spec("tvboptim"):
        pytest.skip("tvboptim is here")
    command = [sys.executable, "-m", "benchmarks.networks_peers", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("skipped: tvboptim is not installed: pip install 'brainmass-kernels[peers]'")
