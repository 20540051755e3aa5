"""Likelihoods against scipy's densities, of predictions that are computed apart."""

import math
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from test_fit import FREQS, SHAKEN, Resonator, resonance
from test_fit_targets import RUN, STEPS

import brainmass_kernels as bk
from brainmass_kernels import spectra
from brainmass_kernels.inference import density as densities
from brainmass_kernels.inference import priors
from brainmass_kernels.inference.likelihoods import FisherZ, Gaussian, StudentT, Whittle

F0 = {"f0": (6.0, 16.0)}
LINEAR: dict[str, Any] = {
    "noise": {"drive": 1.0 * SHAKEN},
    "predict": "linear",
    "duration": 4 * u.second,
    "dt": 2 * u.ms,
}
# One position, and what the likelihood takes by it.
Z = {"f0": 0.1}


def spectrum() -> bk.PowerSpectrum:
    rng = np.random.default_rng(0)
    return bk.PowerSpectrum(FREQS, 0.7 * resonance(9.0, 0.15) * rng.gamma(5.0, 0.2, FREQS.shape))


def expected(f0) -> np.ndarray:
    """A one-sided density, of white noise of intensity 1 filtered by the resonator."""
    return 2 * resonance(f0, 0.15)


def value(density, name, z):
    return float(u.get_magnitude(density.to_parameters(z)[name]))


# Spectra ------------------------------------------------------------------------------------------------------------


def test_whittle_is_a_gamma_density(x64):
    target = spectrum()
    likelihood = Whittle(
        priors.Uniform(3.0, 8.0), gain=priors.LogNormal(0.5, 0.3), background=priors.HalfNormal(2.0),
        exponent=priors.Normal(1.0, 0.4),
    )  # fmt: skip
    density = bk.log_density(Resonator(), target, F0, likelihood=likelihood, **LINEAR)
    z = {name: 0.1 * n - 0.2 for n, name in enumerate(density.names)}
    L, gain, level, exponent = (
        value(density, f"likelihood.{n}", z) for n in ("segments", "gain", "background", "exponent")
    )
    S = gain * expected(value(density, "f0", z)) + level * FREQS**-exponent
    want = scipy.stats.gamma(L, scale=S / L).logpdf(target.power[0]).sum()
    assert float(density.log_likelihood(z)) == pytest.approx(want, rel=1e-6)


def test_a_gain_and_no_background(x64):
    density = bk.log_density(Resonator(), spectrum(), F0, likelihood=Whittle(5, gain=0.3), **LINEAR)
    S = 0.3 * expected(value(density, "f0", Z))
    want = scipy.stats.gamma(5, scale=S / 5).logpdf(spectrum().power[0]).sum()
    assert density.names == ("f0",)
    assert float(density.log_likelihood(Z)) == pytest.approx(want, rel=1e-6)


def test_a_robust_likelihood_is_student_s(x64):
    likelihood = StudentT(priors.HalfNormal(0.2), degrees=3.0, gain=0.4, background=0.1, exponent=1.5)
    density = bk.log_density(Resonator(), spectrum(), F0, likelihood=likelihood, **LINEAR)
    z = Z | {"likelihood.sigma": -0.3}
    S = 0.4 * expected(value(density, "f0", z)) + 0.1 * FREQS**-1.5
    residuals = np.log10(spectrum().power[0]) - np.log10(S)
    want = scipy.stats.t(3.0, scale=value(density, "likelihood.sigma", z)).logpdf(residuals).sum()
    assert float(density.log_likelihood(z)) == pytest.approx(want, rel=1e-6)


def test_a_small_power_keeps_its_digits():
    """As of MEG, 1e-26 T^2/Hz, in float32."""
    target = bk.PowerSpectrum(FREQS, 1e-26 * spectrum().power[0])
    density = bk.log_density(Resonator(), target, F0, likelihood=Whittle(5, gain=3e-27), **LINEAR)
    S = 3e-27 * expected(value(density, "f0", Z))
    want = scipy.stats.gamma(5, scale=S / 5).logpdf(target.power[0]).sum()
    assert float(density.log_likelihood(Z)) == pytest.approx(want, rel=1e-5)


def test_a_simulated_spectrum_is_the_mean_over_realisations():
    run = {"noise": {"drive": 1.0 * SHAKEN}, "duration": 4 * u.second, "transient": 1 * u.second, "dt": 2 * u.ms}
    key = jax.random.key(1)
    density = bk.log_density(
        Resonator(), spectrum(), F0, likelihood=Whittle(5), key=key, realisations=2, every=5, **run
    )  # fmt: skip
    model = Resonator(f0=density.to_parameters(Z)["f0"])
    signal = bk.simulate(model, run["duration"], run["dt"], noise=run["noise"], transient=run["transient"], every=5,
                         key=jax.random.split(key, 2))["eeg"] / u.mV  # fmt: skip
    freqs, power = spectra.welch(signal, 0.01, 200)
    S = np.asarray(power, float).mean(1)[np.isin(np.round(np.asarray(freqs), 6), FREQS)]
    want = scipy.stats.gamma(5, scale=S / 5).logpdf(spectrum().power[0]).sum()
    assert float(density.log_likelihood(Z)) == pytest.approx(want, rel=1e-3)


# Series -------------------------------------------------------------------------------------------------------------


def series(rng=3) -> tuple[bk.TimeSeries, Any]:
    values = np.random.default_rng(rng).normal(0.0, 0.1, STEPS // RUN["every"])
    return bk.TimeSeries(values * u.mV, sigma=0.1 * u.mV), values


def predicted(f0) -> np.ndarray:
    model = Resonator(f0=f0 * u.Hz)
    return np.asarray(bk.simulate(model, STEPS, RUN["dt"], inputs=RUN["inputs"], every=RUN["every"])["eeg"] / u.mV)


@pytest.mark.parametrize("rho", [0.6, -0.3, priors.Uniform(-0.9, 0.9), None])
def test_autocorrelated_residuals_are_a_gaussian_process(x64, rho):
    target, values = series()
    likelihood = Gaussian(0.08 * u.mV, rho=rho, gain=priors.Normal(1.0, 0.5), offset=20e-6 * u.volt)
    density = bk.log_density(Resonator(), target, {"f0": (3.0, 8.0)}, likelihood=likelihood, **RUN)
    z = {name: 0.1 * n - 0.2 for n, name in enumerate(density.names)}
    known = 0.0 if rho is None else rho if isinstance(rho, float) else value(density, "likelihood.rho", z)
    gain = value(density, "likelihood.gain", z)
    lags = np.abs(np.subtract.outer(np.arange(len(values)), np.arange(len(values))))
    covariance = 0.08**2 * np.where(lags, np.float64(known) ** lags, 1.0)
    mean = gain * predicted(value(density, "f0", z)) + 0.02
    want = scipy.stats.multivariate_normal(mean, covariance).logpdf(values)
    assert float(density.log_likelihood(z)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("rho", [None, -0.4, priors.Uniform(-0.9, 0.9)])
def test_samples_at_sensors_of_which_some_are_missing(x64, rho):
    """The density of those that were measured: a Gaussian process of each sensor, with a sigma of its own."""
    rng, gains = np.random.default_rng(6), np.array([[1.0, 0.5, -0.2], [0.3, -0.6, 1.0]])
    values, sigmas = rng.normal(0.0, 0.1, (80, 2)), np.array([0.1, 0.25])
    values[[0, 1, 40, 41, 42, 79], 0] = np.nan
    values[7, :] = np.nan
    readout = bk.Readout(gains, unit=u.mV)
    target = bk.TimeSeries(values * u.mV, sigmas * u.mV, missing="mask", of=readout)
    likelihood = None if rho is None else Gaussian(sigmas * u.mV, rho=rho)
    run: dict[str, Any] = {n: x for n, x in NETWORK_RUN.items() if n != "noise"}
    run["inputs"] = {"drive": np.sin(np.arange(400) / 20) * u.mV}
    density = bk.log_density(NETWORK, target, {"coupling.k": (0.05, 0.4)}, likelihood=likelihood, **run)
    z = {name: 0.1 * n - 0.2 for n, name in enumerate(density.names)}
    known = 0.0 if rho is None else rho if isinstance(rho, float) else value(density, "likelihood.rho", z)
    network = NETWORK.replace(k=density.to_parameters(z)["coupling.k"])
    mean = bk.simulate(network, 400, 5 * u.ms, every=5, record={"eeg": readout}, inputs=run["inputs"])["eeg"] / u.mV
    mean = np.asarray(mean)
    want, lags = 0.0, np.abs(np.subtract.outer(np.arange(80), np.arange(80)))
    for x, m, sigma in zip(values.T, mean.T, sigmas, strict=True):
        there = np.isfinite(x)
        covariance = sigma**2 * np.where(lags, np.float64(known) ** lags, 1.0)[np.ix_(there, there)]
        want += scipy.stats.multivariate_normal(m[there], covariance).logpdf(x[there])
    assert np.ptp(mean) > 0.01
    assert float(density.log_likelihood(z)) == pytest.approx(want, rel=1e-6)
    slopes = jax.grad(density)({name: jnp.asarray(x) for name, x in z.items()})
    for name, x in z.items():
        ahead, behind = (float(density(z | {name: x + h})) for h in (1e-5, -1e-5))
        assert float(slopes[name]) == pytest.approx((ahead - behind) / 2e-5, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("sigma", "said"),
    [
        (np.ones(3) * u.mV, r"'sigma' of Gaussian .* got shape \(3,\), but takes 2 numbers, one for each channel"),
        (np.array([0.1, -0.1]) * u.mV, "'sigma' of Gaussian .* takes positive numbers"),
    ],
)
def test_a_sigma_of_each_channel_is_checked(sigma, said):
    readout = bk.Readout(np.array([[1.0, 0.5, -0.2], [0.3, -0.6, 1.0]]), unit=u.mV)
    target = bk.TimeSeries(np.eye(80, 2) * u.mV, of=readout)
    with pytest.raises(ValueError, match=said):
        bk.log_density(NETWORK, target, {"coupling.k": (0.05, 0.4)}, likelihood=Gaussian(sigma), **NETWORK_RUN)


def test_a_sigma_of_each_channel_is_that_of_every_subject(x64):
    """Of two subjects the density is the product of those of each."""
    sigmas, values = np.array([0.1, 0.25]) * u.mV, np.random.default_rng(1).normal(0.0, 0.1, (2, 80, 2))
    readout = bk.Readout(np.array([[1.0, 0.5, -0.2], [0.3, -0.6, 1.0]]), unit=u.mV)
    run: dict[str, Any] = {n: x for n, x in NETWORK_RUN.items() if n != "noise"}
    run["inputs"] = {"drive": np.sin(np.arange(400) / 20) * u.mV}

    def density(values, sigma, likelihood):
        target = bk.TimeSeries(values * u.mV, sigma, of=readout)
        return bk.log_density(
            NETWORK, target, {"coupling.k": (0.05, 0.4)}, likelihood=likelihood,
            shared=("coupling.k",) * (values.ndim > 2), **run,
        )  # fmt: skip

    z = {"coupling.k": 0.3}
    for sigma, likelihood in ((None, Gaussian(sigmas)), (sigmas, None)):
        alone = sum(float(density(each, sigma, likelihood).log_likelihood(z)) for each in values)
        assert float(density(values, sigma, likelihood).log_likelihood(z)) == pytest.approx(alone, rel=1e-9)


def test_a_unit_of_the_data_is_read(x64):
    target, values = series()
    same = bk.TimeSeries(values * 1e-3 * u.volt, sigma=1e-4 * u.volt)
    one, other = (bk.log_density(Resonator(), x, {"f0": (3.0, 8.0)}, **RUN) for x in (target, same))
    want = scipy.stats.norm(predicted(value(one, "f0", Z)), 0.1).logpdf(values).sum()
    assert float(one.log_likelihood(Z)) == pytest.approx(want, rel=1e-6)
    assert float(other.log_likelihood(Z)) == pytest.approx(want, rel=1e-6)


# Networks -----------------------------------------------------------------------------------------------------------

NETWORK = bk.Network(Resonator(), np.ones((3, 3)) - np.eye(3), source="eeg", target="drive", k=0.2)
CORRELATIONS = np.array([[1.0, 0.3, 0.5], [0.3, 1.0, -0.2], [0.5, -0.2, 1.0]])
NETWORK_RUN: dict[str, Any] = {
    "noise": {"drive": 1.0 * SHAKEN}, "duration": 400, "dt": 5 * u.ms, "every": 5, "transient": None,
    "key": jax.random.key(1), "realisations": 1,
}  # fmt: skip


def recorded(density) -> np.ndarray:
    """(K, 3) of the density's own noise."""
    run = {n: x for n, x in NETWORK_RUN.items() if n not in ("key", "realisations", "duration", "dt")}
    network = NETWORK.replace(k=density.to_parameters({"coupling.k": 0.1})["coupling.k"])
    keys = jax.random.split(NETWORK_RUN["key"], (1, 3))
    return np.asarray(bk.simulate(network, 400, 5 * u.ms, key=keys, **run)["eeg"][:, 0] / u.mV, float)


def test_connectivity_and_a_joint_target():
    target = bk.Connectivity(CORRELATIONS, sigma=0.2)
    samples = np.random.default_rng(0).normal(0.0, 0.1, (80, 3))
    joint = bk.Joint({"fc": target, "eeg": bk.TimeSeries(samples * u.mV, sigma=0.1 * u.mV)})
    k = {"coupling.k": (0.05, 0.4)}
    density = bk.log_density(
        NETWORK, joint, k, likelihood={"fc": FisherZ(priors.HalfNormal(0.3))}, record="eeg", **NETWORK_RUN
    )
    z = {"coupling.k": 0.1, "likelihood.fc.sigma": -0.5}
    assert density.names == tuple(z)
    alone = bk.log_density(NETWORK, target, k, **NETWORK_RUN)
    signal = recorded(alone)
    above = np.triu_indices(3, 1)
    fisher, data = np.arctanh(np.corrcoef(signal.T)[above]), np.arctanh(CORRELATIONS[above])
    want = scipy.stats.norm(fisher, 0.2).logpdf(data).sum()
    assert float(alone.log_likelihood({"coupling.k": 0.1})) == pytest.approx(want, rel=1e-3)
    want = scipy.stats.norm(fisher, 0.3 * math.exp(-0.5)).logpdf(data).sum()
    want += scipy.stats.norm(signal, 0.1).logpdf(samples).sum()
    assert float(density.log_likelihood(z)) == pytest.approx(want, rel=1e-3)
    both = densities.predicted(density, {name: jnp.full(2, x) for name, x in z.items()}).targets
    np.testing.assert_allclose(both["fc"].values[1], np.corrcoef(signal.T), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(both["eeg"].values[1] / u.mV, signal, rtol=1e-3, atol=1e-5)


def test_of_a_joint_target_what_is_not_known_is_named():
    parts = {"fc": bk.Connectivity(CORRELATIONS), "eeg": bk.TimeSeries(np.eye(80, 3) * u.mV, sigma=0.1 * u.mV)}
    k = {"coupling.k": (0.05, 0.4)}
    with pytest.raises(TypeError, match="of a Joint takes a dict by name: fc, eeg"):
        bk.log_density(NETWORK, bk.Joint(parts), k, likelihood=FisherZ(0.1), record="eeg", **NETWORK_RUN)
    with pytest.raises(ValueError, match="unknown target in 'likelihood' 'cf'; did you mean 'fc'"):
        bk.log_density(NETWORK, bk.Joint(parts), k, likelihood={"cf": FisherZ(0.1)}, record="eeg", **NETWORK_RUN)
    with pytest.raises(ValueError, match=r"'weights' of joint targets got .*, but likelihoods have none"):
        bk.log_density(NETWORK, bk.Joint(parts, {"fc": 2.0}), k, record="eeg", **NETWORK_RUN)
    twins = np.where(np.eye(3)[[1, 0, 2]] > 0, 1.0, CORRELATIONS)
    with pytest.raises(ValueError, match="got 1 beside the diagonal, whose Fisher's z is infinite"):
        bk.log_density(NETWORK, bk.Connectivity(np.maximum(twins, twins.T)), k, **NETWORK_RUN)


def test_dynamics_have_no_likelihood():
    values = np.full((4, 4), 0.2) + 0.8 * np.eye(4)
    dynamics = bk.ConnectivityDynamics(values, 0.5 * u.second, 0.5 * u.second)
    with pytest.raises(TypeError, match="of which no likelihood is known: take a function of a Result"):
        bk.log_density(NETWORK, dynamics, {"coupling.k": (0.05, 0.4)}, record="eeg", **NETWORK_RUN)


def test_a_spectrum_to_be_compared_in_powers_has_no_likelihood():
    freqs = np.arange(5.0, 20.0)
    target = bk.PowerSpectrum(freqs, 1.0 / freqs, compare="linear")
    with pytest.raises(ValueError, match="'compare' of spectrum got 'linear', which is how a fit compares powers"):
        bk.log_density(
            bk.JansenRit(), target, {"C": (100.0, 200.0)}, likelihood=Whittle(8), duration=2000, dt=1 * u.ms,
            transient=None, band=(5.0, 19.0), noise={"E_inp": 2 * u.Hz * u.second**0.5}, key=jax.random.key(0),
        )  # fmt: skip


# New data -----------------------------------------------------------------------------------------------------------

LANES, MANY = 3, 4000
SIGMA = np.array([0.1, 0.5, 2.0])


def drawn(likelihood, expected, **values):
    """New data about what is expected, ``(LANES, ...)``."""
    fields = {name: x if x is None or isinstance(x, float) else jnp.asarray(x, float) for name, x in values.items()}
    return np.asarray(likelihood.noisy(jax.random.key(0), None, jnp.asarray(expected, float), fields))


def test_new_samples_are_gaussian(x64):
    residuals = drawn(Gaussian(1.0), np.ones((LANES, MANY, 1)), sigma=SIGMA, rho=None)[..., 0] - 1
    for x, sigma in zip(residuals, SIGMA):
        assert scipy.stats.kstest(x / sigma, "norm").pvalue > 1e-3


def test_new_autocorrelated_samples(x64):
    rho = np.array([-0.5, 0.3, 0.9])
    residuals = drawn(Gaussian(1.0, rho=0.5), np.zeros((LANES, MANY, 2)), sigma=SIGMA, rho=rho)
    for x, sigma, r in zip(residuals, SIGMA, rho):
        assert x.std() == pytest.approx(sigma, rel=0.15)
        assert np.corrcoef(x[1:, 0], x[:-1, 0])[0, 1] == pytest.approx(r, abs=0.06)
        # What is new in each sample is Gaussian, and of the regions independent.
        new = (x[1:] - r * x[:-1]) / (sigma * np.sqrt(1 - r**2))
        assert scipy.stats.kstest(new.ravel(), "norm").pvalue > 1e-3
        assert abs(np.corrcoef(new.T)[0, 1]) < 0.06
    one = drawn(Gaussian(1.0, rho=0.5), np.zeros((LANES, MANY, 1)), sigma=1.0, rho=0.5)
    assert np.corrcoef(one[0, 1:, 0], one[0, :-1, 0])[0, 1] == pytest.approx(0.5, abs=0.06)


def test_new_powers_and_correlations(x64):
    segments = np.array([2.0, 10.0, 50.0])
    for x, L in zip(drawn(Whittle(4.0), np.full((LANES, MANY), 0.3), segments=segments), segments):
        assert scipy.stats.kstest(np.exp(x - 0.3), scipy.stats.gamma(L, scale=1 / L).cdf).pvalue > 1e-3
    for x, sigma in zip(drawn(StudentT(0.1), np.zeros((LANES, MANY)), sigma=SIGMA, degrees=4.0), SIGMA):
        assert scipy.stats.kstest(x / math.log(10) / sigma, scipy.stats.t(4).cdf).pvalue > 1e-3
    for x, sigma in zip(drawn(FisherZ(0.1), np.zeros((LANES, MANY)), sigma=SIGMA), SIGMA):
        assert scipy.stats.kstest(x / sigma, "norm").pvalue > 1e-3


def test_predictions_of_a_spectrum(x64):
    likelihood = Whittle(20.0, gain=priors.LogNormal(0.5, 0.3), background=0.2, exponent=1.5)
    density = bk.log_density(Resonator(), spectrum(), F0, likelihood=likelihood, **LINEAR)
    z = {"f0": jnp.asarray([-0.5, 0.0, 0.5]), "likelihood.gain": jnp.asarray([0.1, 0.0, -0.3])}
    values = {name: np.asarray(u.get_magnitude(x)) for name, x in density.to_parameters(z).items()}
    power = densities.predicted(density, z).power
    for got, f0, gain in zip(power, values["f0"], values["likelihood.gain"]):
        np.testing.assert_allclose(got, gain * expected(f0) + 0.2 * FREQS**-1.5, rtol=1e-6)
    noisy = densities.predicted(density, z, jax.random.key(1)).power
    assert (noisy / power).std() == pytest.approx(20**-0.5, rel=0.2)
