"""The log density of parameters: an exact posterior, gradients, lanes, kernels, others' samplers, refusals."""

import dataclasses
import functools
import pathlib
import re
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import scipy.stats
from test_fit import FREQS, SHAKEN, Resonator
from test_fit_targets import RUN, STEPS, Follower

import brainmass_kernels as bk
from benchmarks.ledger import libtpu_lock
from brainmass_kernels.inference import likelihoods, priors

NOISY: dict[str, Any] = {**RUN, "noise": {"drive": 0.05 * SHAKEN}, "key": jax.random.key(3), "realisations": 2}
BOUNDS = {"f0": (2.0, 9.0), "damping": (0.05, 0.6)}


@functools.cache
def response() -> np.ndarray:
    """(K,) in mV, of a gain of 1."""
    return np.asarray(bk.simulate(Follower(), STEPS, RUN["dt"], inputs=RUN["inputs"], every=RUN["every"])["eeg"] / u.mV)


def data(sigma=0.02):
    noise = np.random.default_rng(0).normal(0.0, 0.02, response().shape)
    return bk.TimeSeries((1.3 * response() + noise) * u.mV, sigma=None if sigma is None else sigma * u.mV)


def of_gain(**more):
    return bk.log_density(Follower(), data(), {"gain": None}, **{"priors": {"gain": (1.0, 0.5)}, **RUN, **more})


def of_resonator(**more):
    return bk.log_density(Resonator(f0=5 * u.Hz), data(), {**BOUNDS}, **{**NOISY, **more})


# Right --------------------------------------------------------------------------------------------------------------


def test_a_conjugate_posterior_is_exact(x64):
    density = of_gain()
    x, y = (np.asarray(v, float) for v in (response(), data().values / u.mV))
    precision = 1 / 0.5**2 + x @ x / 0.02**2
    mean = (1 / 0.5**2 + x @ y / 0.02**2) / precision
    gain = np.linspace(0.2, 2.0, 13)
    got = np.asarray(density(density.to_position({"gain": gain})))
    want = scipy.stats.norm(mean, precision**-0.5).logpdf(gain)
    np.testing.assert_allclose(got - got[0], want - want[0], rtol=1e-5)
    whole = scipy.stats.norm(gain[:, None] * x, 0.02).logpdf(y).sum(-1) + scipy.stats.norm(1.0, 0.5).logpdf(gain)
    np.testing.assert_allclose(got, whole + np.log(0.5), rtol=1e-6)
    parts = density.log_prior({"gain": 0.3}) + density.log_likelihood({"gain": 0.3})
    assert float(density({"gain": 0.3})) == pytest.approx(float(parts))


def test_it_is_calibrated():
    """Parameters from the prior, data from these: the ranks in the posteriors are uniform, and not if rho is left out.

    The data are a leaf of the density, so that all posteriors are one run.
    """
    noise, z = np.random.default_rng(2).normal(0.0, 1.0, (300, len(response()))), jnp.linspace(-7.0, 7.0, 141)
    for t in range(1, noise.shape[1]):
        noise[:, t] = 0.6 * noise[:, t - 1] + 0.8 * noise[:, t]
    chosen = {"free": {"gain": (0.2, 3.0)}, "priors": {"gain": priors.Beta(2, 3)}, **RUN}
    for rho, calibrated in ((0.6, True), (None, False)):
        likelihood = likelihoods.Gaussian(0.3 * u.mV, rho=rho)
        density = bk.log_density(Follower(), data(), likelihood=likelihood, **chosen)
        true = density.sample_prior(jax.random.key(0), (300,))["gain"]
        gain = np.asarray(density.to_parameters({"gain": true})["gain"])
        values = jnp.asarray(gain[:, None] * response() + 0.3 * noise, jnp.float32)[..., None]
        logs = jax.vmap(lambda y, d=density: dataclasses.replace(d, data=(y,))({"gain": z}))(values)
        weights = np.exp(np.asarray(logs) - np.asarray(logs).max(1, keepdims=True))
        below = np.asarray(z) + 0.05 < np.asarray(true)[:, None]
        ranks = (weights * below).sum(1) / weights.sum(1)
        assert (scipy.stats.kstest(ranks, "uniform").pvalue > 1e-3) == calibrated


def test_a_gradient_is_that_of_differences(x64):
    likelihood = likelihoods.Gaussian(priors.HalfNormal(0.1 * u.mV), rho=priors.Normal(0.2, 0.3))
    chosen = {"f0": priors.LogNormal(5 * u.Hz, 0.2), "damping": priors.Beta(2, 3)}
    density = of_resonator(likelihood=likelihood, priors=chosen, implementation="scan")
    assert density.names == ("f0", "damping", "likelihood.sigma", "likelihood.rho")
    # The position, and two beside it along each axis, all in one run.
    steps = 1e-5 * np.concatenate([np.zeros((1, 4)), np.eye(4), -np.eye(4)])
    z = {name: jnp.asarray(0.1 * n - 0.2 + steps[:, n]) for n, name in enumerate(density.names)}
    gradient, at = jax.grad(lambda z: (density(z).sum(), density(z)), has_aux=True)(z)
    for n, name in enumerate(density.names):
        assert float(gradient[name][0]) == pytest.approx(float(at[1 + n] - at[5 + n]) / 2e-5, rel=1e-5), name


@pytest.fixture(scope="module")
def noisy():
    return of_resonator()


def test_chains_are_lanes(noisy):
    z = noisy.sample_prior(jax.random.key(0), (3,))
    every, gradients = jax.vmap(jax.value_and_grad(noisy))(z)
    for at in range(3):
        one, gradient = jax.value_and_grad(noisy)({name: x[at] for name, x in z.items()})
        np.testing.assert_allclose(one, every[at], rtol=1e-5)
        for name in z:
            np.testing.assert_allclose(gradient[name], gradients[name][at], rtol=1e-3, atol=1e-3)


def test_axes_broadcast_and_it_is_a_pytree(noisy):
    z = {"f0": jnp.linspace(-1, 1, 3)[:, None], "damping": jnp.zeros(2)}
    assert noisy(z).shape == (3, 2)
    np.testing.assert_allclose(noisy(z)[2, 1], noisy({"f0": 1.0, "damping": 0.0}), rtol=1e-5)
    passed = jax.jit(lambda density, z: density(z))(noisy, z)
    np.testing.assert_allclose(passed, noisy(z), rtol=1e-6)
    leaves, structure = jax.tree.flatten(noisy)
    assert structure == jax.tree.structure(of_resonator())
    np.testing.assert_array_equal(structure.unflatten(leaves)(z), noisy(z))


def test_positions_have_parameters_with_units(noisy):
    parameters = noisy.to_parameters(noisy.initial)
    assert parameters["f0"].unit == u.Hz
    assert float(parameters["f0"] / u.Hz) == pytest.approx(5.0, rel=1e-5)
    assert float(parameters["damping"]) == pytest.approx(0.15, rel=1e-5)
    z = noisy.sample_prior(jax.random.key(0), (5,))
    back = noisy.to_position(noisy.to_parameters(z))
    assert noisy.names == tuple(z) == tuple(back)
    for name in z:
        np.testing.assert_allclose(back[name], z[name], rtol=1e-4, atol=1e-4)


def test_noise_is_the_same_for_all_positions():
    a, b = of_resonator(), of_resonator(key=jax.random.key(4))
    z = {"f0": jnp.zeros(2), "damping": jnp.zeros(2)}
    assert float(a(z)[0]) == float(a(z)[1]) != float(b(z)[0])


def test_a_function_returns_log_likelihoods(noisy):
    """They are averaged over realisations as likelihoods."""
    values = jnp.asarray(data().values / u.mV, jnp.float32)

    def function(result):
        signal = result["eeg"] / u.mV
        return -0.5 * jnp.mean((signal - values.reshape(-1, 1, 1, 1)) ** 2, 0) / 0.1**2

    density = bk.log_density(Resonator(f0=5 * u.Hz), function, BOUNDS, record="eeg", **NOISY)
    z = {"f0": jnp.asarray(0.2), "damping": jnp.asarray(-0.3)}
    model = Resonator(f0=density.to_parameters(z)["f0"], damping=density.to_parameters(z)["damping"])
    run = bk.simulate(
        model, STEPS, RUN["dt"], inputs=RUN["inputs"], noise=NOISY["noise"], every=5,
        key=jax.random.split(NOISY["key"], 2),
    )  # fmt: skip
    squares = np.mean((np.asarray(run["eeg"] / u.mV) - np.asarray(values)[:, None]) ** 2, 0) / 0.1**2
    want = np.log(np.mean(np.exp(-0.5 * squares)))
    assert float(density.log_likelihood(z)) == pytest.approx(want, rel=1e-3)


def test_a_run_that_is_not_finite_has_no_density():
    density = bk.log_density(Follower(), data(), {"gain": (1.0, 1e37)}, **RUN)
    got, gradient = jax.vmap(jax.value_and_grad(density))({"gain": jnp.asarray([-20.0, 30.0])})
    assert np.isfinite(got[0])
    assert got[1] == -np.inf
    # The other chain has its gradient.
    assert np.isfinite(gradient["gain"][0])


# Kernels ------------------------------------------------------------------------------------------------------------


@needs.libtpu
@pytest.mark.parametrize("chains", [3, 200])
def test_all_chains_are_one_kernel_forward_and_one_back(noisy, chains):
    z = {name: jax.ShapeDtypeStruct((chains,), jnp.float32) for name in noisy.names}
    with libtpu_lock():
        compiled = bk.testing.compile_for("v5e", jax.vmap(jax.value_and_grad(noisy)), z)
    assert compiled.executable.as_text().count("tpu_custom_call") == 2


def loops(text: str) -> list[str]:
    """The loops of numba that a program calls."""
    return sorted(re.findall(r'custom_call_target="brainmass_kernels_numba_(forward|adjoint)', text))


@needs.numba
def test_all_chains_are_one_loop_on_the_cpu():
    density = of_gain(implementation="numba")
    compiled = jax.jit(jax.vmap(jax.value_and_grad(density))).lower({"gain": jnp.zeros(5)}).compile()
    assert loops(compiled.as_text()) == ["adjoint", "forward"]


@needs.numba
def test_the_implementation_is_chosen_for_several_chains():
    """The trace of a chain sees one lane, of which so short a run is faster by scan."""
    run = {"duration": 1000, "dt": 1 * u.ms, "every": 50, "inputs": {"E_inp": 60 * u.Hz}}
    assert bk.explain(bk.JansenRit(), **run).implementation == "scan"
    likelihood, series = likelihoods.Gaussian(1 * u.mV), bk.TimeSeries(np.arange(20.0) * u.mV)
    density = bk.log_density(bk.JansenRit(), series, {"C": (110, 130)}, likelihood=likelihood, transient=None, **run)
    lowered = jax.jit(jax.vmap(jax.value_and_grad(density))).lower({"C": jnp.zeros(8)})
    assert sorted(re.findall(r"brainmass_kernels_numba_(forward|adjoint)", lowered.as_text())) == ["adjoint", "forward"]


# Other people's samplers --------------------------------------------------------------------------------------------


def test_blackjax_takes_it():
    blackjax = pytest.importorskip("blackjax", reason="blackjax is not installed")
    density = of_gain()
    nuts = blackjax.nuts(density, step_size=0.02, inverse_mass_matrix=jnp.ones(1))

    def chain(key, z):
        def step(state, key):
            state, info = nuts.step(key, state)
            return state, (state.position["gain"], info.is_divergent)

        return jax.lax.scan(step, nuts.init(z), jax.random.split(key, 60))[1]

    z, divergent = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), 4), {"gain": jnp.full(4, 0.6)})
    assert not divergent.any()
    assert_posterior(density.to_parameters({"gain": z[:, 20:]})["gain"])


def of_two_parameters() -> bk.LogDensity:
    """That depend on each other."""
    true = bk.simulate(Resonator(f0=4.5 * u.Hz, damping=0.3), STEPS, RUN["dt"], inputs=RUN["inputs"], every=5)["eeg"]
    noise = np.random.default_rng(1).normal(0.0, 0.3, true.shape)
    target = bk.TimeSeries((np.asarray(true / u.mV) + noise) * u.mV, sigma=0.3 * u.mV)
    return bk.log_density(
        Resonator(f0=4.5 * u.Hz), target, {"f0": None, "damping": (0.05, 0.6)},
        priors={"f0": bk.priors.LogNormal(5 * u.Hz, 0.1), "damping": bk.priors.Beta(2, 2)}, **RUN,
    )  # fmt: skip


def test_two_parameters_against_a_grid(x64):
    """Means within 0.15 standard deviations, widths within 15%."""
    blackjax = pytest.importorskip("blackjax", reason="blackjax is not installed")
    density = of_two_parameters()
    axis = jnp.linspace(-9.0, 9.0, 201)
    logs = density({"f0": axis[:, None], "damping": axis})
    weights = np.exp(np.asarray(logs) - logs.max())
    assert weights[[0, -1]].max() < 1e-4 > weights[:, [0, -1]].max()
    marginals = {"f0": weights.sum(1), "damping": weights.sum(0)}
    warmup = blackjax.window_adaptation(blackjax.nuts, density)

    def chain(key, z):
        warm, draw = jax.random.split(key)
        (state, parameters), _ = warmup.run(warm, z, num_steps=200)
        kernel = blackjax.nuts(density, **parameters).step

        def step(state, key):
            return (state := kernel(key, state)[0]), state.position

        return jax.lax.scan(step, state, jax.random.split(draw, 300))[1]

    # BlackJAX itself promotes types.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        start = density.sample_prior(jax.random.key(1), (8,))
        draws = density.to_parameters(jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), 8), start))
    at = density.to_parameters(dict.fromkeys(density.names, axis))
    for name, marginal in marginals.items():
        values, known = (np.asarray(u.get_magnitude(x[name])) for x in (draws, at))
        mean = np.average(known, weights=marginal)
        sd = np.sqrt(np.average((known - mean) ** 2, weights=marginal))
        assert abs(values.mean() - mean) < 0.15 * sd, name
        assert 0.85 < values.std() / sd < 1.15, name


@needs.numba
def test_chains_of_blackjax_are_one_loop():
    blackjax = pytest.importorskip("blackjax", reason="blackjax is not installed")
    nuts = blackjax.nuts(of_gain(implementation="numba"), step_size=0.02, inverse_mass_matrix=jnp.ones(1))
    keys = jax.random.split(jax.random.key(0), 4)
    state = jax.vmap(nuts.init)({"gain": jnp.full(4, 0.6)})
    text = jax.jit(jax.vmap(nuts.step)).lower(keys, state).compile().as_text()
    # The integrator's gradient: one, whatever the number of chains.
    assert loops(text) == ["adjoint", "forward"]


def test_numpyro_takes_it():
    numpyro = pytest.importorskip("numpyro", reason="numpyro is not installed")
    density = of_gain()

    def model():
        flat = numpyro.distributions.ImproperUniform(numpyro.distributions.constraints.real, (), ())
        numpyro.factor("density", density({name: numpyro.sample(name, flat) for name in density.names}))

    # NumPyro itself promotes types.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mcmc = numpyro.infer.MCMC(
            numpyro.infer.NUTS(model), num_warmup=60, num_samples=60, num_chains=4, chain_method="vectorized",
            progress_bar=False,
        )  # fmt: skip
        mcmc.run(jax.random.key(0), init_params={"gain": jnp.full(4, 0.6)})
    assert_posterior(density.to_parameters(mcmc.get_samples(group_by_chain=True))["gain"])


def assert_posterior(gain):
    x, y = (np.asarray(v, float) for v in (response(), data().values / u.mV))
    precision = 1 / 0.5**2 + x @ x / 0.02**2
    mean, sd = (1 / 0.5**2 + x @ y / 0.02**2) / precision, precision**-0.5
    assert abs(np.mean(gain) - mean) < 0.4 * sd
    assert 0.7 < np.std(gain) / sd < 1.4


@pytest.fixture(scope="module")
def page():
    """The blocks of the page's code, and what the first of them leaves."""
    text = (pathlib.Path(__file__).parents[1] / "docs" / "posteriors.md").read_text()
    blocks, namespace = re.findall(r"```python\n(.*?)```", text, re.S), {}
    assert len(blocks) == 5
    run_block(blocks[0], namespace)
    run_block("start = {name: jnp.full(4, value) for name, value in density.initial.items()}", namespace)
    return blocks, namespace


def run_block(block: str, namespace: dict) -> None:
    """With the promotion that users have."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "posteriors.md", "exec"), namespace)


def test_the_page_runs(page):
    _, namespace = page
    assert namespace["density"].names == ("C", "be", "likelihood.sigma")
    assert np.isfinite(namespace["log_p"]).all()
    assert all(np.isfinite(x).all() for x in namespace["gradient"].values())


@pytest.mark.parametrize(("block", "sampler"), [(2, "blackjax"), (3, "numpyro")])
def test_the_page_samples(page, block, sampler):
    pytest.importorskip(sampler, reason=f"{sampler} is not installed")
    blocks, namespace = page
    run_block(blocks[block], namespace)
    if sampler == "blackjax":
        assert namespace["draws"]["C"].shape == (4, 10)
    else:
        assert namespace["mcmc"].get_samples()["be"].shape == (20,)


def test_the_page_has_several_subjects(page):
    blocks, namespace = page
    namespace = dict(namespace)
    run_block(blocks[4], namespace)
    assert namespace["of_three"].names == ("C", "C.group", "C.spread", "be", "likelihood.sigma")
    assert namespace["parameters"]["C"].shape == (8, 3)
    assert np.isfinite(namespace["log_p"]).all()


@pytest.mark.filterwarnings("ignore:R-hat")
def test_the_page_draws(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("blackjax", reason="blackjax is not installed")
    monkeypatch.chdir(tmp_path)
    blocks, namespace = page
    run_block(blocks[1], namespace)
    assert "4 chains of 100 draws by nuts, after 100 of warm-up" in capsys.readouterr().out
    assert namespace["new_data"].shape == (50, 80)
    assert namespace["posterior"].divergent.mean() < 0.05
    assert sorted(x.name for x in tmp_path.iterdir()) == ["posterior.npz", "posterior.png"]


# Refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"free": {"gian": None}}, ValueError, "unknown name in 'free' 'gian'; did you mean 'gain'"),
        ({"free": {}}, ValueError, "'free' names no parameter"),
        ({"free": ["gain"]}, TypeError, "'free' got list, but takes a dict"),
        ({"free": {"gain": (2.0, 1.0)}}, ValueError, "takes finite bounds, low < high, or None"),
        ({"priors": {"damping": (1, 1)}}, ValueError, "unknown free name in 'priors' 'damping'"),
        ({"priors": {}}, ValueError, "'priors' has nothing for 'gain', which has no bounds"),
        ({"priors": {"gain": 3.0}}, TypeError, "'priors' got 3.0 for 'gain', but takes one of bk.priors"),
        ({"free": {"gain": (1.0, 4.0)}, "priors": {"gain": priors.Uniform(2, 3)}}, ValueError, "does not cover"),
        ({"noise": {"drive": 1.0 * SHAKEN}}, ValueError, "'key' is missing, but this model has noise"),
        ({"free": {"noise.drive": (0.1, 1.0)}, "priors": {}}, ValueError, "'key' is missing"),
        ({"free": {"noise.drive": (-0.1, 1.0)}, "priors": {}}, ValueError, "a noise intensity is not negative"),
        ({"realisations": 0}, ValueError, "'realisations' got 0"),
        ({"predict": "guess"}, ValueError, "'predict' got 'guess'"),
        ({"key": 3}, TypeError, "'key' got 3"),
        ({"likelihood": likelihoods.Gaussian(0.0 * u.mV)}, ValueError, "'sigma' of Gaussian .* takes a positive"),
        ({"likelihood": likelihoods.Gaussian(np.nan)}, ValueError, "'sigma' of Gaussian for time series got nan"),
        ({"likelihood": likelihoods.Gaussian(1.0, rho=1.0)}, ValueError, "'rho' .* takes a number from -1 to 1"),
        ({"likelihood": likelihoods.Gaussian("1")}, TypeError, "takes a number or one of bk.priors"),
        ({"likelihood": likelihoods.Whittle(3)}, TypeError, "got Whittle for time series, .* is of a PowerSpectrum"),
        ({"likelihood": lambda result: 0.0}, TypeError, "a function of yours is the 'target'"),
        ({"group": ("gain",)}, ValueError, "'group' got gain, but 'target' has one of time series"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(change, error, message):
    arguments = {"target": data(), "free": {"gain": None}, "priors": {"gain": (1.0, 0.5)}, **RUN, **change}
    with pytest.raises(error, match=message):
        bk.log_density(Follower(), **arguments)


def test_a_series_without_a_sigma_is_asked_for_it():
    with pytest.raises(ValueError, match="'likelihood' is missing: time series says no 'sigma'"):
        bk.log_density(Follower(), data(sigma=None), {"gain": (0.1, 3.0)}, **RUN)
    with pytest.raises(ValueError, match="'scale' of time series got True, which solves for it"):
        bk.log_density(Follower(), bk.TimeSeries(response(), sigma=1.0, scale=True), {"gain": (0.1, 3.0)}, **RUN)
    with pytest.raises(ValueError, match="'sigma' of time series got"):
        data(sigma=np.nan)


def test_a_likelihood_that_is_nan_at_the_start_is_named():
    with pytest.raises(FloatingPointError, match="NaN at the start, gain = 1: broken returned it"):
        bk.log_density(Follower(), broken, {"gain": (0.1, 3.0)}, record="eeg", **RUN)
    with pytest.raises(FloatingPointError, match=r"NaN at the start, f0 = .* Hz: the simulation there is not finite"):
        bk.log_density(Resonator(f0=1e6 * u.Hz), data(), {"f0": (1.0, 2e6)}, **RUN)


def broken(result):
    return 0.0 * jnp.mean(result["eeg"] / u.mV, 0) + jnp.nan


def test_a_function_that_returns_something_else_is_told_what():
    with pytest.raises(TypeError, match="'target' returned shape"):
        bk.log_density(Follower(), lambda r: jnp.sum(r["eeg"] / u.mV), {"gain": (0.1, 3.0)}, record="eeg", **RUN)
    with pytest.raises(TypeError, match="a log likelihood is a plain number"):
        bk.log_density(Follower(), lambda r: r["eeg"][0], {"gain": (0.1, 3.0)}, record="eeg", **RUN)


def test_positions_of_other_names_are_refused(noisy):
    with pytest.raises(ValueError, match="unknown name in 'z' 'fo'; did you mean 'f0'"):
        noisy({"fo": 0.0, "damping": 0.0})
    with pytest.raises(ValueError, match="'z' has nothing for 'damping'"):
        noisy({"f0": 0.0})
    with pytest.raises(TypeError, match="'z' got ndarray, but takes a dict by name: f0, damping"):
        noisy(np.zeros(2))
    with pytest.raises(ValueError, match=r"'parameters' got f0 = 20.0, outside of 2 to 9 Hz"):
        noisy.to_position({"f0": 20.0 * u.Hz, "damping": 0.2})


def test_a_spectrum_is_asked_for_its_segments():
    spectrum = bk.PowerSpectrum(FREQS, 1 / FREQS)
    with pytest.raises(ValueError, match="'likelihood' is missing: of how many segments"):
        bk.log_density(Resonator(), spectrum, BOUNDS, **{**NOISY, "transient": None, "duration": 2 * u.second})
