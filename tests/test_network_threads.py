"""One large network on several threads of the CPU: the bits of one thread, both ways."""

import functools

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import brainmass_kernels as bk
from brainmass_kernels import arguments
from brainmass_kernels.backends.numba import call, layout
from brainmass_kernels.run import _execute, loop_of
from brainmass_kernels.schedule import Schedule

N, STEPS, DT = 300, 90, 0.5 * u.ms
RANDOM = np.random.default_rng(8)
WEIGHTS = scipy.sparse.random_array((N, N), density=0.06, rng=RANDOM, dtype=np.float32)
TIMES = (RANDOM.random(WEIGHTS.nnz) * 24) * u.ms
SIGNAL = RANDOM.random((STEPS, N)).astype(np.float32)
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def small_runs_take_threads(monkeypatch):
    monkeypatch.setattr(call, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(layout, "SHARED", 1)


def network(form: str, delayed: bool) -> bk.Network:
    weights, delays = (WEIGHTS, TIMES) if form == "sparse" else (WEIGHTS.toarray(), None)
    if form != "sparse" and delayed:
        delays = (RANDOM.random((N, N)) * 24) * u.ms
    if form == "groups":
        coupling = bk.Coupling(weights, delays=delays, k=0.01, source="a.x", target={"a": "x_inp", "b": "y_inp"})
        return bk.Network({"a": (bk.Hopf(), 170), "b": (bk.VanDerPol(), N - 170)}, couplings=[coupling])
    return bk.Network(bk.Hopf(), weights, delays=delays if delayed else None, k=0.01)


def run_of(net: bk.Network, **kwargs):
    inputs = {"x_inp": SIGNAL, "y_inp": np.linspace(0, 0.1, STEPS, dtype=np.float32)}
    noise = {"y": 0.1 / u.ms**0.5}
    if hasattr(net.model, "groups"):
        inputs = {"a.x_inp": SIGNAL[:, : net.model.spans[0][1]], "b.y_inp": inputs["y_inp"]}
        noise = {"a.y": noise["y"], "b.x": noise["y"]}
    settings = {"inputs": inputs, "noise": noise, "key": KEY, "every": 4, "implementation": "numba"}
    return arguments.prepare(net, STEPS, DT, **(settings | kwargs))


def everything(run, data) -> list[np.ndarray]:
    """Records and the last history; gradients by weights, strength, the signal of each region, and the start."""

    def total(weights, hoisted, signal, state):
        connections = tuple(term._replace(weights=w) for term, w in zip(data.connections, weights))
        varying = (signal, *data.varying[1:])
        out = _execute(run, data._replace(connections=connections, hoisted=hoisted, varying=varying, state=state))
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(out)), out

    places = [term.weights for term in data.connections], data.hoisted, data.varying[0], data.state
    places = jax.tree.map(jnp.asarray, places)
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*places)
    return [np.asarray(x) for x in jax.tree.leaves((gradient, jax.jit(functools.partial(_execute, run))(data)))]


@pytest.mark.parametrize("delayed", [True, False], ids=["delays", "no delays"])
@pytest.mark.parametrize("form", ["sparse", "matrix", "groups"])
def test_the_bits_do_not_depend_on_the_threads(monkeypatch, form, delayed):
    run, data = run_of(network(form, delayed))
    bits = {}
    for threads in (1, 3):
        monkeypatch.setenv("NUMBA_NUM_THREADS", str(threads))
        kind = layout.Layout.of(loop_of(run)[1], N, np.float32)
        assert kind.parts == (0 if threads == 1 else threads)
        bits[threads] = everything(run, data)
    assert all(np.array_equal(a, b) for a, b in zip(bits[1], bits[3], strict=True))
    assert all(np.abs(x).max(initial=1.0) > 0 for x in bits[1])


def test_fewer_threads_than_parts_do_all_of_them(monkeypatch):
    """As where a thread cannot be had: what threads there are take the parts in turn."""
    run, data = run_of(network("sparse", True))
    monkeypatch.setenv("NUMBA_NUM_THREADS", "4")
    together = everything(run, data)
    monkeypatch.setattr(call, "WORTH_A_THREAD", 10**12)
    assert all(np.array_equal(a, b) for a, b in zip(everything(run, data), together, strict=True))


def test_a_window_that_moves(monkeypatch):
    """A run longer than the window in which it keeps what was sent."""
    run, data = run_of(network("sparse", True), inputs={}, noise=None, key=None, every=60)
    run = run._replace(schedule=Schedule(3000, 0, 60), checkpoint_every=3000)
    records = []
    for threads in (1, 3):
        monkeypatch.setenv("NUMBA_NUM_THREADS", str(threads))
        records.append(jax.tree.leaves(jax.jit(functools.partial(_execute, run))(data)))
    assert all(np.array_equal(a, b) for a, b in zip(*records, strict=True))


def test_what_is_not_shared(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    loop = loop_of(run_of(network("sparse", True))[0])[1]
    assert layout.Layout.of(loop, N, np.float32).parts == 2
    assert layout.Layout.of(loop, 2 * N, np.float32).parts == 0
    # The cotangent of an input that all regions share is a sum over them, of which the order would change.
    assert layout.Layout.of(loop, N, np.float32, 8, sharable=False).parts == 0
    monkeypatch.setattr(layout, "SHARED", 10**9)
    assert layout.Layout.of(loop, N, np.float32).parts == 0


def test_the_gradient_by_an_input_that_all_regions_share(monkeypatch):
    run, data = run_of(network("sparse", True))

    def gradient():
        def total(shared):
            out = _execute(run, data._replace(varying=(data.varying[0], shared)))
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(out))

        return np.asarray(jax.jit(jax.grad(total))(jnp.asarray(data.varying[1])))

    gradients = []
    for threads in (1, 2):
        monkeypatch.setenv("NUMBA_NUM_THREADS", str(threads))
        gradients.append(gradient())
    assert np.array_equal(*gradients)
    assert np.abs(gradients[0]).max() > 0
