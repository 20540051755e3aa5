"""A gradient is finite wherever the run is: of every model, over a logarithmic grid of everything it takes.

One exception is no fault. Where a run is unstable its derivatives grow with every step, and some leave float32's range:
`outgrown` finds these lanes, by the adjoint of the same trajectory in float64.
"""

from types import SimpleNamespace

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import spectra, units
from brainmass_kernels.coupling import COUPLINGS
from brainmass_kernels.models.wong_wang import _transfer
from brainmass_kernels.schemes import SCHEMES, _phi, _position_loss

MADE = {
    "coloured JansenRit": bk.coloured(bk.JansenRit(), "E_inp", 10 * u.ms),
    "coloured WongWangExcInh": bk.coloured(bk.WongWangExcInh(), "coupling", 10 * u.ms),
    "with_bold JansenRit": bk.with_bold(bk.JansenRit()),
    "with_bold Linear": bk.with_bold(bk.Linear()),
}
MODELS = {entry.name: entry.model() for entry in bk.list_models() if not entry.model.delayed} | MADE
# Those with a branch that is not taken everywhere, and one that is unstable; the others when slow tests are.
QUICK = {"WongWangExcInh", "Epileptor", "Hopf", "with_bold Linear"}
SIZES = np.logspace(-3, 4, 8)
GRID = np.concatenate([-SIZES[::-1], [0.0], SIZES])
LARGEST = float(np.finfo(np.float32).max)
STEPS, DT = 20, {"Lorenz": 0.01}


def on_grid(model) -> tuple[dict, list]:
    """Everything a model takes: in each lane one argument on the grid and the others at their defaults."""
    cls = type(model)
    defaults = {("parameters", n): u.get_mantissa(x) for n, x in cls.parameters().items()}
    defaults |= {("inputs", n): u.get_mantissa(x) for n, x in cls.inputs.items()}
    defaults |= {("initial", n): u.get_mantissa(cls.initial.get(n, 0.0)) for n in cls.states}
    lanes = [(key, factor * (float(x) or 1.0)) for key, x in defaults.items() for factor in GRID]
    theta: dict = {"parameters": {}, "inputs": {}, "initial": {}}
    for (kind, n), x in defaults.items():
        theta[kind][n] = np.array([value if key == (kind, n) else x for key, value in lanes], np.float32)
    return theta, [(*key, value) for key, value in lanes]


def pulled_back(model, theta, dt, scheme, implementation):
    """Every record and the gradient of the sum of all, without units."""
    cls = type(model)
    known = {"parameters": cls.parameter_units(), "initial": cls.states}
    known["inputs"] = {n: units.unit_of(x) for n, x in cls.inputs.items()}

    def loss(theta):
        given = {kind: {n: units.attach(x, known[kind][n]) for n, x in some.items()} for kind, some in theta.items()}
        run = bk.simulate(
            cls(**given["parameters"]), STEPS, dt * u.ms, inputs=given["inputs"], initial=given["initial"],
            record=tuple(cls.recordable()), scheme=scheme, implementation=implementation,
        )  # fmt: skip
        seen = {n: u.get_magnitude(x) for n, x in run.records.items()}
        return sum(jnp.sum(x) for x in seen.values()), (seen, run.ok)

    gradient, (seen, ok) = jax.jit(jax.grad(loss, has_aux=True))(theta)
    finite = np.asarray(ok) & np.all([np.isfinite(x).all(0) for x in seen.values()], axis=0)
    return jax.tree.map(np.asarray, seen), finite, jax.tree.map(np.asarray, gradient)


def outgrown(model, theta, seen, dt, scheme) -> np.ndarray:
    """For each lane, whether some derivative of its trajectory, or a product with a state, leaves float32's range.

    The states are those that float32 saw: another run would leave an unstable fixed point in another way. A NaN does
    not count as large.
    """
    cls, moved = type(model), SCHEMES[scheme]
    h = units.strip(dt * u.ms, cls.time_unit, "dt")
    theta = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
    before = {n: np.concatenate([theta["initial"][n][None], np.float64(seen[n])[:-1]]) for n in cls.states}

    def step(s, p, i):
        p, i = SimpleNamespace(**p), SimpleNamespace(**i)
        s = moved.exit(cls, moved.step(cls, moved.enter(cls, s, p, h), p, i, h), p, h)
        return s, {**s, **cls.observe(SimpleNamespace(**s), p)}

    def back(cotangents, s):
        _, pull = jax.vjp(step, s, theta["parameters"], theta["inputs"])
        ones = {n: jnp.ones_like(x) for n in cls.recordable() for x in [s[next(iter(s))]]}
        found = pull((cotangents, ones))
        largest = [jnp.max(jnp.abs(jnp.stack(list(group))), 0) for group in (jax.tree.leaves(found), s.values())]
        return found[0], largest[0] * jnp.maximum(largest[1], 1.0)

    with jax.numpy_rank_promotion("allow"):
        zero = {n: jnp.zeros_like(x[0]) for n, x in before.items()}
        _, sizes = jax.jit(lambda: jax.lax.scan(back, zero, before, reverse=True))()
    # Whatever comes after, on the way back, the first number that float32 does not hold.
    sizes = np.asarray(sizes)[::-1]
    beyond = ~(sizes < 1e-3 * LARGEST)
    first = np.take_along_axis(sizes, np.argmax(beyond, 0)[None], 0)[0]
    return beyond.any(0) & ~np.isnan(first)


def check(name: str, scheme: str, implementation: str):
    model, dt = MODELS[name], DT.get(name, 0.1)
    theta, lanes = on_grid(model)
    seen, finite, gradient = pulled_back(model, theta, dt, scheme, implementation)
    assert finite.mean() > 0.5
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    broken = np.any([~np.isfinite(x) for _, x in leaves], axis=0) & finite
    if broken.any():
        broken &= ~_excused(model, theta, seen, dt, scheme)
    assert [lanes[lane] for lane in np.flatnonzero(broken)] == []


def _excused(*of_run):
    with jax.enable_x64(True):
        return outgrown(*of_run)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in MODELS])
def test_finite_wherever_the_run_is(name):
    check(name, MODELS[name].scheme, "scan")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_finite_by_exponential_euler(name):
    check(name, "exp_euler", "scan")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["exact", "rk4"])
@pytest.mark.parametrize("name", ["JansenRit", "Wendling"])
def test_finite_by_other_schemes(name, scheme):
    check(name, scheme, "scan")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "WongWangExcInh")) for n in MODELS])
def test_finite_on_numba(name):
    check(name, MODELS[name].scheme, "numba")


# Right, not only finite ---------------------------------------------------------------------------------------------


def slopes(fun, x, dtype):
    with jax.enable_x64(dtype == np.float64):
        return np.asarray(jax.jit(jax.vmap(jax.grad(fun)))(jnp.asarray(x, dtype)))


def test_the_transfer_of_wong_wang_far_from_zero():
    d, z = 0.16, np.float32([-1e8, -1e3, -89.0, -60.0, -39.0, -30.0, -21.0, -5.0, -0.5, 0.0, 0.5, 30.0, 1e3, 1e8])
    x, z64 = z / np.float32(d), np.float64(z / np.float32(d)) * d
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.exp(z64) * (np.expm1(-z64) * -1.0 - z64 * np.exp(-z64)) / (np.exp(z64) * np.expm1(-z64) ** 2)
        expected = np.where(z64 == 0.0, 0.5, np.where(z64 < -40.0, 0.0, np.where(z64 > 500.0, 1.0, expected)))
        value = np.where(z64 < -40.0, 0.0, np.where(z64 == 0.0, 1.0, z64 / -np.expm1(-z64))) / d
    for dtype, accuracy in ((np.float32, 1e-4), (np.float64, 1e-6)):
        np.testing.assert_allclose(slopes(lambda y: _transfer(y, d), x, dtype), expected, rtol=accuracy, atol=1e-16)
        np.testing.assert_allclose(_transfer(dtype(x), dtype(d)), value, rtol=accuracy, atol=1e-14)


def test_the_slope_of_the_transfer_loses_no_digits_near_zero():
    z = np.concatenate([-np.geomspace(1e-5, 30.0, 200)[::-1], np.geomspace(1e-5, 30.0, 200)])
    slope = jax.jit(jax.vmap(jax.grad(lambda x: _transfer(x, jnp.float32(0.16)))))(jnp.asarray(z / 0.16, jnp.float32))
    z = np.longdouble(np.float32(0.16)) * np.asarray(jnp.asarray(z / 0.16, jnp.float32), np.longdouble)
    away = -np.expm1(-z)
    expected = np.where(np.abs(z) < 1e-3, 0.5 + z / 6 - z**3 / 180, 1 / away - z * np.exp(-z) / away**2)
    np.testing.assert_allclose(slope, expected, rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize("implementation", ["scan", "numba"])
def test_strong_inhibition_moves_the_gates_and_nothing_else(implementation):
    """A population that does not fire lets its gate decay: d S / d S(0) is what remains of it."""

    def last(start, I_o):
        run = bk.simulate(
            bk.WongWangExcInh(I_o=I_o), 100, 0.1 * u.ms, initial={"S_e": start, "S_i": start}, scheme="euler",
            record="S_e", every=100, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(run["S_e"])

    by_start, by_current = jax.grad(last, argnums=(0, 1))(jnp.full(2, 0.1), jnp.asarray([-6.0, -1000.0]))
    np.testing.assert_allclose(by_start, (1.0 - 0.1 / 100.0) ** 100, rtol=1e-5)
    np.testing.assert_array_equal(by_current, 0.0)


def test_the_epileptor_at_high_permittivity():
    cls = bk.Epileptor
    p = SimpleNamespace(**{n: jnp.float32(x) for n, x in cls.parameters().items()})
    i = SimpleNamespace(x1_inp=jnp.float32(0.0), x2_inp=jnp.float32(0.0))
    s = {n: jnp.float32(0.0) for n in cls.states} | {"z": jnp.float32(1e7)}

    def rate(s):
        return cls.drift(SimpleNamespace(**s), p, i)["z"]

    assert np.isfinite(rate(s))
    assert jax.grad(rate)(s)["z"] == -p.r
    below = {**s, "z": jnp.float32(-2.0)}
    np.testing.assert_allclose(jax.grad(rate)(below)["z"], p.r * (-0.7 * 2.0**6 - 1.0), rtol=1e-6)


def test_blood_that_has_stopped():
    """Of little blood all oxygen is taken, so that deoxyhaemoglobin follows the inflow with slope 1 / (rho tau)."""
    cls = type(MODELS["with_bold Linear"])
    p = SimpleNamespace(**{n: jnp.float32(u.get_mantissa(x)) for n, x in cls.parameters().items()})
    s = {n: jnp.float32(cls.initial.get(n, 0.0)) for n in cls.states}

    def rate(f):
        moved = cls.drift(SimpleNamespace(**{**s, "bold_f": f}), p, SimpleNamespace(x_inp=jnp.float32(0.0)))
        return 1e3 * moved["bold_q"]  # per second

    for f in (0.0, 1e-30, 1e-16, 1e-3):
        np.testing.assert_allclose(jax.grad(rate)(jnp.float32(f)), 1.0 / (p.bold_rho * p.bold_tau), rtol=1e-5)


def test_what_the_schemes_divide_by():
    z = np.float32(np.concatenate([GRID * 80.0 / SIZES[-1], [1e-4, -1e-4, 0.5, -0.5]]))
    z = np.concatenate([z, np.float32([-1e4, -1e30])])
    z64 = np.float64(z)
    near = np.abs(z64) < 1e-3
    far = np.where(near, 1.0, z64)
    phi = np.where(near, 0.5 + z64 / 3.0, (1.0 - np.expm1(far) / far + np.expm1(far)) / far)
    np.testing.assert_allclose(slopes(_phi, z, np.float64), phi, rtol=1e-3, atol=1e-30)
    # Between its two forms the slope of a float32 quotient loses digits; the states need a value, this a direction.
    assert np.isfinite(slopes(_phi, z, np.float32)).all()
    for dtype in (np.float32, np.float64):
        loss = slopes(_position_loss, -z[z <= 80.0], dtype)
        np.testing.assert_allclose(loss, (z64 * np.exp(z64))[z <= 80.0], rtol=1e-4, atol=1e-30)


# Functions beside the models ----------------------------------------------------------------------------------------

HELPERS = {
    "sigmoid": (bk.sigmoid, (1.0, 5.0, 6.0, 0.56)),
    "sys2nd": (bk.sys2nd, (3.25, 100.0, 120.0, 1.0, 10.0)),
    "bounded_input": (lambda x, bound: bk.bounded_input(x, jnp.where(bound > 0, bound, 1.0)), (1.0, 500.0)),
    "clipped": (lambda x, low, high: bk.bounded_input(x, lower=low, upper=high), (1.0, -1.0, 1.0)),
} | {
    f"coupling {name}": (
        lambda total, own, *values, kind=kind: (
            sum(kind.sent(own, p := SimpleNamespace(**dict(zip([*kind.parameters, "degree"], values)))))
            + kind.received((total,) * (kind.sums or 1), own, p)
        ),
        (1.0, 1.0, *kind.parameters.values(), 1.0),
    )
    for name, kind in COUPLINGS.items()
}


@pytest.mark.parametrize("name", HELPERS)
def test_helpers_and_couplings_on_the_grid(name):
    fun, defaults = HELPERS[name]
    lanes = [
        [y if n != k else factor * (x or 1.0) for n, y in enumerate(defaults)]
        for k, x in enumerate(defaults)
        for factor in GRID
    ]
    arguments = jnp.asarray(lanes, jnp.float32).T
    value, found = jax.jit(jax.vmap(jax.value_and_grad(fun, argnums=tuple(range(len(defaults))))))(*arguments)
    assert np.isfinite(value).all()
    assert np.isfinite(jnp.stack(found)).all()


def test_statistics_of_a_mass_at_rest():
    """Nothing varies: variance and power, of which logarithms and roots are taken, are 0."""

    def seen(start):
        run = bk.simulate(
            bk.Linear(gamma=-1.0), 64, 1 * u.ms, initial={"x": start}, implementation="scan",
            record={
                "mean": bk.Mean(), "variance": bk.Variance(), "least": bk.Minimum(), "most": bk.Maximum(),
                "power": bk.Spectrum([0.0, 100.0, 200.0]), "means": bk.Average(8 * u.ms), "x": "x",
            },
        )  # fmt: skip
        found = [jnp.sum(u.get_magnitude(x)) for x in run.records.values()]
        x = run["x"]
        found.append(jnp.sum(spectra.envelope(x, 1e-3, (20.0, 40.0))))
        found.append(jnp.sum(spectra.correlation(x)))
        found.append(jnp.sum(jnp.log10(jnp.maximum(spectra.welch(x, 1e-3, 32)[1], 1e-30))))
        return sum(found), jnp.stack(found)

    slope, found = jax.jit(jax.grad(seen, has_aux=True))(jnp.zeros(2))
    assert np.isfinite(found).all()
    assert np.isfinite(slope).all()
