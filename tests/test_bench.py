"""The benchmark command: right before fast, and what fails is said."""

import argparse
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cases import device_cases
from brainmass_kernels import bench, cli, commands


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


def test_a_reference_of_fewer_steps(monkeypatch):
    """Its time is brought to the case's steps, and what it ran is compared."""
    monkeypatch.setattr(bench, "timed", lambda functions, *_: {"ours": 2.0, "theirs": 3.0})
    found = bench.measure(bench.Case(8, 400), "scan", reference_steps=100)
    assert (found.seconds, found.reference_seconds, found.ratio) == (2.0, 12.0, 6.0)
    assert found.error < 1e-5
    right = bench.reference
    monkeypatch.setattr(bench, "reference", lambda case: lambda *args: 1.001 * right(case)(*args))
    with pytest.raises(FloatingPointError, match="no speed"):
        bench.measure(bench.Case(8, 400), "scan", reference_steps=100)


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
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "brainmass" else find(name))
    assert commands.rivals_of(argparse.Namespace(lanes=[1], steps=10)) == []
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2
    assert "pip install 'brainmass-kernels[brainmass]'" in printed


def test_the_command_names_a_wrong_argument(capsys):
    assert cli.main(["bench", "--steps", "7"]) == 2
    assert "'--steps' got 7" in capsys.readouterr().err
