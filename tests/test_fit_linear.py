"""Fits whose spectra are those of linear systems, and fits by simulation that begin there."""

import brainunit as u
import jax
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import spectra
from brainmass_kernels.fitting import targets

pytest.importorskip("optax")

FREQS = np.arange(4.0, 24.0, 1.0)
SIGMA = 1.0 * u.mV / u.ms * u.ms**0.5


@bk.model
class Resonator(bk.Model):
    """A damped oscillator; it grows where ``zeta`` is negative."""

    w: object = 2 * np.pi * 12.0 * u.Hz
    zeta: object = 0.4
    states = {"x": u.mV, "v": u.mV / u.ms}
    inputs = {"x_inp": 0.0 * u.mV / u.ms}
    time_unit = u.ms

    @staticmethod
    def drift(s, p, i):
        return {"x": s.v, "v": 0.001 * i.x_inp - 2.0 * p.zeta * p.w * s.v - p.w**2 * s.x}


FREE = {"w": (30.0, 120.0), "zeta": (0.05, 1.0)}
COMMON = {
    "noise": {"x_inp": SIGMA}, "background": False, "band": (3.0, 30.0), "predict": "linear", "dt": 5 * u.ms,
    "key": jax.random.key(1), "record": "x",
}  # fmt: skip


def spectrum(frequency, zeta):
    """Of the published filter, in any unit."""
    s, w = 2j * np.pi * FREQS, 2 * np.pi * frequency
    return 1e-9 * np.abs(1.0 / (s**2 + 2 * zeta * w * s + w**2)) ** 2


TARGET = FREQS, np.stack([spectrum(9.0, 0.2), spectrum(15.0, 0.1)])


@pytest.fixture(scope="module")
def by_least_squares():
    return bk.fit(Resonator(), TARGET, FREE, starts=4, steps=12, optimiser="levenberg_marquardt", **COMMON)


def test_least_squares_find_the_parameters(by_least_squares):
    fit = by_least_squares
    np.testing.assert_allclose(u.get_magnitude(fit.parameters["w"]), 2 * np.pi * np.array([9.0, 15.0]), rtol=1e-3)
    np.testing.assert_allclose(u.get_magnitude(fit.parameters["zeta"]), [0.2, 0.1], rtol=1e-3)
    assert (fit.rms < 1e-3).all()
    assert (fit.initial_rms > 0.1).all()
    assert fit.implementation == "linear"
    assert "nothing is simulated" in fit.reason
    assert "on linear" in str(fit)
    errors = fit.standard_errors()
    assert all((np.asarray(u.get_magnitude(x)) < 0.05).all() for x in errors.values())


def test_gradients_lead_there_too():
    fit = bk.fit(Resonator(), TARGET, FREE, starts=4, steps=30, **COMMON)
    assert (fit.rms < 0.5 * fit.initial_rms).all()
    # Nothing is drawn: the report has the errors of the steps.
    np.testing.assert_allclose(fit.rms, np.nanmin(fit.losses, (0, 2)), rtol=1e-3)


def test_saved_loaded_and_resumed(by_least_squares, tmp_path):
    path = tmp_path / "fit.json"
    by_least_squares.save(path)
    loaded = bk.Fit.load(path, Resonator())
    assert loaded.settings["predict"] == "linear"
    for name, x in by_least_squares.standard_errors().items():
        np.testing.assert_allclose(u.get_magnitude(loaded.standard_errors()[name]), u.get_magnitude(x), rtol=1e-4)
    common = {name: x for name, x in COMMON.items() if name != "predict"}
    more = bk.fit(Resonator(), resume=loaded, steps=1, optimiser="levenberg_marquardt", **common)
    assert more.settings["predict"] == "linear"
    assert len(more.losses) == len(loaded.losses) + 1
    with pytest.raises(ValueError, match="'resume' got a fit with predict = 'linear', but this call has 'simulation'"):
        bk.fit(Resonator(), resume=loaded, predict="simulation", optimiser="levenberg_marquardt", **common)


def test_a_fit_by_simulation_begins_there(by_least_squares):
    common = COMMON | {"predict": "simulation", "duration": 3 * u.second, "realisations": 2, "every": 2}
    fit = bk.fit(Resonator(), TARGET, FREE, starts=by_least_squares, steps=1, **common)
    assert fit.implementation != "linear"
    assert "predict" not in fit.settings
    start, found = fit.losses[0], by_least_squares.places()["w"]
    assert start.shape == (2, 4) == np.shape(found)
    # Welch's spectra of short runs scatter about the target.
    assert (np.nanmin(start, 1) < 0.4).all()


def test_starts_without_a_stable_point_have_no_error():
    free = FREE | {"zeta": (-0.5, 1.0)}
    starts = {"w": np.array([60.0, 60.0]) * u.Hz, "zeta": np.array([0.3, -0.2])}
    fit = bk.fit(Resonator(), (FREQS, spectrum(9.0, 0.2)), free, starts=starts, steps=4, **COMMON)
    assert np.isfinite(fit.losses[:, 0, 0]).all()
    assert np.isnan(fit.losses[:, 0, 1]).all()
    assert fit.best_start.tolist() == [0]


def test_shared_values_and_priors():
    priors = {"w": (70.0 * u.Hz, 5.0 * u.Hz)}
    fit = bk.fit(
        Resonator(), TARGET, FREE, shared=["zeta"], priors=priors, starts=2, steps=6, optimiser="levenberg_marquardt",
        **COMMON,
    )  # fmt: skip
    zeta = np.asarray(fit.parameters["zeta"])
    assert zeta[0] == pytest.approx(zeta[1])
    assert 0.1 < zeta[0] < 0.2


def test_predictions_are_linear_spectra(by_least_squares):
    fit = by_least_squares
    power = bk.linear_spectrum(fit.model, FREQS, noise=fit.noise, of="x")
    gain = 10.0 ** fit.nuisance["log_scale"]
    np.testing.assert_allclose(fit.spectrum.power, (np.asarray(u.get_magnitude(power)) * gain).T, rtol=1e-3)


NETWORK = bk.Network(Resonator(), np.array([[0.0, 1.0], [1.0, 0.0]]), source="x", target="x_inp", k=1.0 / u.ms)


@pytest.mark.parametrize(
    ("model", "target", "arguments", "error", "message"),
    [
        (Resonator(), TARGET, {"predict": "welch"}, ValueError, "'predict' got 'welch', but takes 'simulation' or"),
        (Resonator(), TARGET, {"noise": None}, ValueError, "'noise' names nothing"),
        (Resonator(), lambda result: 0.0, {}, TypeError, "'predict' got 'linear' of <lambda>"),
        (Resonator(), bk.TimeSeries(np.arange(9.0)), {}, TypeError, "'predict' got 'linear' of time series"),
        (
            NETWORK,
            bk.Joint(
                {"a": bk.PowerSpectrum(FREQS, TARGET[1][0]), "b": bk.Connectivity(np.array([[1, 0.5], [0.5, 1]]))}
            ),
            {},
            TypeError,
            "'linear' of .*connectivity.*, but predicts power spectra, cross-spectra of a network",
        ),
    ],
)
def test_refused(model, target, arguments, error, message):
    with pytest.raises(error, match=message):
        bk.fit(model, target, FREE, **(COMMON | arguments))


def test_settings_say_what_predicts():
    target = spectra.Spectrum(*TARGET)
    linear = targets.compare(target, Resonator(), "x", {}, (3.0, 30.0), False, "linear")
    assert linear.settings["predict"] == "linear"
    assert linear.read() != targets.OfSpectra(target, "x", 0.005, 400, (3.0, 30.0), False).read()
