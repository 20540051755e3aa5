"""Models and networks as arguments of other people's transformations: jit, grad, vmap, tree.map, optax, equinox."""

import functools
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import brainmass_kernels as bk

DT = 0.5 * u.ms
WEIGHTS = np.random.default_rng(0).uniform(0.0, 0.2, (3, 3)).astype(np.float32)


@bk.model
class Relaxation(bk.Model):
    """A user's model: a field with a unit, and one without."""

    states = {"x": u.mV}
    inputs = {"push": 1.0 * u.mV}
    observables = {"out": u.mV}
    time_unit = u.ms
    tau: Any = 10 * u.ms
    gain: Any = 2

    @staticmethod
    def drift(s, p, i):
        return {"x": (p.gain * i.push - s.x - 0.1 * s.x**3) / p.tau}

    @staticmethod
    def observe(s, p):
        return {"out": s.x + 0.1 * p.gain}


def coupled(model, weights=WEIGHTS, **options):
    source, target = {"Relaxation": ("out", "push"), "Hopf": ("x", "x_inp")}[type(model).__name__]
    return bk.Network(model, weights, **{"source": source, "target": target, "k": 0.5, "delays": 2 * u.ms, **options})


def made() -> dict[str, Any]:
    return {
        "model": bk.JansenRit(C=np.float32(135.0)),
        "without units": bk.Hopf(),
        "the user's": Relaxation(),
        "coloured": bk.coloured(Relaxation(), "push", 5 * u.ms),
        "with blood": bk.with_bold(Relaxation(), gain=0.1 / u.second / u.mV),
        "network": coupled(bk.Hopf()),
        "network with units": bk.Network(
            bk.JansenRit(), WEIGHTS, source="eeg", target="E_inp", k=20 * u.Hz / u.mV, coupling="laplacian"
        ),
        "network of the user's": coupled(Relaxation()),
    }


@pytest.fixture(params=[*made()])
def thing(request):
    return made()[request.param]


@pytest.fixture(params=["without units", pytest.param("model", marks=pytest.mark.slow), "the user's", "network"])
def runnable(request):
    """What the tests run that compile a run for each: a model, a user's model, and a network."""
    return made()[request.param]


def loss(thing, implementation="scan"):
    """Without units, of the first observable or state."""
    mass = bk.network.parts_of(thing)[1]
    name = next(iter(mass.recordable()))
    start = {} if isinstance(mass, bk.JansenRit) else {"x": 0.2 * mass.states["x"]}
    run = bk.simulate(thing, 12, DT, initial=start, record=name, implementation=implementation)
    return 10.0 * jnp.mean(u.get_magnitude(run[name]) ** 2)


compiled, slope = jax.jit(loss), jax.jit(jax.grad(loss))


def near(one, other, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


# The tree -----------------------------------------------------------------------------------------------------------


def test_leaves_are_real_numbers_and_come_back(thing):
    leaves, structure = jax.tree.flatten(thing)
    assert leaves
    assert all(isinstance(x, float) or jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(thing)
    assert jax.tree.structure(again) == structure
    assert all(x is y for x, y in zip(leaves, jax.tree.leaves(again), strict=True))
    hash(structure)


@pytest.mark.parametrize("leaf", [object(), None, "leaf", jax.ShapeDtypeStruct((2,), jnp.float32), False])
def test_leaves_may_be_anything(thing, leaf):
    leaves, structure = jax.tree.flatten(thing)
    mapped = jax.tree.unflatten(structure, [leaf] * len(leaves))
    assert jax.tree.leaves(mapped, is_leaf=lambda x: x is None) == [leaf] * len(leaves)
    assert type(bk.network.parts_of(mapped)[1]).__name__ in repr(mapped)


def test_paths_are_those_of_the_attributes():
    paths, _ = jax.tree_util.tree_flatten_with_path(coupled(bk.Hopf()))
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [
        ".model.a", ".model.w", ".model.beta", ".weights", ".parameters['b']", ".parameters['k']",
    ]  # fmt: skip


def test_what_is_static_decides_the_structure():
    structure = jax.tree.structure(coupled(bk.Hopf()))
    assert jax.tree.structure(coupled(bk.Hopf(a=0.3), weights=2 * WEIGHTS, k=0.1)) == structure
    others = {"delays": 3 * u.ms}, {"delays": None}, {"coupling": "diffusive"}, {"self_connection": True}
    assert all(jax.tree.structure(coupled(bk.Hopf(), **other)) != structure for other in others)


def test_delays_do_not_change_behind_a_compiled_program():
    times = np.full((3, 3), 0.002)
    network = coupled(bk.Hopf(), delays=times * u.second)
    times[:] = 0.0
    assert (network.delay_steps(1e-3) == 2).all()
    with pytest.raises(ValueError, match="read-only"):
        network.delays[0, 0] = 0.0


def test_whole_numbers_and_lists_are_floating_point():
    model = Relaxation(tau=[10, 20] * u.ms, gain=[1, 2])
    assert [x.dtype.kind for x in jax.tree.leaves(model)] == ["f", "f"]
    assert model.tau.unit == u.ms
    assert jax.tree.leaves(Relaxation(tau=np.array([1, 2]) * u.second))[0].tolist() == [1.0, 2.0]
    assert isinstance(Relaxation(gain=3).gain, float)
    assert isinstance(coupled(bk.Hopf(), k=1).parameters["k"], float)
    array = jnp.ones(3)
    assert Relaxation(gain=array).gain is array
    near(jax.grad(loss)(Relaxation(tau=10 * u.ms, gain=2)), jax.grad(loss)(Relaxation(tau=10.0 * u.ms, gain=2.0)))


# Transformations ----------------------------------------------------------------------------------------------------


def test_under_jit(thing):
    np.testing.assert_allclose(compiled(thing), loss(thing), rtol=1e-5)
    doubled = jax.jit(lambda x: jax.tree.map(lambda leaf: 2 * leaf, x))(thing)
    near(doubled, jax.tree.map(lambda leaf: np.float32(2 * leaf), thing))


def test_equal_networks_are_traced_once():
    traced = []

    @jax.jit
    def total(network):
        traced.append(network)
        return sum(map(jnp.sum, jax.tree.leaves(network)))

    delays = np.random.default_rng(1).uniform(0.0, 5.0, (3, 3))
    for k in (0.1, 0.2):
        total(coupled(bk.Hopf(a=k), weights=k * WEIGHTS, k=k, delays=delays.copy() * u.ms))
    assert len(traced) == 1
    total(coupled(bk.Hopf(), delays=2 * delays * u.ms))
    assert len(traced) == 2


def test_the_gradient_is_a_tree_like_the_argument(runnable):
    gradient = slope(runnable)
    leaves, structure = jax.tree.flatten(runnable)
    assert jax.tree.structure(gradient) == structure
    first = jax.grad(lambda x: compiled(jax.tree.unflatten(structure, [x, *leaves[1:]])))(leaves[0])
    np.testing.assert_allclose(jax.tree.leaves(gradient)[0], first, rtol=1e-4)
    assert [np.shape(x) for x in jax.tree.leaves(gradient)] == [np.shape(x) for x in leaves]
    assert all(np.any(np.asarray(x) != 0.0) for x in jax.tree.leaves(gradient))


def test_the_gradient_is_that_by_each_parameter():
    network = made()["network of the user's"]

    def changed(gain, tau, k, weights):
        model = network.model.replace(gain=gain, tau=tau * u.ms)
        return loss(network.replace(model=model, k=k, weights=weights))

    one_by_one = jax.jit(jax.grad(changed, argnums=(0, 1, 2, 3)))(2.0, 10.0, 0.5, WEIGHTS)
    gradient = slope(network)
    found = gradient.model.gain, gradient.model.tau.mantissa, gradient.parameters["k"], gradient.weights
    for x, expected in zip(found, one_by_one, strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-8)
    assert gradient.model.tau.unit == u.ms


def test_gradients_have_their_true_units_from_brainunit():
    model = Relaxation()
    plain = slope(model)
    true = u.autograd.grad(lambda model: loss(model) * u.mV**2)(model)
    assert true.tau.unit == u.mV**2 / u.ms
    np.testing.assert_allclose(true.tau.mantissa, plain.tau.mantissa, rtol=1e-6)
    assert true.gain.unit == u.mV**2


@needs.numba
@pytest.mark.slow
def test_one_kernel_of_numba():
    network = coupled(Relaxation())
    fast, slow = (jax.jit(jax.grad(functools.partial(loss, implementation=name))) for name in ("numba", "scan"))
    near(fast(network), slow(network), rtol=1e-4)


def test_under_vmap(runnable):
    scales = np.array([1.0, 1.01, 0.99], np.float32)
    each = [jax.tree.map(lambda x, c=c: np.float32(c * x), runnable) for c in scales]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *each)
    np.testing.assert_allclose(jax.vmap(loss)(batch), [loss(x) for x in each], rtol=1e-5)


def test_the_gradient_of_a_batch():
    thing = coupled(Relaxation())
    each = [thing.replace(k=k).as_arrays() for k in (0.3, 0.6)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *each)
    found = jax.jit(jax.vmap(jax.grad(loss)))(batch)
    near(found, jax.tree.map(lambda *x: jnp.stack(x), *map(slope, each)))


def test_under_tree_map(runnable):
    moved = jax.tree.map(lambda x, g: x - 1e-3 * g, runnable, slope(runnable))
    assert type(moved) is type(runnable)
    assert loss(moved) < loss(runnable)
    flat, back = ravel_pytree(runnable)
    assert flat.size == sum(np.size(x) for x in jax.tree.leaves(runnable))
    near(back(flat), runnable)


def test_derived_inside_a_transformation():
    def active(model):
        model = bk.coloured(model, "push", 5 * u.ms)
        return loss(bk.with_bold(model, gain=0.1 / u.second / u.mV))

    near(jax.jit(jax.grad(active))(Relaxation()), slope(Relaxation()), rtol=1e-4)


@pytest.mark.slow
def test_second_derivatives():
    curvature = jax.hessian(loss)(bk.Hopf())
    np.testing.assert_allclose(curvature.a.w, jax.grad(lambda w: slope(bk.Hopf(w=w)).a)(0.2), rtol=1e-5)


def test_a_network_made_of_traced_weights():
    delays = jnp.full((3, 3), 2.0) * u.ms

    @jax.jit
    def run(weights, k, gain):
        return loss(coupled(Relaxation(gain=gain), weights, k=k, delays=delays))

    np.testing.assert_allclose(run(WEIGHTS, 0.5, 2.0), loss(coupled(Relaxation())), rtol=1e-5)
    with pytest.raises(TypeError, match="'distances' is traced by jit"):
        jax.jit(lambda lengths: loss(coupled(Relaxation(), delays=None, distances=lengths, speed=3.0)))(
            jnp.ones((3, 3))
        )


def test_simulate_itself_under_jit(runnable):
    run = functools.partial(bk.simulate, duration=5, dt=DT, implementation="scan")
    found, expected = jax.jit(run)(runnable), run(runnable)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert (found.ts == expected.ts).all()
    moved = jax.jit(bk.simulate, static_argnames=("duration", "implementation", "record"))
    with pytest.raises(TypeError, match="'dt' is traced by jit"):
        moved(runnable, duration=5, dt=DT, implementation="scan")


# Training loops of other packages -----------------------------------------------------------------------------------


@pytest.fixture
def loose():
    """The promotion of types that users have, and that optax needs."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", [pytest.param("model", marks=pytest.mark.slow), "the user's", "network"])
def test_adam(name, loose):
    optax, thing = pytest.importorskip("optax"), made()[name]
    optimiser = optax.adam(0.01)
    state, before = optimiser.init(thing), compiled(thing)

    @jax.jit
    def moved(thing, state, gradient):
        updates, state = optimiser.update(gradient, state, thing)
        return optax.apply_updates(thing, updates), state

    for _ in range(3):
        thing, state = moved(thing, state, slope(thing))
    assert jax.tree.structure(thing) == jax.tree.structure(made()[name])
    assert compiled(thing) < before


@pytest.mark.parametrize("name", ["the user's", "network"])
def test_training_in_a_scan(name, loose):
    optax, thing = pytest.importorskip("optax"), made()[name].as_arrays()
    optimiser = optax.adam(0.01)

    def step(carry, _):
        thing, state = carry
        value, gradient = jax.value_and_grad(loss)(thing)
        updates, state = optimiser.update(gradient, state, thing)
        return (optax.apply_updates(thing, updates), state), value

    (thing, _), values = jax.lax.scan(step, (thing, optimiser.init(thing)), length=5)
    assert (np.diff(values) < 0.0).all()
    assert loss(thing) < values[-1]


def test_equinox(runnable):
    eqx = pytest.importorskip("equinox")
    arrays = runnable.as_arrays()
    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(arrays)
    np.testing.assert_allclose(value, compiled(arrays), rtol=1e-5)
    near(gradient, slope(arrays))


def test_equinox_leaves_numbers_out():
    eqx = pytest.importorskip("equinox")
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(Relaxation(gain=jnp.float32(2.0)))
    assert gradient.tau.mantissa is None
    np.testing.assert_allclose(gradient.gain, slope(Relaxation()).gain, rtol=1e-5)
    network = eqx.tree_at(lambda n: n.parameters["k"], coupled(bk.Hopf()), 0.7)
    assert network.parameters["k"] == 0.7
    assert loss(network) == loss(coupled(bk.Hopf(), k=0.7))


# Methods ------------------------------------------------------------------------------------------------------------


def test_as_arrays(thing):
    arrays = thing.as_arrays()
    assert jax.tree.structure(arrays) == jax.tree.structure(thing)
    for x, y in zip(jax.tree.leaves(arrays), jax.tree.leaves(thing), strict=True):
        assert isinstance(x, jax.Array)
        assert x.dtype == jnp.float32
        assert not x.weak_type
        np.testing.assert_array_equal(x, np.float32(y))
    np.testing.assert_allclose(loss(arrays), loss(thing), rtol=1e-5)


def test_as_arrays_keeps_the_precision_of_the_run(x64):
    def kinds(**fields):
        return [str(x.dtype) for x in jax.tree.leaves(Relaxation(**fields).as_arrays())]

    assert kinds() == ["float64", "float64"]
    assert kinds(gain=np.float32(2.0)) == ["float32", "float32"]
    assert kinds(gain=np.ones(2), tau=np.float32(3.0) * u.ms) == ["float32", "float64"]
    narrow = Relaxation(gain=jnp.ones(2, jnp.float32))
    assert loss(narrow.as_arrays()).dtype == loss(narrow).dtype == jnp.float32


def test_replace():
    model = Relaxation(gain=3.0)
    other = model.replace(tau=0.02 * u.second)
    assert (type(other), other.gain, other.tau, model.tau) == (Relaxation, 3.0, 0.02 * u.second, 10.0 * u.ms)
    assert model.replace().tau == model.tau
    noisy = bk.coloured(model, "push", 5 * u.ms)
    assert noisy.replace(tau_push=1 * u.ms).tau_push == 1.0 * u.ms
    with pytest.raises(TypeError, match=r"unknown parameter 'gian'; did you mean 'gain'\? Known: tau, gain"):
        model.replace(gian=1.0)
    with pytest.raises(ValueError, match=r"'tau' got a plain float .* but takes ms"):
        model.replace(tau=1.0)
    with pytest.raises(ValueError, match="'gain' got NaN"):
        model.replace(gain=np.nan)
    np.testing.assert_allclose(jax.jit(lambda g: loss(model.replace(gain=g)))(3.0), loss(model), rtol=1e-5)
