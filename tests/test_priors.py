"""Priors and the maps of unconstrained positions: densities that integrate to one, against scipy, and draws."""

import math

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import brainmass_kernels as bk
from brainmass_kernels.inference.positions import Position
from brainmass_kernels.inference.priors import Beta, HalfNormal, LogNormal, Normal, Uniform, as_prior

ANY, POSITIVE = (-math.inf, math.inf), (0.0, math.inf)
# The prior, its bounds, where it may be, and the same density by scipy, before it is cut off.
CASES = {
    "normal": (Normal(3.0, 0.5), None, ANY, scipy.stats.norm(3.0, 0.5)),
    "normal of what is positive": (Normal(0.5, 0.5), None, POSITIVE, scipy.stats.norm(0.5, 0.5)),
    "normal between positive bounds": (Normal(3.0, 0.5), (2.9, 5.0), ANY, scipy.stats.norm(3.0, 0.5)),
    "normal between bounds": (Normal(0.3, 0.5), (-1.0, 1.0), ANY, scipy.stats.norm(0.3, 0.5)),
    "lognormal": (LogNormal(4.0, 0.2), None, ANY, scipy.stats.lognorm(0.2, scale=4.0)),
    "lognormal between bounds": (LogNormal(4.0, 0.2), (3.0, 4.5), ANY, scipy.stats.lognorm(0.2, scale=4.0)),
    "halfnormal": (HalfNormal(2.0), None, ANY, scipy.stats.halfnorm(scale=2.0)),
    "halfnormal between bounds": (HalfNormal(2.0), (0.0, 1.5), ANY, scipy.stats.halfnorm(scale=2.0)),
    "uniform": (Uniform(-1.0, 2.0), None, ANY, scipy.stats.uniform(-1.0, 3.0)),
    "uniform between bounds": (Uniform(1.0, 9.0), (2.0, 8.0), ANY, scipy.stats.uniform(1.0, 8.0)),
    "beta": (Beta(2.0, 3.0), (-1.0, 3.0), ANY, scipy.stats.beta(2.0, 3.0, -1.0, 4.0)),
    "beta with a peak at a bound": (Beta(0.5, 1.5), (2.0, 5.0), ANY, scipy.stats.beta(0.5, 1.5, 2.0, 3.0)),
}


@pytest.fixture(params=CASES)
def case(request, x64):
    prior, bounds, natural, known = CASES[request.param]
    position = Position.of("x", prior, u.UNITLESS, bounds, natural, "'priors'")
    mass = known.cdf(position.high) - known.cdf(position.low)
    return position, known, mass


def slope(position, z):
    """The derivative of the map, by central differences in float64."""
    h = 1e-5
    return np.asarray(position.value(jnp.asarray(z + h)) - position.value(jnp.asarray(z - h))) / (2 * h)


def test_the_density_of_positions_is_that_of_values(case):
    position, known, mass = case
    z = np.linspace(-3.0, 3.0, 31)
    want = known.logpdf(np.asarray(position.value(jnp.asarray(z)))) - np.log(mass) + np.log(slope(position, z))
    np.testing.assert_allclose(position.log_prior(jnp.asarray(z)), want, rtol=1e-7, atol=1e-7)


def test_the_density_integrates_to_one(case):
    position, _, _ = case
    # Where what is positive is bounded by nothing, exp(z) leaves the normal's density at 15 and more.
    z = np.linspace(-80.0, 80.0, 160_001)
    density = np.exp(np.asarray(position.log_prior(jnp.asarray(z))))
    assert np.trapezoid(density, z) == pytest.approx(1.0, abs=1e-6)


def test_draws_have_the_density(case):
    position, known, mass = case
    values = np.asarray(position.value(position.sample(jax.random.key(1), (4000,))))
    low = known.cdf(position.low)
    assert scipy.stats.kstest(values, lambda x: (known.cdf(x) - low) / mass).pvalue > 1e-3


def test_quantiles_are_those_of_the_density(case):
    position, known, mass = case
    p = np.array([1e-9, 0.01, 0.3, 0.5, 0.9, 1 - 1e-9])
    want = known.ppf(known.cdf(position.low) + p * mass)
    found = position.prior.quantile(p, position.low, position.high)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-9)


def test_quantiles_far_out_keep_their_digits():
    found = Normal(0.0, 1.0).quantile([0.25, 0.5, 0.75], 9.0, 10.0)
    np.testing.assert_allclose(found, -scipy.stats.truncnorm(-10.0, -9.0).ppf([0.75, 0.5, 0.25]), rtol=1e-9)


def test_a_position_is_that_of_its_value(case):
    position, _, _ = case
    z = jnp.linspace(-4.0, 4.0, 9)
    np.testing.assert_allclose(position.of_value(position.value(z)), z, atol=1e-9)


def test_gradients_are_finite_far_out_and_in_float32(case):
    position, _, _ = case
    z = jnp.asarray([-30.0, 0.0, 30.0], jnp.float32)
    assert np.isfinite(jax.vmap(jax.grad(position.log_prior))(z)).all()


def test_a_prior_has_the_unit_of_its_parameter():
    prior = Normal(0.22 * u.kHz, 20 * u.Hz)
    assert prior.plain(u.Hz, "E_inp") == Normal(220.0, 20.0)
    assert as_prior((0.22 * u.kHz, 20 * u.Hz), "E_inp").plain(u.Hz, "E_inp") == Normal(220.0, 20.0)
    with jax.enable_x64(True):
        want = scipy.stats.norm(0.22, 0.02).logpdf(0.23)
        assert float(prior.log_prob(jnp.asarray(230.0) * u.Hz)) == pytest.approx(want)
        assert float(Beta(2, 3).log_prob(jnp.asarray(0.25), 0.0, 1.0)) == pytest.approx(
            scipy.stats.beta(2, 3).logpdf(0.25)
        )
        assert float(Uniform(0 * u.mV, 2 * u.mV).log_prob(jnp.asarray(3.0) * u.mV)) == -np.inf
    assert LogNormal(4 * u.mV, 0.1).plain(u.volt, "be") == LogNormal(0.004, 0.1)
    with pytest.raises(ValueError, match=r"priors: E_inp"):
        Normal(1 * u.mV, 1 * u.mV).plain(u.Hz, "E_inp")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normal(1.0, 0.0), "'width' of Normal got 0.0, but takes a positive number"),
        (lambda: Normal(np.nan, 1.0), "'centre' of Normal got nan, but takes a finite number"),
        (lambda: LogNormal(-2 * u.mV, 0.1), "'median' of LogNormal got .*, but takes a positive number"),
        (lambda: HalfNormal([1.0, 2.0]), "'width' of HalfNormal got .*, but takes a finite number"),
        (lambda: Uniform(3 * u.mV, 2 * u.mV), "takes low < high"),
        (lambda: Beta(0.0, 1.0), "'a' of Beta got 0.0, but takes a positive number"),
        (lambda: Beta(2.0, 2.0).sample(jax.random.key(0)), "takes finite ones"),
    ],
)
def test_a_prior_that_is_none_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("prior", "bounds", "natural", "message"),
    [
        (Uniform(2.0, 3.0), (1.0, 4.0), ANY, r"0 beyond 2 to 3 and does not cover the bounds 1 to 4"),
        (LogNormal(1.0, 1.0), (-1.0, 4.0), ANY, "does not cover the bounds -1 to 4"),
        (Normal(0.0, 1.0), (100.0, 200.0), ANY, "of whose mass the bounds 100 to 200 have"),
        (Beta(2.0, 2.0), None, ANY, r"takes bounds: give them in 'free'"),
        (Uniform(-3.0, -2.0), None, POSITIVE, "is nowhere between 0 and inf"),
    ],
)
def test_a_prior_that_does_not_cover_the_bounds_is_named(prior, bounds, natural, message):
    with pytest.raises(ValueError, match=message) as raised:
        Position.of("C", prior, u.UNITLESS, bounds, natural, "'priors'")
    assert "'priors' got" in str(raised.value)
    assert "'C'" in str(raised.value)


def test_the_modules_are_public():
    assert bk.priors.Normal is Normal
    assert bk.likelihoods.Gaussian.data_of == "a TimeSeries"
