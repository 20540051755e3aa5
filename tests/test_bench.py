"""The benchmark command and the device check: right before fast, and what fails is said."""

import argparse
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import device_check
from benchmarks.cases import device_cases
from brainmass_kernels import bench, cli


def test_a_case_is_compared_and_timed():
    found = bench.measure(bench.Case(8, 200), "scan", seconds=0.01)
    assert found.implementation == "scan"
    assert found.error < 1e-5
    assert found.seconds > 0
    assert found.reference_seconds > 0
    assert found.rate == pytest.approx(1600 / found.seconds)
    assert "forward 8 x 200 strang" in bench.line(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", [bench.Case(8, 1000, gradient=True, noisy=True), bench.Case(8, 1000, noisy=True)])
def test_the_reference_has_the_same_noise_and_gradient(case):
    assert bench.measure(case, "scan", seconds=0.01).error < 1e-5


def test_a_wrong_result_has_no_speed(monkeypatch):
    right = bench.reference

    def wrong(case):
        return lambda *args: 1.001 * right(case)(*args)

    monkeypatch.setattr(bench, "reference", wrong)
    with pytest.raises(FloatingPointError, match="no speed"):
        bench.measure(bench.Case(8, 200), "scan", seconds=0.01)


def test_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(bench, "reference", lambda case: lambda *args: jnp.full((20, 8), jnp.nan))
    with pytest.raises(FloatingPointError, match="no speed"):
        bench.measure(bench.Case(8, 200), "scan", seconds=0.01)


@pytest.fixture
def brainmass():
    """brainmass leans on implicit promotion."""
    pytest.importorskip("brainmass")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


EXP_EULER = bench.Case(4, 100, scheme="exp_euler")


def test_brainmass_is_compared_and_timed(brainmass):
    rivals = bench.against_brainmass(EXP_EULER, "scan", seconds=0.01)
    assert [r.name for r in rivals] == ["Simulator.run (compiles)", "Simulator.run in jax.jit", "for_loop in jax.jit"]
    for rival in rivals:
        assert rival.error < 1e-5
        assert rival.ratio == pytest.approx(rival.seconds / rival.ours)
        assert rival.rate == pytest.approx(400 / rival.seconds)
        assert rival.name in bench.rival_line(rival)
        assert bench.record(rival)["case"] == "forward 4 x 100 exp_euler"
    # What compiles at each call takes far longer.
    assert rivals[0].seconds > 10 * rivals[1].seconds


def test_a_wrong_result_against_brainmass_has_no_speed(brainmass, monkeypatch):
    right = bench.looped_by_brainstate
    monkeypatch.setattr(bench, "looped_by_brainstate", lambda steps: lambda *args: 1.001 * right(steps)(*args))
    with pytest.raises(FloatingPointError, match=r"brainmass's for_loop in jax\.jit, so it has no speed"):
        bench.against_brainmass(EXP_EULER, "scan", seconds=0.01)


def test_another_scheme_than_brainmass_s_is_a_wrong_result(brainmass):
    with pytest.raises(FloatingPointError, match="no speed"):
        bench.against_brainmass(EXP_EULER._replace(scheme="strang"), "scan", seconds=0.01)


@pytest.mark.slow
def test_work_precision_orders_the_schemes():
    points = {(p.scheme, p.dt_ms): p for p in bench.work_precision(("exp_euler", "strang"), (0.5, 1.0), 16, 0.01)}
    assert points["strang", 0.5].rms < points["strang", 1.0].rms < points["exp_euler", 0.5].rms
    assert all(p.seconds > 0 for p in points.values())


def test_cases_are_told_once_and_the_largest_first():
    for platform in ("cpu", "gpu"):
        cases = device_cases(platform)
        assert len(set(cases)) == len(cases)
        assert cases[0].lanes == max(case.lanes for case in cases)
        assert {case.noisy for case in cases} == {case.gradient for case in cases} == {False, True}


def test_the_ceiling_is_the_ledgers():
    forward = device_check.ceiling(bench.Case(1, 10, precision="fast"), "mosaic_gpu", "NVIDIA H200")
    both = device_check.ceiling(bench.Case(1, 10, gradient=True, precision="fast"), "mosaic_gpu", "NVIDIA H200")
    assert 1e11 < both < forward < 2e12
    assert device_check.ceiling(bench.Case(1, 10), "triton", "an unknown device") is None


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("gradient", [False, True])
def test_an_h100_is_an_h200_with_other_memory(implementation, gradient):
    case = bench.Case(1, 10, gradient=gradient, precision="fast")
    sxm, pcie, h200 = (
        device_check.ceiling(case, implementation, f"NVIDIA {name}") for name in ("H100 80GB HBM3", "H100 PCIe", "H200")
    )
    assert sxm == h200
    assert pcie == pytest.approx(0.7655 * sxm, rel=1e-3)


def test_every_chip_that_is_checked_is_in_the_ledger():
    chips = {r["chip"] for r in json.loads(device_check.LEDGER.read_text())["rows"]}
    assert {chip for known in device_check.CHIPS.values() for chip in known[:2] if chip} <= chips


@pytest.mark.slow
def test_device_check_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    cases = [bench.Case(4, 100), bench.Case(4, 100, scheme="no such scheme")]
    monkeypatch.setattr(device_check, "device_cases", lambda platform: cases)
    monkeypatch.setattr(device_check, "NETWORKS", ((5, 1.0, 2, 40, False),))
    # With the promotion that users have: what is written by hand leans on it.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert device_check.main(["--minutes", "2", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    kept = json.loads(path.read_text())
    assert [row["case"] for row in kept["rows"]] == [str(cases[0])]
    assert [row["case"] for row in kept["failed"]] == [str(cases[1])]
    assert np.isfinite(kept["rows"][0]["mass_steps_per_s"])
    assert [row["what"] for row in kept["networks"]] == ["Jansen-Rit, forward"]
    printed = capsys.readouterr().out
    assert "no accelerator here" in printed
    assert "FAILED" in printed


@pytest.mark.slow
def test_the_command(brainmass, tmp_path, capsys):
    out, result = tmp_path / "speed.svg", tmp_path / "speed.json"
    assert cli.main(["bench", "--lanes", "4", "--steps", "100", "--out", str(out), "--json", str(result)]) == 0
    assert out.stat().st_size > 1000
    kept = json.loads(result.read_text())
    assert {p["scheme"] for p in kept["work_precision"]} == {"exp_euler", "exact", "strang", "heun"}
    assert [(r["lanes"], r["scheme"]) for r in kept["brainmass"]] == [(4, "exp_euler")] * 3
    printed = capsys.readouterr().out
    assert "mass-steps/s" in printed
    assert "against brainmass" in printed
    assert "brainmass: for_loop in jax.jit" in out.read_text()


def test_without_brainmass_the_command_says_how_to_get_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "brainmass" else find(name))
    assert cli._rivals(argparse.Namespace(lanes=[1], steps=10)) == []
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2
    assert "pip install 'brainmass-kernels[brainmass]'" in printed


def test_the_command_names_a_wrong_argument(capsys):
    assert cli.main(["bench", "--steps", "7"]) == 2
    assert "'--steps' got 7" in capsys.readouterr().err
