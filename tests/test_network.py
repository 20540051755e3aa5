"""Networks on `scan` and `numba` by their suite, against brainmass's own, what they cost, and what is refused."""

import functools

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from network_suite import CASES, NetworkSuite, loops_but

import brainmass_kernels as bk

DT = 0.1 * u.ms


class TestScan(NetworkSuite):
    """By name, as JAX differentiates it."""

    implementation = "scan"
    long = (
        *loops_but("a live speed", "one region that waits"), "test_vmap[live speeds]",
        "test_single_precision", "test_statistics_are_those_of_what_is_recorded",
    )  # fmt: skip


class TestScanAdjoint(NetworkSuite):
    """As the fallback, where numba is not installed: with its own adjoint. The rest is that of the above."""

    implementation = None
    context = staticmethod(functools.partial(bk.testing.without, "numba"))
    long = loops_but("one step")
    held_elsewhere = tuple(name for name in vars(NetworkSuite) if name.startswith("test_") and name != "test_the_loop")

    def test_that_it_runs(self):
        case = CASES["one step"]
        assert bk.explain(**self.arguments(case, self.given(case))).implementation == "scan"


@needs.numba
class TestNumba(NetworkSuite):
    implementation = "numba"
    long = (
        *loops_but("three couplings", "groups", "different delays", "delays about a tile", "a batch"),
        "test_vmap[a batch of weights]", "test_a_history_in_each_form",
    )  # fmt: skip


def connectome(n: int, seed: int = 0):
    made = np.random.default_rng(seed)
    weights = made.uniform(0.0, 2.0 / n, (n, n)) * (made.uniform(size=(n, n)) < 0.7)
    return weights, made.uniform(1.0, 30.0, (n, n))


def hopf(weights, source="x", **options):
    return bk.Network(bk.Hopf(a=0.1, w=0.3), weights, source=source, target="x_inp", **{"k": 0.2, **options})


@pytest.mark.parametrize("delayed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "coupling",
    [
        "additive",
        "sigmoidal_jansen_rit",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("diffusive", "laplacian", "sigmoidal", "tanh")),
    ],
)
def test_as_brainmass_has_it(coupling, delayed):
    brainmass, brainstate = pytest.importorskip("brainmass"), pytest.importorskip("brainstate")
    init = pytest.importorskip("braintools").init
    weights, lengths = connectome(6)
    wired = {"distances": lengths, "speed": 5.0} if delayed else {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), brainstate.environ.context(dt=DT):
        node = brainmass.HopfStep(6, a=0.1, init_x=init.Constant(0.3), init_y=init.Constant(0.1))
        theirs = brainmass.Network(
            node, conn=weights, coupling=coupling, coupled_var="x", k=0.2, delay_init=init.Constant(0.3),
            distance=wired.get("distances"), speed=wired.get("speed"),
        )  # fmt: skip
        want = brainmass.Simulator(theirs, dt=DT).run(20 * u.ms, monitors=lambda m: m.node.x.value)["output"]
    if coupling == "laplacian":
        # brainmass exponentiates the weights that its `LaplacianConnParam` is given, and multiplies with them.
        weights = np.exp(weights) * weights
    network = bk.Network(bk.Hopf(a=0.1), weights, coupling=coupling, source="x", k=0.2, **wired)
    run = {"initial": {"x": 0.3, "y": 0.1}, "record": "x", "scheme": "exp_euler", "implementation": "scan"}
    found = bk.simulate(network, 20 * u.ms, DT, **run)
    np.testing.assert_allclose(found["x"], want, atol=1e-6)


def test_delays_are_rounded_up_as_in_brainmass():
    delays = np.array([[0.0, 0.3, 0.31], [0.05, 0.0, 0.1], [0.29999, 1.0, 0.0]])
    steps = hopf(np.ones((3, 3)), delays=delays * u.ms).delay_steps(1e-4)
    # 0.3 / 0.1 is 2.9999999999999996 in float64 and 3.0000002 in float32; it is three steps.
    assert steps.tolist() == [[0, 3, 4], [1, 0, 1], [3, 10, 0]]


@pytest.mark.slow
def test_a_gradient_of_a_long_run_holds_no_trajectory():
    """What a gradient holds grows with the blocks of a run, and not with its steps."""
    network = bk.Network(bk.Hopf(a=0.1), connectome(20)[0], delays=20 * DT, source="x", k=0.1)

    def held(duration):
        def square(k):
            found = bk.simulate(network.replace(k=k), duration, DT, initial={"x": 0.1}, every=duration, record="x")
            return jnp.sum(found["x"])

        return jax.jit(jax.grad(square)).lower(0.1).compile().memory_analysis().temp_size_in_bytes

    assert held(80_000) < 1.3 * held(20_000)


# Errors -------------------------------------------------------------------------------------------------------------


@bk.model
class Alone(bk.Model):
    """A model that nothing can be added to."""

    rate: float = 1.0
    states = {"x": u.UNITLESS}

    @staticmethod
    def drift(s, p, i):
        return {"x": -p.rate * s.x}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": np.ones((3, 2))}, r"'weights' got shape \(3, 2\), but takes \(N, N\)"),
        ({"weights": np.full((3, 3), np.nan)}, "'weights' got NaN"),
        ({"coupling": "difusive"}, "unknown coupling 'difusive'; did you mean 'diffusive'"),
        ({"source": "z"}, "unknown source"),
        ({"target": "z"}, r"unknown target, which is an input, 'z'\. Known: "),
        ({"speed": 3.0}, "'distances' is needed"),
        ({"distances": np.ones((3, 3)), "speed": -1.0}, "'speed' got -1.0"),
        ({"distances": np.ones((2, 2)), "speed": 1.0}, r"'distances' got shape \(2, 2\), but takes \(3, 3\)"),
        ({"delays": np.ones((3, 3))}, "'delays' got a plain ndarray"),
        ({"delays": -np.ones((3, 3)) * u.ms}, "negative"),
        ({"delays": 1 * u.ms, "distances": np.ones((3, 3)), "speed": 1.0}, "both given"),
        ({"k": 1 * u.mV}, "'k' got mV, but takes"),
    ],
)
def test_what_is_wrong_is_said(options, says):
    options = {"weights": np.ones((3, 3)), "k": 0.1, **options}
    with pytest.raises(ValueError, match=says):
        bk.Network(bk.Hopf(), **options)


def test_what_is_wrong_in_a_run_is_said():
    with pytest.raises(TypeError, match="unknown parameter of coupling 'tanh' 'slope'"):
        hopf(np.ones((3, 3)), coupling="tanh", slope=2.0)
    with pytest.raises(ValueError, match="'k' is needed: it turns eeg into E_inp"):
        bk.Network(bk.JansenRit(), np.ones((3, 3)), target="E_inp")
    with pytest.raises(ValueError, match="no input"):
        bk.Network(Alone(), np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"last axis of the batch \(5, 1, 3\)|do not broadcast"):
        bk.simulate(hopf(np.ones((3, 3)), k=np.ones(5)), 10, DT)
    with pytest.raises(ValueError, match=r"do not broadcast|last axis"):
        bk.simulate(hopf(np.ones((1, 1)), k=np.ones(5)), 10, DT)
    with pytest.raises(ValueError, match="has no delays"):
        bk.simulate(hopf(np.ones((3, 3))), 10, DT, initial={"history": 0.1})
    delayed = hopf(np.ones((3, 3)), delays=1 * u.ms)
    with pytest.raises(ValueError, match=r"'history' got shape \(4, 3\).*longest delay is 10 steps"):
        bk.simulate(delayed, 10, DT, initial={"history": np.ones((4, 3))})
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda d: bk.simulate(hopf(np.ones((3, 3)), delays=d * u.ms), 10, DT))(np.ones((3, 3)))
    with pytest.raises(bk.Unsupported, match="mosaic_gpu' cannot run this"):
        bk.simulate(delayed, 10, DT, implementation="mosaic_gpu")


def test_what_takes_no_network_says_what_does():
    network = hopf(np.ones((3, 3)))
    with pytest.raises(TypeError, match="got a Network, but takes a model"):
        bk.sensitivities(network, 10, DT, wrt="a")
    with pytest.raises(ValueError, match=r"did you mean 'coupling\.k'\? It is of the network's coupling"):
        bk.sweep(network, {"k": [0.1, 0.2]}, 10, DT)


def test_it_says_what_it_is():
    network = hopf(np.ones((3, 3)), delays=1 * u.ms, coupling="tanh", scale=3.0)
    assert repr(network) == "Network(3 regions of Hopf, x -> x_inp, tanh, delays to 1 ms)"
    other = network.replace(k=0.7)
    assert other.parameters == {"k": 0.7, "scale": 3.0}
    assert other.link == network.link
    leaves, tree = jax.tree.flatten(network)
    assert jax.tree.unflatten(tree, leaves).parameters == network.parameters
    assert jax.tree.structure(other) == tree
    assert "checkpoints" in str(bk.explain(network, 100, DT))
