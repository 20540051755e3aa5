"""The models of EEG: the equations against ones written out anew, the behaviour against what was published."""

from types import SimpleNamespace

import brainunit as u
import jax
import numpy as np
import pytest
from scipy import signal

import brainmass_kernels as bk

PER_ROOT_SECOND = u.Hz * u.second**0.5


def ours(model, names, y, **inputs):
    """The drift of a model, of states in the order of ``names``."""
    given = {n: u.get_mantissa(x) for n, x in {**model.inputs, **inputs}.items()}
    p = SimpleNamespace(**model.magnitudes())
    rates = model.drift(SimpleNamespace(**dict(zip(names, y, strict=True))), p, SimpleNamespace(**given))
    return np.array([rates[n] for n in names])


def assert_same_equations(model, names, equations, size, **inputs):
    """At states drawn over the range that the model visits; ``size`` is that of each."""
    assert set(names) == set(model.states)
    for y in np.random.default_rng(0).normal(size=(20, len(names))) * np.asarray(size):
        np.testing.assert_allclose(ours(model, names, y, **inputs), equations(0.0, y), rtol=1e-10, atol=1e-9)


def settled(model, names, steps, dt):
    run = bk.simulate(model, steps, dt, implementation="scan")
    return np.array([u.get_mantissa(run.final[n]) for n in names])


def fired(v, largest=5.0, threshold=6.0, steepness=0.56):
    return largest / (1.0 + np.exp(steepness * (threshold - v)))


def spectra_of(x, dt):
    """Frequencies from 1 Hz and the power there, by Welch's method."""
    freqs, power = signal.welch(x, 1.0 / dt, nperseg=round(2.0 / dt), axis=0)
    return freqs[2:], power[2:]


# Wendling -----------------------------------------------------------------------------------------------------------


def wendling(t, y, A=5.0, B=22.0, G=10.0, a=100.0, b=50.0, g=500.0, p=90.0, C=135.0):
    """Ten first-order equations, in the paper's numbering of states."""
    C1, C2, C3, C4, C5, C6, C7 = C, 0.8 * C, 0.25 * C, 0.25 * C, 0.3 * C, 0.1 * C, 0.8 * C
    return np.array(
        [
            *y[5:],
            A * a * fired(y[1] - y[2] - y[3]) - 2 * a * y[5] - a * a * y[0],
            A * a * (p + C2 * fired(C1 * y[0])) - 2 * a * y[6] - a * a * y[1],
            B * b * C4 * fired(C3 * y[0]) - 2 * b * y[7] - b * b * y[2],
            G * g * C7 * fired(C5 * y[0] - C6 * y[4]) - 2 * g * y[8] - g * g * y[3],
            B * b * fired(C3 * y[0]) - 2 * b * y[9] - b * b * y[4],
        ]
    )


def test_wendling_is_its_ten_equations(x64):
    names = ("M", "E", "I", "F", "S", "Mv", "Ev", "Iv", "Fv", "Sv")
    assert_same_equations(bk.Wendling(A=5.0 * u.mV), names, wendling, [0.1, 10, 10, 10, 1, 5, 500, 500, 500, 50])


def test_wendling_without_fast_inhibition_is_jansen_rit(x64):
    names, y = ("M", "E", "I", "Mv", "Ev", "Iv"), np.array([0.1, 12.0, 7.0, 3.0, 40.0, -30.0])
    more = ours(bk.Wendling(c7=0.0), (*names, "F", "S", "Fv", "Sv"), [*y, 0.0, 0.3, 0.0, 2.0], E_inp=180.0 * u.Hz)
    np.testing.assert_allclose(more[:6], ours(bk.JansenRit(), names, y, E_inp=180.0 * u.Hz), rtol=1e-12)


@pytest.fixture(scope="module")
def types():
    """Potential and spectrum of the six published (B, G), a column each."""
    B, G = [50.0, 40.0, 25.0, 10.0, 5.0, 15.0], [15.0, 15.0, 15.0, 15.0, 25.0, 0.0]
    run = bk.simulate(
        bk.Wendling(A=5.0 * u.mV, B=np.array(B) * u.mV, G=np.array(G) * u.mV), 22 * u.second, 0.5 * u.ms,
        noise={"E_inp": 2.0 * PER_ROOT_SECOND}, key=jax.random.key(1), transient=2 * u.second,
    )  # fmt: skip
    x = np.asarray(run["eeg"] / u.mV)
    return (x, *spectra_of(x, 5e-4))


def test_the_six_types_of_wendling(types):
    x, freqs, power = types
    height, spread = np.ptp(x, axis=0), x.std(axis=0)
    peak = freqs[np.argmax(power, axis=0)]
    centroid = (freqs[:, None] * power).sum(axis=0) / power.sum(axis=0)
    spikes = np.array([len(signal.find_peaks(lane, prominence=8.0)[0]) for lane in x.T]) / 20.0
    background, sporadic, sustained, alpha, fast, quasi_sinus = range(6)
    assert spikes[[background, alpha, fast]].max() == 0
    assert height[background] < 5.0
    assert 0.3 < spikes[sporadic] < 2.0
    assert height[sporadic] > 15.0
    assert 4.0 < spikes[sustained] < 6.0
    assert peak[sustained] == pytest.approx(spikes[sustained], abs=0.5)
    assert 8.0 < peak[alpha] < 13.0
    assert spread[fast] < 0.8 * spread[[background, alpha]].min()
    assert centroid[fast] == centroid.max() > 15.0
    # Nearly a sine: one line holds most of the power.
    near = np.abs(freqs - peak[quasi_sinus]) <= 1.0
    assert power[near, quasi_sinus].sum() > 0.95 * power[:, quasi_sinus].sum()
    assert 8.0 < peak[quasi_sinus] < 13.0
    assert height[quasi_sinus] > 8.0


# David and Friston --------------------------------------------------------------------------------------------------


def david_friston(t, y, w=0.8, p=220.0, C=135.0):
    """Three populations by two kinetics, rows ``(excitatory, inhibitory, pyramidal)``."""
    v, x = y[:6].reshape(3, 2), y[6:].reshape(3, 2)
    tau = np.array([[10.8e-3, 4.6e-3], [22e-3, 2.9e-3], [10.8e-3, 4.6e-3]])
    H = np.array([[3.25], [22.0], [3.25]]) * np.array([[10e-3], [20e-3], [10e-3]]) / tau
    mixed = v @ np.array([w, 1 - w])
    rate = np.array(
        [p + 0.8 * C * fired(C * mixed[2]), 0.25 * C * fired(0.25 * C * mixed[2]), fired(mixed[0] - mixed[1])]
    )
    return np.concatenate([x.ravel(), (H / tau * rate[:, None] - 2 * x / tau - v / tau**2).ravel()])


def test_david_friston_is_its_equations(x64):
    names = [f"{x}{part}" for x in ("E", "I", "M", "Ev", "Iv", "Mv") for part in (1, 2)]
    assert_same_equations(bk.DavidFriston(), names, david_friston, np.repeat([10, 10, 0.1, 500, 500, 5], 2))


def test_the_spectrum_of_david_friston_moves_from_gamma_to_alpha(x64):
    w = np.linspace(0.0, 1.0, 6)
    run = bk.simulate(
        bk.DavidFriston(w=w), 22 * u.second, 0.5 * u.ms, noise={"E_inp": 1.0 * PER_ROOT_SECOND}, key=jax.random.key(1),
        transient=2 * u.second,
    )  # fmt: skip
    freqs, power = spectra_of(np.asarray(run["meg"] / u.mV), 5e-4)
    peak = freqs[np.argmax(power, axis=0)]
    centroid = (freqs[:, None] * power).sum(axis=0) / power.sum(axis=0)
    assert peak[0] == pytest.approx(43.0, abs=2.0)
    assert peak[-1] == pytest.approx(10.0, abs=1.0)
    assert (np.diff(centroid) < -1.0).all()
    # At the published 0.8, both rhythms at once.
    alpha, gamma = (freqs > 7) & (freqs < 15), (freqs > 30) & (freqs < 50)
    assert min(power[alpha, 4].sum(), power[gamma, 4].sum()) > 0.05 * power[:, 4].sum()


# The canonical microcircuit -----------------------------------------------------------------------------------------


def microcircuit(t, x, drive=300.0):
    """Populations (ss, sp, ii, dp), with SPM's time constants and its ten connections as one matrix."""
    T = np.array([2.0, 2.0, 16.0, 28.0]) / 1000.0
    onto = 200.0 * np.array([[-4, -4, -8, 0], [4, -4, 0, 0], [4, 0, -4, 2], [0, 0, -2, -1]])
    V, W = x[:4], x[4:]
    u = onto @ (1.0 / (1.0 + np.exp(-2.0 / 3.0 * V)) - 0.5) + np.array([drive, 0.0, 0.0, 0.0])
    return np.concatenate([W, (u - 2.0 * W - V / T) / T])


def test_the_microcircuit_is_spms(x64):
    names = ("ss", "sp", "ii", "dp", "ssv", "spv", "iiv", "dpv")
    size = np.repeat([2.0, 300.0], 4)
    assert_same_equations(bk.CanonicalMicrocircuit(), names, microcircuit, size, ss_inp=300.0 * u.Hz)


def test_superficial_cells_are_faster_than_deep_ones():
    run = bk.simulate(
        bk.CanonicalMicrocircuit(H=np.ones(16) * u.mV), 8 * u.second, 0.25 * u.ms, record=("sp", "dp"), every=8,
        noise={"ss_inp": 20.0 * PER_ROOT_SECOND}, key=jax.random.key(2), transient=1 * u.second,
    )  # fmt: skip
    peaks = []
    for n in ("sp", "dp"):
        freqs, power = spectra_of(np.asarray(run[n] / u.mV), 2e-3)
        peaks.append(freqs[np.argmax(power.mean(axis=1))])
    assert 15.0 < peaks[0] < 40.0
    assert peaks[1] < 12.0


# Robinson -----------------------------------------------------------------------------------------------------------


def robinson(t, y):
    """From the differential operators of the dendrite and of the field, ``D y = drive``, solved for ``y''``."""
    V, Vt, phi, phit = y[:3], y[3:6], y[6], y[7]
    Qe, Qr, Qs = fired(V, 340.0, 12.92, 1 / 3.8)
    nu = 1e3 * np.array(
        [
            [0.0015316368, -0.0096390641, 0.0, 0.0097322420, 0.0],
            [0.0001428004, 0.0, 0.0, 0.0000577027, 0.0],
            [0.0011354746, 0.0, -0.0012216477, 0.0, 0.0082218638],
        ]
    )
    slow, quick = 12e-3, 1.3e-3
    Vtt = (nu @ np.array([phi, Qe, Qr, Qs, 1.0]) - V - (slow + quick) * Vt) / (slow * quick)
    return np.array([*Vt, *Vtt, phit, 116.0**2 * (Qe - phi - 2.0 / 116.0 * phit)])


def test_robinson_is_its_equations(x64):
    names = ("V_e", "V_r", "V_s", "V_et", "V_rt", "V_st", "phi_e", "phi_et")
    assert_same_equations(bk.Robinson(), names, robinson, [5, 5, 5, 100, 100, 100, 10, 300])


def test_the_dendrite_of_robinson_is_two_exponentials(x64):
    """The response of the relay cells to a step of input, with every other connection cut, in closed form."""
    cut = dict.fromkeys(("nu_ee", "nu_ei", "nu_es", "nu_re", "nu_rs", "nu_se", "nu_sr"), 0.0 * u.mV * u.second)
    run = bk.simulate(bk.Robinson(**cut), 3000, 0.01 * u.ms, record="V_s", every=100, implementation="scan")
    t, slow, quick = np.asarray(run.ts.to_decimal(u.ms)), 12.0, 1.3
    rise = 1 - (slow * np.exp(-t / slow) - quick * np.exp(-t / quick)) / (slow - quick)
    np.testing.assert_allclose(run["V_s"] / u.mV, 8.2218638 * rise, rtol=1e-4)


def test_robinson_rests_at_the_published_eyes_closed_rates(x64):
    """Firing rates in Hz as in NFTsim's eyes-closed configuration."""
    *V, phi = settled(bk.Robinson(), ("V_e", "V_r", "V_s", "phi_e"), 6000, 0.5 * u.ms)
    published = [6.9858430745, 15.3466300572, 5.6382566040]
    np.testing.assert_allclose(fired(np.array(V), 340.0, 12.92, 1 / 3.8), published, rtol=1e-6)
    assert phi == pytest.approx(published[0], rel=1e-6)
