"""fuse() of networks: each coupling of brainmass, fused, against brainmass.Simulator's run of the same object."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk

brainmass, brainstate = pytest.importorskip("brainmass"), pytest.importorskip("brainstate")
init = pytest.importorskip("braintools").init

DT = 0.1 * u.ms
N = 4
COUPLINGS = ["diffusive", "additive", "laplacian", "sigmoidal", "tanh", "sigmoidal_jansen_rit"]
# Of those whose history is of states and of rates; the others are among the slow tests.
QUICK = {("tanh", False), ("sigmoidal_jansen_rit", True)}


def slow_unless(quick, *values):
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


@pytest.fixture(autouse=True)
def _strict():
    """In place of the suite's: brainmass leans on implicit promotion, and its steps are traced as they are."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def weights(n=N, seed=0):
    return np.random.default_rng(seed).uniform(0.0, 0.3, (n, n))


def lengths(n=N, seed=1):
    return np.random.default_rng(seed).uniform(1.0, 10.0, (n, n))


def network(coupling="diffusive", delayed=True, node=None, conn=None, **options):
    wired = {"distance": lengths(), "speed": 5.0} if delayed else {}
    with brainstate.environ.context(dt=DT):
        node = brainmass.HopfStep(N, a=0.1) if node is None else node
        options = {"coupled_var": "x", "k": 0.2, **wired, **options}
        return brainmass.Network(node, conn=weights() if conn is None else conn, coupling=coupling, **options)


def of_node(name="x"):
    return lambda m: getattr(m.node, name).value


def states_of(model):
    """With the entries of the delays, and where in them the next is written."""
    return {path: state.value for path, state in model.states(brainstate.ShortTermState).items()}


def close(got, want, rtol):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-300))


def both(model, durations, rtol=1e-5, implementation="scan", delayed=True, **arguments):
    """Runs one after the other, each from where the last ended: results and states agree. Returns the results."""
    found = []
    for run in (brainmass.Simulator(model, DT), bk.fuse(model, DT, implementation=implementation)):
        brainstate.random.seed(2)
        found.append([])
        for k, duration in enumerate(durations):
            found[-1].append((run.run(duration, init_states=k == 0, **arguments), states_of(model)))
    close(found[1], found[0], rtol)
    assert any("history" in str(path) for path in found[0][0][1]) == delayed
    return [result for result, _ in found[1]]


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coupling", "delayed"), [slow_unless((c, d) in QUICK, c, d) for c in COUPLINGS for d in (False, True)]
)
def test_every_coupling_in_float64(coupling, delayed, x64):
    """A run, and one that goes on from it, shorter than the longest delay."""
    with brainstate.environ.context(precision=64):
        runs = both(network(coupling, delayed), [10 * u.ms, 1 * u.ms], 1e-9, monitors=of_node())
    assert runs[0]["output"].shape == (100, N)
    assert runs[0]["output"].dtype == np.float64


@pytest.mark.parametrize("coupling", [slow_unless(c == "laplacian", c) for c in COUPLINGS])
def test_float32(coupling):
    both(network(coupling), [10 * u.ms], monitors=of_node())


@pytest.mark.slow
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_by_numba(coupling):
    pytest.importorskip("llvmlite")
    both(network(coupling), [10 * u.ms, 3 * u.ms], implementation="numba", monitors=of_node())


@pytest.mark.parametrize("coupling", ["additive", slow_unless(False, "sigmoidal_jansen_rit")])
def test_units(coupling):
    """Jansen-Rit in mV, coupled into its first input, with other inputs and what it returns."""
    k = {"additive": 0.5, "sigmoidal_jansen_rit": 200.0 * u.mV}[coupling]
    node = brainmass.JansenRitStep(N, M_init=init.Constant(0.1 * u.mV))
    model = network(coupling, node=node, coupled_var="M", k=k)
    (run,) = both(model, [10 * u.ms], inputs=lambda i, t: (220.0 * u.Hz, 0.1 * u.mV))
    assert u.get_unit(run["output"]) == u.mV


@pytest.mark.parametrize(
    ("coupling", "transient", "sample_every"),
    [
        ("tanh", 2, 7),
        ("sigmoidal_jansen_rit", 3.0 * u.ms, 7),
        ("sigmoidal_jansen_rit", 95, 3),
        *(slow_unless(False, "sigmoidal_jansen_rit", *those) for those in [(2, 7), (98, 200), (30, 71), (90, 1)]),
    ],
)
def test_transient_and_sample_every(coupling, transient, sample_every):
    """Where the last steps are a run of their own, for what was sent is not the state, and where not."""
    (run,) = both(network(coupling), [10 * u.ms], monitors=of_node(), transient=transient, sample_every=sample_every)
    assert u.get_unit(run["ts"]) == u.ms


def test_monitors_and_inputs():
    monitors = {"x": of_node(), "mean": lambda m: m.node.x.value.mean(), "y": of_node("y")}
    both(network(), [3 * u.ms], monitors=monitors, inputs=np.linspace(0.0, 0.5, 30, dtype=np.float32))


@pytest.mark.slow
def test_a_delay_that_others_read_from_has_its_entries_too():
    model = network()
    with brainstate.environ.context(dt=DT):
        model.node.prefetch_delay("x", 6.0 * u.ms)
    both(model, [7 * u.ms], monitors=of_node())


def test_from_fused_to_brainmass_and_back():
    model = network("sigmoidal_jansen_rit")
    simulator, fused = brainmass.Simulator(model, DT), bk.fuse(model, DT, implementation="scan")
    brainstate.random.seed(5)
    whole = simulator.run(10 * u.ms, monitors=of_node())["output"]
    brainstate.random.seed(5)
    parts = [fused.run(4 * u.ms, monitors=of_node())["output"]]
    parts += [run.run(3 * u.ms, monitors=of_node(), init_states=False)["output"] for run in (simulator, fused)]
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=1e-5, atol=1e-7)


class Wired(brainstate.nn.Module):
    """A network wired by hand, with delays and weights flattened."""

    def __init__(self, late=False, twice=False):
        super().__init__()
        self.node, self.late, self.twice = brainmass.HopfStep(N, a=0.1), late, twice
        regions = np.tile(np.arange(N), (N, 1))
        source = self.node.prefetch_delay("x", lengths().ravel() / 5.0 * u.ms, regions.ravel(), init=init.Constant(0.1))
        target = self.node.prefetch("x")
        self.coupling = brainmass.DiffusiveCoupling(source, target, weights().ravel(), k=0.2)

    def update(self):
        if self.late:
            self.node(0.0)
        current = self.coupling()
        return self.node.update(current) if self.twice else self.node(current)


def test_a_network_wired_by_hand():
    with brainstate.environ.context(dt=DT):
        both(Wired(), [5 * u.ms])


@pytest.mark.slow
def test_noise_of_the_network():
    """Equal in law: the sum over regions spreads as brainmass's does."""
    n = 40
    noise = brainmass.OUProcess(n, sigma=0.5, tau=5.0 * u.ms)
    with brainstate.environ.context(dt=DT):
        node = brainmass.HopfStep(n, a=-0.5)
        model = brainmass.Network(node, conn=weights(n) / n, coupled_var="x", k=0.5, noise=noise)
    brainstate.random.seed(3)
    runs = [run(model, DT).run(30 * u.ms, monitors=of_node(), transient=100) for run in (brainmass.Simulator, bk.fuse)]
    want, got = (np.std(run["output"]) for run in runs)
    np.testing.assert_allclose(got, want, rtol=0.15)


# Gradients ----------------------------------------------------------------------------------------------------------


def trainable(coupling):
    Param = brainstate.nn.Param
    conn = Param(jnp.asarray(weights()))
    if coupling == "laplacian":
        conn = brainmass.LaplacianConnParam(jnp.asarray(weights()))
    node = brainmass.HopfStep(N, a=Param(jnp.linspace(0.1, 0.2, N)), w=Param(0.3))
    model = network(coupling, node=node, conn=conn, k=Param(0.2))
    for name in ("slope", "scale", "cmax", "midpoint"):
        if hasattr(model.coupling, name):
            setattr(model.coupling, name, Param(1.1 * getattr(model.coupling, name).value() + 0.1))
    return model


@pytest.mark.parametrize("coupling", [slow_unless(c == "diffusive", c) for c in COUPLINGS])
def test_gradients(coupling, x64):
    """In parameters of regions, connectome and coupling, states and delays; through records, states and delays."""
    with brainstate.environ.context(precision=64):
        model = trainable(coupling)
        brainmass.Simulator(model, DT).run(3 * u.ms)
        start, delay = states_of(model), model.coupling.x.state_delay

        def gradient(run):
            def loss():
                x = run.run(2.5 * u.ms, monitors=of_node(), sample_every=4, init_states=False)["output"]
                return jnp.mean(x**2) + jnp.mean(model.node.x.value**2) + jnp.sum(delay.history.value**3)

            for path, state in model.states(brainstate.ShortTermState).items():
                state.value = start[path]
            kinds = brainstate.ParamState, brainstate.HiddenState, brainstate.DelayState
            return brainstate.transform.grad(loss, {p: x for kind in model.states(*kinds) for p, x in kind.items()})()

        want, got = gradient(brainmass.Simulator(model, DT)), gradient(bk.fuse(model, DT, implementation="scan"))
    assert len(want) >= 7
    close(got, want, 1e-9)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(want))


def test_jit_of_brainstate():
    model, found = network("tanh"), []
    for run in (brainmass.Simulator(model, DT), bk.fuse(model, DT, implementation="scan")):
        brainstate.random.seed(2)
        run.run(1 * u.ms)
        on = brainstate.transform.jit(lambda run=run: run.run(3 * u.ms, monitors=of_node(), init_states=False))
        found.append((on(), on(), states_of(model)))
    close(found[1], found[0], 1e-5)


def test_vmap_over_strengths():
    def last(run, k):
        model = network(
            k=k, delay_init=init.Constant(0.1), node=brainmass.HopfStep(N, a=0.1, init_x=init.Constant(0.3))
        )
        return run(model, DT).run(3 * u.ms, monitors=of_node())["output"][-1]

    strengths = jnp.array([0.1, 0.5, 2.0])
    want = jnp.stack([last(brainmass.Simulator, k) for k in strengths])
    np.testing.assert_allclose(jax.vmap(lambda k: last(bk.fuse, k))(strengths), want, rtol=1e-5)


# What is refused ----------------------------------------------------------------------------------------------------


def refused(model, message, **arguments):
    with pytest.raises(bk.Unsupported, match=message):
        bk.fuse(model, DT).run(1 * u.ms, **arguments)


def test_refusals():
    with brainstate.environ.context(dt=DT):
        refused(Wired(late=True), "DiffusiveCoupling 'coupling' is read after the step of its regions")
        refused(Wired(twice=True), "writes 'x' to its delay 0 times")
    refused(network(), r"its source 'x' has the shape \(2, 2, 4\) and not \(4,\)", batch_size=2)
    refused(network(), "reads the delay", monitors=lambda m: m.coupling())


def test_couplings_that_are_refused():
    with brainstate.environ.context(dt=DT):
        node = brainmass.HopfStep(N)
        plain = brainmass.AdditiveCoupling(node.prefetch("x"), weights())
        regions = np.tile(np.arange(N)[::-1], (N, 1))
        turned = brainmass.AdditiveCoupling(node.prefetch_delay("x", lengths() * u.ms, regions), weights())
        two = network()
        two.also = network().coupling
        smaller = brainmass.HopfStep(N - 1)
        index = np.tile(np.arange(N - 1), (N - 1, 1))
        source = smaller.prefetch_delay("x", (lengths(N - 1) * u.ms, index))
        three = network()
        three.also = brainmass.AdditiveCoupling(source, weights(N - 1))
    with pytest.raises(bk.Unsupported, match=r"AdditiveCoupling '' cannot be fused: its source is Prefetch"):
        bk.fuse(plain, DT)
    with pytest.raises(bk.Unsupported, match=r"connection \(i, j\) must read region j"):
        bk.fuse(turned, DT)
    with pytest.raises(bk.Unsupported, match=r"'also' .*writes 'x' to its delay 0 times"):
        bk.fuse(two, DT).run(1 * u.ms)
    different = r"different numbers of regions: AdditiveCoupling 'also' has 3, DiffusiveCoupling 'coupling' has 4"
    with pytest.raises(bk.Unsupported, match=different):
        bk.fuse(three, DT)


def test_what_would_run():
    plan = bk.fuse(network(), DT, implementation="scan").explain(10 * u.ms, monitors=of_node())
    assert (plan.implementation, plan.steps, plan.lanes) == ("scan", 100, N)


# JansenRitTR: sums that are held for a repetition time ---------------------------------------------------------------


def held(tr=1 * u.ms, **options):
    rng = np.random.default_rng(0)
    lateral, forward, back = (brainstate.nn.Param(jnp.asarray(w)) for w in rng.normal(0.0, 0.1, (3, N, N)))
    options = {"k": 5.0, "g_l": brainstate.nn.Param(50.0), "g_f": 50.0, "g_b": 1.0, "tr": tr, **options}
    options |= {"w_ll": lateral, "w_ff": forward, "w_bb": back, "sc": rng.uniform(size=(N, N))}
    with brainstate.environ.context(dt=DT):
        return brainmass.JansenRitTR(N, delay=rng.integers(1, 5, (N, N)).astype(float), **options)


def wave(i, t):
    return jnp.sin(0.1 * i + jnp.arange(N))


@pytest.mark.parametrize("implementation", ["scan", "numba"])
def test_the_steps_of_a_repetition_time(implementation):
    model, found = held(), []
    for run in (brainmass.Simulator(model, DT), bk.fuse(model, DT, implementation=implementation)):
        start = run.run(4 * u.ms, inputs=wave, transient=5, sample_every=3)
        on = run.run(2 * u.ms, inputs=wave, monitors={"M": lambda m: m.step.M.value}, init_states=False)
        found.append((start, on, states_of(model)))
    close(found[1], found[0], 1e-4)


def test_inputs_of_each_step_and_records_of_states():
    model, found = held(tr=0.8 * u.ms, mask=jnp.ones((N, N)).at[0, 1].set(0.0)), []
    with brainstate.environ.context(dt=DT):
        steps = int(model.tr / DT)
    rows = jnp.asarray(np.random.default_rng(3).normal(size=(steps, N)))
    for run in (brainmass.Simulator(model, DT), bk.fuse(model, DT, implementation="scan")):
        found.append(run.run(1 * u.ms, inputs=lambda i, t: (rows * i, True, True))["output"])
    close(found[1], found[0], 1e-4)
    with pytest.raises(ValueError, match=rf"'input' has {steps + 1} rows, and a repetition time has {steps} steps"):
        bk.fuse(model, DT).run(1 * u.ms, inputs=lambda i, t: (jnp.zeros((steps + 1, N)), False, True))


def test_gradients_through_repetition_times():
    model = held()

    def loss(run):
        return jnp.mean(run.run(2 * u.ms, inputs=wave)["output"] ** 2)

    runs = brainmass.Simulator(model, DT), bk.fuse(model, DT, implementation="scan")
    parameters = model.states(brainstate.ParamState)
    want, got = (brainstate.transform.grad(lambda run=run: loss(run), parameters)() for run in runs)
    assert len(want) == 4
    for name in want:
        assert np.abs(want[name]).max() > 0, name
        close(got[name], want[name], 1e-4)


def test_noise_is_new_in_each_repetition_time():
    def outputs(sigma):
        model = held(k=0.0)
        model.step.noise_M = brainmass.GaussianNoise(N, sigma=sigma * u.mV)
        brainstate.random.seed(0)
        run = bk.fuse(model, DT, implementation="scan").run(
            30 * u.ms,
            inputs=lambda i, t: jnp.zeros(N),
            monitors={"M": lambda m: m.step.Mv.value.to_decimal(u.mV / u.second)},
        )
        return np.asarray(run["M"])

    moved = np.diff(outputs(3.0) - outputs(0.0), axis=0)
    assert np.abs(moved).min() > 0
    assert np.abs(np.corrcoef(moved.T) - np.eye(N)).max() < 0.4


def test_a_model_around_repetition_times():
    class Sensors(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.regions = held()

        def update(self, drive):
            return jnp.sum(self.regions.update(drive))

    model = Sensors()
    want = brainmass.Simulator(model, DT).run(2 * u.ms, inputs=wave)
    close(bk.fuse(model, DT, implementation="scan").run(2 * u.ms, inputs=wave), want, 1e-4)
    plan = bk.fuse(model, DT, implementation="scan").explain(2 * u.ms, inputs=wave)
    with brainstate.environ.context(dt=DT):
        assert (plan.implementation, plan.steps, plan.lanes) == ("scan", int(model.regions.tr / DT), N)


def test_what_repetition_times_do_not_take():
    model = held()
    model.step.noise_M = brainmass.OUProcess(N, sigma=1.0 * u.mV, tau=5 * u.ms)
    model.step.update = lambda *_: jnp.cumsum(u.get_magnitude(model.step.M.value))
    with pytest.raises(bk.Unsupported, match="JansenRitTR"):
        bk.fuse(model, DT).run(1 * u.ms, inputs=wave)
    fused = bk.fuse(model, DT, allow_fallback=True)
    want = brainmass.Simulator(model, DT).run(1 * u.ms, inputs=wave)
    close(fused.run(1 * u.ms, inputs=wave), want, 1e-6)
    assert "JansenRitTR" in fused.fallback
