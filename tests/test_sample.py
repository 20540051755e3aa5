"""Draws from posteriors: exact ones, a grid, calibration, seeds, interrupts, lanes, files, refusals."""

import dataclasses
import functools
import json
import math
import re
import warnings
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import scipy.stats
from test_fit import Resonator
from test_fit_targets import RUN, Follower
from test_log_density import BOUNDS, NOISY, broken, data, of_two_parameters, response

import brainmass_kernels as bk
from brainmass_kernels.inference import running
from brainmass_kernels.inference.sample import METHODS
from brainmass_kernels.inference.starting import begin_at
from brainmass_kernels.inference.warmup import DRAW, END, FAST, SLOW, Metric, Window, schedule

pytest.importorskip("blackjax", reason="blackjax is not installed")

SHORT: dict[str, Any] = {"chains": 4, "draws": 60, "warmup": 60, "key": jax.random.key(1)}
NAMES = ("gain", "likelihood.sigma")


@functools.cache
def of_gain() -> bk.LogDensity:
    return bk.log_density(Follower(), data(), {"gain": None}, priors={"gain": (1.0, 0.5)}, **RUN)


@functools.cache
def of_two() -> bk.LogDensity:
    """A gain, and the width of the noise."""
    likelihood = bk.likelihoods.Gaussian(bk.priors.HalfNormal(0.1 * u.mV))
    return bk.log_density(
        Follower(), data(), {"gain": (0.2, 4.0)}, priors={"gain": (1.0, 0.5)}, likelihood=likelihood, **RUN
    )


def quiet(*arguments, **named) -> bk.Posterior:
    """So few draws that R-hat may be above 1.01."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return bk.sample(*arguments, **named)


@functools.cache
def short(method: str = "nuts") -> bk.Posterior:
    return quiet(of_two(), method=method, **SHORT)


def values(posterior, name: str) -> np.ndarray:
    return np.asarray(u.get_magnitude(posterior[name]), float)


def same(a, b) -> bool:
    """Bit for bit."""
    return all(np.array_equal(a.z[name], b.z[name]) for name in a.z)


# Right --------------------------------------------------------------------------------------------------------------


def exact() -> tuple[float, float]:
    """Mean and standard deviation of the gain, of a Gaussian prior and a Gaussian likelihood."""
    x, y = (np.asarray(v, float) for v in (response(), data().values / u.mV))
    precision = 1 / 0.5**2 + x @ x / 0.02**2
    return (1 / 0.5**2 + x @ y / 0.02**2) / precision, precision**-0.5


@pytest.mark.parametrize("method", ["nuts", "chees", "smc"])
def test_a_conjugate_posterior_is_exact_within_its_own_error(method):
    posterior = bk.sample(of_gain(), method=method, chains=8, draws=400, warmup=200, key=jax.random.key(0))
    mean, sd = exact()
    row = posterior.summary()["gain"]
    assert row.r_hat < 1.01
    assert min(row.ess_bulk, row.ess_tail) > 400
    assert abs(row.mean - mean) < 4 * sd / math.sqrt(row.ess_bulk)
    assert abs(row.sd / sd - 1) < 4 / math.sqrt(2 * row.ess_bulk)
    low, high = scipy.stats.norm(mean, sd).ppf([0.05, 0.95])
    assert abs(row.low - low) < 0.15 * sd > abs(row.high - high)


@pytest.mark.parametrize("method", list(METHODS))
def test_two_parameters_against_a_grid(method, x64):
    """Means within 0.15 standard deviations, widths within 15%, correlations within 0.1, of a grid in float64."""
    density = of_two_parameters()
    axis = jnp.linspace(-9.0, 9.0, 201)
    logs = np.asarray(density({"f0": axis[:, None], "damping": axis}))
    weights = np.exp(logs - logs.max())
    posterior = bk.sample(density, method=method, chains=8, draws=300, warmup=300, key=jax.random.key(2))
    at = density.to_parameters(dict.fromkeys(density.names, axis))
    first, second = (np.asarray(u.get_magnitude(at[name])) for name in density.names)
    x, y = (values(posterior, name) for name in density.names)
    moments = {}
    for n, (known, marginal, got) in enumerate(((first, weights.sum(1), x), (second, weights.sum(0), y))):
        mean = np.average(known, weights=marginal)
        sd = math.sqrt(np.average((known - mean) ** 2, weights=marginal))
        assert abs(got.mean() - mean) < 0.15 * sd
        assert 0.85 < got.std() / sd < 1.15
        moments[n] = (known - mean) / sd
    correlation = np.sum(weights * np.outer(moments[0], moments[1])) / weights.sum()
    assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1] - correlation) < 0.1
    assert all(row.r_hat < 1.02 for row in posterior.summary().values())


def test_ranks_are_uniform():
    """Simulation-based calibration (Talts et al. 2018): parameters of the prior rank uniformly among the draws."""
    likelihood, count, noise = bk.likelihoods.Gaussian(0.3 * u.mV), 120, np.random.default_rng(5)
    density = bk.log_density(
        Follower(), data(), {"gain": None}, priors={"gain": (1.0, 0.5)}, likelihood=likelihood, **RUN
    )
    true = density.sample_prior(jax.random.key(3), (count,))["gain"]
    gains, ranks = np.asarray(density.to_parameters({"gain": true})["gain"]), []
    for n, gain in enumerate(gains):
        series = gain * response() + noise.normal(0.0, 0.3, response().shape)
        other = dataclasses.replace(density, data=(jnp.asarray(series, jnp.float32)[:, None],))
        posterior = quiet(other, chains=4, draws=50, warmup=100, screen=0, key=jax.random.key(n))
        # Draws far enough apart to be independent, 39 of them.
        some = values(posterior, "gain").T[::5].ravel()[:39]
        ranks.append(int((some < gain).sum()))
    counts = np.histogram(ranks, np.linspace(0, 40, 9))[0]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    # The same ranks of posteriors that are too narrow by half would not be.
    wrong = scipy.stats.norm.cdf(2 * scipy.stats.norm.ppf((np.array(ranks) + 0.5) / 40))
    assert scipy.stats.chisquare(np.histogram(wrong, np.linspace(0, 1, 9))[0]).pvalue < 1e-3


def test_several_modes_are_weighed():
    """Two modes of different weights, which chains do not cross, and particles of "smc" do."""

    def function(result):
        gain = jnp.max(result["eeg"] / u.mV, 0) / np.max(response())
        narrow = -0.5 * ((gain - 0.6) / 0.02) ** 2 + math.log(0.3)
        return jnp.logaddexp(narrow, -0.5 * ((gain - 1.6) / 0.02) ** 2 + math.log(0.7))

    density = bk.log_density(Follower(), function, {"gain": (0.1, 2.5)}, record="eeg", **RUN)
    posterior = quiet(density, method="smc", chains=4, draws=500, key=jax.random.key(0))
    upper = values(posterior, "gain") > 1.1
    assert abs(upper.mean() - 0.7) < 0.06
    for name, mean in (("lower", 0.6), ("upper", 1.6)):
        part = values(posterior, "gain")[upper == (name == "upper")]
        assert abs(part.mean() - mean) < 0.005
        assert 0.85 < part.std() / 0.02 < 1.15
    # The evidence: the mean likelihood under a uniform prior.
    known = math.log(0.02 * math.sqrt(2 * math.pi) / 2.4)
    assert abs(np.mean(posterior.settings["log_evidence"]) - known) < 0.1
    stuck = quiet(density, start={"gain": np.array([0.6, 1.6, 0.6, 1.6])}, **SHORT)
    assert stuck.summary()["gain"].r_hat > 1.5
    assert "the chains do not agree yet" in repr(stuck)


# The same again -----------------------------------------------------------------------------------------------------


def test_a_key_fixes_the_draws_bit_for_bit():
    assert same(short(), quiet(of_two(), **SHORT))
    assert not same(short(), quiet(of_two(), **{**SHORT, "key": jax.random.key(2)}))


def test_draws_do_not_depend_on_chunks(monkeypatch):
    monkeypatch.setattr(running, "_SECONDS", 1e-9)
    assert same(short(), quiet(of_two(), **SHORT))


def interrupt_at(step: int):
    def progress(report) -> None:
        if report.step >= step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("method", "at"), [("nuts", 20), ("nuts", 100), ("chees", 80), ("mclmc", 80), ("smc", 3)])
def test_what_was_interrupted_resumes_with_the_same_draws(method, at, tmp_path, monkeypatch):
    path, whole = tmp_path / "chains.npz", short(method)
    monkeypatch.setattr(running, "_APART", 0.0)
    monkeypatch.setattr(running, "_SECONDS", 1e-9)
    with pytest.raises(KeyboardInterrupt):
        quiet(of_two(), method=method, checkpoint=path, progress=interrupt_at(at), **SHORT)
    steps = []
    resumed = quiet(of_two(), method=method, checkpoint=path, progress=lambda r: steps.append(r.step), **SHORT)
    assert same(resumed, whole)
    assert min(steps) > at - (method == "smc")
    np.testing.assert_array_equal(resumed.log_density, whole.log_density)
    assert resumed.settings == whole.settings
    # What is done runs no step.
    steps.clear()
    assert same(
        quiet(of_two(), method=method, checkpoint=path, progress=lambda r: steps.append(r.step), **SHORT), whole
    )
    assert not steps


def test_a_checkpoint_goes_on_with_more_draws(tmp_path):
    path = tmp_path / "chains.npz"
    quiet(of_two(), checkpoint=path, **{**SHORT, "draws": 25})
    assert same(quiet(of_two(), checkpoint=path, **SHORT), short())
    fewer = quiet(of_two(), checkpoint=path, **{**SHORT, "draws": 25})
    np.testing.assert_array_equal(fewer.z["gain"], short().z["gain"][:, :25])


def test_a_checkpoint_of_another_run_says_what_differs(tmp_path):
    path = tmp_path / "chains.npz"
    quiet(of_two(), checkpoint=path, **SHORT)
    for change, said in (
        ({"key": jax.random.key(5)}, "'key'"), ({"warmup": 61}, r"'warmup' \(60 then, 61 now\)"),
        ({"method": "chees"}, r"'method' \(Nuts\(.*then, Chees\("), ({"target_acceptance": 0.9}, "'method'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"'checkpoint' got chains.npz, .*of another run. What differs: .*{said}"):
            quiet(of_two(), checkpoint=path, **{**SHORT, **change})
    other = dataclasses.replace(of_two(), data=(of_two().data[0] + 0.1,))
    with pytest.raises(ValueError, match=r"of another run. What differs: .*'data'"):
        quiet(other, checkpoint=path, start={"gain": 1.3}, **SHORT)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"chains.npz: not a checkpoint of chains, or damaged .*; delete it"):
        quiet(of_two(), checkpoint=path, **SHORT)


# Lanes --------------------------------------------------------------------------------------------------------------


@needs.numba
@pytest.mark.parametrize("method", ["nuts", "chees", "mclmc"])
def test_all_chains_are_one_loop_forward_and_one_back(method):
    density, sampler = of_two().for_chains(200), METHODS[method]()
    assert density.problem.options["implementation"] == "numba"
    z = jnp.zeros((200, 2))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = jax.eval_shape(lambda z: sampler.begin(density, z, jax.random.key(0)), z)
        stages = jax.ShapeDtypeStruct((running.CHUNK,), jnp.int32)
        lowered = running.advance.lower(sampler, density, state, jax.random.key(0), 0, stages, 1, None)
        text = lowered.compile().as_text()
    # MCLMC's integrator has two gradients in a step.
    loops = re.findall(r'custom_call_target="brainmass_kernels_numba_(forward|adjoint)', text)
    assert (
        sorted(loops) == ["adjoint", "forward"] if method != "mclmc" else sorted(set(loops)) == ["adjoint", "forward"]
    )


def test_a_density_for_chains_runs_where_so_many_are_fast():
    one, many = of_gain(), of_gain().for_chains(512)
    lanes = {"gain": jnp.zeros((1, 512))}
    assert many.problem.options["implementation"] == many.problem.run(lanes, many.keys, bk.explain).implementation
    assert one.problem.options["implementation"] is None
    named = bk.log_density(
        Follower(), data(), {"gain": None}, priors={"gain": (1.0, 0.5)}, implementation="scan", **RUN
    )
    assert named.for_chains(512) is named
    np.testing.assert_allclose(one({"gain": 0.4}), many({"gain": 0.4}), rtol=1e-5)


# The warm-up --------------------------------------------------------------------------------------------------------


def test_the_windows_are_stans():
    with jax.numpy_dtype_promotion("standard"):
        stages, few = schedule(1000), schedule(10)
    assert stages[:75].tolist() == [FAST] * 75
    assert stages[-50:].tolist() == [FAST] * 50
    assert np.flatnonzero(stages == END).tolist() == [99, 149, 249, 449, 949]
    assert set(stages) == {FAST, SLOW, END}
    assert set(few) == {FAST}
    assert DRAW not in stages


def test_a_metric_is_the_covariance_within_chains():
    """Of chains in different places, each is about its own."""
    rng = np.random.default_rng(0)
    root = np.array([[2.0, 0.0, 0.0], [0.5, 0.1, 0.0], [0.0, 0.3, 1.0]])
    z = rng.normal(size=(400, 6, 3)) @ root.T + 50 * np.arange(6)[None, :, None]
    window = Window.empty(jnp.zeros((6, 3)))
    with_positions = jax.jit(Window.with_positions)
    for positions in z:
        window = with_positions(window, jnp.asarray(positions, jnp.float32))
    metric = Metric.of(window)
    within = np.mean([np.cov(z[:, n].T) for n in range(6)], 0)
    np.testing.assert_allclose(metric.covariance, within, rtol=0.01, atol=0.01)
    white = np.asarray(metric.whitened(jnp.asarray(z[:, 0], jnp.float32)))
    np.testing.assert_allclose(np.cov(white.T), np.eye(3), atol=0.15)
    # The narrowest direction, of 0.1 or so, ruled the step in the identity metric.
    narrowest = math.sqrt(np.linalg.eigvalsh(within)[0])
    assert float(metric.stretch(Metric.unit(3))) == pytest.approx(1 / narrowest, rel=0.1)
    assert float(metric.stretch(metric)) == pytest.approx(1.0, rel=1e-3)


# A posterior --------------------------------------------------------------------------------------------------------


def test_a_posterior_is_a_mapping_with_units():
    posterior = short()
    assert tuple(posterior) == NAMES == tuple(posterior.z)
    assert posterior.shape == posterior["gain"].shape == posterior.log_density.shape == (4, 60)
    assert posterior["likelihood.sigma"].unit == u.mV
    again = of_two()({name: jnp.asarray(x) for name, x in posterior.z.items()})
    np.testing.assert_allclose(again, posterior.log_density, rtol=1e-4)
    known = of_two().to_position({name: posterior[name][0] for name in NAMES})
    np.testing.assert_allclose(known["gain"], posterior.z["gain"][0], rtol=1e-3, atol=1e-3)
    assert posterior.settings["gradients"] > posterior.gradients.sum() > 0
    with pytest.raises(ValueError, match="unknown parameter 'gian'; did you mean 'gain'"):
        posterior["gian"]


def test_a_summary_is_a_table():
    posterior, summary = short(), short().summary()
    x = values(posterior, "likelihood.sigma")
    row = summary["likelihood.sigma"]
    assert row.mean.unit == row.high.unit == u.mV
    assert float(row.mean / u.mV) == pytest.approx(x.mean())
    assert float(row.sd / u.mV) == pytest.approx(x.std(ddof=1))
    assert float(row.high / u.mV) == pytest.approx(np.quantile(x, 0.95))
    text = repr(posterior)
    assert "4 chains of 60 draws by nuts, after 60 of warm-up; acceptance 0." in text
    assert re.search(r"likelihood\.sigma \(mV\) +0\.0\d+", text)
    assert "R-hat" in text.split("\n")[2]
    html = posterior._repr_html_()
    assert html.count("<tr>") == 3
    assert "likelihood.sigma (mV)" in html
    frame = summary.to_dataframe()
    assert frame.loc["gain", "mean"] == pytest.approx(float(summary["gain"].mean))
    with pytest.raises(ValueError, match="unknown parameter 'sigma'"):
        summary["sigma"]


def test_what_is_wrong_is_said_in_words():
    posterior = short()
    apart = {**posterior.draws, "gain": posterior["gain"] + np.arange(4)[:, None]}
    wrong = dataclasses.replace(posterior, draws=apart, divergent=posterior.divergent | (np.arange(60) == 3))
    text = repr(wrong)
    assert re.search(r"R-hat is above 1.01 of gain.* \(at most \d\.\d+\): the chains do not agree yet", text)
    assert "4 of 240 draws diverged" in text
    few = dataclasses.replace(posterior, draws={name: x[:, :3] for name, x in posterior.draws.items()})
    assert "R-hat is not known of gain, likelihood.sigma: chains of 4 draws or more" in repr(few)
    with pytest.warns(UserWarning, match=r"R-hat is above 1.01"):
        bk.sample(of_two(), chains=4, draws=5, warmup=5, screen=0, key=jax.random.key(0))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_arviz_takes_it():
    arviz = pytest.importorskip("arviz", reason="arviz is not installed")
    posterior = short()
    inference = posterior.to_arviz()
    sigma = inference["posterior"]["likelihood.sigma"]
    assert sigma.dims == ("chain", "draw")
    assert sigma.attrs["units"] == "mV"
    assert int(inference["sample_stats"]["diverging"].sum()) == int(posterior.divergent.sum())
    table, ours = arviz.summary(inference, round_to=8), posterior.summary()
    for name in NAMES:
        assert table.loc[name, "r_hat"] == pytest.approx(ours[name].r_hat, rel=2e-3)
        assert table.loc[name, "ess_bulk"] == pytest.approx(ours[name].ess_bulk, rel=0.02)


def test_a_saved_posterior_is_the_same(tmp_path):
    posterior, path = short(), tmp_path / "posterior.npz"
    posterior.save(path)
    loaded = bk.Posterior.load(path)
    assert same(posterior, loaded)
    assert loaded.summary().rows == posterior.summary().rows
    assert repr(loaded).split("\n")[2:] == repr(posterior).split("\n")[2:]
    assert loaded["likelihood.sigma"].unit == u.mV
    with pytest.raises(ValueError, match=r"predict\(\) needs the density: Posterior.load\(path, bk.log_density"):
        loaded.predict()
    whole = bk.Posterior.load(path, of_two())
    np.testing.assert_array_equal(whole.predict(3).values / u.mV, posterior.predict(3).values / u.mV)
    with pytest.raises(ValueError, match=r"'density' got one of gain, but these draws are of gain, likelihood.sigma"):
        bk.Posterior.load(path, of_gain())
    with pytest.raises(ValueError, match=r"'path' got .*posterior.json, but takes a name that ends in .npz"):
        posterior.save(tmp_path / "posterior.json")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"posterior.npz: not a posterior saved by .*, or damaged .*; take a copy"):
        bk.Posterior.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file of that name"):
        bk.Posterior.load(tmp_path / "absent.npz")


def test_predictions_are_those_of_draws():
    posterior = short()
    one, noisy = posterior.predict(40), posterior.predict(40, key=jax.random.key(0))
    gains = values(posterior, "gain").T.reshape(-1)[np.linspace(0, 239, 40).round().astype(int)]
    np.testing.assert_allclose(one.values / u.mV, gains[:, None] * response(), rtol=1e-4, atol=1e-6)
    residuals = np.asarray((noisy.values - one.values) / u.mV)
    assert residuals.std() == pytest.approx(values(posterior, "likelihood.sigma").mean(), rel=0.1)
    with pytest.raises(ValueError, match="'n' got 0"):
        posterior.predict(0)


def test_a_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    posterior = short()
    figure = posterior.plot(tmp_path / "posterior.png")
    assert (tmp_path / "posterior.png").stat().st_size > 10_000
    texts = {ax.get_xlabel() for ax in figure.axes} | {ax.get_ylabel() for ax in figure.axes}
    assert {"gain", "sigma (mV)", "time (s)", "time series (mV)"} <= texts
    lines = next(ax for ax in figure.axes if ax.get_xlabel() == "time (s)").get_lines()
    np.testing.assert_allclose(lines[1].get_ydata(), np.asarray(data().values / u.mV), rtol=1e-6)
    alone = dataclasses.replace(posterior, density=None).plot()
    assert len(alone.axes) == 4


# Where chains begin -------------------------------------------------------------------------------------------------


def test_chains_begin_at_a_fit():
    fit = bk.fit(Resonator(f0=5 * u.Hz), data(), BOUNDS, starts=3, steps=2, key=jax.random.key(0), **RUN)
    density = bk.log_density(Resonator(f0=5 * u.Hz), data(), BOUNDS, **RUN)
    order = np.argsort(np.asarray(fit.state["best"])[0])
    rows = begin_at(density, fit, 4, 0, jax.random.key(0))
    found = density.to_parameters({"f0": rows[:, 0], "damping": rows[:, 1]})
    want = np.asarray(fit.places()["f0"][0] / u.Hz)[order[[0, 1, 2, 0]]]
    np.testing.assert_allclose(found["f0"] / u.Hz, want, 1e-4)
    with pytest.raises(ValueError, match="unknown free name of the fit in 'start' 'f0'"):
        begin_at(of_two(), fit, 4, 0, jax.random.key(0))


def test_chains_begin_at_the_likeliest_of_the_prior():
    drawn = of_two().sample_prior(jax.random.key(0), (16,))
    logs, gains = np.asarray(of_two()(drawn)), np.asarray(drawn["gain"])
    rows = begin_at(of_two(), None, 4, 16, jax.random.key(0))
    np.testing.assert_array_equal(rows[:, 0], gains[np.argsort(-logs)[:4]])
    plain = begin_at(of_two(), None, 4, 0, jax.random.key(0))
    np.testing.assert_array_equal(plain[:, 0], gains[:4])


def test_a_noisy_model_is_sampled_from_a_fit():
    """The arguments of a density in the call, with the noise of the key."""
    run = {**NOISY, "key": jax.random.key(3)}
    fit = bk.fit(Resonator(f0=5 * u.Hz), data(), BOUNDS, starts=4, steps=3, **run)
    few = {"chains": 4, "draws": 20, "warmup": 30, "start": fit}
    posterior = quiet(Resonator(f0=5 * u.Hz), data(), BOUNDS, priors={"f0": (5 * u.Hz, 1 * u.Hz)}, **few, **run)
    assert tuple(posterior) == ("f0", "damping")
    assert posterior["f0"].unit == u.Hz
    np.testing.assert_array_equal(
        jax.random.key_data(posterior.density.keys), jax.random.key_data(jax.random.split(jax.random.key(3), 2))
    )
    again = posterior.density({name: jnp.asarray(x) for name, x in posterior.z.items()})
    np.testing.assert_allclose(again, posterior.log_density, rtol=1e-4, atol=1e-3)
    assert same(posterior, quiet(posterior.density, key=jax.random.key(3), **few))


# Progress -----------------------------------------------------------------------------------------------------------


def test_progress_is_told_and_may_stop(monkeypatch):
    monkeypatch.setattr(running, "_SECONDS", 1e-9)
    reports = []
    posterior = quiet(of_two(), progress=lambda r: reports.append(r) or r.step >= 90, **SHORT)
    assert posterior.shape[1] < 60
    np.testing.assert_array_equal(posterior.z["gain"], short().z["gain"][:, : posterior.shape[1]])
    last = reports[-1]
    assert (last.steps, last.warmup, last.phase) == (120, 60, "sampling")
    assert reports[0].phase == "warm-up"
    assert 0 <= last.acceptance <= 1
    assert last.gradients == posterior.settings["gradients"]
    assert re.match(r"acceptance [01]\.\d\d, \d+ divergences, .* gradients/s", str(last))
    with pytest.raises(ValueError, match="'progress' stopped the chains in their warm-up, before any draw"):
        quiet(of_two(), progress=lambda r: True, **SHORT)


def test_a_bar_is_drawn(capsys):
    pytest.importorskip("rich", reason="rich is not installed")
    assert same(quiet(of_two(), progress=True, **SHORT), short())
    shown = capsys.readouterr().err
    assert "gradients/s" in shown
    assert "120/1" in shown


# Refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "nutz"}, ValueError, "unknown method 'nutz'; did you mean 'nuts'"),
        ({"chains": 0}, ValueError, "'chains' got 0, but takes at least 2"),
        ({"chains": 1}, ValueError, "'chains' got 1, but takes at least 2"),
        ({"chains": 2.0}, TypeError, "'chains' got 2.0, but takes a whole number"),
        ({"draws": 0}, ValueError, "'draws' got 0, but takes at least 1"),
        ({"warmup": 0}, ValueError, "'warmup' got 0, but takes at least 1"),
        ({"screen": -1}, ValueError, "'screen' got -1"),
        ({"key": 3}, TypeError, "'key' got 3, but takes a random key"),
        ({"target_acceptance": 1.0}, ValueError, "'target_acceptance' got 1.0, but takes a number between 0 and 1"),
        ({"target_acceptance": "high"}, ValueError, "'target_acceptance' got 'high'"),
        ({"checkpoint": "absent/chains.npz"}, ValueError, "'checkpoint' got absent/chains.npz, but there is no folder"),
        ({"method": "mclmc"}, ValueError, "'method' got 'mclmc', whose directions need two parameters or more"),
        ({"method": "smc", "start": {"gain": 1.0}}, ValueError, "'start' is of chains, but 'smc' begins at the prior"),
        ({"start": {"gian": 1.0}}, ValueError, "unknown name in 'start' 'gian'; did you mean 'gain'"),
        ({"start": {"gain": np.ones(3)}}, ValueError, r"'start' got shape \(3,\) for 'gain', but takes a value, or 8"),
        ({"start": {"gain": -1.0}, "free": {"gain": (0.1, 3.0)}}, ValueError, "'start' got gain = -1.0, outside"),
        ({"start": {"gain": 1.0 * u.mV}}, ValueError, "gain"),
        ({"start": 1.0}, TypeError, "'start' got float, but takes a Fit, a dict by name, or None"),
        ({"free": {"gain": (1.0, 4.0)}, "priors": {"gain": bk.priors.Uniform(2, 3)}}, ValueError, "does not cover"),
        ({"likelihood": bk.likelihoods.Gaussian(0.0 * u.mV)}, ValueError, "'sigma' of Gaussian .* takes a positive"),
        ({"likelihood": bk.likelihoods.Gaussian(np.nan)}, ValueError, "'sigma' of Gaussian for time series got nan"),
        ({"noise": {"drive": 0.1 * u.mV * u.second**0.5}}, ValueError, "'key' is missing, but this model has noise"),
        ({"target": None}, TypeError, "'target' is missing: a posterior is of a model, a target and free parameters"),
        ({"free": None}, TypeError, "'free' is missing"),
        ({"target": broken, "record": "eeg", "priors": {"gain": (1.0, 0.5)}, "likelihood": None}, FloatingPointError,
         "the log likelihood is NaN at the start, gain = 1: broken returned it"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(change, error, message):
    arguments = {"target": data(), "free": {"gain": None}, "priors": {"gain": (1.0, 0.5)}, **RUN, **change}
    with pytest.raises(error, match=message):
        bk.sample(Follower(), **arguments)


def test_a_density_is_alone():
    with pytest.raises(TypeError, match=r"'priors' got .* beside a LogDensity, which has it"):
        bk.sample(of_gain(), priors={"gain": (1.0, 0.1)})


def test_a_start_without_a_density_is_named_with_its_parameters():
    def function(result):
        gain = jnp.max(result["eeg"] / u.mV, 0) / np.max(response())
        return jnp.where(gain < 1.5, -(gain**2), jnp.nan)

    density = bk.log_density(Follower(), function, {"gain": (0.1, 3.0)}, record="eeg", **RUN)
    with pytest.raises(FloatingPointError, match="not finite at gain = 2, where a chain begins"):
        bk.sample(density, start={"gain": 2.0}, **SHORT)
    never = bk.log_density(Follower(), function, {"gain": (0.1, 1e6)}, record="eeg", **RUN)
    never = dataclasses.replace(never, positions=(dataclasses.replace(never.positions[0], low=2.0),))
    with pytest.raises(FloatingPointError, match=r"256 of 256 draws from the prior have no density, so 4 chains"):
        bk.sample(never, **SHORT)


def test_a_file_of_settings_is_plain():
    """Which is what `save` writes."""
    assert json.loads(json.dumps(short().settings)) == short().settings
