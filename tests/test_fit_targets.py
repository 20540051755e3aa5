"""Fits to series, connectivity and functions; least squares, priors and ties; what follows from a fit."""

import functools
import json
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_fit import FREQS, SHAKEN, Resonator, resonance

import brainmass_kernels as bk
from brainmass_kernels import spectra
from brainmass_kernels.fitting.fit import default_every, fit
from brainmass_kernels.fitting.problem import Free, Problem
from brainmass_kernels.fitting.result import Fit
from brainmass_kernels.fitting.steps import normal_equations_at
from brainmass_kernels.fitting.targets import as_target, compare

DT, STEPS, EVERY = 5 * u.ms, 200, 5
LEAST_SQUARES: dict[str, Any] = {"optimiser": "levenberg_marquardt"}
FREE = {"f0": (2.0, 9.0), "damping": (0.05, 0.6)}
START = Resonator(f0=8.8 * u.Hz)


@bk.model
class Follower(bk.Model):
    """Linear in its one parameter, so that what a fit is to find has a closed form."""

    gain: Any = 1.0

    states = {"x": u.mV}
    inputs = {"drive": 0.0 * u.mV}
    observables = {"eeg": u.mV}
    scheme = "heun"

    @staticmethod
    def drift(s, p, i):
        return {"x": (p.gain * i.drive - s.x) / 0.2}

    @staticmethod
    def observe(s, p):
        return {"eeg": s.x}


PULSE = np.zeros(STEPS, np.float32)
PULSE[10:20] = 1.0
RUN: dict[str, Any] = {
    "inputs": {"drive": PULSE * u.mV}, "duration": STEPS, "dt": DT, "every": EVERY, "transient": None,
    "realisations": 1,
}  # fmt: skip


def evoked(model=None):
    """(K, *batch) in mV, what the pulse leaves."""
    inputs = {"drive": PULSE * u.mV}
    run = bk.simulate(model or Resonator(f0=5.0 * u.Hz, damping=0.2), STEPS, DT, inputs=inputs, every=EVERY)
    return np.asarray(run["eeg"].mantissa)


def series(**options):
    return bk.TimeSeries(evoked()[None] * u.mV, **options)


def small(target=None, free=FREE, model=None, **changes) -> Fit:
    return fit(model or START, target or series(), free, **(RUN | {"starts": 4, **changes}))


def value(found: Fit, name: str) -> np.ndarray:
    return np.asarray(u.get_magnitude(found.parameters[name]))


# --- least squares ---


@pytest.fixture(scope="module")
def evoked_fit() -> Fit:
    return small(steps=20, **LEAST_SQUARES)


def test_least_squares_finds_what_made_a_series(evoked_fit):
    np.testing.assert_allclose(value(evoked_fit, "f0"), 5.0, rtol=1e-3)
    np.testing.assert_allclose(value(evoked_fit, "damping"), 0.2, rtol=5e-3)
    assert evoked_fit.rms < 1e-3 < 0.5 < evoked_fit.initial_rms
    assert len(evoked_fit.losses) <= 20
    np.testing.assert_allclose(evoked_fit.prediction.values.mantissa[0], evoked(), atol=1e-3 * evoked().max())


def test_least_squares_end_what_gradients_began():
    began = small(steps=15, optimiser=optax.adam(0.3))
    assert 1e-3 < began.rms < began.initial_rms
    ended = small(steps=10, starts=began, **LEAST_SQUARES)
    assert ended.rms < 1e-4
    # It begins where the other ended: with the error of the best places.
    np.testing.assert_allclose(ended.losses[0, 0], np.nanmin(began.losses[:, 0], 0), rtol=0.05, atol=1e-3)
    assert began.places()["f0"].shape == (1, 4)


def problem_of(target, noise=None, inputs=RUN["inputs"], background=False, **changes) -> Problem:
    options = {name: RUN[name] for name in ("duration", "dt", "every", "transient")}
    options |= {"scheme": None, "implementation": None, **changes}
    frees = tuple(Free(name, *bounds, u.Hz if name == "f0" else u.UNITLESS) for name, bounds in FREE.items())
    comparison = compare(as_target(target), Resonator(), "eeg", options, (2.0, 40.0), background)
    return Problem(Resonator(), inputs, noise or {}, frees, comparison, 1, "eeg", options)


@pytest.mark.parametrize("compared", ["log", "linear"])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.slow
def test_the_normal_equations_have_the_gradient_of_the_error(background, compared):
    """For spectra too, whose scale and background follow."""
    target = bk.PowerSpectrum(FREQS, resonance(6.0, 0.1) + 0.3 / FREQS, compare=compared)
    problem = problem_of(target, {"drive": 1.0 * SHAKEN}, duration=5 * u.second, every=2, background=background)
    z = {name: jnp.full((1, 3), x) + 0.1 * jnp.arange(3.0)[None] for name, x in (("f0", 0.3), ("damping", -0.4))}
    keys, data = problem.keys(jax.random.key(0)), problem.comparison.data

    def error(z):
        found = problem.comparison.error(problem.predict(z, keys), data)[0]
        return found.sum(), found

    slopes, wanted = jax.grad(error, has_aux=True)(z)
    found = normal_equations_at(problem, z, keys, data)
    np.testing.assert_allclose(found.error, wanted, rtol=1e-4)
    for p, name in enumerate(FREE):
        np.testing.assert_allclose(2 * found.slope[..., p], slopes[name], rtol=2e-2, atol=1e-4)


@pytest.mark.slow
def test_a_spectrum_is_compared_in_powers(tmp_path):
    """The error is that of powers in standard deviations, and 1 would explain nothing; files keep how."""
    target = bk.PowerSpectrum(FREQS, resonance(6.0, 0.1), compare="linear")
    call = {
        "noise": {"drive": 1.0 * SHAKEN},
        "duration": 5 * u.second,
        "every": 2,
        "background": False,
        **LEAST_SQUARES,
    }
    call |= {"inputs": None, "starts": 2, "steps": 6}
    found = small(target, **call)
    fitted, power = found.spectrum.power[0], found.target.power[0]
    assert found.spectrum.compare == "linear"
    assert found.rms[0] == pytest.approx(np.sqrt(np.mean((fitted - power) ** 2)) / power.std(), rel=1e-3)
    assert found.rms[0] < found.initial_rms[0]
    assert "rms error, power" in str(found)
    path = tmp_path / "fit.json"
    found.save(path)
    loaded = bk.Fit.load(path, START)
    assert loaded.target.compare == loaded.prediction.compare == "linear"
    np.testing.assert_allclose(loaded.standard_errors()["damping"], found.standard_errors()["damping"], rtol=1e-3)
    with pytest.raises(ValueError, match="'resume' got a fit to another target"):
        small(bk.PowerSpectrum(FREQS, resonance(6.0, 0.1)), **call, resume=loaded)


def test_a_jacobian_against_finite_differences(x64):
    problem = problem_of(
        bk.TimeSeries(evoked()[None].astype(float) * u.mV), inputs={"drive": PULSE.astype(float) * u.mV}
    )
    z = {"f0": jnp.array([[0.2]]), "damping": jnp.array([[-0.3]])}
    keys, data = problem.keys(jax.random.key(0)), problem.comparison.data
    _, jacobian = problem.linearised(z, keys, data)
    for p, name in enumerate(FREE):
        ends = [problem.linearised(z | {name: z[name] + h}, keys, data)[0] for h in (1e-5, -1e-5)]
        np.testing.assert_allclose(jacobian[:, :, p], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_gain_and_offset_of_a_sensor_are_solved_for(evoked_fit):
    target = bk.TimeSeries((0.02 * evoked() + 0.1)[None] * u.volt, scale=True, offset=True)
    found = small(target, steps=20, **LEAST_SQUARES)
    np.testing.assert_allclose(value(found, "f0"), 5.0, rtol=2e-3)
    np.testing.assert_allclose(found.nuisance["scale"], 0.02, rtol=1e-2)
    np.testing.assert_allclose(found.nuisance["offset"], 0.1, rtol=1e-2)


# --- what is known beside the data ---

GAIN = {"gain": (-20.0, 20.0)}


def linear(values, **changes) -> Fit:
    """Gains whose best values have a closed form, from series of the given gains."""
    target = bk.TimeSeries(np.outer(values, evoked(Follower())) * u.mV, sigma=0.05 * u.mV)
    return small(target, GAIN, Follower(), **({"steps": 30, "tolerance": 0.0} | LEAST_SQUARES | changes))


def weight(sigma: float = 0.05) -> float:
    """What the samples say of a gain: the inverse of its variance."""
    return float(np.sum(evoked(Follower()) ** 2) / sigma**2)


@pytest.mark.parametrize(("model", "shape", "every"), [
    (Follower(), (100,), 2),
    (Follower(), (2, 100), 2),  # two subjects, and not two samples of a hundred regions
    (Follower(), (2, 40), 5),
    (bk.Network(Follower(), np.eye(3), source="eeg", target="drive", k=0.1), (100, 3), 2),
    (bk.Network(Follower(), np.eye(4), source="eeg", target="drive", k=0.1), (2, 50, 4), 4),
])  # fmt: skip
def test_records_are_as_many_as_samples(model, shape, every):
    values = np.sin(np.arange(np.prod(shape))).reshape(shape) * u.mV
    assert default_every(model, bk.TimeSeries(values), STEPS, DT, None) == every


def test_a_prior_weighs_as_its_width_says():
    found = linear([3.0], priors={"gain": (1.0, 0.2)})
    wanted = (weight() * 3.0 + 1.0 / 0.2**2) / (weight() + 1 / 0.2**2)
    assert 1.5 < wanted < 2.9
    np.testing.assert_allclose(value(found, "gain"), wanted, rtol=1e-3)


def test_a_prior_weighs_the_same_along_a_gradient():
    found = linear([3.0], priors={"gain": (1.0, 0.2)}, optimiser=optax.adam(0.05), steps=120, starts={"gain": [2.0]})
    wanted = (weight() * 3.0 + 1.0 / 0.2**2) / (weight() + 1 / 0.2**2)
    np.testing.assert_allclose(value(found, "gain"), wanted, rtol=1e-2)


@pytest.mark.slow
def test_a_group_draws_its_members_to_their_mean():
    gains, width = np.array([1.0, 2.0, 6.0]), 0.3
    found = linear(gains, group={"gain": width})
    # Residuals are in standard deviations of each series, which is its gain's; sigma is that of their mean.
    sigma = found.problem.comparison.sigma * evoked(Follower()).std() * gains
    data, prior = weight(1.0) / sigma**2, 1 / width**2
    # The best of each, given the mean, and the mean of those bests.
    share = data / (data + prior)
    mean = np.sum(share * gains) / np.sum(share)
    np.testing.assert_allclose(value(found, "gain"), share * gains + (1 - share) * mean, rtol=2e-3)


def test_what_is_shared_is_one_value():
    """Two resonators of one damping; what is found is where the sum of both errors is lowest."""
    both = evoked(Resonator(f0=np.array([4.0, 6.0], np.float32) * u.Hz, damping=0.2)).T
    found = small(bk.TimeSeries(both * u.mV), shared="damping", steps=25, **LEAST_SQUARES)
    np.testing.assert_allclose(value(found, "f0"), [4.0, 6.0], rtol=2e-3)
    np.testing.assert_allclose(value(found, "damping"), [0.2, 0.2], rtol=1e-2)
    assert found.state["z"]["damping"].shape == (1, 4)
    along = small(bk.TimeSeries(both * u.mV), shared="damping", steps=2)
    assert along.state["z"]["damping"].shape == (1, 4)
    assert value(along, "damping")[0] == value(along, "damping")[1]


# --- functions of one's own, and networks ---


@pytest.mark.slow
def test_a_function_of_ones_own_is_the_built_in_target_again():
    wanted = evoked()
    spread = float(wanted.std())

    def errors(result):
        apart = (result["eeg"].mantissa - jnp.asarray(wanted)[:, None, None, None]) / spread
        return jnp.mean(apart**2, 0)

    def residuals(result):
        return (result["eeg"].mantissa - jnp.asarray(wanted)[:, None, None, None]) / spread

    same = {"steps": 4, "key": jax.random.key(3)}
    ours = small(**same)
    np.testing.assert_allclose(small(errors, **same).losses ** 0.5, ours.losses, rtol=1e-4)
    solved = small(residuals, **same, **LEAST_SQUARES)
    np.testing.assert_allclose(solved.losses**0.5, small(**same, **LEAST_SQUARES).losses, rtol=1e-3)
    with pytest.raises(TypeError, match="returns an error, but this takes its residuals"):
        small(errors, steps=2, **LEAST_SQUARES)


def hopf(n: int, k: float = 0.3):
    weights = np.random.default_rng(0).uniform(0.0, 1.0, (n, n)).astype(np.float32)
    return bk.Network(bk.Hopf(a=-0.05, w=0.6), weights / n, source="x", target="x_inp", k=k)


@pytest.mark.parametrize("regional", [pytest.param((), marks=pytest.mark.slow), ("a",)])
def test_a_network_is_fitted_to_functional_connectivity(regional):
    options = {"noise": {"x_inp": 0.1 * u.ms**0.5}, "dt": 0.5 * u.ms, "duration": 400, "transient": None, "every": 2}
    strong, key = hopf(4, 1.5), jax.random.key(5)
    run = bk.simulate(strong, 400, 0.5 * u.ms, noise=options["noise"], key=key, record="x", every=2)
    target = bk.Connectivity(np.asarray(spectra.correlation(run["x"])))
    free = {"coupling.k": (0.05, 3.0), "a": (-0.2, 0.0)}
    found = fit(hopf(4), target, free, starts=2, steps=12, realisations=2, record="x", regional=regional, **options)
    assert found.rms < found.initial_rms
    assert value(found, "coupling.k").shape == (1,)
    assert value(found, "a").shape == ((1, 4) if regional else (1,))
    assert np.shape(found.prediction.values) == (1, 4, 4)
    again = bk.simulate(found.model, 10, 0.5 * u.ms, record="x")
    assert again["x"].shape == (10, 1, 4)


# --- many starts ---


@pytest.mark.slow
def test_the_worse_half_of_the_starts_is_left():
    found = small(steps=6, prune=2, starts=8)
    counted = np.isfinite(found.losses[:, 0]).sum(-1)
    np.testing.assert_array_equal(counted, [8, 8, 4, 4, 2, 2])
    assert found.best_start[0] in found.state["alive"][0]
    whole = small(steps=6, starts=8)
    kept = np.isfinite(found.losses[-1, 0])
    np.testing.assert_allclose(found.losses[-1, 0, kept], whole.losses[-1, 0, kept], rtol=1e-3)


def test_a_fit_that_was_stopped_goes_on_to_the_same_result(tmp_path):
    path = tmp_path / "fit.part.json"

    def stop(report):
        if report.step == 3:
            raise KeyboardInterrupt

    for options in ({}, LEAST_SQUARES):
        path.unlink(missing_ok=True)
        same = {"steps": 6, "key": jax.random.key(1), "prune": 2, **options}
        with pytest.raises(KeyboardInterrupt):
            small(checkpoint=path, progress=stop, **same)
        steps = []
        found = small(checkpoint=path, progress=lambda report, steps=steps: steps.append(report.step), **same)
        whole = small(**same)
        assert len(steps) < 6
        np.testing.assert_array_equal(found.losses, whole.losses)
        np.testing.assert_array_equal(value(found, "f0"), value(whole, "f0"))
    with pytest.raises(ValueError, match="'checkpoint' got a fit with every"):
        small(checkpoint=path, every=4, target=bk.TimeSeries(np.sin(np.arange(50.0)) * u.mV), steps=2)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint of a fit"):
        small(checkpoint=path)


# --- what follows from a fit ---


def test_standard_errors_are_those_of_linear_regression():
    noise = np.random.default_rng(0).normal(0, 0.05, len(evoked(Follower())))
    model = evoked(Follower())
    target = bk.TimeSeries((3.0 * model + noise)[None] * u.mV)
    found = small(target, GAIN, Follower(), steps=20, **LEAST_SQUARES)
    best = float(model @ (3.0 * model + noise) / (model @ model))
    left = 3.0 * model + noise - best * model
    wanted = np.sqrt(left @ left / (len(left) - 1) / (model @ model))
    np.testing.assert_allclose(value(found, "gain"), best, rtol=1e-4)
    np.testing.assert_allclose(found.standard_errors()["gain"], wanted, rtol=1e-3)


def test_a_profile_is_lowest_at_the_fit(evoked_fit):
    profile = evoked_fit.profile("f0", [4.0, 4.9, 5.0, 5.1, 6.5] * u.Hz, steps=6)
    assert profile.rms.shape == (1, 5)
    assert profile.rms[0].argmin() == 2
    assert profile.rms[0, 0] > profile.rms[0, 1] > 10 * profile.rms[0, 2]
    chosen = evoked_fit.profile("f0", 5, steps=6).values
    assert chosen.shape == (5,)
    assert (np.diff(chosen / u.Hz) > 0).all()
    with pytest.raises(ValueError, match="'f1'"):
        evoked_fit.profile("f1")


def test_a_fit_of_a_series_survives_json(evoked_fit, tmp_path):
    evoked_fit.save(tmp_path / "fit.json")
    json.loads((tmp_path / "fit.json").read_text(), parse_constant=pytest.fail)
    read = Fit.load(tmp_path / "fit.json", Resonator())
    assert str(read) == str(evoked_fit)
    assert "error" in str(read)
    assert read.target.values.unit == u.mV
    np.testing.assert_allclose(read.target.values.mantissa, evoked_fit.target.values.mantissa)
    ours, theirs = (f.standard_errors() for f in (evoked_fit, read))
    for name in FREE:
        np.testing.assert_allclose(u.get_magnitude(ours[name]), u.get_magnitude(theirs[name]), rtol=1e-3)
    more = small(steps=2, resume=read, **LEAST_SQUARES)
    assert len(more.losses) == len(evoked_fit.losses) + 2
    with pytest.raises(TypeError, match="'spectrum' is of fits to spectra"):
        _ = read.spectrum


def test_a_fit_is_drawn_and_tabulated(evoked_fit, tmp_path):
    pytest.importorskip("pandas")
    page = evoked_fit.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 5_000
    assert [line.get_label() for line in page.axes[0].get_lines()[:3]] == ["target", "start", "fit"]
    table = evoked_fit.to_dataframe()
    assert len(table) == 1
    np.testing.assert_allclose(table["f0 (Hz)"], value(evoked_fit, "f0"))


def test_progress_tells_rate_and_time_left():
    seen = []
    small(steps=3, progress=seen.append)
    assert seen[-1].left == 0.0
    assert seen[0].left == pytest.approx(2 / seen[0].rate)


@pytest.mark.filterwarnings("ignore:nothing improved")
@pytest.mark.parametrize("options", [{}, LEAST_SQUARES])
def test_progress_tells_the_best_values_so_far(options):
    """At each step those of the lowest error so far, which the steps themselves measured."""
    path = []
    target = bk.TimeSeries(np.stack([evoked(), 0.5 * evoked(Resonator(f0=4.0 * u.Hz, damping=0.3))]) * u.mV)
    found = small(target, steps=3, progress=path.append, **options)
    lowest = [report.best for report in path]
    for report, best in zip(path, lowest, strict=True):
        again = small(target, starts={n: x[:, None] * np.ones(4) for n, x in report.values.items()}, steps=1, **options)
        np.testing.assert_allclose(again.losses[0, :, 0], best, rtol=1e-3)
    assert u.get_unit(path[-1].values["f0"]) == u.Hz
    assert found.losses.min((0, 2)) == pytest.approx(lowest[-1])


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"priors": {"f0": 3.0}}, TypeError, r"takes a pair \(centre, width\)"),
        ({"priors": {"f0": (5.0, 0.0)}}, ValueError, "the width 0 for 'f0'"),
        ({"priors": {"f1": (5.0, 1.0)}}, ValueError, "'f1'.*did you mean 'f0'"),
        ({"shared": "f1"}, ValueError, "'f1'"),
        ({"shared": "f0", "group": {"f0": 1.0}}, ValueError, "one value has no spread"),
        ({"regional": "f0"}, ValueError, "one mass has no regions"),
        ({"prune": -1}, ValueError, "'prune' got -1"),
        ({"record": ("eeg",)}, TypeError, "'record' got"),
        ({"optimiser": "newton"}, TypeError, "'optimiser' got str 'newton'.*levenberg_marquardt"),
        ({"target": bk.TimeSeries(np.arange(7.0) * u.mV)}, ValueError, r"shape \(1, 7\).*this run records \(40,\)"),
        ({"target": bk.TimeSeries(np.arange(40.0) * u.Hz)}, ValueError, "'values' got Hz, but takes mV"),
        ({"target": bk.Connectivity(np.eye(3))}, ValueError, "3 regions, but what is fitted is one mass"),
        ({"target": lambda result: result["eeg"].mantissa[0, 0]}, TypeError, "returned shape"),
        ({"target": lambda result: result["eeg"][0]}, TypeError, "returned mV"),
    ],
)
def test_arguments_are_checked(changes, error, said):
    with pytest.raises(error, match=said):
        small(steps=1, **changes)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bk.TimeSeries(np.array([1.0, np.nan])), "not finite"),
        (lambda: bk.TimeSeries(np.ones(4)), "takes"),
        (lambda: bk.TimeSeries(np.arange(4.0), sigma=0.0), "positive"),
        (lambda: bk.Connectivity(2 * np.eye(3)), "correlations"),
        (lambda: bk.Connectivity(np.array([[1.0, 0.5], [0.1, 1.0]])), "not symmetric"),
    ],
)
def test_targets_are_checked(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_saved_fit_of_a_function_says_what_it_lacks(tmp_path):
    def lowest(result):
        return jnp.mean(result["eeg"].mantissa ** 2, 0)

    small(functools.partial(lowest), steps=1, starts=1).save(tmp_path / "fit.json")
    read = Fit.load(tmp_path / "fit.json", Resonator())
    assert "Resonator fitted to partial" in str(read)
    with pytest.raises(TypeError, match="a function, which a saved fit does not hold"):
        read.standard_errors()


@pytest.mark.parametrize("kind", [bk.TimeSeries, bk.Connectivity])
@pytest.mark.parametrize("values", ["x", [[1.0], [1.0, 2.0]]])
def test_values_that_are_no_numbers_are_refused_by_name(kind, values):
    with pytest.raises(TypeError, match=r"'values' of .* got \w+, but takes an array of real numbers"):
        kind(values)
