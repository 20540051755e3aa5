"""`simulate` and `sigmoid_sys2nd` as parts of users' programs, on every implementation that runs on this machine."""

import functools

import brainunit as u
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import brainmass_kernels as bk
from brainmass_kernels.models import JansenRit

LANES, STEPS, DT = 3, 40, 0.5 * u.ms
C = np.linspace(120.0, 150.0, LANES, dtype=np.float32)
START = {"M": 0.1, "E": 20.0, "I": 15.0, "Mv": 1.0, "Ev": 2.0, "Iv": 3.0}


@pytest.fixture(params=["numba", pytest.param("scan", marks=pytest.mark.slow)])
def run(request):
    """One implementation: ``(C, start, **arguments) -> Result``."""

    def simulate(C, start=None, steps=STEPS, **more):
        initial = {n: (START[n] if start is None else start[n]) * unit for n, unit in JansenRit.states.items()}
        arguments = {"inputs": {"E_inp": 220 * u.Hz}, "initial": initial, "every": 4, "checkpoint_every": 10, **more}
        return bk.simulate(JansenRit(C=C), steps, DT, implementation=request.param, **arguments)

    simulate.name = request.param
    return simulate


def magnitudes(result: bk.Result) -> dict:
    return {n: u.get_magnitude(x) for n, x in {**result.records, **result.final}.items()}


def mixed(result: bk.Result):
    """A loss of the trajectory and of the final state."""
    return jnp.mean(result["eeg"].mantissa ** 2) + 0.1 * jnp.mean(result.final["Iv"].mantissa ** 2)


def assert_near(got, want, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.max(np.abs(b)))),
        got,
        want,
    )


def test_under_jit(run):
    assert_near(jax.jit(lambda C: magnitudes(run(C)))(C), magnitudes(run(C)), 1e-6)


def test_in_the_body_of_a_scan(run):
    """Four runs of ten steps, each from where the last one ended, are one of forty; gradient included."""

    def in_parts(C):
        def part(state, _):
            res = run(C, state, steps=10, every=2)
            return {n: u.get_magnitude(x) for n, x in res.final.items()}, res["eeg"].mantissa

        first = {n: jnp.full(LANES, x, jnp.float32) for n, x in START.items()}
        final, eeg = lax.scan(part, first, None, length=4)
        return jnp.mean(eeg**2) + 0.1 * jnp.mean(final["Iv"] ** 2)

    whole = jax.value_and_grad(lambda C: mixed(run(C, every=2)))(C)
    assert_near(jax.jit(jax.value_and_grad(in_parts))(C), whole)


ARGUMENTS = {
    "a parameter": lambda run, x: run(C * x),
    "an input": lambda run, x: run(C, inputs={"E_inp": 200 * x * u.Hz}),
    "an input that varies": lambda run, x: run(C, inputs={"E_inp": 200 * x * jnp.linspace(0.9, 1.1, STEPS) * u.Hz}),
    "the state": lambda run, x: run(C, {n: jnp.float32(value) * x for n, value in START.items()}),
    "the intensity of noise": lambda run, x: run(
        C, noise={"E_inp": 2.0 * x * u.Hz * u.second**0.5}, key=jax.random.key(0)
    ),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_under_vmap_over(run, what):
    scales = jnp.array([0.9, 1.1], jnp.float32)
    fun = ARGUMENTS[what]
    mapped = jax.vmap(lambda x: magnitudes(fun(run, x)))(scales)
    for i, x in enumerate(scales):
        assert_near(jax.tree.map(lambda y, i=i: y[i], mapped), magnitudes(fun(run, x)))


def test_under_vmap_over_keys(run):
    def noisy(key):
        return magnitudes(run(C, noise={"E_inp": 2.0 * u.Hz * u.second**0.5}, key=key))

    keys = jax.random.split(jax.random.key(1), 2)
    mapped = jax.vmap(noisy)(keys)
    for i in range(2):
        assert_near(jax.tree.map(lambda y, i=i: y[i], mapped), noisy(keys[i]))
    assert float(jnp.max(jnp.abs(mapped["eeg"][0] - mapped["eeg"][1]))) > 1e-3


def test_under_nested_vmap_and_its_gradient(run):
    scales, drives = jnp.array([0.9, 1.1], jnp.float32), jnp.array([180.0, 220.0, 260.0], jnp.float32)

    def loss(scale, drive):
        return mixed(run(C * scale, inputs={"E_inp": drive * u.Hz}))

    got = jax.vmap(jax.vmap(jax.grad(loss, (0, 1)), (None, 0)), (0, None))(scales, drives)
    want = [[jax.grad(loss, (0, 1))(a, b) for b in drives] for a in scales]
    for k in range(2):
        assert got[k].shape == (2, 3)
        assert_near(got[k], np.array([[w[k] for w in row] for row in want]))


def test_under_checkpoint(run):
    def loss(C):
        return mixed(run(C)) + jnp.sum(jnp.sin(C))

    assert_near(jax.grad(jax.checkpoint(loss))(C), jax.grad(loss)(C), 1e-6)


def test_gradient_of_trajectory_and_final_state(run):
    """Against differences in float64."""
    with jax.enable_x64(True):
        wide = jnp.asarray(C, jnp.float64)
        start = {n: jnp.full(LANES, x, jnp.float64) for n, x in START.items()}
        fun = functools.partial(lambda C, start: mixed(run(C, start)))
        by_C, by_start = jax.grad(fun, (0, 1))(wide, start)
        h = 1e-4
        assert float(by_C.sum()) == pytest.approx(
            float(fun(wide + h, start) - fun(wide - h, start)) / (2 * h), rel=1e-6
        )
        up, down = ({**start, "E": start["E"] + by} for by in (h, -h))
        assert float(by_start["E"].sum()) == pytest.approx(float(fun(wide, up) - fun(wide, down)) / (2 * h), rel=1e-6)


def test_donated_buffers(run):
    """What is donated may be written over; the numbers stay."""
    step = jax.jit(
        lambda state: {n: u.get_magnitude(x) for n, x in run(C, state, every=STEPS).final.items()}, donate_argnums=0
    )

    def start():
        return {n: jnp.full(LANES, x, jnp.float32) for n, x in START.items()}

    want = {n: u.get_magnitude(x) for n, x in run(C, start(), every=STEPS).final.items()}
    given = start()
    got = step(given)
    assert_near(got, want, 1e-6)
    assert all(x.is_deleted() for x in given.values())


def test_export_and_back(run):
    """A gradient as bytes and back, in one process: numba's kernels are registered with this one."""
    fun = jax.jit(jax.value_and_grad(lambda C: mixed(run(C))))
    checks = []
    if run.name == "numba":
        lowered = fun.lower(C).as_text()
        names = {word.strip('@"(') for word in lowered.replace("(", " ").split() if "brainmass_kernels_numba" in word}
        kinds = [name.split("_")[3] for name in names]
        assert {"forward", "adjoint", "pointwise"} == set(kinds)
        assert kinds.count("forward") == kinds.count("adjoint") == 1
        checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    exported = jax.export.export(fun, disabled_checks=checks)(jax.ShapeDtypeStruct(C.shape, C.dtype))
    again = jax.export.deserialize(exported.serialize())
    assert_near(again.call(C), fun(C), 1e-6)


@pytest.mark.parametrize("enabled", [True, False], ids=["x64", "x32"])
def test_dtypes_follow_the_arguments(run, enabled):
    """Float32 arguments make a float32 run wherever float64 is enabled; float64 ones a float64 run."""
    with jax.enable_x64(enabled):
        start = {n: jnp.full(LANES, x, jnp.float32) for n, x in START.items()}
        assert {x.dtype.name for x in magnitudes(run(jnp.asarray(C), start)).values()} == {"float32"}
        if enabled:
            wide = magnitudes(run(jnp.asarray(C, jnp.float64), start))
            assert {x.dtype.name for x in wide.values()} == {"float64"}


def test_gradients_of_brainunit(run):
    """`brainunit.autograd` gives gradients their units."""

    def power(drive):
        return u.math.mean(run(C, inputs={"E_inp": drive})["eeg"] ** 2)

    got = u.autograd.grad(power)(220.0 * u.Hz)
    want = jax.grad(lambda x: power(x * u.Hz).mantissa)(220.0)
    assert u.get_unit(got).has_same_dim(u.mV**2 / u.Hz)
    assert float(got.to_decimal(u.mV**2 / u.Hz)) == pytest.approx(float(want), rel=1e-5)


def test_one_step_in_all_of_these():
    """`sigmoid_sys2nd` under jit, vmap, scan, checkpoint and grad at once, against plain jnp."""
    fixed = {"A": 3.25, "a": 100.0, "vmax": 5.0, "v0": 6.0, "r": 0.56, "dt": 1e-3}

    def by(step):
        def loss(gain, start):
            @jax.checkpoint
            def body(state, potential):
                state = step(*state, potential, gain)
                return state, state[0]

            state, seen = lax.scan(body, (start, jnp.zeros_like(start)), jnp.linspace(3.0, 9.0, 20))
            return jnp.mean(seen**2) + jnp.mean(state[1] ** 2)

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), (0, None)))(jnp.array([50.0, 90.0]), jnp.ones(4))

    def ours(x, v, potential, gain):
        return bk.sigmoid_sys2nd(x, v, potential, gain=gain, scheme="euler", **fixed)

    def plain(x, v, potential, gain):
        drive = gain * 5.0 / (1 + jnp.exp(0.56 * (6.0 - potential)))
        return x + 1e-3 * v, v + 1e-3 * (3.25 * 100.0 * drive - 2 * 100.0 * v - 100.0**2 * x)

    assert_near(by(ours), by(plain))
