"""Welch's estimate, targets from files, nuisances and peaks."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.signal
from jax.test_util import check_grads

from brainmass_kernels import spectra
from brainmass_kernels.spectra import Nuisance, Spectrum, alpha_peak, load_spectrum, log_error, resting_meg, welch

RNG = np.random.default_rng(0)
FREQS = np.arange(2.0, 40.5, 0.5)


@pytest.mark.parametrize(("nperseg", "batch"), [(205, ()), (410, (3,)), (64, (2, 3))])
def test_welch_is_scipys(nperseg, batch):
    x = RNG.normal(size=(1000, *batch)).cumsum(0).astype(np.float32)
    freqs, power = welch(jnp.asarray(x), 0.005, nperseg)
    want_freqs, want = scipy.signal.welch(x, fs=200.0, nperseg=nperseg, axis=0)
    np.testing.assert_allclose(freqs, want_freqs)
    np.testing.assert_allclose(power, want, rtol=2e-4, atol=2e-4 * want.mean())


def test_welch_carries_units():
    x = RNG.normal(size=500) * u.mV
    freqs, power = welch(x, 5 * u.ms, 100)
    assert u.get_unit(power) == u.mV**2 / u.Hz
    assert freqs[-1] == pytest.approx(100.0)


def test_welch_gradient_is_right():
    x = jnp.asarray(RNG.normal(size=64))
    check_grads(lambda x: welch(x, 0.01, 16)[1], (x,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("nperseg", [2, 101])
def test_welch_refuses_a_segment_that_does_not_fit(nperseg):
    with pytest.raises(ValueError, match=f"'nperseg' got {nperseg}"):
        welch(jnp.ones(100), 0.01, nperseg)


def test_the_built_in_target_peaks_in_alpha_and_bumps_in_beta():
    target = resting_meg()
    assert alpha_peak(target.freqs, target.power)[0] == pytest.approx(9.755, abs=0.1)
    log_power = np.log10(target.power[0])
    at = {f: log_power[target.freqs == f][0] for f in (15.0, 19.0, 40.0)}
    assert at[19.0] == pytest.approx(-0.382 - 0.82 * np.log10(19.0) + 0.313, abs=1e-3)
    assert at[19.0] > at[15.0] + np.log10(15 / 19) > at[40.0]


# --- files ---


def test_npz_in_either_order(tmp_path):
    power = RNG.uniform(1, 2, size=(3, len(FREQS)))
    np.savez(tmp_path / "a.npz", freqs_hz=FREQS, power_t2_per_hz=power)
    np.savez(tmp_path / "b.npz", f=FREQS, other=power.T, label=np.array("x"))
    for name in ("a.npz", "b.npz"):
        read = load_spectrum(tmp_path / name)
        np.testing.assert_array_equal(read.freqs, FREQS)
        np.testing.assert_array_equal(read.power, power)
        assert read.name == name


@pytest.mark.parametrize("header", ["frequency,power,power 2\n", ""])
def test_csv_with_and_without_names(tmp_path, header):
    rows = "\n".join(f"{f}, {1 / (f + 1)}, {2 / (f + 1)}" for f in [0.0, *FREQS])
    (tmp_path / "a.csv").write_text(header + rows + "\n\n")
    read = load_spectrum(tmp_path / "a.csv")
    np.testing.assert_allclose(read.freqs, FREQS)
    np.testing.assert_allclose(read.power, [1 / (FREQS + 1), 2 / (FREQS + 1)])


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_spectrum(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no numbers"),
        ("frequency,power\n", "holds no numbers"),
        ("1\n2\n", "1 column"),
        ("1,2\n2,3,4\n", "line 2: 3 columns"),
        ("1,2\n2,much\n", "line 2: 'much' is not a number"),
        ("1,2\n2,3\n", "2 frequencies are too few"),
        ("\n".join(f"{f},-1" for f in FREQS), "-1 at 2 Hz .* is it already a logarithm"),
        ("\n".join(f"{f},{f != 5.0:d}" for f in FREQS), "0 at 5 Hz"),
        ("\n".join(f"{f},1" for f in [*FREQS, 3.0]), "3 Hz follows 40 Hz"),
        ("\n".join(f"{f},nan" for f in FREQS), "nan at 2 Hz"),
    ],
)
def test_a_bad_csv_says_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.csv.*{said}"):
        load_spectrum(path)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"power": FREQS}, "no array of frequencies"),
        ({"freqs": FREQS}, "no array of powers"),
        ({"freqs": FREQS, "power": FREQS[:-1]}, "no array of powers"),
        ({"freqs": FREQS, "a": FREQS, "b": FREQS}, r"several arrays could be the power \(a, b\)"),
        ({"freqs": FREQS[None], "power": FREQS}, r"shape \(F,\)"),
    ],
)
def test_a_bad_npz_says_what_it_holds(tmp_path, arrays, said):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"bad.npz.*{said}"):
        load_spectrum(tmp_path / "bad.npz")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("1,2")
    (tmp_path / "a.npz").write_text("not a zip")
    with pytest.raises(ValueError, match=r"not one of \.npz, \.csv"):
        load_spectrum(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
        load_spectrum(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("freqs", "power", "error", "said"),
    [
        (FREQS, FREQS[:-1], ValueError, "takes freqs"),
        (FREQS, np.ones((0, len(FREQS))), ValueError, "no spectrum"),
        (FREQS * u.mV, FREQS, TypeError, "takes a frequency"),
        (FREQS - 2.0, FREQS, ValueError, "positive, got 0 Hz"),
    ],
)
def test_a_bad_spectrum_is_refused(freqs, power, error, said):
    with pytest.raises(error, match=said):
        Spectrum(freqs, power)


def test_a_band_keeps_its_edges_and_refuses_to_be_empty():
    spectrum = Spectrum(FREQS * u.Hz, FREQS)
    assert spectrum.band(4, 30).freqs[[0, -1]].tolist() == [4.0, 30.0]
    with pytest.raises(ValueError, match=r"'band' .* 3 frequencies from 39 to 45 Hz"):
        spectrum.band(39, 45)


# --- nuisances ---


def log_bump(at, width):
    return np.log10(1e-3 + np.exp(-((FREQS - at) ** 2) / (2 * width**2)))


@pytest.mark.parametrize("truth", [(1.5, 0.3, 1.2), (-2.0, 0.0, 0.6), (0.0, -1.0, 2.0)])
def test_nuisances_are_recovered(truth):
    model = jnp.asarray(np.stack([log_bump(10, 1.5), log_bump(8, 1.0)]))
    want = Nuisance(*(jnp.full(2, value) for value in truth))
    target = spectra.observed_log_power(model, jnp.log10(FREQS), want)
    if truth[0] < -1:
        target = target + 1e-3 * RNG.normal(size=target.shape)
    error, found = log_error(model, target, jnp.log10(FREQS))
    assert jnp.sqrt(error).max() < 5e-3
    if truth[0] > -1:
        np.testing.assert_allclose(np.stack(found), np.stack(want), atol=0.05)


def test_without_a_background_the_scale_is_the_mean_difference():
    model = jnp.asarray(log_bump(10, 1.5))
    error, found = log_error(model, model + 2.5, jnp.log10(FREQS), background=False)
    assert error == pytest.approx(0.0, abs=1e-10)
    assert found.log_scale == pytest.approx(2.5)
    assert found.log_background == -np.inf


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))])
def test_the_nuisances_of_powers_are_the_best_ones(background, seed):
    """Against scipy's least squares in powers, from many starts; a scale of 1e-9 costs float32 nothing."""
    rng = np.random.default_rng(seed)
    model = log_bump(9.0 + seed, 1.0) - 9.0
    power = 10 ** (log_bump(10, 1.5)) + 3.0 * FREQS ** -rng.uniform(0.5, 1.5) * np.exp(
        0.1 * rng.normal(size=len(FREQS))
    )

    def residuals(x):
        found = 10 ** (x[0] + model + 9.0)
        found = found + 10 ** (x[1] - x[2] * np.log10(FREQS)) if background else found
        return (found - power) / power.std()

    bounds = ([-9.0, -9.0, 0.0], [9.0, 9.0, 3.0])
    begins = ([a, b, c] for a in (-1.0, 0.0) for b in (-1.0, 0.5) for c in (0.5, 1.5))
    best = min((scipy.optimize.least_squares(residuals, x, bounds=bounds) for x in begins), key=lambda x: x.cost)
    model, target = jnp.asarray(model, jnp.float32), jnp.asarray(np.log10(power), jnp.float32)
    error, found = log_error(model, target, jnp.log10(FREQS), background=background, linear=True)
    assert float(error) == pytest.approx(2 * best.cost / len(FREQS), rel=1e-3)
    assert float(found.log_scale) - 9.0 == pytest.approx(best.x[0], abs=5e-3)


def test_what_of_a_power_is_compared_is_checked():
    with pytest.raises(ValueError, match="'compare' of spectrum got 'log10', but takes 'log' or 'linear'"):
        Spectrum(FREQS, 1.0 / FREQS, compare="log10")
    with pytest.raises(ValueError, match="is to vary, but spectrum 2 is flat"):
        Spectrum(FREQS, np.stack([1.0 / FREQS, np.ones_like(FREQS)]), compare="linear")
    assert Spectrum(FREQS, 1.0 / FREQS, compare="linear").band(5.0, 20.0).compare == "linear"


@pytest.mark.parametrize("linear", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("background", [True, False])
def test_the_gradient_at_the_best_nuisances_is_the_whole_gradient(background, linear):
    """Against differences of the error with the nuisances solved anew: the envelope theorem."""
    with jax.enable_x64(True):
        model, target = jnp.asarray(log_bump(10.4, 1.2)), jnp.asarray(log_bump(10, 1.5) + 0.3 * np.log10(FREQS))
        log_freqs = jnp.log10(FREQS)

        @jax.jit
        def error(x):
            how = {"background": background, "iterations": 200, "linear": linear}
            nuisance = spectra.solve_nuisance(x, target, log_freqs, **how)
            total = spectra.observed_log_power(x, log_freqs, nuisance)
            difference = (10**total - 10**target) / jnp.std(10**target) if linear else total - target
            return jnp.mean(difference**2)

        def at_best(x):
            return log_error(x, target, log_freqs, background=background, iterations=200, linear=linear)[0]

        slope = jax.jit(jax.grad(at_best))(model)
        for i in (0, 12, 16, 40):
            step = 1e-5 * jnp.zeros_like(model).at[i].set(1.0)
            difference = (error(model + step) - error(model - step)) / 2e-5
            assert slope[i] == pytest.approx(float(difference), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("at", [8.0, 9.3, 10.25, 11.9])
def test_alpha_peaks_are_found_between_grid_points(at):
    power = 10 ** (1.0 * np.exp(-((FREQS - at) ** 2) / (2 * 1.2**2)) - 0.9 * np.log10(FREQS))
    assert alpha_peak(FREQS, power) == pytest.approx(at, abs=0.1)
    np.testing.assert_allclose(alpha_peak(FREQS, np.stack([power, power * 3])), at, atol=0.1)


def test_interpolation_refuses_to_extrapolate():
    weights = spectra.interpolation(np.array([0.0, 1.0, 2.0]), np.array([0.5, 2.0]))
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match=r"0\.5 to 3 Hz"):
        spectra.interpolation(np.array([0.0, 1.0, 2.0]), np.array([0.5, 3.0]))


# --- recordings ---


def write_edf(path, signals: dict[str, np.ndarray], rate: int):
    """European Data Format, seconds of one record each: Kemp et al. 1992, Electroenceph. Clin. Neurophysiol. 82:391."""
    seconds, count = len(next(iter(signals.values()))) // rate, len(signals)

    def text(value, width: int) -> str:
        return f"{value!s:<{width}}"[:width]

    about = (("0", 8), ("X X X X", 80), ("Startdate X X X X", 80), ("01.01.00", 8), ("00.00.00", 8))
    head = "".join(text(*part) for part in about)
    head += text(256 * (count + 1), 8) + text("", 44) + text(seconds, 8) + text(1, 8) + text(count, 4)
    for values, width in (
        (signals, 16), ([""] * count, 80), (["uV"] * count, 8), ([-500] * count, 8), ([500] * count, 8),
        ([-32768] * count, 8), ([32767] * count, 8), ([""] * count, 80), ([rate] * count, 8), ([""] * count, 32),
    ):  # fmt: skip
        head += "".join(text(value, width) for value in values)
    digital = np.stack([np.round((x + 500) / 1000 * 65535 - 32768) for x in signals.values()]).astype("<i2")
    records = digital[:, : seconds * rate].reshape(count, seconds, rate).swapaxes(0, 1)
    path.write_bytes(head.encode("ascii") + records.tobytes())


@pytest.fixture
def recording(tmp_path):
    """A minute of two channels, alpha of 20 microvolts in one of them."""
    rng, ts = np.random.default_rng(0), np.arange(60 * 200) / 200
    noise = rng.normal(0, 5, (2, len(ts)))
    signals = {"EEG O1": noise[0] + 20 * np.sin(2 * np.pi * 10 * ts), "EEG Fz": noise[1]}
    write_edf(tmp_path / "rest.edf", signals, 200)
    return tmp_path / "rest.edf", signals


def test_a_channel_of_a_recording_is_a_target(recording):
    pytest.importorskip("mne")
    path, signals = recording
    found = load_spectrum(path, "EEG O1")
    freqs, want = scipy.signal.welch(signals["EEG O1"], fs=200.0, nperseg=400)
    np.testing.assert_allclose(found.freqs, freqs[1:])
    np.testing.assert_allclose(found.power[0], want[1:], rtol=5e-2)
    assert found.name == "rest.edf, EEG O1"
    assert found.freqs[found.power[0].argmax()] == 10.0
    assert len(load_spectrum(path)) == len(load_spectrum(path, ["EEG O1", "EEG Fz"])) == 2


def test_what_is_wrong_with_a_recording_is_said(recording, tmp_path, monkeypatch):
    pytest.importorskip("mne")
    path, _ = recording
    with pytest.raises(ValueError, match=r"'EEG O2'.*did you mean 'EEG O1'"):
        load_spectrum(path, "EEG O2")
    write_edf(tmp_path / "short.edf", {"EEG O1": np.ones(200)}, 200)
    with pytest.raises(ValueError, match=r"short\.edf: 1 s are too short"):
        load_spectrum(tmp_path / "short.edf")
    (tmp_path / "bad.edf").write_text("no recording")
    with pytest.raises(ValueError, match=r"bad\.edf: cannot be read"):
        load_spectrum(tmp_path / "bad.edf")
    np.savez(tmp_path / "one.npz", freqs=FREQS, power=FREQS)
    with pytest.raises(ValueError, match=r"'channel' got 'O1', but one\.npz is a spectrum"):
        load_spectrum(tmp_path / "one.npz", "O1")
    monkeypatch.setitem(__import__("sys").modules, "mne", None)
    with pytest.raises(ImportError, match=r"needs mne.*brainmass-kernels\[eeg\]"):
        load_spectrum(path)
