"""Fits to several targets of one run."""

from __future__ import annotations

import warnings

import brainunit as u
import jax
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import spectra
from brainmass_kernels.fitting import targets

OPTIONS = {"duration": 3 * u.second, "dt": 1 * u.ms, "every": 5, "transient": 0.5 * u.second}
BAND, RNG = (2.0, 40.0), np.random.default_rng(0)
FREQS = np.arange(1.0, 45.0)
POWER = 1.0 / (1.0 + (FREQS - 10.0) ** 2 / 9.0)
MATRIX = np.array([[1.0, 0.6, 0.1], [0.6, 1.0, 0.3], [0.1, 0.3, 1.0]])


def network():
    weights = np.array([[0.0, 1.0, 0.2], [1.0, 0.0, 0.5], [0.2, 0.5, 0.0]])
    return bk.Network(bk.JansenRit(), weights, source="eeg", target="E_inp", k=0.5 * u.Hz / u.mV)


def both(**more):
    return bk.Joint({"rhythm": bk.PowerSpectrum(FREQS, POWER), "fc": bk.Connectivity(MATRIX, sigma=0.2)}, **more)


def compared(target, record="eeg"):
    return targets.compare(target, network(), record, OPTIONS, BAND, True)


def some_result(starts=2, realisations=3):
    signal = RNG.normal(size=(500, 1, starts, realisations, 3)).cumsum(0)
    return signal - signal.mean(0)


def test_the_error_is_the_weighted_sum_of_those_of_each():
    signal, weights = some_result(), {"fc": 4.0}
    together = compared(both(weights=weights))
    # A spectrum is of records, connectivity is computed as they come.
    matrices = np.asarray(spectra.correlation(signal))
    prediction = together.predict({"rhythm": signal, "fc": matrices})
    error, nuisances = together.error(prediction, together.data)
    alone = {}
    for name, target in both().targets.items():
        one = compared(target)
        records = {"eeg": signal if name == "rhythm" else matrices}
        alone[name] = one.error(one.predict(records), one.data)[0] / one.sigma**2
        assert np.shape(alone[name]) == (1, 2)
    np.testing.assert_allclose(error, (alone["rhythm"] + 4.0 * alone["fc"]) / 5.0, rtol=1e-4)
    assert set(nuisances) == {"rhythm.log_scale", "rhythm.log_background", "rhythm.chi"}


def test_a_name_may_have_a_dot():
    target = bk.Joint({"a": bk.PowerSpectrum(FREQS, POWER), "a.b": bk.PowerSpectrum(FREQS, POWER[::-1])})
    comparison = targets.compare(target, network(), "eeg", OPTIONS, BAND, True)
    signal = some_result(1, 1)
    prediction = comparison.predict({"a": signal, "a.b": signal})
    nuisances = {n: np.asarray(x) for n, x in comparison.residuals(prediction, comparison.data)[1].items()}
    assert len(nuisances) == 6
    seen = comparison.like_target(prediction, nuisances, (np.array([0]), np.array([0])))
    assert not np.allclose(seen.targets["a"].power, seen.targets["a.b"].power)
    assert set(comparison.nuisances_in_units(nuisances)) == set(nuisances)


def test_a_spectrum_of_a_network_is_the_mean_over_its_regions():
    signal = some_result()
    one = compared(bk.PowerSpectrum(FREQS, POWER))
    found = one.predict({"eeg": signal})
    _, expected = spectra.welch(signal, 5e-3, one.nperseg)
    np.testing.assert_allclose(found, np.moveaxis(np.asarray(expected).mean((3, 4)), 0, -1), rtol=1e-5)


def fitted(**more):
    options = {
        "inputs": {"E_inp": 150 * u.Hz}, "noise": {"E_inp": 2 * u.Hz * u.second**0.5}, "key": jax.random.key(0),
        "starts": 2, "realisations": 1, "steps": 2, "record": {"rhythm": "eeg", "fc": "E"}, **OPTIONS,
    }  # fmt: skip
    with warnings.catch_warnings():
        # Two steps need not improve on the start.
        warnings.simplefilter("ignore", UserWarning)
        return bk.fit(network(), both(), {"C": (110.0, 160.0), "coupling.k": (0.1, 2.0)}, **(options | more))


@pytest.fixture(scope="module")
def fit():
    return fitted()


def test_a_fit_has_each_prediction_in_the_form_of_its_target(fit):
    assert list(fit.prediction.targets) == ["rhythm", "fc"]
    assert isinstance(fit.prediction.targets["rhythm"], bk.PowerSpectrum)
    assert fit.prediction.targets["rhythm"].power.shape == (1, 39)
    assert fit.prediction.targets["fc"].values.shape == (1, 3, 3)
    assert "rhythm.chi" in fit.nuisance
    assert fit.settings["record"] == {"rhythm": "eeg", "fc": "E"}
    assert "joint targets" in str(fit)
    assert np.isfinite(fit.rms).all()


def test_it_is_saved_drawn_and_resumed(fit, tmp_path):
    fit.save(tmp_path / "fit.json")
    loaded = bk.Fit.load(tmp_path / "fit.json", network())
    for name, part in fit.prediction.targets.items():
        values = (part.power, loaded.prediction.targets[name].power) if name == "rhythm" else (
            part.values, loaded.prediction.targets[name].values
        )  # fmt: skip
        np.testing.assert_allclose(*values, rtol=1e-6)
    assert loaded.target.weights == {"rhythm": 1.0, "fc": 1.0}
    titles = [ax.get_title() for ax in fit.plot().get_axes()]
    assert any("rms" in title for title in titles)
    assert {"target", "start"} <= set(titles)
    fit.report(tmp_path / "fit.html")
    longer = fitted(resume=loaded, steps=1)
    assert len(longer.losses) == 3
    with pytest.raises(ValueError, match="weights"):
        bk.fit(network(), both(weights={"fc": 2.0}), resume=loaded, steps=1, inputs=fit.inputs, noise=fit.noise,
               key=jax.random.key(0), realisations=1, **OPTIONS)  # fmt: skip


def test_several_targets_at_once_and_series():
    """Two subjects, each of a spectrum and a series, by least squares; a subject has what it has alone."""
    series = np.sin(2 * np.pi * 10 * np.arange(1, 101) * 5e-3) * np.array([[1.0], [2.0]])
    power = np.stack([POWER, POWER[::-1]])

    def of(rows):
        parts = {
            "rhythm": bk.PowerSpectrum(FREQS[:19], power[rows, :19]),
            "wave": bk.TimeSeries(series[rows], scale=True, offset=True),
        }
        return bk.fit(
            bk.JansenRit(), bk.Joint(parts), {"C": (110.0, 160.0)}, inputs={"E_inp": 150 * u.Hz}, starts=2, steps=2,
            realisations=1, record="eeg", optimiser="levenberg_marquardt", **(OPTIONS | {"every": 25}),
        )  # fmt: skip

    many, alone = of(slice(None)), of(slice(1, 2))
    assert many.losses.shape == (2, 2, 2)
    np.testing.assert_allclose(many.rms[1], alone.rms[0], rtol=1e-4)
    assert many.prediction.targets["wave"].values.shape == (2, 100)
    errors = many.standard_errors()
    assert errors["C"].shape == (2,)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: bk.Joint({"fc": bk.Connectivity(MATRIX)}), "takes two or more"),
        (lambda: bk.Joint([1, 2]), "takes a dict by name"),
        (lambda: bk.Joint({"a": bk.Connectivity(MATRIX), "b": lambda result: 0.0}), "'b' of joint targets got a func"),
        (lambda: both(weights={"fd": 1.0}), "'fd'"),
        (lambda: both(weights={"fc": 0.0}), "takes a positive number"),
        (lambda: compared(both(), {"rhythm": "eeg"}), "names nothing for 'fc'"),
        (lambda: compared(both(), {"rhythm": "eeg", "fx": "eeg"}), "'fx'"),
        (lambda: compared(bk.Joint({"a": bk.PowerSpectrum(FREQS, np.stack([POWER, POWER])),
                                    "b": bk.Connectivity(MATRIX)})), "2 of 'a', 1 of 'b', but takes as many"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()


def test_the_statistic_is_no_target():
    assert spectra.Spectrum is bk.PowerSpectrum
    with pytest.raises(TypeError, match="'target' got Spectrum, but takes a PowerSpectrum"):
        targets.as_target(bk.Spectrum(FREQS))


# Connectivity within the loop, and its dynamics ----------------------------------------------------------------------


def oscillators(k):
    weights = np.array([[0.0, 1.0, 0.2, 0.1], [1.0, 0.0, 0.5, 0.2], [0.2, 0.5, 0.0, 0.9], [0.1, 0.2, 0.9, 0.0]])
    return bk.Network(bk.Hopf(a=-0.05, w=0.6), weights, source="x", target="x_inp", k=k)


SHAKEN = {"noise": {"x_inp": 0.1 * u.ms**0.5}, "key": jax.random.key(2)}
RUN = {"duration": 600, "dt": 0.5 * u.ms, "every": 5, "transient": None}
WINDOWS = {"window": 50 * u.ms, "step": 25 * u.ms}


def test_correlations_are_taken_in_the_loop():
    """No record is stored: what is recorded does not grow with the run, and the prediction is that of stored ones."""
    comparison = targets.compare(bk.Connectivity(np.eye(4)), oscillators(0.5), "x", RUN, BAND, True)
    assert comparison.recorded == {"x": bk.Correlation(of="x")}
    stored = bk.simulate(oscillators(0.5), 600, 0.5 * u.ms, record="x", every=5, **SHAKEN)["x"]
    run = bk.simulate(oscillators(0.5), 600, 0.5 * u.ms, record=comparison.recorded, every=5, **SHAKEN)
    found = comparison.predict({"x": run["x"][None, None, None]})
    expected = np.corrcoef(np.asarray(stored, float).T)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-5)


@pytest.fixture(scope="module")
def dynamics():
    seen = bk.simulate(oscillators(1.0), 600, 0.5 * u.ms, record=bk.FCD(of="x", **WINDOWS), every=5, **SHAKEN)
    return np.asarray(seen["x_fcd"])


def test_dynamics_are_compared_by_their_quantiles(dynamics):
    target = bk.ConnectivityDynamics(dynamics, **WINDOWS)
    comparison = targets.compare(target, oscillators(1.0), "x", RUN, BAND, True)
    prediction = comparison.predict({"x": dynamics[None, None, None]})
    error, _ = comparison.error(prediction, comparison.data)
    assert error.shape == (1, 1)
    assert error[0, 0] < 1e-12
    shifted = np.clip(dynamics + 0.1 * (1 - np.eye(len(dynamics), dtype=np.float32)), -1, 1).astype(np.float32)
    error, _ = comparison.error(comparison.predict({"x": shifted[None, None, None]}), comparison.data)
    moved = np.quantile(spectra.pairs(shifted), np.linspace(0, 1, 101)) - np.quantile(
        spectra.pairs(dynamics), np.linspace(0, 1, 101)
    )
    np.testing.assert_allclose(error[0, 0], np.mean(moved**2), rtol=1e-3)


def test_a_fit_of_connectivity_and_its_dynamics(dynamics, tmp_path):
    parts = {"fc": bk.Connectivity(0.5 + 0.5 * np.eye(4)), "fcd": bk.ConnectivityDynamics(dynamics, **WINDOWS)}
    options = {"starts": 2, "steps": 2, "realisations": 2, "record": "x", **SHAKEN, **RUN}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fit = bk.fit(oscillators(0.3), bk.Joint(parts), {"coupling.k": (0.1, 2.0)}, **options)
    assert np.isfinite(fit.losses).all()
    assert np.ptp(fit.losses[:, 0, 0]) > 0
    assert fit.prediction.targets["fcd"].values.shape == (1, 101)
    fit.save(tmp_path / "fit.json")
    loaded = bk.Fit.load(tmp_path / "fit.json", oscillators(0.3))
    np.testing.assert_allclose(loaded.prediction.targets["fcd"].values, fit.prediction.targets["fcd"].values, rtol=1e-6)
    assert loaded.target.targets["fcd"].seconds == pytest.approx((0.05, 0.025))
    fit.plot()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: bk.ConnectivityDynamics(np.eye(2), **WINDOWS), "three windows"),
        (lambda: bk.ConnectivityDynamics(3 * np.ones((4, 4)), **WINDOWS), "takes correlations"),
        (lambda: bk.ConnectivityDynamics(np.full((4, 4), np.nan), **WINDOWS), "takes correlations"),
        (lambda: bk.ConnectivityDynamics(np.eye(4), window=-1 * u.second, step=1 * u.second), "'window'"),
        (lambda: bk.ConnectivityDynamics(np.eye(4), window=1 * u.second, step=1 * u.Hz), "'step'"),
        (lambda: targets.compare(bk.ConnectivityDynamics(np.eye(4), **WINDOWS), bk.Hopf(), "x", RUN, BAND, True),
         "one mass"),
        (lambda: targets.compare(both(), bk.JansenRit(), "eeg", OPTIONS, BAND, True, "linear"), "'predict' got 'lin"),
    ],
)  # fmt: skip
def test_what_is_wrong_of_dynamics_is_said(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()
