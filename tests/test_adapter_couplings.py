"""fuse() of models with several couplings, without delays, or by three sums, against brainmass.Simulator's runs."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from needs import numba
from test_adapter_networks import DT, N, both, close, lengths, slow_unless, states_of, weights

import brainmass_kernels as bk

brainmass, brainstate = pytest.importorskip("brainmass"), pytest.importorskip("brainstate")
init = pytest.importorskip("braintools").init
Param = brainstate.nn.Param
INDEX = np.tile(np.arange(N), (N, 1))


@pytest.fixture(autouse=True)
def _strict():
    """In place of the suite's: brainmass leans on implicit promotion, and its steps are traced as they are."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def late(node, name, seed, shortest=0.0, start=0.05):
    delays = (shortest + lengths(seed=seed) / 5.0) * u.ms
    return node.prefetch_delay(name, (delays, INDEX), init=init.Constant(start))


class ThreePopulations(brainstate.nn.Module):
    """Couplings of three populations: two read the same states with other delays, one sends rates, one has no delay."""

    def __init__(self):
        super().__init__()
        node = self.node = brainmass.WilsonCowanThreePopulationStep(
            N, wEE=Param(jnp.linspace(10.0, 12.0, N)), rE_init=init.Constant(0.1), rM_init=init.Constant(0.2)
        )
        w = [Param(jnp.asarray(weights(seed=seed))) for seed in range(4)]
        w[3] = Param(w[3].value() * (lengths(seed=7) < lengths(seed=7).max()))  # the longest delay is of no connection
        self.to_E = brainmass.AdditiveCoupling(late(node, "rE", 5), w[0], k=Param(2.0))
        self.to_I = brainmass.DiffusiveCoupling(late(node, "rE", 6, 0.3), node.prefetch("rI"), w[1], k=Param(0.7))
        self.by_M = brainmass.SigmoidalJansenRitCoupling(
            late(node, "rM", 7), w[2], k=Param(30.0), midpoint=Param(0.2), r=4.0
        )
        self.now = brainmass.HyperbolicTangentCoupling(
            node.prefetch_delay("rI", (np.zeros((N, N)) * u.ms, INDEX)), w[3], k=Param(0.5)
        )

    def update(self, drive=0.0):
        return self.node(self.to_E() + self.now() + drive, self.to_I() + 0.3, self.by_M())


class ByLaplacian(brainstate.nn.Module):
    """Jansen-Rit coupled by a `LaplacianConnectivity` at each step."""

    def __init__(self, by_hand=False, **options):
        super().__init__()
        node = self.node = brainmass.JansenRitStep(N, M_init=init.Constant(0.1 * u.mV))
        rng = np.random.default_rng(0)
        logs = [Param(jnp.asarray(w)) for w in rng.normal(0.0, 0.1, (3, N, N))]
        times = lengths() / 5.0 * u.ms, INDEX
        self.delay = brainstate.nn.Delay(jnp.zeros(N), init=init.Constant(0.1)) if by_hand else None
        if self.delay is None:
            source = node.prefetch_delay("M", times, init=init.Constant(0.1))
        else:
            source = self.delay.access("far", *times)
        options = {"g_l": Param(50.0), "g_f": Param(40.0), "g_b": 2.0, "mask": 1.0 - np.eye(N), **options}
        self.conn = brainmass.jansen_rit.LaplacianConnectivity(
            source, *map(node.prefetch, "MEI"), rng.uniform(size=(N, N)), *logs, **options
        )

    def update(self, drive=220.0):
        far, own = self.conn.update_tr(), self.conn.update()
        to_M, to_E, to_I = (a + b for a, b in zip(far, own))
        out = self.node(to_M * u.mV, (to_E + drive) * u.Hz, to_I * u.mV)
        if self.delay is not None:
            self.delay.update(u.get_magnitude(self.node.M.value))
        return out


class Crossed(brainstate.nn.Module):
    """Two populations of their own, each coupled to the other, both before they step."""

    def __init__(self, after=False):
        super().__init__()
        self.front, self.back, self.after = brainmass.HopfStep(N, a=0.1), brainmass.HopfStep(N, a=-0.2), after
        self.forward = brainmass.AdditiveCoupling(late(self.front, "x", 1), weights(seed=1), k=0.3)
        self.backward = brainmass.AdditiveCoupling(late(self.back, "y", 2), weights(seed=2), k=-0.3)

    def update(self):
        forward = None if self.after else self.forward()
        back = self.front(self.backward())
        return back, self.back(self.forward() if self.after else forward)


def kuramoto(alpha=0.3, conn=None, n=N, **options):
    options = {"omega": Param(jnp.linspace(0.1, 0.4, n)), "K": Param(1.5), "alpha": alpha, "conn": conn, **options}
    return brainmass.KuramotoNetwork(n, **options)


def wired(make, *arguments, **options):
    with brainstate.environ.context(dt=DT):
        return make(*arguments, **options)


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [slow_unless(False, ThreePopulations), ByLaplacian, Crossed])
def test_in_float64(model, x64):
    """A run, and one that goes on from it, shorter than the longest delay."""
    with brainstate.environ.context(precision=64):
        both(wired(model), [10 * u.ms, 1 * u.ms], 1e-9, sample_every=3)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["scan", pytest.param("numba", marks=numba)])
@pytest.mark.parametrize("model", [ThreePopulations, ByLaplacian, Crossed])
def test_in_float32(model, implementation):
    both(wired(model), [10 * u.ms, 3 * u.ms], implementation=implementation)


def test_a_delay_that_the_model_writes():
    both(wired(ByLaplacian, by_hand=True), [3 * u.ms, 1 * u.ms], 2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": Param(0.3), "conn": weights()},
        {"alpha": np.linspace(0.0, 0.5, N), "exclude_self": False, "normalize_by_n": False},
        slow_unless(False, {"conn": weights().ravel(), "alpha": np.linspace(0.0, 0.5, N)}),
        slow_unless(False, {"alpha": 0.0}),
    ],
    ids=["one lag", "a lag of each", "flat weights", "no lag"],
)
def test_phases_in_float64(options, x64):
    with brainstate.environ.context(precision=64):
        both(kuramoto(**options), [10 * u.ms, 1 * u.ms], 1e-9, delayed=False)


@pytest.mark.parametrize("implementation", ["scan", pytest.param("numba", marks=[numba, pytest.mark.slow])])
def test_a_batch_of_phases_in_float32(implementation):
    model = kuramoto(np.linspace(0.0, 0.5, N, dtype=np.float32), conn=weights())
    (run,) = both(model, [5 * u.ms], implementation=implementation, delayed=False, batch_size=3, inputs=np.ones(50))
    assert run["output"].shape == (50, 3, N)


@pytest.mark.slow
def test_phases_of_a_network_with_another_coupling(x64):
    """A network within a model, whose phases another coupling reads late."""

    class Both(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.phases = kuramoto(conn=weights())
            self.far = brainmass.AdditiveCoupling(late(self.phases, "theta", 3, start=0.5), weights(seed=3), k=-0.2)

        def update(self):
            return self.phases(self.far())

    with brainstate.environ.context(precision=64):
        both(wired(Both), [5 * u.ms, 1 * u.ms], 1e-9)


# Gradients ----------------------------------------------------------------------------------------------------------


def gradients(model, rtol, least, implementation="scan"):
    """In parameters, states and delays; through records, states and delays."""
    brainstate.random.seed(2)
    brainmass.Simulator(model, DT).run(3 * u.ms)
    start = states_of(model)
    delays = [*model.states(brainstate.DelayState).values()]

    def gradient(run):
        def loss():
            x = run.run(2.5 * u.ms, sample_every=4, init_states=False)["output"]
            total = sum(jnp.mean(u.get_magnitude(y) ** 2) for y in jax.tree.leaves(x))
            return total + sum(jnp.sum(u.get_magnitude(delay.value) ** 3) for delay in delays)

        for path, state in model.states(brainstate.ShortTermState).items():
            state.value = start[path]
        kinds = brainstate.ParamState, brainstate.HiddenState, brainstate.DelayState
        of = {p: x for kind in model.states(*kinds) for p, x in kind.items()}
        return jax.tree.map(u.get_magnitude, brainstate.transform.grad(loss, of)(), is_leaf=u.math.is_quantity)

    want = gradient(brainmass.Simulator(model, DT))
    got = gradient(bk.fuse(model, DT, implementation=implementation))
    assert len(want) >= least
    close(got, want, rtol)
    assert sum(np.abs(x).max() > 0 for x in jax.tree.leaves(want)) >= least


@pytest.mark.slow
@pytest.mark.parametrize(("make", "least"), [(ThreePopulations, 16), (ByLaplacian, 7), (Crossed, 5)])
def test_gradients(make, least, x64):
    with brainstate.environ.context(precision=64):
        gradients(wired(make), 1e-9, least)


def test_gradients_of_phases(x64):
    with brainstate.environ.context(precision=64):
        gradients(kuramoto(Param(jnp.linspace(0.1, 0.4, N)), conn=weights()), 1e-9, 4)


@pytest.mark.slow
@numba
@pytest.mark.parametrize("make", [ThreePopulations, ByLaplacian])
def test_gradients_in_float32_by_numba(make):
    gradients(wired(make), 1e-4, 7, "numba")


# What is refused ----------------------------------------------------------------------------------------------------


def refused(model, message, **arguments):
    with pytest.raises(bk.Unsupported, match=message):
        bk.fuse(model, DT).run(1 * u.ms, **arguments)


def test_refusals():
    refused(wired(Crossed, after=True), "AdditiveCoupling 'forward' is read after the step of its regions|0 times")
    refused(wired(ByLaplacian).conn, "LaplacianConnectivity '' cannot be fused: a step writes 'M' to its delay 0 times")
    undelayed = wired(ThreePopulations)
    undelayed.to_E.x = undelayed.node.prefetch("rE")
    refused(undelayed, "AdditiveCoupling 'to_E' cannot be fused: its source is Prefetch, and what is fused is a state")


def test_phases_that_are_refused():
    class Twice(brainmass.KuramotoNetwork):
        def update(self):
            self.theta.value = self.theta.value + 0.1
            return super().update()

    class Others(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.node = kuramoto(), brainmass.HopfStep(N)

        def update(self):
            return self.node()

    refused(Twice(N), "Twice '' is read after the step of its regions, or of other phases than theirs")
    refused(Others(), "KuramotoNetwork 'unused' cannot be fused: a step does not change the states that it couples")
    with pytest.raises(ValueError, match=r"Connectivity must be square \(N,N\)=\(4, 4\); got \(3, 4\)"):
        bk.fuse(kuramoto(conn=np.ones((3, 4))), DT).run(1 * u.ms)
