"""Least squares and standard errors of networks and of joint targets, against finite differences in float64."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels.fitting import targets
from brainmass_kernels.fitting.problem import NO_POOLING, Free, Pooling, Problem
from brainmass_kernels.fitting.steps import normal_equations_at

pytestmark = pytest.mark.filterwarnings("ignore:nothing improved")

N, STEPS, KEY = 3, 520, jax.random.key(1)
FREQS = np.arange(10.0, 100.0, 5.0)
OPTIONS = {
    "duration": STEPS, "dt": 2 * u.ms, "every": 2, "transient": None, "scheme": None, "implementation": None,
}  # fmt: skip
NOISE = {"x_inp": 0.1 * u.ms**0.5}
FREE = {"coupling.k": (0.02, 0.3), "a": (-0.3, -0.01)}
MATRIX = np.array([[1.0, 0.3, 0.1], [0.3, 1.0, 0.5], [0.1, 0.5, 1.0]])
CALL = {"noise": NOISE, "dt": 2 * u.ms, "record": "x", "transient": None, "key": KEY}


def network(k=0.1, a=-0.15):
    weights = np.array([[0.0, 0.5, 0.2], [0.5, 0.0, 0.7], [0.2, 0.7, 0.0]], np.float32)
    return bk.Network(bk.Hopf(a=a, w=0.2), weights, source="x", target="x_inp", k=k)


def problem_of(target, record="x", pooling=NO_POOLING, options=OPTIONS, model=None) -> Problem:
    comparison = targets.compare(target, model or network(), record, options, (10.0, 95.0), False)
    frees = tuple(Free(name, *bounds, u.UNITLESS) for name, bounds in FREE.items())
    return Problem(model or network(), {}, NOISE, frees, comparison, 2, comparison.recorded, options, pooling)


def joint():
    return bk.Joint({"rhythm": bk.PowerSpectrum(FREQS, 1.0 / FREQS), "fc": bk.Connectivity(MATRIX)}, {"fc": 2.0})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "pooling", "implementation"),
    [
        (joint, NO_POOLING, "numba"),
        (lambda: bk.Connectivity(MATRIX), Pooling(regional=("a",)), "numba"),
        (lambda: bk.Connectivity(np.stack([MATRIX] * 2)), NO_POOLING, "numba"),
    ],
)
def test_a_jacobian_against_finite_differences(target, pooling, implementation, x64):
    """Those of `scan`'s forward mode, against differences of runs on another implementation."""
    pytest.importorskip("llvmlite")
    target = target()
    record = RECORD if isinstance(target, bk.Joint) else "x"
    problem = problem_of(target, record, pooling)
    n, keys, rng = problem.comparison.count, problem.keys(KEY), np.random.default_rng(0)
    shapes = {f.name: (n, 2, *([N] if f.name in pooling.regional else [])) for f in problem.frees}
    z = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    residuals, jacobian = jax.jit(Problem.linearised, static_argnums=0)(problem, z, keys, problem.comparison.data)
    plain = problem_of(target, record, pooling, OPTIONS | {"implementation": implementation})

    @jax.jit
    def residuals_at(z):
        return plain.comparison.residuals(plain.predict(z, keys), plain.comparison.data)[0]

    np.testing.assert_allclose(residuals, residuals_at(z), rtol=1e-5, atol=1e-5)
    assert jacobian.shape == (n, 2, problem.unknowns[-1][1].stop, residuals.shape[-1])
    for f, at in problem.unknowns:
        for k in range(at.start, at.stop):
            step = np.zeros(shapes[f.name])
            step[(..., k - at.start) if f.name in pooling.regional else ...] = 1e-5
            ahead, behind = (residuals_at(z | {f.name: z[f.name] + sign * step}) for sign in (1, -1))
            want = (ahead - behind) / 2e-5
            np.testing.assert_allclose(jacobian[:, :, k], want, rtol=2e-4, atol=2e-4 * np.abs(want).max())


@pytest.mark.slow
def test_a_report_has_the_errors_of_regions(tmp_path):
    call = {"every": 2, "realisations": 1, "starts": 1, "steps": 1, "duration": STEPS, "regional": "a", **CALL}
    found = bk.fit(network(), bk.Connectivity(np.stack([MATRIX] * 2)), FREE, **call)
    errors = found.standard_errors()
    assert (errors["coupling.k"].shape, errors["a"].shape) == ((2,), (2, N))
    pytest.importorskip("jinja2")
    found.report(tmp_path / "fit.html")
    page = (tmp_path / "fit.html").read_text()
    assert "There are no standard errors" not in page
    spread = [f"{x:.3g}" for x in errors["a"][0]]
    assert all(text in page for text in (min(spread, key=float), max(spread, key=float)))


@pytest.mark.slow
def test_penalties_of_regions_are_in_the_normal_equations():
    """A prior on a value of each region adds the square of its slope to each diagonal, and no more."""
    without = problem_of(bk.Connectivity(MATRIX), pooling=Pooling(regional=("a",)))
    prior = Pooling(regional=("a",), priors=(("a", -0.1, 0.02),))
    with_prior = problem_of(bk.Connectivity(MATRIX), pooling=prior)
    z = {"coupling.k": jnp.zeros((1, 1)), "a": jnp.asarray([[[-0.5, 0.0, 0.7]]], jnp.float32)}
    plain, pulled = (normal_equations_at(p, z, p.keys(KEY), p.comparison.data) for p in (without, with_prior))
    free = without.frees[1]
    value, slope = np.asarray(free.value(z["a"]))[0, 0], np.asarray(free.slope(z["a"]))[0, 0]
    weight = 0.1**2 / 3  # sigma of a correlation, and their number
    added = np.zeros(4)
    added[1:] = (slope / 0.02) ** 2 * weight
    np.testing.assert_allclose(np.asarray(pulled.normal - plain.normal)[0, 0], np.diag(added), rtol=1e-3, atol=1e-5)
    want = np.array([0.0, *((value + 0.1) / 0.02 * slope / 0.02 * weight)])
    np.testing.assert_allclose(np.asarray(pulled.slope - plain.slope)[0, 0], want, rtol=1e-3, atol=1e-5)


RECORD = {"rhythm": "x", "fc": "x"}


@pytest.fixture(scope="module")
def recovered() -> bk.Fit:
    """Correlations and a spectrum that the network made with the noise of the fit."""
    problem = problem_of(joint(), RECORD)
    keys, z = problem.keys(KEY), {"coupling.k": 0.12, "a": -0.2}
    z = {f.name: jnp.asarray(f.z([[z[f.name]]], "truth"), jnp.float32) for f in problem.frees}
    prediction = problem.predict(z, keys)
    nuisances = problem.comparison.residuals(prediction, problem.comparison.data)[1]
    made = problem.comparison.like_target(np.asarray(prediction), nuisances, ([0], [0])).targets
    data = {"rhythm": bk.PowerSpectrum(FREQS, made["rhythm"].power), "fc": bk.Connectivity(made["fc"].values)}
    return bk.fit(
        network(), bk.Joint(data), FREE, every=2, realisations=2, starts=1, steps=8, duration=STEPS, band=(10.0, 95.0),
        background=False, optimiser="levenberg_marquardt", **(CALL | {"record": RECORD}),
    )  # fmt: skip


@pytest.mark.slow
def test_least_squares_find_what_made_the_data(recovered):
    assert float(recovered.losses[:, 0, 0].min()) < 0.02 < float(recovered.losses[0, 0, 0])
    np.testing.assert_allclose(recovered.parameters["coupling.k"], 0.12, rtol=0.02)
    np.testing.assert_allclose(recovered.parameters["a"], -0.2, rtol=0.02)
    assert "'scan'" in recovered.reason
    errors = recovered.standard_errors()
    assert all(0 < x[0] < 1e-3 for x in errors.values())


@pytest.mark.slow
def test_a_loaded_fit_of_statistics_has_the_same_errors(tmp_path):
    """Its programs are those of as many starts."""
    call = {"duration": STEPS, "starts": 2, "steps": 1, "realisations": 1, "every": 2, **CALL}
    fit = bk.fit(network(), bk.Connectivity(MATRIX), FREE, **call)
    fit.save(tmp_path / "fit.json")
    loaded = bk.Fit.load(tmp_path / "fit.json", network())
    ours, theirs = fit.standard_errors(), loaded.standard_errors()
    for name, errors in ours.items():
        np.testing.assert_allclose(theirs[name], errors, rtol=1e-3)


def test_what_least_squares_of_networks_do_not_take():
    call = {"duration": 20, "starts": 1, "steps": 1, "optimiser": "levenberg_marquardt", **CALL}
    with pytest.raises(bk.Unsupported, match=r"'optimiser' got 'levenberg_marquardt' on 'numba'.*through 'scan'"):
        bk.fit(network(), bk.Connectivity(MATRIX), FREE, implementation="numba", **call)
    with pytest.raises(ValueError, match="'gradient_horizon' got"):
        bk.fit(network(), bk.Connectivity(MATRIX), FREE, gradient_horizon=10, **call)
    with pytest.raises(TypeError, match="'target' returns an error, but this takes its residuals"):
        bk.fit(network(), lambda result: result["x"].mean((0, -1)) ** 2, FREE, **call)
