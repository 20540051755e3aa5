"""What does not vary beyond rounding: no correlation, no oscillation, no peak, no target, whatever its level."""

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import rounding, spectra
from brainmass_kernels.fitting import targets

LEVELS = (5.0, 0.1, 0.3, 7.7, 14.62, 1e-6, -3e5)
EPS32 = np.finfo(np.float32).eps


def toggling(level: float, count: int = 5000) -> np.ndarray:
    """A value and its neighbour in float32, in turn and in runs of three: what a mass at rest may leave."""
    at = np.float32(level)
    beside = np.nextafter(at, np.float32(np.inf))
    return np.stack([np.where(np.arange(count) % n < n // 2, at, beside) for n in (2, 6)], -1)


class TestAtRest:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("level", LEVELS)
    def test_is_relative_to_the_level(self, dtype, level):
        x = np.full(50, level, dtype)
        varied = x.copy()
        varied[::2] *= 1 + 100 * np.finfo(dtype).eps
        assert rounding.at_rest(x)
        assert not rounding.at_rest(varied)
        x[3:6] = np.nextafter(x[0], np.inf, dtype=dtype)
        assert rounding.at_rest(x)

    def test_of_zero_and_of_what_is_not_finite(self):
        x = np.stack([np.zeros(4), [0, 0, 1e-30, 0], [1, 1, np.nan, 1], [np.inf] * 4, np.arange(4)], -1)
        assert np.asarray(rounding.at_rest(x)).tolist() == [True, False, False, False, False]

    def test_of_whole_numbers_and_quantities(self):
        assert rounding.at_rest(np.full(4, 3))
        assert not rounding.at_rest(np.array([3, 4]))
        assert rounding.at_rest(np.full(4, 3.0) * u.mV)

    def test_of_what_is_left_of_a_transient(self):
        x = (8.63 * (1 + 80 * EPS32 * np.exp(-np.arange(1000) / 5.0))).astype(np.float32)
        assert rounding.at_rest(x)
        assert not rounding.at_rest(x + np.exp(-np.arange(1000) / 5.0).astype(np.float32))

    def test_where_only_the_first_differs(self):
        x = np.full(100_000, 14.62, np.float32)
        x[0] = 0.0
        assert not rounding.at_rest(x)
        assert not rounding.at_rest(jnp.asarray(x))


class TestCorrelation:
    @pytest.mark.parametrize("level", LEVELS)
    def test_of_constants_is_0(self, level):
        """Not 1 and not -1, as of what a rounded mean leaves."""
        constant = np.full((20_000, 3), level, np.float32)
        constant[:, 1] *= 2
        assert not np.asarray(spectra.correlation(constant)).any()
        assert not np.asarray(spectra.correlation(toggling(level))).any()

    def test_of_a_constant_beside_signals(self):
        rng = np.random.default_rng(0)
        x = rng.normal(5.0, 1.0, (400, 4)).astype(np.float32)
        want = np.corrcoef(x.T)
        x[:, 1] = 14.62
        got = np.asarray(spectra.correlation(x))
        assert not got[1].any()
        assert not got[:, 1].any()
        others = np.ix_([0, 2, 3], [0, 2, 3])
        np.testing.assert_allclose(got[others], want[others], atol=1e-5)
        slope = jax.grad(lambda x: spectra.correlation(x)[0, 2])(jnp.asarray(x))
        assert np.isfinite(slope).all()
        assert np.abs(slope[:, 0]).max() > 0

    def test_of_a_small_signal_upon_a_large_constant(self):
        """A ten thousandth of its level is a signal."""
        rng = np.random.default_rng(0)
        x = (14.62 * (1 + 1e-4 * rng.normal(0, 1, (400, 3)))).astype(np.float32)
        np.testing.assert_allclose(spectra.correlation(x), np.corrcoef(x.T.astype(float)), atol=1e-4)

    def test_of_amplitudes_of_constants_is_0(self):
        constant = np.concatenate([np.full((2000, 1), 14.62, np.float32), toggling(7.7, 2000)], -1)
        amplitudes = spectra.envelope(constant, 0.01, (8.0, 12.0))
        assert np.abs(amplitudes).max() < 1e-18
        assert not np.asarray(spectra.correlation(amplitudes)).any()

    def test_amplitudes_keep_what_the_band_has_of_a_constant(self):
        """A band whose lower flank reaches beyond 0 Hz."""
        t = np.arange(1000) * 0.01
        wave = np.sin(2 * np.pi * 5.0 * t).astype(np.float32)
        got = spectra.envelope(3.0 + wave, 0.01, (0.1, 10.0)) ** 2
        freqs = np.fft.fftfreq(1000, 0.01)
        inside = np.clip(np.minimum(freqs - 0.1, 10.0 - freqs) / (9.9 / 4) + 0.5, 0.0, 1.0)
        want = np.abs(np.fft.ifft(np.fft.fft(3.0 + wave) * 2 * np.sin(0.5 * np.pi * inside) ** 2)) ** 2
        np.testing.assert_allclose(got, want, atol=1e-3)


def test_regions_at_rest_are_not_correlated():
    """A network whose drives differ, run until nothing moves."""
    network = bk.Network(
        bk.JansenRit(), np.ones((3, 3)), source="eeg", target="E_inp", k=0.01 * u.Hz / u.mV
    )  # fmt: skip
    drive = {"E_inp": np.array([10.0, 20.0, 30.0], np.float32) * u.Hz}
    found = bk.simulate(
        network, 5 * u.second, 1 * u.ms, inputs=drive, transient=4 * u.second, every=5, implementation="scan"
    )
    assert not np.asarray(spectra.correlation(found["eeg"])).any()


class TestPeaks:
    def test_a_flat_spectrum_has_none(self):
        freqs = np.arange(2.0, 40.5, 0.5)
        flat, line = np.ones(len(freqs)), 3.0 * freqs**-1.3
        peaked = line * (1 + np.exp(-((freqs - 10.0) ** 2)))
        got = spectra.alpha_peak(freqs, np.stack([flat, line, peaked]))
        assert np.isnan(got[:2]).all()
        assert got[2] == pytest.approx(10.0, abs=0.1)

    @pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
    def test_what_is_no_power_has_none(self, bad):
        freqs = np.arange(2.0, 40.5, 0.5)
        power = np.stack([1 / freqs, 1 / freqs * (1 + np.exp(-((freqs - 10.0) ** 2)))])
        power[0, 5] = bad
        got = spectra.alpha_peak(freqs, power)
        assert np.isnan(got[0])
        assert got[1] == pytest.approx(10.0, abs=0.1)


# --- targets ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_a_constant_series_is_refused(level, dtype):
    for n in (40, 1000):
        with pytest.raises(ValueError, match="vary by more than rounding"):
            bk.TimeSeries(np.full(n, level, dtype))
    with pytest.raises(ValueError, match="vary by more than rounding"):
        bk.TimeSeries(toggling(level)[:, 0] * u.mV)
    assert bk.TimeSeries(np.array([level, level * 1.001], dtype))


class Tiny:
    """What the tests below compare: series of 40 samples."""

    t = np.arange(40) / 40

    @classmethod
    def comparison(cls, *rows, **options):
        target = bk.TimeSeries(np.stack([np.sin(20 * cls.t), *rows]) * u.mV, **options)
        return targets.OfSeries(target, "eeg", u.mV, 40, None)


@pytest.mark.parametrize("level", LEVELS)
def test_one_constant_target_of_several_is_refused(level):
    with pytest.raises(ValueError, match="does not vary by more than rounding in target 2"):
        Tiny.comparison(np.full(40, level))


def test_a_tiny_series_is_a_target():
    assert Tiny.comparison(1e-9 * np.cos(Tiny.t)).count == 2


def test_a_gain_is_not_fitted_to_rounding():
    """A run at rest explains nothing, however well its rounding would fit."""
    series = toggling(5.0, 40)[:, 1]
    comparison = Tiny.comparison(scale=True, offset=True)
    moving = (5.0 + np.sin(20 * Tiny.t)).astype(np.float32)
    prediction = jnp.asarray(np.stack([series, moving]))[None]
    data = tuple(jnp.asarray(x, jnp.float32) for x in comparison.data)
    error, solved = comparison.error(prediction, data)
    assert float(error[0, 0]) == pytest.approx(1.0, rel=1e-5)
    assert float(solved["scale"][0, 0]) == 0.0
    assert float(error[0, 1]) < 1e-6


@bk.model
class Follower(bk.Model):
    """Follows its input by a gain; with a rate it runs away."""

    gain: Any = 0.0
    rate: Any = 0.0

    states = {"x": u.mV}
    inputs = {"drive": 0.0 * u.mV}
    scheme = "euler"

    @staticmethod
    def drift(s, p, i):
        return {"x": 20.0 * (p.gain * i.drive + 1.0 - s.x) + p.rate * s.x * s.x}


@pytest.mark.parametrize("start", ["at rest", "diverged"])
def test_a_fit_whose_first_start_explains_nothing(tmp_path, start):
    """It is shown as it is, saved and read, and is no reason to refuse the fit."""
    wave = np.sin(np.arange(80) / 6.0).astype(np.float32)
    call = {"inputs": {"drive": wave * u.mV}, "duration": 80, "dt": 10 * u.ms, "implementation": "scan"}
    target = bk.TimeSeries(bk.simulate(Follower(gain=2.0), 80, 10 * u.ms, inputs=call["inputs"], every=4)["x"])
    given = {"gain": [0.0, 1.5]} if start == "at rest" else {"gain": [1.0, 1.5], "rate": [1e4, 0.0]}
    free = {"gain": (0.0, 4.0), **({} if start == "at rest" else {"rate": (0.0, 1e4)})}
    found = bk.fit(
        Follower(), target, free, transient=None, realisations=1, starts=given, steps=2, **call
    )  # fmt: skip
    assert found.best_start.tolist() == [1]
    assert found.rms[0] < 1
    shown = np.asarray(found.initial_prediction.values.mantissa)
    if start == "diverged":
        assert not np.isfinite(shown).all()
        assert np.isnan(found.initial_rms).all()
    found.save(tmp_path / "fit.json")
    read = bk.Fit.load(tmp_path / "fit.json", Follower())
    finite = np.isfinite(shown)
    np.testing.assert_allclose(read.initial_prediction.values.mantissa[finite], shown[finite], rtol=1e-6)
