"""A second fused run of the same step takes nothing apart; after any change it is the run of a new model."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels.adapters import fused_step

brainmass, brainstate = pytest.importorskip("brainmass"), pytest.importorskip("brainstate")

DT = 0.1 * u.ms


@pytest.fixture(autouse=True)
def _strict():
    """In place of the suite's: brainmass leans on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def taken_apart(monkeypatch):
    """The steps that were taken apart, by label."""
    bk.clear_caches()
    labels, init = [], fused_step.FusedStep.__init__

    def counted(self, closed, arguments, states, outputs, label):
        labels.append(label)
        init(self, closed, arguments, states, outputs, label)

    monkeypatch.setattr(fused_step.FusedStep, "__init__", counted)
    return labels


def fused(node, dt=DT, duration=2 * u.ms, **arguments):
    return bk.fuse(node, dt, implementation="scan").run(duration, **arguments)


def unfused(node, dt=DT, duration=2 * u.ms, **arguments):
    return brainmass.Simulator(node, dt).run(duration, **arguments)


def agree(node, dt=DT, **arguments):
    """The fused run, which is brainmass's own."""
    got, want = fused(node, dt, **arguments), unfused(node, dt, **arguments)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=1e-5)
    return np.asarray(jax.tree.leaves(got)[0])


def test_an_equal_step_is_taken_apart_once(taken_apart):
    node = brainmass.JansenRitStep(3)
    first, second = (fused(node, monitors=["M"])["M"].mantissa for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert taken_apart == ["JansenRitStep"]
    # Neither another object, nor another length, is another step.
    fused(brainmass.JansenRitStep(3), duration=3 * u.ms, monitors=["M"])
    assert taken_apart == ["JansenRitStep"]
    bk.clear_caches()
    fused(node, monitors=["M"])
    assert len(taken_apart) == 2


class Relaxing(brainstate.nn.Dynamics):
    """A state that goes to the node's `target`, in its own unit."""

    def __init__(self, size, target, rate=0.5):
        super().__init__(size)
        self.target, self.rate, self.start = target, rate, 0.1

    def init_state(self, batch_size=None, **_):
        self.x = brainstate.HiddenState(jnp.full(self.varshape, self.start) * u.get_unit(self.target))

    def update(self):
        self.x.value = self.x.value + self.rate * self.gain() * (self.target - self.x.value)
        return self.x.value

    def gain(self):
        return brainstate.environ.get_dt() / u.ms


def changed_parameter(node, _):
    node.target = 3.0 * u.mV


def changed_array_in_place(node, _):
    node.rate[:] = 0.9


def changed_attribute(node, _):
    node.start = 0.7


def patched_object(node, monkeypatch):
    monkeypatch.setattr(node, "gain", lambda: 0.3)


def patched_class(_, monkeypatch):
    monkeypatch.setattr(Relaxing, "gain", lambda self: 0.4)


@pytest.mark.parametrize(
    "change",
    [changed_parameter, changed_array_in_place, changed_attribute, patched_object, patched_class],
)
def test_a_changed_model_is_run_as_it_is(change, monkeypatch):
    node = Relaxing(2, 2.0 * u.mV, np.full(2, 0.5, np.float32))
    before = agree(node)
    change(node, monkeypatch)
    after = agree(node)
    assert not np.allclose(before, after)


def test_another_unit_of_the_same_number():
    node = Relaxing(2, 2.0 * u.mV)
    before = agree(node)
    node.target = 2.0 * u.volt
    np.testing.assert_array_equal(agree(node), before)
    assert u.get_unit(fused(node)["output"]) == u.volt


def test_another_step_in_the_environment():
    node, runs = Relaxing(2, 2.0 * u.mV), []
    for dt in (0.1 * u.ms, 0.2 * u.ms):
        with brainstate.environ.context(dt=dt):
            runs.append(agree(node, dt=None)[-1])
    assert not np.allclose(*runs)


def test_another_state_of_a_run_that_goes_on():
    node = Relaxing(2, 2.0 * u.mV)
    first = fused(node)
    second = fused(node, init_states=False)
    assert np.all(np.asarray(second["output"].mantissa) > np.asarray(first["output"].mantissa)[-1])


def test_another_delay(taken_apart):
    runs = []
    for speed in (5.0, 1.0):
        with brainstate.environ.context(dt=DT):
            node, distance = brainmass.HopfStep(2, a=0.1), np.array([[0.0, 3.0], [2.0, 0.0]])
            options = {"coupling": "diffusive", "coupled_var": "x", "k": 0.5, "distance": distance, "speed": speed}
            net = brainmass.Network(node, conn=np.array([[0.0, 1.0], [0.5, 0.0]]), **options)
        asked = {"duration": 5 * u.ms, "monitors": {"x": lambda m: m.node.x.value}}
        brainstate.random.seed(0)
        got = fused(net, **asked)["x"]
        brainstate.random.seed(0)
        np.testing.assert_allclose(got, unfused(net, **asked)["x"], rtol=2e-4, atol=1e-5)
        runs.append(np.asarray(got))
    assert not np.allclose(*runs)
    # The delays are the loop's, and the step is the same.
    assert len(taken_apart) == 1


class Called(Relaxing):
    """The gain is what a Python function says."""

    def gain(self):
        return jax.pure_callback(lambda: np.float32(self.said), jax.ShapeDtypeStruct((), jnp.float32))


def test_what_a_python_function_says_is_asked_again():
    node, runs = Called(2, 2.0 * u.mV), []
    for node.said in (0.1, 0.3):
        runs.append(np.asarray(fused(node)["output"].mantissa))
    assert not np.allclose(*runs)


def test_gradients_after_a_run(taken_apart):
    node = Relaxing(2, 2.0 * u.mV)
    fused(node)

    def loss(target):
        node.target = target * u.mV
        return jnp.sum(fused(node)["output"].mantissa)

    slope = jax.grad(loss)(2.0)
    np.testing.assert_allclose(slope, (loss(2.1) - loss(1.9)) / 0.2, rtol=1e-3)
