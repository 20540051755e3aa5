"""fuse(): a fused run of each model of brainmass against brainmass.Simulator's own run of the same object."""

import builtins
import inspect
import zlib

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels.adapters import brainmass as adapter

brainmass, brainstate = pytest.importorskip("brainmass"), pytest.importorskip("brainstate")
braintools = pytest.importorskip("braintools")

DT = 0.1 * u.ms
# What `update` is given, where 0.3 for each argument is no input; and steps that suit the model.
DRIVES = {
    "JansenRitStep": (0.5 * u.mV, 220.0 * u.Hz, 0.2 * u.mV),
    "MontbrioPazoRoxinStep": (0.2 * u.Hz, 4.0),
}
STEPS = {"LorenzStep": 0.01 * u.ms}
FUSED = sorted({n for n in dir(brainmass) if n.endswith("Step")} - {"WilsonCowanDelayedStep"})
# One of each family; the others are among the slow tests.
QUICK = {
    "FitzHughNagumoStep", "HORNStep", "JansenRitStep", "LinearStep", "MontbrioPazoRoxinStep", "ThresholdLinearStep",
    "WilsonCowanStep", "WongWangStep",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _strict():
    """In place of the suite's: brainmass leans on implicit promotion, and its steps are traced as they are."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def drive_of(name: str):
    update = inspect.signature(getattr(brainmass, name).update)
    return DRIVES.get(name, (0.3,) * (len(update.parameters) - 1))


def moved(model, seed: str):
    """Initial states that are off rest, in place."""
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    for state in model.states(brainstate.HiddenState).values():
        size, unit = u.get_mantissa(state.value), u.get_unit(state.value)
        state.value = u.Quantity(size + 0.2 * rng.uniform(0.2, 1.0, size.shape).astype(size.dtype), unit=unit)
        state.value = u.get_mantissa(state.value) if unit.is_unitless else state.value


def states_of(model):
    return {path: state.value for path, state in model.states(brainstate.ShortTermState).items()}


def set_states(model, values):
    for path, state in model.states(brainstate.ShortTermState).items():
        state.value = values[path]


def close(got, want, rtol):
    """Same structure, shapes, units and dtypes, and values within ``rtol`` of the largest."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-300))


def both(model, duration=10 * u.ms, dt=DT, rtol=2e-5, implementation="scan", **arguments):
    """Both runs from the same states: results, and states after them, agree. Returns the result."""
    start = states_of(model)
    want = brainmass.Simulator(model, dt).run(duration, init_states=False, **arguments)
    after = states_of(model)
    set_states(model, start)
    fused = bk.fuse(model, dt, implementation=implementation)
    got = fused.run(duration, init_states=False, **arguments)
    assert not fused.fallback
    close(got, want, rtol)
    close(states_of(model), after, rtol)
    return got


def made(name: str, size=3, batch=None, dt=DT, **parameters):
    with brainstate.environ.context(dt=dt):
        model = getattr(brainmass, name)(size, **parameters)
        brainstate.nn.init_all_states(model, *(() if batch is None else (batch,)))
    moved(model, name)
    return model


# Every model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in FUSED])
def test_every_model_in_float64(name, x64):
    drive, dt = drive_of(name), STEPS.get(name, DT)
    with brainstate.environ.context(precision=64):
        model = made(name, dt=dt)
        got = both(model, 200 * dt, dt, 1e-9, inputs=lambda i, t: drive)
    x = np.asarray(jax.tree.leaves(got["output"])[0])
    assert x.dtype == np.float64
    assert np.ptp(x) > 1e-4 * np.abs(x).max()


@pytest.mark.parametrize("name", ["JansenRitStep", "HORNStep"])
def test_float32(name):
    drive = drive_of(name)
    both(made(name), inputs=lambda i, t: drive)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_every_model_in_float32_by_numba(name):
    pytest.importorskip("llvmlite")
    drive, dt = drive_of(name), STEPS.get(name, DT)
    both(made(name, dt=dt), 200 * dt, dt, 1e-4, implementation="numba", inputs=lambda i, t: drive)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["JansenRitStep", "WilsonCowanStep", "WongWangStep"])
def test_models_by_the_kernel_for_tpus(name):
    """In its interpreter: what brainmass's steps are made of, kernels have."""
    drive = drive_of(name)
    with bk.testing.interpret():
        both(made(name), 20 * DT, implementation="mosaic_tpu", inputs=lambda i, t: drive)


@pytest.mark.parametrize("method", ["rk2", pytest.param("rk4", marks=pytest.mark.slow)])
def test_methods(method):
    both(made("JansenRitStep", method=method), inputs=lambda i, t: drive_of("JansenRitStep"))


def test_parameters_initialisers_and_scale():
    rng = np.random.default_rng(0)
    model = brainmass.JansenRitStep(
        (2, 3),
        Ae=rng.uniform(3.0, 3.5, 3) * u.mV,
        C=rng.uniform(120.0, 140.0, (2, 3)),
        M_init=braintools.init.Constant(0.1 * u.mV),
        fr_scale=lambda rate: 20.0 * u.Hz * u.math.tanh(rate / (20.0 * u.Hz)),
    )
    arguments = {"monitors": ["M", "E"], "inputs": lambda i, t: (0.0 * u.mV, 150.0 * u.Hz, 0.0 * u.mV)}
    want = brainmass.Simulator(model, DT).run(20 * u.ms, **arguments)
    close(bk.fuse(model, DT, implementation="scan").run(20 * u.ms, **arguments), want, 2e-5)


def test_a_model_of_the_users_own():
    class Pulsed(brainstate.nn.Dynamics):
        """Driven by the time of the step, with a state of two leaves."""

        def __init__(self, size):
            super().__init__(size)
            self.rate = brainstate.nn.Param(jnp.linspace(0.1, 0.5, size))

        def init_state(self, *_):
            self.pair = brainstate.ShortTermState({"a": jnp.ones(self.varshape), "b": jnp.zeros(self.varshape)})

        def update(self):
            t = brainstate.environ.get("t") / u.ms
            a, b = self.pair.value["a"], self.pair.value["b"]
            self.pair.value = {"a": a - 0.1 * self.rate.value() * b + 0.01 * jnp.sin(t), "b": b + 0.1 * a}
            return a * b

    model = Pulsed(4)
    brainstate.nn.init_all_states(model)
    both(model, monitors={"pair": "pair", "rate": lambda m: m.rate.value()})


# Arguments of a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "monitors",
    [
        None,
        ["V", "w"],
        lambda m: m.V.value - 2.0 * m.w.value,
        {"V": "V", "mean": lambda m: m.V.value.mean(), "constant": lambda m: 1.0, "up": lambda m: m.V.value > 0.1},
        {"lags": lambda m: m.V.value[:, None] - m.w.value},
    ],
    ids=["none", "names", "callable", "dict", "coupled"],
)
def test_monitors(monitors):
    both(made("FitzHughNagumoStep"), monitors=monitors, inputs=lambda i, t: 0.4)


def test_what_an_update_returns_of_the_states_before_it():
    got = both(made("WongWangStep"), inputs=lambda i, t: 0.2)
    assert [u.get_unit(x) for x in got["output"]] == [u.Hz, u.Hz]


@pytest.mark.parametrize(
    "inputs",
    [
        np.linspace(0.0, 0.5, 100, dtype=np.float32),
        np.random.default_rng(1).uniform(0.0, 0.5, (100, 3)).astype(np.float32),
        lambda i, t: 0.3,
        lambda i, t: (0.3 * jnp.sin(t / u.ms), 0.01 * i),
        lambda i, t: jnp.array([0.1, 0.2, 0.3]),
    ],
    ids=["row", "rows", "constant", "waves", "constants"],
)
def test_inputs(inputs):
    both(made("FitzHughNagumoStep"), inputs=inputs)


@pytest.mark.parametrize(
    ("transient", "sample_every"),
    [(None, None), (3.0 * u.ms, None), (30, 7), (2, 7), (0, 100), (99, 3), (98, 200)],
)
def test_transient_and_sample_every(transient, sample_every):
    inputs = np.linspace(0.0, 0.5, 100, dtype=np.float32)
    got = both(made("FitzHughNagumoStep"), inputs=inputs, transient=transient, sample_every=sample_every)
    assert u.get_unit(got["ts"]) == u.ms


def test_a_single_step():
    both(made("FitzHughNagumoStep"), DT, inputs=np.full((1, 3), 0.4, np.float32))


@pytest.mark.parametrize(("size", "batch"), [(1, None), (3, 2), ((2, 3), 4), (1, 1)])
def test_batches(size, batch):
    both(made("HopfStep", size, batch), monitors=["x"], inputs=lambda i, t: 0.1)


def test_batch_size_and_continuation():
    """A run in three, the second by brainmass, is the run in one; initial states are drawn as brainmass draws them."""
    model = brainmass.HopfStep(3, a=0.2)
    simulator, fused = brainmass.Simulator(model, DT), bk.fuse(model, DT, implementation="scan")
    brainstate.random.seed(5)
    whole = simulator.run(10 * u.ms, monitors=["x"], batch_size=2)["x"]
    brainstate.random.seed(5)
    first = fused.run(4 * u.ms, monitors=["x"], batch_size=2)["x"]
    second = simulator.run(3 * u.ms, monitors=["x"], init_states=False)["x"]
    third = fused.run(3 * u.ms, monitors=["x"], init_states=False)["x"]
    assert whole.shape == (100, 2, 3)
    np.testing.assert_allclose(jnp.concatenate([first, second, third]), whole, rtol=1e-5, atol=1e-7)


def test_dt_of_the_environment():
    model = made("FitzHughNagumoStep")
    with brainstate.environ.context(dt=0.2 * u.ms):
        got = bk.fuse(model, implementation="scan").run(10 * u.ms)
    assert got["output"].shape == (50, 3)


def test_errors_are_those_of_the_simulator():
    fused = bk.fuse(made("FitzHughNagumoStep"), DT)
    with pytest.raises(ValueError, match="'v' is not an attribute"):
        fused.run(1 * u.ms, monitors=["v"])
    with pytest.raises(ValueError, match="inputs has length 7"):
        fused.run(1 * u.ms, inputs=np.zeros(7, np.float32))
    with pytest.raises(ValueError, match="shorter than the run"):
        fused.run(1 * u.ms, transient=10)
    with pytest.raises(ValueError, match="sample_every must be >= 1"):
        fused.run(1 * u.ms, sample_every=0)
    with pytest.warns(UserWarning, match="not an integer multiple"):
        fused.run(1.05 * u.ms)
    with pytest.raises(ValueError, match="implementation got 'scann'"):
        bk.fuse(made("FitzHughNagumoStep"), DT, implementation="scann")


# Which program ------------------------------------------------------------------------------------------------------


def test_other_values_compile_nothing():
    from brainmass_kernels.run import RUNS

    fused, compiled = bk.fuse(made("JansenRitStep"), DT, implementation="scan"), []
    for level in (200.0, 210.0, 220.0):
        fused.model.Ae.val = level / 60.0 * u.mV
        fused.run(10 * u.ms, inputs=lambda i, t, level=level: (0.0 * u.mV, level * u.Hz, 0.0 * u.mV))
        compiled.append([run._cache_size() for run in RUNS.values()])
    assert compiled[0] == compiled[1] == compiled[2]


def test_python_may_read_a_constant_input():
    class Switched(brainmass.HopfStep):
        def update(self, x_inp):
            return super().update(x_inp if x_inp > 0.1 else 0.0)

    model = Switched(2, a=0.2)
    brainstate.nn.init_all_states(model)
    moved(model, "switched")
    both(model, inputs=lambda i, t: 0.3)


def test_explain():
    plan = bk.fuse(made("JansenRitStep"), DT).explain(1 * u.second, sample_every=10, batch_size=5)
    assert (plan.lanes, plan.steps, plan.records) == (15, 9_999, 999)  # the first has a run of its own
    assert plan.operations < 60


# Gradients ----------------------------------------------------------------------------------------------------------


def trainable():
    Param = brainstate.nn.Param
    return brainmass.JansenRitStep(
        3,
        Ae=Param(3.25 * u.mV),
        C=Param(jnp.linspace(120.0, 140.0, 3)),
        v0=Param(6.0 * u.mV, t=brainstate.nn.SigmoidT(4.0 * u.mV, 9.0 * u.mV)),
        M_init=braintools.init.Constant(0.1 * u.mV),
    )


@pytest.mark.parametrize("implementation", ["scan", pytest.param("numba", marks=pytest.mark.slow)])
def test_gradients_in_parameters(implementation, x64):
    pytest.importorskip(implementation if implementation != "scan" else "jax")
    with brainstate.environ.context(precision=64):
        model = trainable()
        runs = brainmass.Simulator(model, DT), bk.fuse(model, DT, implementation=implementation)
        weights = model.states(brainstate.ParamState)
        assert len(weights) == 3

        def gradient(run):
            def loss():
                got = run.run(20 * u.ms, inputs=lambda i, t: (0.0 * u.mV, 200.0 * u.Hz, 0.0 * u.mV), sample_every=4)
                return jnp.mean(u.get_mantissa(got["output"]) ** 2)

            return brainstate.transform.grad(loss, weights, return_value=True)()

        want, got = map(gradient, runs)
    close(got, want, 1e-8)
    assert all(np.abs(u.get_mantissa(x)).min() > 0 for x in jax.tree.leaves(want))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_gradients_of_every_model(name, x64):
    """In all parameters and initial states."""
    drive, dt = drive_of(name), STEPS.get(name, DT)
    with brainstate.environ.context(precision=64):
        model = made(name, dt=dt)
        fields = {n: x.val for n, x in vars(model).items() if isinstance(x, brainstate.nn.Param)}
        model = made(name, dt=dt, **{n: brainstate.nn.Param(1.05 * x) for n, x in fields.items()})
        weights, start = model.states(brainstate.ParamState, brainstate.HiddenState), states_of(model)

        def gradient(run):
            def loss():
                got = run.run(50 * dt, inputs=lambda i, t: drive, init_states=False)
                return sum(jnp.mean(u.get_mantissa(x) ** 2) for x in jax.tree.leaves(got["output"]))

            set_states(model, start)
            return [brainstate.transform.grad(loss, w)() for w in weights]

        want, got = gradient(brainmass.Simulator(model, dt)), gradient(bk.fuse(model, dt, implementation="scan"))
    close(got, want, 1e-7)
    assert sum(np.abs(x).max() > 0 for x in jax.tree.leaves(want)) > len(fields) // 2


def test_gradients_in_inputs_and_a_parameter_given_as_a_tracer(x64):
    with brainstate.environ.context(precision=64):

        def loss(run, a, drive):
            model = brainmass.HopfStep(2, a=a, init_x=braintools.init.Constant(0.5))
            return jnp.sum(run(model, DT).run(5 * u.ms, inputs=drive, monitors=["x"])["x"] ** 2)

        at = jnp.array(0.2), jnp.linspace(0.0, 0.3, 50)
        want = jax.grad(lambda *xs: loss(brainmass.Simulator, *xs), (0, 1))(*at)
        got = jax.grad(lambda *xs: loss(bk.fuse, *xs), (0, 1))(*at)
    close(got, want, 1e-9)


def test_gradients_in_the_initial_state_through_the_final_one(x64):
    with brainstate.environ.context(precision=64):
        model = made("HopfStep", 2, a=0.2)
        start = states_of(model)
        hidden = model.states(brainstate.HiddenState)

        def gradient(run):
            def loss():
                run.run(5 * u.ms, init_states=False)
                return jnp.sum(model.x.value**2)

            set_states(model, start)
            return brainstate.transform.grad(loss, hidden)()

        want, got = gradient(brainmass.Simulator(model, DT)), gradient(bk.fuse(model, DT))
    close(got, want, 1e-9)
    assert all(np.abs(x).min() > 0 for x in jax.tree.leaves(want))


def test_jit_and_vmap():
    def final(run, a):
        model = brainmass.HopfStep(2, a=a, init_x=braintools.init.Constant(0.5))
        return run(model, DT).run(5 * u.ms, monitors=["x"])["x"][-1]

    at = jnp.array([0.1, 0.2, 0.3])
    want = jnp.stack([final(brainmass.Simulator, a) for a in at])
    got = jax.jit(jax.vmap(lambda a: final(bk.fuse, a)))(at)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_jit_of_brainstate():
    """A run that goes on, compiled once: by both from the same states."""
    model, found = made("HopfStep", 2, a=0.2), []
    start = states_of(model)
    for run in (brainmass.Simulator(model, DT), bk.fuse(model, DT, implementation="scan")):
        set_states(model, start)
        on = brainstate.transform.jit(lambda run=run: run.run(2 * u.ms, monitors=["x"], init_states=False))
        found.append((on(), on(), states_of(model)))
    close(found[1], found[0], 1e-5)


# Noise --------------------------------------------------------------------------------------------------------------


def drawn(noise, duration=400 * u.ms, batch=None, **arguments):
    """The values of a noise object over a run, by both."""
    brainstate.random.seed(11)
    found = []
    for made in (brainmass.Simulator(noise, 1.0 * u.ms), bk.fuse(noise, 1.0 * u.ms, implementation="scan")):
        output = made.run(duration, batch_size=batch, **arguments)["output"]
        found.append(np.asarray(u.get_mantissa(output)))
    return found


class Carried(brainstate.nn.Dynamics):
    """A state that is the noise: `Simulator` runs what has a state."""

    def __init__(self, noise):
        super().__init__(noise.in_size)
        self.noise = noise

    def init_state(self, batch_size=None, **_):
        self.x = brainstate.HiddenState.init(braintools.init.Constant(0.0), self.varshape, batch_size)

    def update(self):
        self.x.value = 0.0 * self.x.value + self.noise()
        return self.x.value


def test_white_noise_is_white_and_normal():
    from scipy import stats

    noise = brainmass.GaussianNoise(50, mean=jnp.linspace(0.0, 1.0, 50), sigma=2.0)
    _, x = drawn(Carried(noise))
    z = (x - np.linspace(0.0, 1.0, 50)) / 2.0
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    bound = 4.0 / np.sqrt(z.size)
    assert abs(np.mean(z[1:] * z[:-1])) < bound  # from step to step
    assert abs(np.mean(z[:, 1:] * z[:, :-1])) < bound  # from mass to mass


def test_ornstein_uhlenbeck_has_the_law_of_brainmass():
    noise = brainmass.OUProcess(300, mean=1.0, sigma=2.0, tau=8.0 * u.ms)
    for x in drawn(noise):
        late = x[100:] - 1.0
        # The variance of exact relaxation with increments sigma sqrt(dt / tau), and the correlation of a step.
        rho = np.exp(-1.0 / 8.0)
        np.testing.assert_allclose(np.var(late), 4.0 / 8.0 / (1.0 - rho**2), rtol=0.06)
        np.testing.assert_allclose(np.mean(late[1:] * late[:-1]) / np.var(late), rho, rtol=0.02)


def test_brownian_noise_grows_as_the_root_of_time():
    noise = brainmass.BrownianNoise(400, sigma=0.5, init=braintools.init.Constant(0.0))
    for x in drawn(noise, 100 * u.ms):
        np.testing.assert_allclose(np.var(x[[24, 99]], axis=1), [0.25 * 25, 0.25 * 100], rtol=0.3)


def test_noise_that_a_batch_shares():
    """brainmass draws Gaussian noise once for all of a batch."""
    for x in drawn(Carried(brainmass.GaussianNoise(3, sigma=1.0)), 50 * u.ms, batch=2):
        assert x.shape == (50, 2, 3)
        np.testing.assert_array_equal(x[:, 0], x[:, 1])
        assert len(np.unique(x[:, 0])) == 150


@pytest.mark.slow
def test_noise_of_jansen_rit_by_both():
    """The potential of many masses has one distribution, with noise on all three inputs."""
    from scipy import stats

    n = 1000
    model = brainmass.JansenRitStep(
        n,
        noise_E=brainmass.GaussianNoise(n, sigma=100.0 * u.Hz),
        noise_M=brainmass.OUProcess(n, sigma=0.5 * u.mV),
        noise_I=brainmass.GaussianNoise(n, sigma=0.1 * u.mV),
    )
    brainstate.random.seed(7)
    want, got = (
        run(model, 1.0 * u.ms).run(100 * u.ms, inputs=lambda i, t: (0.0 * u.mV, 90.0 * u.Hz, 0.0 * u.mV))["output"]
        for run in (brainmass.Simulator, bk.fuse)
    )
    for at in (20, 50, 99):
        a, b = np.asarray(want[at] / u.mV), np.asarray(got[at] / u.mV)
        assert stats.ks_2samp(a, b).pvalue > 1e-3
        assert stats.ks_2samp(a, b + 0.2 * a.std()).pvalue < 1e-3  # and the test would see a difference


def test_seeds():
    model = brainmass.HopfStep(2, noise_x=brainmass.GaussianNoise(2, sigma=1.0))
    fused = bk.fuse(model, DT, implementation="scan")

    def run(seed):
        brainstate.random.seed(seed)
        return fused.run(2 * u.ms, sample_every=5)["output"][0]

    first, again, other = run(1), run(1), run(2)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


# What is refused ----------------------------------------------------------------------------------------------------


class Refusing(brainstate.nn.Dynamics):
    """A leaky unit whose step does something more."""

    def __init__(self, more, start=lambda shape: jnp.ones(shape)):
        super().__init__(3)
        self.more, self.start, self.count = more, start, 0

    def init_state(self, *_):
        self.x = brainstate.HiddenState(self.start(self.varshape))

    def update(self):
        self.x.value = self.more(self, self.x.value)
        return self.x.value


def counted(model, x):
    model.count += 1
    return 0.9 * x


def printed(model, x):
    jax.debug.print("{}", x[0])
    return 0.9 * x


REFUSED = {
    "sum": (lambda m, x: x - x.mean(), "'reduce_sum' .* is not elementwise"),
    "matrix": (lambda m, x: jnp.eye(3) @ x, "'dot_general' .* is not elementwise"),
    "roll": (lambda m, x: jnp.roll(x, 1), "is not elementwise"),
    "pairs": (lambda m, x: (x[:, None] - x).sum(1), "sets lanes against other lanes"),
    "scan": (lambda m, x: jax.lax.fori_loop(0, 2, lambda _, y: 0.9 * y, x), "'(scan|while)' .* is not elementwise"),
    "uniform": (lambda m, x: x + brainstate.random.uniform(size=(3,)), "draws random numbers by 'uniform'"),
    "counted": (counted, "changes the attribute 'count' of Refusing: a Python side effect"),
    "printed": (printed, "has a side effect .*debug"),
    "grown": (lambda m, x: jnp.concatenate([x, x]), r"changes state 'x' of Refusing from float32\[3\] to float32\[6\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    more, message = REFUSED[name]
    with pytest.raises(bk.Unsupported, match=message):
        bk.fuse(Refusing(more), DT).run(1 * u.ms)


def test_states_that_are_no_real_numbers_are_refused():
    model = Refusing(lambda m, x: x + 1, lambda shape: jnp.zeros(shape, jnp.int32))
    with pytest.raises(bk.Unsupported, match="state 'x' of Refusing is int32"):
        bk.fuse(model, DT).run(1 * u.ms)


def test_states_of_other_shapes_are_refused():
    class Two(Refusing):
        def init_state(self, *_):
            self.x, self.y = brainstate.HiddenState(jnp.ones(3)), brainstate.HiddenState(jnp.ones(5))

        def update(self):
            self.x.value, self.y.value = 0.9 * self.x.value, 0.9 * self.y.value

    with pytest.raises(bk.Unsupported, match=r"do not broadcast to one batch of lanes: 'x' \(3,\), 'y' \(5,\)"):
        bk.fuse(Two(None), DT).run(1 * u.ms, monitors=["x"])


def test_noise_objects_that_are_refused():
    with pytest.raises(bk.Unsupported, match=r"'fft' .*is not elementwise"):
        bk.fuse(brainmass.HopfStep(4, noise_x=brainmass.PinkNoise(4, sigma=1.0)), DT).run(1 * u.ms)
    with pytest.raises(bk.Unsupported, match="GaussianNoise has no state that its step changes"):
        bk.fuse(brainmass.GaussianNoise(4, sigma=1.0), DT).run(1 * u.ms)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="'model' got JansenRit, but takes a model such as"):
        bk.fuse(bk.JansenRit(), DT)


def test_what_is_no_time_step_is_refused():
    model = brainmass.JansenRitStep(1)
    for dt, message in (
        (0.1 * u.mV, "'dt' got mV, but takes s"),
        (-0.1 * u.ms, "'dt' got -0.1 ms, but takes a positive time"),
        (0.0, "'dt' got 0.0, but takes a positive time"),
        ([0.1, 0.2] * u.ms, r"'dt' got shape \(2,\), but takes a single time"),
    ):
        with pytest.raises(ValueError, match=message):
            bk.fuse(model, dt)


def test_models_of_brainmass_that_are_refused():
    with pytest.raises(bk.Unsupported, match=r"Mixing: 'dot_general' .* pointwise"):
        bk.fuse(Mixing(), DT).run(1 * u.ms)


class Mixing(brainstate.nn.Module):
    """Regions coupled by a matrix product, of none of brainmass's classes."""

    def __init__(self):
        super().__init__()
        self.node = brainmass.HopfStep(3, noise_x=brainmass.GaussianNoise(3, sigma=1.0))

    def update(self):
        return self.node(jnp.ones((3, 3)) @ self.node.x.value)


def test_fallback():
    """The run is brainmass's own, to the bit and to the draw, and the reason is kept."""
    model = Mixing()
    fused = bk.fuse(model, DT, allow_fallback=True)
    found = []
    for run in (brainmass.Simulator(model, DT), fused):
        brainstate.random.seed(3)
        found.append(run.run(1 * u.ms, monitors={"x": lambda m: m.node.x.value}, sample_every=2))
    assert "pointwise" in fused.fallback
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_unsupported_version_and_none(monkeypatch):
    model = made("HopfStep")
    adapter._brainmass.cache_clear()
    monkeypatch.setattr(adapter, "VERSIONS", ("0.0.1",))
    with pytest.raises(ImportError, match=r"supports brainmass 0\.0\.1, and this is .*: pip install"):
        bk.fuse(model, DT)
    imported = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "brainmass":
            raise ModuleNotFoundError("No module named 'brainmass'", name="brainmass")
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="brainmass, which is not installed: pip install 'brainmass-kernels"):
        bk.fuse(model, DT)
    monkeypatch.undo()
    adapter._brainmass.cache_clear()
