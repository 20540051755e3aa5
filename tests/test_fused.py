"""sigmoid_sys2nd: one fused step."""

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from scipy.linalg import expm

import brainmass_kernels as bk
from benchmarks import op_bytes
from brainmass_kernels import _jax
from brainmass_kernels.backends import elementwise

PLAIN = {"A": 3.25, "a": 100.0, "vmax": 5.0, "v0": 6.0, "r": 0.56, "dt": 5e-4}
UNITS = {
    "A": 3.25 * u.mV, "a": 100.0 * u.Hz, "vmax": 5.0 * u.Hz, "v0": 6.0 * u.mV, "r": 0.56 / u.mV, "dt": 0.5 * u.ms,
}  # fmt: skip


def closed_form(x, v, potential, gain=1.0, offset=0.0, bound=None):
    """The exact flow in float64, by the matrix exponential of the augmented system."""
    A, a, dt = PLAIN["A"], PLAIN["a"], PLAIN["dt"]
    drive = offset + gain * PLAIN["vmax"] / (1.0 + np.exp(PLAIN["r"] * (PLAIN["v0"] - potential)))
    drive = drive if bound is None else bound * np.tanh(drive / bound)
    system = np.array([[0.0, 1.0, 0.0], [-(a**2), -2.0 * a, A * a * drive], [0.0, 0.0, 0.0]])
    return (expm(system * dt) @ [x, v, 1.0])[:2]


@pytest.mark.parametrize("extra", [{}, {"gain": 2.0, "offset": -1.0}, {"bound": 2.0}])
@pytest.mark.parametrize("potential", [-3.0, 6.0, 20.0])
def test_exact_is_the_closed_form(extra, potential):
    got = bk.sigmoid_sys2nd(1.5, -20.0, potential, **PLAIN, **extra)
    np.testing.assert_allclose(np.array(got), closed_form(1.5, -20.0, potential, **extra), rtol=2e-6)


@pytest.mark.parametrize("scheme", ["euler", "exp_euler", "symplectic_euler", "strang", "heun", "rk4"])
def test_every_scheme_is_near_it(scheme):
    got = bk.sigmoid_sys2nd(1.5, -20.0, 4.0, **PLAIN, scheme=scheme)
    np.testing.assert_allclose(np.array(got), closed_form(1.5, -20.0, 4.0), rtol=0.05)
    assert not np.allclose(got[1], -20.0)


def test_units_come_off_and_on():
    x, v = bk.sigmoid_sys2nd(1.5 * u.mV, -20.0 * u.mV / u.second, 4.0 * u.mV, **UNITS)
    plain = bk.sigmoid_sys2nd(1.5, -20.0, 4.0, **PLAIN)
    np.testing.assert_allclose([x / u.mV, v / (u.mV / u.second)], plain, rtol=1e-6)
    assert x.unit == u.mV
    assert u.have_same_dim(v, 1.0 * u.mV / u.ms)


@pytest.mark.parametrize("implementation", [None, "mosaic_tpu"])
def test_gradient_against_finite_differences(implementation):
    def loss(x, a, potential):
        settings = {**PLAIN, "a": a}
        if implementation is None:
            out = bk.sigmoid_sys2nd(x, -20.0, potential, **settings)
        else:
            with bk.testing.interpret():
                out = bk.sigmoid_sys2nd(x, -20.0, potential, **settings, implementation=implementation)
        return 100.0 * out[0] + out[1]

    at = (1.5, 100.0, 5.0)
    got = jax.grad(loss, argnums=(0, 1, 2))(*at)
    for k, (g, size) in enumerate(zip(got, (0.5, 5.0, 0.5))):
        up, down = list(at), list(at)
        up[k], down[k] = at[k] + size, at[k] - size
        np.testing.assert_allclose(g, (loss(*up) - loss(*down)) / (2 * size), rtol=2e-2)


KERNELS = [
    "mosaic_tpu",
    pytest.param("mosaic_gpu", marks=needs.mosaic_gpu),
]
PARAMETERS = ("A", "a", "vmax", "v0", "r")


def drawn(shape, several=()):
    """x, v and potential of a shape, and parameters, of which some are one an element."""
    rng = np.random.default_rng(4)
    state = [np.float32(rng.normal(at, size, shape)) for at, size in ((0.1, 0.2), (0.0, 10.0), (6.0, 6.0))]
    return *state, *(np.float32(PLAIN[n] * rng.uniform(0.9, 1.1, shape if n in several else ())) for n in PARAMETERS)


def stepped(values, implementation=None, **more):
    x, v, potential, *rest = values
    return bk.sigmoid_sys2nd(
        x, v, potential, **dict(zip(PARAMETERS, rest)), dt=PLAIN["dt"], implementation=implementation, **more
    )


def loss(values, implementation=None, **more):
    x, v = stepped(values, implementation, **more)
    return jnp.sum(jnp.sin(3.0 * x) + 0.01 * v**2)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
    ("shape", "several", "more"),
    [
        ((), (), {}),
        ((1024,), ("a",), {}),
        ((3, 7, 61), (), {"bound": 2.0}),
        ((1500,), PARAMETERS, {"scheme": "heun"}),
    ],
)
def test_a_kernel_of_its_own_is_jnp(implementation, shape, several, more):
    """Both ways, in every argument, of sizes that fill blocks or not; what the kernel does not write is NaN."""
    values = drawn(shape, several)
    want = jax.jit(lambda v: (stepped(v, **more), jax.grad(loss)(v, **more)))(values)
    with bk.testing.interpret():
        got = jax.jit(lambda v: (stepped(v, implementation, **more), jax.grad(loss)(v, implementation, **more)))(values)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * max(1e-30, float(jnp.max(jnp.abs(b)))))


def test_a_kernel_under_vmap_and_its_gradient():
    x, v, potential, *rest = drawn((4, 6))
    rates = np.float32([90.0, 100.0, 110.0, 120.0])

    def of(implementation):
        def one(x, v, potential, a):
            return loss((x, v, potential, rest[0], a, *rest[2:]), implementation)

        return jax.vmap(jax.value_and_grad(one, (0, 3)))(x, v, potential, rates)

    with bk.testing.interpret():
        got = of("mosaic_tpu")
    for a, b in zip(*map(jax.tree.leaves, (got, of(None))), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_what_a_kernel_does_not_do_is_refused_in_words(x64):
    with bk.testing.interpret():
        with pytest.raises(bk.Unsupported, match="float32 only, not in float64"):
            stepped([np.float64(x) for x in drawn((3,))], "mosaic_tpu")
        with pytest.raises(TypeError, match=r"forward-mode.*leave implementation out"):
            jax.jvp(
                lambda x: stepped((x, *drawn((3,))[1:]), "mosaic_tpu"), (drawn((3,))[0],), (np.ones(3, np.float32),)
            )
        with pytest.raises(TypeError, match=r"second derivative.*leave implementation out"):
            jax.grad(jax.grad(lambda a: loss((*drawn((3,))[:4], a, *drawn((3,))[5:]), "mosaic_tpu")))(np.float32(100.0))
        with pytest.raises(ValueError, match="'dt' got"):
            bk.sigmoid_sys2nd(1.5, -20.0, 4.0, **{**PLAIN, "dt": -1.0}, implementation="mosaic_tpu")
        if not _jax.MOSAIC_GPU:
            with pytest.raises(bk.Unsupported, match=r"needs jax 0\.11"):
                stepped(drawn((3,)), "mosaic_gpu")
    with pytest.raises(bk.Unsupported, match="not 'tpu'"):
        stepped(drawn((3,)), "mosaic_tpu")


@pytest.mark.parametrize("bound", [-1.0, 0.0, np.inf, np.nan, np.array([2.0, -2.0])])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ValueError, match=r"'bound' got .*, but takes a positive finite value"):
        bk.sigmoid_sys2nd(1.5, -20.0, 4.0, **PLAIN, bound=bound)


def test_a_kernel_of_no_elements():
    with bk.testing.interpret():
        x, v = stepped(drawn((0, 3)), "mosaic_tpu")
        grad = jax.grad(loss)(drawn((0,)), "mosaic_tpu")
    assert x.shape == v.shape == (0, 3)
    assert float(grad[3]) == 0.0


def test_the_same_call_compiles_once():
    """In a loop of Python, forward and back."""
    values = drawn((40,))

    def traced() -> int:
        return elementwise._mapped.cache_info().misses

    with bk.testing.interpret():
        jax.grad(loss)(values, "mosaic_tpu")
        before = traced()
        jax.grad(loss)(values, "mosaic_tpu")
        assert traced() == before
    bk.clear_caches()
    assert elementwise._mapped.cache_info().currsize == 0


@pytest.mark.slow
@needs.libtpu
@pytest.mark.parametrize(("what", "most"), [("forward", 21), ("in x, v and potential", 44), ("in all", 54)])
def test_a_kernel_reads_and_writes_each_array_once(what, most):
    """Counted from the compiled program; jnp moves 280 MB for the last."""
    assert op_bytes.counted("v5e", "mosaic_tpu", op_bytes.GRADIENTS[what]) <= most


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": 3.25 * u.second}, "'A' got s, but takes"),
        ({"v0": 6.0}, "'v0' got a plain float"),
        ({"vmax": 5.0 * u.Hz, "offset": 1.0 * u.mV}, "'offset' got mV, but takes"),
        ({"dt": -0.5 * u.ms}, "'dt' got"),
        ({"scheme": "strangg"}, "did you mean 'strang'"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        bk.sigmoid_sys2nd(1.5 * u.mV, -20.0 * u.mV / u.second, 4.0 * u.mV, **{**UNITS, **change})
