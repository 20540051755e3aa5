"""Posteriors of several targets: values of their own, shared ones and groups, in one run."""

import functools
import math
import warnings
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import scipy.stats
from test_fit import FREQS, Resonator
from test_fit_targets import RUN, Follower
from test_log_density import BOUNDS, data, loops, response

import brainmass_kernels as bk
from benchmarks.ledger import libtpu_lock
from brainmass_kernels.inference import likelihoods, priors
from brainmass_kernels.inference.starting import begin_at

GAINS = np.array([1.4, 0.7, 1.0, 1.1])
SIGMA = 0.3
TIES: dict[str, dict[str, Any]] = {"own": {}, "shared": {"shared": ("gain",)}, "group": {"group": ("gain",)}}


@functools.cache
def series() -> np.ndarray:
    """(4, K) in mV."""
    noise = np.random.default_rng(4).normal(0.0, SIGMA, (len(GAINS), len(response())))
    return GAINS[:, None] * response() + noise


def of_gain(values=None, **more):
    target = bk.TimeSeries((series() if values is None else values) * u.mV, sigma=SIGMA * u.mV)
    return bk.log_density(Follower(), target, {"gain": None}, **{"priors": {"gain": (1.0, 0.5)}, **RUN, **more})


def vectors(density, count: int, seed: int = 0) -> dict[str, jax.Array]:
    return density.of_vectors(jnp.asarray(np.random.default_rng(seed).normal(0.0, 1.0, (count, density.size))))


# Right --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", list(TIES))
def test_a_density_is_that_of_its_formula(x64, tied):
    density = of_gain(**TIES[tied])
    z = vectors(density, 5)
    got = {name: np.asarray(x) for name, x in density.to_parameters(z).items()}
    gain = got["gain"]
    normal = scipy.stats.norm.logpdf
    # The prior of z is that of the value, and the logarithm of how fast the value moves with z.
    if tied == "group":
        mean, spread, raw = (np.asarray(z[n]) for n in ("gain.group", "gain.spread", "gain"))
        assert gain.shape == (5, 4)
        assert got["gain.group"].shape == got["gain.spread"].shape == (5,)
        np.testing.assert_allclose(got["gain.spread"], 0.5 * np.exp(spread))
        np.testing.assert_allclose(gain, 1.0 + 0.5 * mean[:, None] + 0.5 * np.exp(spread)[:, None] * raw)
        prior = normal(got["gain.group"], 1.0, 0.5) + math.log(0.5) + normal(raw).sum(1)
        prior += scipy.stats.halfnorm(scale=0.5).logpdf(got["gain.spread"]) + np.log(got["gain.spread"])
    else:
        assert gain.shape == ((5, 4) if tied == "own" else (5,))
        prior = normal(gain, 1.0, 0.5) + math.log(0.5)
        prior = prior.sum(1) if tied == "own" else prior
        gain = np.broadcast_to(gain.reshape(5, -1), (5, 4))
    want = normal(series(), gain[..., None] * response(), SIGMA).sum((1, 2))
    np.testing.assert_allclose(density.log_prior(z), prior, rtol=1e-6)
    np.testing.assert_allclose(density.log_likelihood(z), want, rtol=1e-5)
    np.testing.assert_allclose(density(z), want + prior, rtol=1e-5)
    back = density.to_position(density.to_parameters(z))
    for name in density.names:
        np.testing.assert_allclose(back[name], z[name], rtol=1e-6, atol=1e-6)


def test_one_subject_is_a_density_of_one_bit_for_bit():
    one, row = of_gain(series()[0]), of_gain(series()[:1], shared=("gain",))
    assert one.names == row.names
    z = one.sample_prior(jax.random.key(0), (3,))
    for a, b in zip(jax.vmap(jax.value_and_grad(one))(z), jax.vmap(jax.value_and_grad(row))(z)):
        assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    assert of_gain(series()[:1]).initial["gain"].shape == ()


@pytest.mark.parametrize("tied", list(TIES))
def test_subjects_in_another_order_are_the_same(tied):
    order = np.array([2, 0, 3, 1])
    density, other = of_gain(**TIES[tied]), of_gain(series()[order], **TIES[tied])
    z = vectors(density, 3, seed=1)
    turned = {name: x[:, order] if x.ndim == 2 else x for name, x in z.items()}
    (got, gradient), (want, expected) = (
        jax.vmap(jax.value_and_grad(d))(at) for d, at in ((other, turned), (density, z))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name, x in expected.items():
        np.testing.assert_allclose(gradient[name], x[:, order] if x.ndim == 2 else x, rtol=1e-3, atol=1e-2)


def test_a_gradient_is_that_of_differences(x64):
    """Of groups between bounds, and of the likelihood's noise, a group of what is positive."""
    likelihood = likelihoods.Gaussian(priors.HalfNormal(0.3 * u.mV), rho=priors.Normal(0.2, 0.3))
    target = bk.TimeSeries(series()[:2] * u.mV)
    group = {"f0": priors.HalfNormal(0.3), "likelihood.sigma": None}
    density = bk.log_density(
        Resonator(f0=5 * u.Hz), target, BOUNDS, likelihood=likelihood, group=group, shared="damping",
        priors={"damping": priors.Beta(2, 3)}, implementation="scan", **RUN,
    )  # fmt: skip
    assert density.names == (
        "f0", "f0.group", "f0.spread", "damping",
        "likelihood.sigma", "likelihood.sigma.group", "likelihood.sigma.spread", "likelihood.rho",
    )  # fmt: skip
    base = np.random.default_rng(2).normal(0.0, 0.5, density.size)
    steps = 1e-5 * np.concatenate([np.zeros((1, density.size)), np.eye(density.size), -np.eye(density.size)])
    z = density.of_vectors(jnp.asarray(base + steps))
    gradient, at = jax.grad(lambda z: (density(z).sum(), density(z)), has_aux=True)(z)
    n = density.size
    differences = np.asarray(at[1 : n + 1] - at[n + 1 :]) / 2e-5
    np.testing.assert_allclose(density.to_vectors(gradient)[0], differences, rtol=1e-5, atol=1e-5)
    parameters = density.to_parameters(z)
    assert [x.unit for x in (parameters["f0"], parameters["f0.group"], parameters["likelihood.sigma"])] == [
        u.Hz, u.Hz, u.mV,
    ]  # fmt: skip
    mean, spread = (float(u.get_magnitude(parameters[f"f0.{x}"])[0]) for x in ("group", "spread"))
    logit = scipy.special.logit(np.log(np.asarray(parameters["f0"] / u.Hz)[0] / 2) / math.log(4.5))
    middle = scipy.special.logit(math.log(mean / 2) / math.log(4.5))
    np.testing.assert_allclose(logit, middle + spread * np.asarray(z["f0"][0]), rtol=1e-6)


def targets_of(kind: str):
    rng = np.random.default_rng(6)
    power = rng.gamma(5.0, 0.2, (3, len(FREQS)))
    spectra, evoked = bk.PowerSpectrum(FREQS, power), bk.TimeSeries(rng.normal(0.0, 0.2, (3, 40)) * u.mV)
    gain = {"gain": priors.LogNormal(1.0, 1.0)}
    if kind == "whittle":
        return spectra, likelihoods.Whittle(5, **gain)
    if kind == "student":
        return spectra, likelihoods.StudentT(0.2, background=priors.LogNormal(0.1, 1.0))
    gaussian = likelihoods.Gaussian(0.2 * u.mV, rho=priors.Uniform(-0.9, 0.9))
    return evoked, gaussian


def some(target, number: int):
    """One of the subjects."""
    if isinstance(target, bk.PowerSpectrum):
        return bk.PowerSpectrum(FREQS, target.power[number])
    return bk.TimeSeries(target.values[number])


@pytest.mark.parametrize("kind", ["whittle", "student", "gaussian"])
def test_values_of_their_own_are_so_many_densities(kind, x64):
    target, likelihood = targets_of(kind)
    if kind == "gaussian":
        run = {**RUN, "duration": 200, "every": 5}
    else:
        run = {"duration": 2 * u.second, "dt": 10 * u.ms, "transient": None, "predict": "linear",
               "noise": {"drive": 1.0 * u.mV * u.second**0.5}}  # fmt: skip
    make = functools.partial(
        bk.log_density, Resonator(f0=5 * u.Hz), free={"f0": (2.0, 9.0)}, likelihood=likelihood, **run
    )
    density = make(target)
    z = vectors(density, 2)
    parts = [make(some(target, n))({name: x[:, n] for name, x in z.items()}) for n in range(3)]
    np.testing.assert_allclose(density(z), np.sum(parts, 0), rtol=1e-6)


def test_networks_and_joint_targets_have_subjects():
    rng = np.random.default_rng(7)
    weights = rng.uniform(0.0, 0.3, (3, 3)).astype(np.float32)
    network = bk.Network(bk.Hopf(a=-0.05, w=0.6), weights, source="x", target="x_inp", k=0.3)
    matrices = np.array([np.eye(3) * 0.6 + 0.4, np.eye(3) * 0.9 + 0.1], np.float32)
    values = rng.normal(0.0, 0.1, (2, 20, 3))
    run: dict[str, Any] = {
        "noise": {"x_inp": 0.1 * u.ms**0.5}, "duration": 80, "dt": 0.5 * u.ms, "transient": None, "every": 4,
        "record": {"fc": "x", "series": "y"}, "key": jax.random.key(0), "realisations": 2,
        "free": {"a": (-0.2, 0.0), "coupling.k": (0.05, 3.0)},
        "likelihood": {"fc": bk.likelihoods.FisherZ(priors.HalfNormal(0.3)), "series": bk.likelihoods.Gaussian(0.1)},
    }  # fmt: skip

    def of(*chosen):
        many = list(chosen) if len(chosen) > 1 else chosen[0]
        joint = bk.Joint({"fc": bk.Connectivity(matrices[many]), "series": bk.TimeSeries(values[many])})
        return bk.log_density(network, joint, **run)

    density = of(0, 1)
    assert density.names == ("a", "coupling.k", "likelihood.fc.sigma")
    z = vectors(density, 2)
    parts = [of(n)({name: x[:, n] for name, x in z.items()}) for n in range(2)]
    np.testing.assert_allclose(density(z), np.sum(parts, 0), rtol=1e-4)


# One run ------------------------------------------------------------------------------------------------------------


@needs.numba
@pytest.mark.parametrize("tied", list(TIES))
def test_all_chains_of_all_subjects_are_one_loop(tied):
    density = of_gain(implementation="numba", **TIES[tied])
    z = vectors(density, 5)
    compiled = jax.jit(jax.vmap(jax.value_and_grad(density))).lower(z).compile()
    assert loops(compiled.as_text()) == ["adjoint", "forward"]


@needs.libtpu
def test_all_chains_of_all_subjects_are_one_kernel():
    density = of_gain(**TIES["group"])
    z = jax.eval_shape(lambda: vectors(density, 5))
    with libtpu_lock():
        compiled = bk.testing.compile_for("v5e", jax.vmap(jax.value_and_grad(density)), z)
    assert compiled.executable.as_text().count("tpu_custom_call") == 2


# Draws --------------------------------------------------------------------------------------------------------------


def marginals() -> dict[str, tuple[float, float]]:
    """Means and standard deviations of the group's mean and spread and of each gain, on a grid in float64.

    Of a Gaussian likelihood the gain of a subject is known as a Gaussian itself, and sums out in closed form.
    """
    x, y = np.asarray(response(), float), series()
    best, width = y @ x / (x @ x), SIGMA / math.sqrt(x @ x)
    mean, spread = np.meshgrid(np.linspace(-1.0, 3.0, 401), np.linspace(0.002, 2.5, 800), indexing="ij")
    log = scipy.stats.norm.logpdf(mean, 1.0, 0.5) - 0.5 * (spread / 0.5) ** 2
    for own in best:
        log = log + scipy.stats.norm.logpdf(own, mean, np.hypot(spread, width))
    weights = np.exp(log - log.max())

    def of(first, second=None) -> tuple[float, float]:
        centre = np.average(first, weights=weights)
        square = np.average(first**2 if second is None else second, weights=weights)
        return float(centre), math.sqrt(square - centre**2)

    found = {"gain.group": of(mean), "gain.spread": of(spread)}
    for number, own in enumerate(best):
        variance = 1 / (1 / spread**2 + 1 / width**2)
        centre = variance * (mean / spread**2 + own / width**2)
        found[f"gain[{number}]"] = of(centre, centre**2 + variance)
    return found


@functools.cache
def group_draws(method: str) -> bk.Posterior:
    pytest.importorskip("blackjax", reason="blackjax is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        chosen = {"draws": 400, "warmup": 200, "chains": 8} if method == "nuts" else {"draws": 600, "chains": 4}
        target = bk.TimeSeries(series() * u.mV, sigma=SIGMA * u.mV)
        arguments = {"priors": {"gain": (1.0, 0.5)}, "group": ("gain",), **RUN}
        return bk.sample(
            Follower(), target, {"gain": None}, method=method, key=jax.random.key(3), **arguments, **chosen
        )


@pytest.mark.parametrize("method", ["nuts", "smc"])
def test_a_hierarchical_posterior_is_that_of_a_grid(method):
    summary = group_draws(method).summary()
    known = marginals()
    assert set(summary) == set(known)
    for name, (mean, sd) in known.items():
        row = summary[name]
        assert abs(float(row.mean) - mean) < 0.12 * sd, name
        assert 0.85 < float(row.sd) / sd < 1.15, name


def test_draws_name_each_subject(tmp_path):
    posterior = group_draws("nuts")
    assert posterior["gain"].shape == (8, 400, 4)
    np.testing.assert_array_equal(posterior["gain[2]"], posterior["gain"][..., 2])
    assert "gain[3]" in repr(posterior)
    with pytest.raises(ValueError, match=r"unknown parameter 'gain\.spred'; did you mean 'gain\.spread'"):
        posterior["gain.spred"]
    posterior.save(tmp_path / "group.npz")
    density = of_gain(**TIES["group"])
    back = bk.Posterior.load(tmp_path / "group.npz", density)
    np.testing.assert_array_equal(back["gain[1]"], posterior["gain[1]"])
    assert list(back.summary()) == list(posterior.summary())
    with pytest.raises(ValueError, match=r"these draws are of gain, gain\.group, gain\.spread"):
        bk.Posterior.load(tmp_path / "group.npz", of_gain())
    predictions = back.predict(6)
    assert [np.shape(x.values) for x in predictions] == [(6, len(response()))] * 4
    # Of the first draw, of each subject: what a run of its gain is.
    first = np.asarray(back["gain"])[0, 0]
    for own, prediction in zip(first, predictions):
        np.testing.assert_allclose(np.asarray(prediction.values / u.mV)[0], own * response(), rtol=1e-4, atol=1e-5)
    noisy = back.predict(6, key=jax.random.key(0))
    both = [np.asarray(x.values / u.mV) - np.asarray(y.values / u.mV) for x, y in zip(noisy, predictions)]
    assert 0.8 < np.std(both) / SIGMA < 1.2
    assert abs(np.corrcoef(both[0].ravel(), both[1].ravel())[0, 1]) < 0.3


def test_draws_have_a_figure_and_a_form_for_arviz():
    posterior = group_draws("nuts")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = posterior.plot()
    panels = figure.subfigs[1].axes
    assert [ax.get_legend_handles_labels()[1][-1] for ax in panels] == [f"time series [{n}]" for n in range(4)]
    pytest.importorskip("arviz", reason="arviz is not installed")
    variables = posterior.to_arviz()["posterior"]
    assert variables["gain"].dims == ("chain", "draw", "target")


def test_draws_begin_at_a_fit_of_the_same_subjects():
    pytest.importorskip("blackjax", reason="blackjax is not installed")
    target = bk.TimeSeries(series() * u.mV, sigma=SIGMA * u.mV)
    fit = bk.fit(Follower(), target, {"gain": (0.1, 3.0)}, starts=2, steps=3, key=jax.random.key(0), **RUN)
    density = of_gain(**TIES["group"])
    found = density.to_parameters(density.of_vectors(jnp.asarray(begin_at(density, fit, 3, 0, jax.random.key(0)))))
    best = np.asarray(fit.parameters["gain"])
    np.testing.assert_allclose(np.asarray(found["gain"])[0], best, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(found["gain.group"])[0], np.median(best), rtol=1e-3)
    rows = begin_at(density, {"gain": GAINS}, 3, 0, jax.random.key(0))
    found = density.to_parameters(density.of_vectors(jnp.asarray(rows)))
    np.testing.assert_allclose(found["gain"], np.tile(GAINS, (3, 1)), rtol=1e-5)
    with pytest.raises(ValueError, match="'start' got a fit to 4 targets, but this posterior is of 3"):
        begin_at(of_gain(series()[:3]), fit, 3, 0, jax.random.key(0))


def test_other_samplers_take_it():
    numpyro = pytest.importorskip("numpyro", reason="numpyro is not installed")
    blackjax = pytest.importorskip("blackjax", reason="blackjax is not installed")
    density = of_gain(**TIES["group"])
    start = {name: jnp.broadcast_to(x, (2, *x.shape)) for name, x in density.initial.items()}
    nuts = blackjax.nuts(density, step_size=0.3, inverse_mass_matrix=jnp.ones(density.size))
    state, _ = jax.jit(jax.vmap(nuts.step))(jax.random.split(jax.random.key(0), 2), jax.vmap(nuts.init)(start))
    np.testing.assert_allclose(state.logdensity, density(state.position), rtol=1e-4)

    def model():
        z = {}
        for name, x in density.initial.items():
            flat = numpyro.distributions.ImproperUniform(numpyro.distributions.constraints.real, x.shape, ())
            z[name] = numpyro.sample(name, flat)
        numpyro.factor("density", density(z))

    # NumPyro itself promotes types.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mcmc = numpyro.infer.MCMC(
            numpyro.infer.NUTS(model, max_tree_depth=3), num_warmup=3, num_samples=4, num_chains=2,
            chain_method="vectorized", progress_bar=False,
        )  # fmt: skip
        mcmc.run(jax.random.key(0), init_params=start)
    assert density.to_parameters(mcmc.get_samples(group_by_chain=True))["gain"].shape == (2, 4, 4)


# Refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shared": ("gian",)}, ValueError, "unknown name in 'shared' 'gian'; did you mean 'gain'"),
        ({"group": ("gian",)}, ValueError, "unknown name in 'group' 'gian'; did you mean 'gain'"),
        ({"shared": "gain", "group": {"gain": None}}, ValueError, "'group' got gain, which 'shared' has too"),
        ({"group": {"gain": 0.3}}, TypeError, "'group' got 0.3 for 'gain', but takes the prior of the spread"),
        ({"group": {"gain": priors.HalfNormal(1 * u.mV)}}, ValueError, "gain.spread"),
        ({"group": {"gain": priors.Normal(-9.0, 0.1)}}, ValueError, "'group' got .* of whose mass"),
    ],
)
def test_a_wrong_tie_is_named(change, error, message):
    with pytest.raises(error, match=message):
        of_gain(**change)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="'group' got gain, but 'target' has one of time series"):
        bk.log_density(Follower(), data(), {"gain": (0.1, 3.0)}, group=("gain",), **RUN)


def test_a_likelihood_that_is_nan_at_the_start_is_named_with_each_subject():
    target = bk.TimeSeries(series()[:2] * u.mV, sigma=SIGMA * u.mV)
    with pytest.raises(FloatingPointError, match=r"NaN at the start, f0\[0\] = 1e\+06 Hz, f0\[1\] = 1e\+06 Hz"):
        bk.log_density(Resonator(f0=1e6 * u.Hz), target, {"f0": (1.0, 2e6)}, **RUN)


def test_positions_of_another_shape_are_refused():
    density = of_gain()
    with pytest.raises(ValueError, match=r"'z' got shape \(3,\) for 'gain', of which each of 4 targets has its own"):
        density({"gain": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"'parameters' got shape \(\) for 'gain'"):
        density.to_position({"gain": 1.0})
