"""Fitting by gradients: recovery, lanes, saving and resuming, and what is refused."""

import dataclasses
import importlib
import json
import re
import sys
import time
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brainmass_kernels as bk
from brainmass_kernels import grids, plots, spectra
from brainmass_kernels.fitting.fit import fit
from brainmass_kernels.fitting.problem import Problem
from brainmass_kernels.fitting.result import Fit
from brainmass_kernels.fitting.steps import Meanwhile, Progress, progress_bar
from brainmass_kernels.spectra import Spectrum

fitting = importlib.import_module("brainmass_kernels.fitting.fit")

FREQS = np.arange(2.0, 40.5, 0.5)
SHAKEN = u.mV * u.second**0.5


@bk.model
class Resonator(bk.Model):
    """A damped linear oscillator: small, quick to compile, and its spectrum is known."""

    f0: Any = 10.0 * u.Hz
    damping: Any = 0.15

    states = {"x": u.mV, "v": u.mV / u.second}
    inputs = {"drive": 0.0 * u.mV}
    observables = {"eeg": u.mV}
    scheme = "heun"

    @staticmethod
    def drift(s, p, i):
        w = 2 * jnp.pi * p.f0
        return {"x": s.v, "v": w * w * (i.drive - s.x) - 2 * p.damping * w * s.v}

    @staticmethod
    def observe(s, p):
        return {"eeg": s.x}


def resonance(f0, damping):
    ratio = FREQS / f0
    return 1 / ((1 - ratio**2) ** 2 + (2 * damping * ratio) ** 2)


FREE = {"f0": (6.0, 16.0), "damping": (0.03, 0.6)}
SMALL = {
    "noise": {"drive": 1.0 * SHAKEN},
    "starts": 2,
    "duration": 4 * u.second,
    "dt": 2 * u.ms,
    "every": 5,
    "realisations": 2,
    "background": False,
    "record": "eeg",
}


def small(target=None, free=FREE, model=None, **changes) -> Fit:
    target = (FREQS, resonance(10.0, 0.15)) if target is None else target
    return fit(model or Resonator(), target, free, **(SMALL | changes))


# --- what is found ---


@pytest.fixture(scope="module")
def found() -> Fit:
    """Two targets at once, starts 20% off on either side, against the spectrum in closed form."""
    target = Spectrum(FREQS, np.stack([resonance(9.0, 0.1), resonance(11.5, 0.15)]), "two resonances")
    starts = {"f0": [[7.2, 10.8], [9.2, 13.8]], "damping": [[0.12, 0.08], [0.12, 0.18]]}
    return small(target, starts=starts, steps=30, duration=6 * u.second, realisations=8, optimiser=optax.adam(0.12))


def test_parameters_come_back_from_20_percent_off(found):
    np.testing.assert_allclose(found.parameters["f0"].to_decimal(u.Hz), [9.0, 11.5], rtol=0.03)
    np.testing.assert_allclose(found.parameters["damping"], [0.1, 0.15], rtol=0.15)
    assert (found.rms < 0.08).all()
    assert (found.rms < 0.5 * found.initial_rms).all()


def test_lanes_are_targets_by_starts_and_all_are_kept(found):
    steps = len(found.losses)
    assert found.losses.shape == (steps, 2, 2)
    assert np.isfinite(found.losses).all()
    assert found.best_start.shape == found.rms.shape == (2,)
    assert found.spectrum.power.shape == found.target.power.shape == (2, len(FREQS))
    wanted, reached = found.peaks
    np.testing.assert_allclose(wanted, reached, atol=0.5)


def test_a_fit_puts_its_values_into_the_model(found):
    assert found.model.f0.unit == u.Hz
    result = bk.simulate(found.model, 100, 2 * u.ms, inputs=found.inputs, noise=found.noise, key=jax.random.key(0))
    assert result["eeg"].shape == (100, 2)


def test_a_fit_prints_a_table(found):
    text = str(found)
    parts = "Resonator fitted to two resonances", "f0", "Hz", "6 to 16", "rms error", "alpha peak"
    for part in (*parts, f"on {found.implementation}"):
        assert part in text
    assert max(map(len, text.splitlines())) < 120


def test_a_table_shows_once_what_targets_share_and_keeps_columns_apart(found):
    value = 1.234567e10 * u.Hz
    shared = u.math.stack([value, value])
    (row,) = (line for line in str(replace(found, {"f0": shared})).splitlines() if line.strip().startswith("f0"))
    assert row.split() == ["f0", "1.235e+10", "Hz", "6", "to", "16"]
    (row,) = (line for line in str(replace(found, {"f0": -shared * [1, 1.1]})).splitlines() if "f0" in line)
    assert row.endswith("to -1.23e+10) Hz 6 to 16")


def replace(found, parameters):
    return dataclasses.replace(found, parameters=found.parameters | parameters)


def test_a_fit_is_short_where_it_is_echoed(found):
    text = repr(found)
    assert text.startswith("Fit(f0, damping of Resonator to two resonances (2): rms ")
    assert len(text) < 160
    table = found._repr_html_()
    for part in (">f0<", "6 to 16", " Hz<", ">rms error, log10 power<", "fitted to two resonances"):
        assert part in table


def test_a_fit_that_improves_nothing_says_so():
    with pytest.warns(UserWarning, match="nothing improved on the start: the error is 0.* at start 0. Take more steps"):
        result = small(steps=2, starts={"f0": [10.0], "damping": [0.15]}, optimiser=optax.sgd(1e-9))
    assert result.rms == result.initial_rms


def test_a_figure_has_a_panel_for_each_spectrum(found, tmp_path):
    page = plots.figure(found)
    assert len(page.axes) == 2
    assert [line.get_label() for line in page.axes[0].get_lines()[:3]] == ["target", "start", "fit"]
    plots.figure(found, which=[1]).savefig(tmp_path / "one.pdf")
    assert (tmp_path / "one.pdf").exists()
    with pytest.raises(ValueError, match=r"'which' got \[2\], but takes numbers from 0 to 1"):
        plots.figure(found, which=[2])


# --- saving and resuming ---


def test_a_fit_survives_json(found, tmp_path):
    found.save(tmp_path / "fit.json")
    json.loads((tmp_path / "fit.json").read_text(), parse_constant=pytest.fail)
    read = Fit.load(tmp_path / "fit.json", Resonator())
    assert str(read) == str(found)
    assert read.settings == found.settings
    np.testing.assert_allclose(read.losses, found.losses, atol=1e-6)
    np.testing.assert_allclose(read.spectrum.power, found.spectrum.power, rtol=1e-9)
    for a, b in zip(jax.tree.leaves(read.state), jax.tree.leaves(found.state)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:nothing improved on the start")
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path):
    whole = small(steps=5)
    part = small(steps=2)
    part.save(tmp_path / "fit.json")
    resumed = small(steps=3, resume=tmp_path / "fit.json")
    np.testing.assert_allclose(resumed.losses, whole.losses, atol=2e-6)
    for name in FREE:
        np.testing.assert_allclose(u.get_mantissa(resumed.parameters[name]), u.get_mantissa(whole.parameters[name]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"realisations": 3}, "realisations = 8, but this call has 3"),
        ({"duration": 4 * u.second}, "duration = 6.0"),
        ({"free": {"f0": (6.0, 16.0)}}, "fixed"),
        ({"free": FREE | {"f0": (6.0, 17.0)}}, "free"),
        ({"target": (FREQS, resonance(8.0, 0.1))}, "another target"),
        ({"key": jax.random.key(1)}, "key"),
        ({"optimiser": optax.sgd(0.1)}, "'optimiser' is another"),
    ],
)
def test_a_fit_is_not_resumed_as_another(found, changes, said):
    same = {"target": found.target, "duration": 6 * u.second, "realisations": 8, "resume": found}
    with pytest.raises(ValueError, match=said):
        small(**(same | changes))


def test_what_is_no_saved_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Fit.load(tmp_path / "absent.json")
    for text in ("{", "[]", "{}", '{"format": "brainmass_kernels.Fit", "version": 1}', '{"format": "x", "version": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json"):
            Fit.load(tmp_path / "bad.json")


def test_a_saved_fit_of_a_model_of_ones_own_needs_it(found, tmp_path):
    found.save(tmp_path / "fit.json")
    with pytest.raises(ValueError, match="saved fit is of Resonator"):
        Fit.load(tmp_path / "fit.json")


# --- the descent ---


@pytest.mark.filterwarnings("ignore:nothing improved")
@pytest.mark.parametrize("watched", [True, False])
def test_what_is_begun_meanwhile_begins_once_after_the_first_step(watched):
    told: list[Any] = []

    def watch(report: Progress) -> bool:
        told.append(report.step)
        return report.step == 2

    result = small(steps=3, progress=Meanwhile(watch if watched else False, lambda: told.append("begun")))
    assert told == (["begun", 1, 2] if watched else ["begun"])
    assert len(result.losses) == (2 if watched else 3)


@pytest.mark.filterwarnings("ignore:nothing improved")
@pytest.mark.parametrize(("optimiser", "traced"), [(None, "predict"), ("levenberg_marquardt", "linearised")])
def test_the_step_is_traced_once_while_candidates_are_simulated(optimiser, traced, monkeypatch):
    order, step, descend = [], getattr(Problem, traced), fitting.descend

    def counted(problem, z, *rest):
        order.append(z["f0"].shape)
        return step(problem, z, *rest)

    def descended(*arguments):
        order.append("descend")
        return descend(*arguments)

    # On one device: with several, each traces its share of the starts.
    monkeypatch.setattr(grids, "SPLIT", False)
    monkeypatch.setattr(Problem, traced, counted)
    monkeypatch.setattr(fitting, "descend", descended)
    # A duration of its own, lest an earlier fit has traced it.
    result = small(steps=2, starts=3, screen=12, optimiser=optimiser, duration=4.5 * u.second)
    assert order == [(1, 3), "descend"]
    assert result.losses.shape == (2, 1, 3)


@pytest.mark.filterwarnings("ignore:nothing improved")
def test_progress_is_told_and_may_stop_the_fit():
    seen = []

    def watch(report):
        seen.append(report)
        return report.step == 2

    result = small(steps=5, progress=watch, screen=16)
    assert [report.step for report in seen] == [1, 2]
    assert seen[0].rms.shape == (1, 2)
    assert (seen[1].best <= seen[0].best).all()
    assert len(result.losses) == 2


@pytest.mark.filterwarnings("ignore:nothing improved")
def test_a_fit_stops_when_nothing_is_gained():
    result = small(steps=50, patience=3, tolerance=0.9)
    assert len(result.losses) == 4


@pytest.mark.filterwarnings("ignore")
def test_lanes_that_diverge_are_left_out():
    free = {"damping": (-3.0, 0.6)}
    result = small(free=free, starts={"damping": [-2.5, 0.3]}, steps=2, duration=9 * u.second)
    assert np.isnan(result.losses[:, 0, 0]).all()
    assert np.isfinite(result.losses[:, 0, 1]).all()
    assert result.best_start.tolist() == [1]
    assert "starts that diverged    1 of 2" in str(result)
    assert np.isfinite(result.rms).all()


# --- what is refused, before anything is compiled ---


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"free": {"dampng": (0, 1)}}, ValueError, "'dampng'.*did you mean 'damping'"),
        ({"free": {}}, ValueError, "names no parameter"),
        ({"free": ["f0"]}, TypeError, "'free' got list"),
        ({"free": {"f0": 3.0}}, TypeError, r"takes a pair \(low, high\)"),
        ({"free": {"f0": (12.0, 8.0)}}, ValueError, "low < high"),
        ({"free": {"f0": (8.0, np.inf)}}, ValueError, "finite bounds"),
        ({"free": {"f0": (8 * u.mV, 9 * u.mV)}}, ValueError, "'free: f0' got mV, but takes Hz"),
        ({"free": {"noise.drive": (-1.0, 1.0)}}, ValueError, "not negative"),
        ({"model": Resonator(f0=[8.0, 9.0] * u.Hz)}, ValueError, r"'f0' got shape \(2,\)"),
        ({"starts": 0}, ValueError, "'starts' got 0"),
        ({"starts": 2.5}, TypeError, "'starts' got 2.5"),
        ({"starts": {"f0": [9.0]}}, ValueError, "'starts' got f0, but takes values of f0, damping"),
        ({"starts": {"f0": [9.0, 8.0], "damping": [0.1, 0.2, 0.3]}}, ValueError, "'starts' got shapes"),
        ({"steps": 0}, ValueError, "'steps' got 0"),
        ({"realisations": 0}, ValueError, "'realisations' got 0"),
        ({"screen": -1}, ValueError, "'screen' got -1"),
        ({"band": (30, 2)}, ValueError, "'band' got 30 and 2"),
        ({"band": 3}, TypeError, "'band' got 3"),
        ({"band": (38, 40)}, ValueError, "'band'"),
        ({"target": 3}, TypeError, "'target' got int"),
        ({"target": "absent.npz"}, FileNotFoundError, "absent.npz"),
        ({"dt": 2.0}, ValueError, "'dt'"),
        ({"duration": 1.5 * u.second}, ValueError, "'duration' leaves"),
        ({"transient": 1.0}, TypeError, "'transient'"),
        ({"every": 0}, ValueError, "'every' got 0"),
        ({"every": 20}, ValueError, "'target' has frequencies"),
        ({"record": "meg"}, ValueError, "'meg'"),
        ({"noise": {"drive": 1.0 * u.mV}}, ValueError, "noise"),
        ({"noise": {"drivee": 1.0 * SHAKEN}}, ValueError, "did you mean 'drive'"),
        ({"inputs": {"x": 1.0 * u.mV}}, ValueError, "'x'"),
        ({"implementation": "gpu"}, ValueError, "'gpu'"),
        ({"model": 3}, TypeError, "'model' got int"),
        ({"clip": 0.0}, ValueError, "'clip' got 0"),
        ({"optimiser": "adam"}, TypeError, "'optimiser' got str"),
    ],
)
def test_arguments_are_checked(changes, error, said):
    with pytest.raises(error, match=said):
        small(**changes)


def test_without_the_extra_its_name_is_said(monkeypatch, found):
    for package in ("optax", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"needs optax.* pip install 'brainmass-kernels\[fit\]'"):
        small()
    with pytest.raises(ImportError, match=r"needs matplotlib"):
        plots.figure(found)


# --- Jansen-Rit ---


@pytest.mark.slow
def test_jansen_rit_is_recovered_from_other_noise():
    """Ae and be, from 20% off, from a spectrum of 256 s simulated with another key."""
    model = bk.JansenRit(Ae=3.5 * u.mV, be=90 * u.Hz)
    driven = {"inputs": {"E_inp": 220 * u.Hz}, "noise": {"E_inp": 2 * u.Hz * u.second**0.5}}
    lanes = dataclasses.replace(model, be=np.full(32, 90.0, np.float32) * u.Hz)
    record = bk.simulate(
        lanes, 9 * u.second, 1 * u.ms, **driven, every=5, transient=1 * u.second, key=jax.random.key(77)
    )["eeg"]
    freqs, power = spectra.welch(record, 5 * u.ms, 400)
    target = Spectrum(freqs[1:], np.asarray(u.get_mantissa(power)).mean(-1)[1:], "simulated")
    result = fit(
        bk.JansenRit(),
        target,
        {"Ae": (2.6, 9.75), "be": (50.0, 180.0)},
        **driven,
        starts={"Ae": [2.8, 4.2, 2.8, 4.2], "be": [72.0, 108.0, 108.0, 72.0]},
        realisations=16,
        steps=80,
        background=False,
        key=jax.random.key(5),
    )
    assert result.parameters["Ae"].to_decimal(u.mV)[0] == pytest.approx(3.5, rel=0.03)
    assert result.parameters["be"].to_decimal(u.Hz)[0] == pytest.approx(90.0, rel=0.03)


@pytest.mark.parametrize("columns", [40, 120])
def test_a_bar_says_that_it_compiles_and_how_long_is_left(columns, monkeypatch, capfd):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar(True, 4) as show:
        for step in (0, 1, 2):
            time.sleep(0.2)
            assert not (step and show(Progress(step, 4, np.ones((1, 2)), np.array([0.5]), 1.0)))
        time.sleep(0.2)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capfd.readouterr().err)
    lines = [line.strip() for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert lines[0].startswith("compiling")
    assert lines[-1].startswith("fitting")
    assert re.search(r"2/4.* left \d:\d\d:\d\d$", lines[-1])
    assert max(map(len, lines)) <= columns
    assert ("steps/s" in lines[-1]) == (columns > 40)
