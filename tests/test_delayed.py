"""Delays inside a mass, against a float64 loop over a list of the past."""

from __future__ import annotations

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import brainmass_kernels as bk
from brainmass_kernels import testing

DT, STEPS = 0.1, 60
# None, one step, two, between two, exactly the longest.
TIMES = np.array([0.0, 0.1, 0.2, 0.537, 3.0])


@bk.model
class Late(bk.Model):
    """Two delayed quantities, an observable and a state; the second waits for half of its time, rounded."""

    t0: Any = 1.0 * u.ms
    t1: Any = 1.0 * u.ms
    a: Any = 1.3
    weight: Any = 1.0

    states = {"x": u.UNITLESS, "y": u.UNITLESS}
    inputs = {"I": 0.1}
    observables = {"o": u.mV}
    initial = {"x": 0.5}
    time_unit = u.ms
    delayed = {
        "late": bk.Delayed("o", by="t0", interpolate=True, max_delay=3.0 * u.ms),
        "later": bk.Delayed("y", by="t1", factor=0.5, max_delay=4.0 * u.ms),
    }

    @staticmethod
    def drift(s, p, i):
        to_x = -jnp.tanh(p.a * i.late) + i.I - 0.2 * s.x + 0.3 * i.later
        return {"x": p.weight * to_x / 5.0, "y": (i.late - s.y) / 3.0}

    @staticmethod
    def observe(s, p):
        return {"o": 2.0 * s.x + 0.1 * s.y}


def back(past, steps: float):
    """What was a number of steps ago, linearly between two; before the first step, as at it."""
    before = int(np.floor(steps + 1e-9))
    share = max(0.0, steps - before)
    first, second = (past[max(0, len(past) - 1 - k)] for k in (before, before + 1))
    return (1 - share) * first + share * second


def looped(t0, t1=1.0, a=1.3, weight=1.0, x: Any = 0.5, steps=STEPS, arriving=None, noise=None):
    """Heun's rule; ``arriving(past of o) -> I`` is a coupling."""
    y, seen, past_o, past_y = 0.0 * x, [], [], []
    for n in range(steps):
        past_o.append(2.0 * x + 0.1 * y)
        past_y.append(y)
        late, later = back(past_o, t0 / DT), back(past_y, np.ceil(0.5 * t1 / DT - 1e-9))
        drive = 0.1 + (0.0 if arriving is None else arriving(past_o)) + (0.0 if noise is None else noise[n])

        def drift(x, y, late=late, later=later, drive=drive):
            to_x = -np.tanh(a * late) + drive - 0.2 * x + 0.3 * later
            return weight * to_x / 5.0, (late - y) / 3.0

        one = drift(x, y)
        two = drift(x + DT * one[0], y + DT * one[1])
        x, y = x + 0.5 * DT * (one[0] + two[0]), y + 0.5 * DT * (one[1] + two[1])
        seen.append(2.0 * x + 0.1 * y)
    return np.array(seen)


def run(implementation="scan", steps=STEPS, **fields):
    fields = {n: x * u.ms if n.startswith("t") else x for n, x in fields.items()}
    return bk.simulate(Late(**fields), steps, DT * u.ms, implementation=implementation)["o"].mantissa


compiled = pytest.mark.parametrize("implementation", ["scan", pytest.param("numba", marks=needs.numba)])


# A mass alone --------------------------------------------------------------------------------------------------------


@compiled
def test_delays_of_a_batch(implementation, x64):
    found = run(implementation, t0=TIMES, t1=TIMES[::-1] / 2)
    for k, (t0, t1) in enumerate(zip(TIMES, TIMES[::-1] / 2)):
        np.testing.assert_allclose(found[:, k], looped(t0, t1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("t0", TIMES)
def test_one_known_delay(t0, x64):
    """It is compiled in, and gives the same numbers."""
    np.testing.assert_allclose(run(t0=t0), looped(t0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [pytest.param("triton", marks=needs.interpreter), "mosaic_tpu"])
def test_in_interpreters(name):
    delays = {"t0": 0.25, "t1": 0.6} if name == "mosaic_tpu" else {"t0": TIMES[:4], "t1": 0.6}
    with testing.interpret():
        found = run(name, 12, **delays)
        # A delay for each lane, or a traced one, is data.
        if name == "mosaic_tpu":
            with pytest.raises(bk.Unsupported, match="it compiles delays in"):
                run(name, 12, t0=TIMES)
    for k, t0 in enumerate(np.atleast_1d(delays["t0"])):
        np.testing.assert_allclose(found.reshape(12, -1)[:, k], looped(t0, 0.6, steps=12), atol=1e-6)


@compiled
def test_gradients_against_finite_differences(implementation, x64):
    at = {"t0": 0.537, "t1": 1.0, "a": 1.3, "weight": 1.1, "x": 0.5}

    def loss(t0, a, weight, x):
        model = Late(t0=t0 * u.ms, a=a, weight=weight)
        found = bk.simulate(model, STEPS, DT * u.ms, initial={"x": x}, implementation=implementation)
        return jnp.sum(jnp.sin(3 * found["o"].mantissa))

    def oracle(**at):
        return np.sum(np.sin(3 * looped(**at)))

    names = ("t0", "a", "weight", "x")
    for name, gradient in zip(names, jax.grad(loss, (0, 1, 2, 3))(*(at[n] for n in names))):
        both = [oracle(**at | {name: at[name] + sign * 1e-6}) for sign in (1, -1)]
        np.testing.assert_allclose(gradient, (both[0] - both[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def test_no_weight_on_what_is_late_gives_the_bits_without_it(x64):
    @bk.model
    class Now(bk.Model):
        weight: Any = 0.0
        t0: Any = 1.0 * u.ms
        states, time_unit, initial = {"x": u.UNITLESS}, u.ms, {"x": 0.7}

        @staticmethod
        def drift(s, p, i):
            return {"x": -jnp.sin(s.x)}

    @bk.model
    class Before(Now):
        delayed = {"late": bk.Delayed("x", by="t0")}

        @staticmethod
        def drift(s, p, i):
            return {"x": -jnp.sin(s.x) + p.weight * i.late}

    found = [bk.simulate(cls(), 50, DT * u.ms, implementation="scan")["x"] for cls in (Now, Before)]
    np.testing.assert_array_equal(*found)
    assert not np.array_equal(found[0], bk.simulate(Before(weight=0.1), 50, DT * u.ms, implementation="scan")["x"])


def test_vmap_and_jit_are_the_batch(x64):
    batch = run(t0=TIMES, t1=1.0)
    mapped = jax.jit(jax.vmap(lambda t0: run(t0=t0), out_axes=1))(jnp.asarray(TIMES))
    np.testing.assert_allclose(mapped, batch, rtol=0, atol=1e-14)


@compiled
def test_a_run_continues(implementation, x64):
    model, options = Late(t0=TIMES * u.ms), {"implementation": implementation}
    whole = bk.simulate(model, STEPS, DT * u.ms, **options)
    first = bk.simulate(model, STEPS // 2, DT * u.ms, **options)
    assert {n: x.shape for n, x in first.final["history"].items()} == {"o": (30, 5), "y": (5, 5)}
    second = bk.simulate(model, STEPS // 2, DT * u.ms, initial=first.final, **options)
    np.testing.assert_array_equal(second["o"].mantissa, whole["o"].mantissa[STEPS // 2 :])


def test_a_history_that_is_given(x64):
    model, n = Late(t0=0.5 * u.ms, t1=1.0 * u.ms), 20
    want = bk.simulate(model, n, DT * u.ms, implementation="scan")["o"]
    for o in (1.0 * u.mV, np.ones(5) * u.mV, lambda t: np.ones(len(t)) * u.mV):
        got = bk.simulate(model, n, DT * u.ms, initial={"history": {"o": o, "y": 0.0}}, implementation="scan")["o"]
        np.testing.assert_allclose(got.mantissa, want.mantissa, rtol=0, atol=1e-15)
    other = {"history": {"o": lambda t: (1.0 + t.to_decimal(u.ms)) * u.mV}}
    got = bk.simulate(model, n, DT * u.ms, initial=other, implementation="scan")["o"]
    assert np.max(np.abs(got.mantissa - want.mantissa)) > 1e-3
    with pytest.raises(ValueError, match=r"'o' got shape \(4,\), but takes one value or \(5, \*batch\)"):
        bk.simulate(model, n, DT * u.ms, initial={"history": {"o": np.ones(4) * u.mV}})


def test_noise_and_statistics(x64):
    key, sigma = jax.random.key(1), 0.2 * u.ms**0.5
    model, options = Late(t0=TIMES * u.ms), {"noise": {"I": sigma}, "key": key, "implementation": "scan"}

    @bk.model
    class Draws(bk.Model):
        states, inputs, time_unit = {"x": u.UNITLESS}, {"I": 0.0}, u.ms

        @staticmethod
        def drift(s, p, i):
            return {"x": i.I}

    start = {"x": np.zeros(len(TIMES))}
    drawn = bk.simulate(Draws(), STEPS, DT * u.ms, initial=start, scheme="euler", **options)["x"]
    noise = np.diff(drawn, axis=0, prepend=0.0) / DT
    found = bk.simulate(model, STEPS, DT * u.ms, record={"o": "o", "mean": bk.Mean(of="o")}, **options)
    for k, t0 in enumerate(TIMES):
        np.testing.assert_allclose(found["mean"][k].mantissa, looped(t0, noise=noise[:, k]).mean(), rtol=1e-12)


@compiled
def test_beside_a_stimulus_and_a_gradient_horizon(implementation, x64):
    model, options = Late(t0=TIMES * u.ms), {"scheme": "euler", "implementation": implementation}
    wave = 0.1 + bk.Sine(amplitude=0.5, frequency=200 * u.Hz)
    rows = 0.1 + 0.5 * np.sin(2 * np.pi * 200 * 1e-4 * np.arange(STEPS))
    runs = [bk.simulate(model, STEPS, DT * u.ms, inputs={"I": x}, **options)["o"].mantissa for x in (wave, rows)]
    np.testing.assert_allclose(*runs, rtol=0, atol=1e-13)

    def last(a, horizon):
        # What was sent before the horizon is held fixed, as the state is.
        return jnp.sum(
            bk.simulate(
                Late(t0=TIMES * u.ms, a=a), STEPS, DT * u.ms, record=["o"], gradient_horizon=horizon, **options
            ).final["x"]
        )

    before = bk.simulate(model, STEPS - 20, DT * u.ms, **options).final
    short = jax.grad(
        lambda a: jnp.sum(bk.simulate(Late(t0=TIMES * u.ms, a=a), 20, DT * u.ms, initial=before, **options).final["x"])
    )(1.3)
    np.testing.assert_allclose(jax.grad(last)(1.3, 20), short, rtol=1e-12)
    assert abs(jax.grad(last)(1.3, None) - short) > 1e-3


def test_blocks_times_and_derived_models(x64):
    """A drive of a second-order block reads what is late, in the numbers of the equations; so do derived models."""

    @bk.model
    class Resonator(bk.SecondOrderModel):
        A: Any = 3.0 * u.mV
        a: Any = 100.0 * u.Hz
        t0: Any = 5.0 * u.ms
        states = {"x": u.mV, "v": u.mV / u.second}
        inputs = {"I": 40.0 * u.Hz}
        observables = {"rate": u.Hz}
        blocks = (bk.Block("x", "v", "A", "a"),)
        delayed = {"late": bk.Delayed("rate", by="t0", interpolate=True)}
        time_unit = u.ms

        @staticmethod
        def drive(s, p, i):
            return {"x": i.I - 0.4 * i.late}

        @staticmethod
        def observe(s, p):
            return {"rate": 0.02 * jnp.tanh(0.3 * s.x)}

    dt, x, v, past, seen = 1.0, 0.0, 0.0, [], []
    for _ in range(80):
        past.append(20.0 * np.tanh(0.3 * x))
        drive = (40.0 - 0.4 * back(past, 4.5)) / 1000.0
        x, v = x + dt * v, v + dt * (3.0 * 0.1 * drive - 0.2 * v - 0.01 * x)
        seen.append(20.0 * np.tanh(0.3 * x))
    model = Resonator(t0=4.5 * u.ms)
    options = {"scheme": "euler", "implementation": "scan", "record": "rate"}
    found = bk.simulate(model, 80, dt * u.ms, **options)["rate"].to_decimal(u.Hz)
    np.testing.assert_allclose(found, seen, rtol=1e-12)
    for derived in (bk.coloured(model, "I", 10 * u.ms), bk.with_bold(model, "rate")):
        same = bk.simulate(derived, 80, dt * u.ms, **options)["rate"].to_decimal(u.Hz)
        np.testing.assert_allclose(same, seen, rtol=1e-12)
    strang = bk.simulate(model, 80, dt * u.ms, implementation="scan")["rate"].to_decimal(u.Hz)
    np.testing.assert_allclose(strang[-1], seen[-1], rtol=0.02)


def test_devices_share_the_lanes(x64):
    mesh = jax.make_mesh((4,), ("lanes",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    times = np.linspace(0.0, 2.0, 8)
    spread = jax.device_put(times, NamedSharding(mesh, PartitionSpec("lanes")))
    whole, shared = run(t0=times), run(t0=spread)
    assert len(shared.sharding.device_set) == 4
    np.testing.assert_allclose(shared, whole, rtol=0, atol=1e-14)


def test_sweeps_and_fits_of_a_delay():
    times = np.array([0.4, 0.8, 1.2], np.float32)
    swept = bk.sweep(Late(), {"t0": times * u.ms}, STEPS, DT * u.ms, record=["o"], implementation="scan")
    np.testing.assert_allclose(u.get_magnitude(swept["o"]), run(t0=times), atol=1e-6)
    target = bk.TimeSeries(looped(0.8)[None].astype(np.float32) * u.mV)
    found = bk.fit(
        Late(), target, {"t0": (0.3 * u.ms, 2.0 * u.ms)}, record="o", duration=STEPS, dt=DT * u.ms, transient=0,
        every=1, starts=2, steps=40, realisations=1, key=jax.random.key(0), implementation="scan",
    )  # fmt: skip
    np.testing.assert_allclose(found.parameters["t0"].to_decimal(u.ms), 0.8, atol=0.02)


# In a network --------------------------------------------------------------------------------------------------------

N = 4
WEIGHTS = np.random.default_rng(0).uniform(0.0, 0.3, (N, N)) * (1 - np.eye(N))
BETWEEN = np.random.default_rng(1).integers(0, 9, (N, N))


def networked(t0, weights=WEIGHTS, batch=(), sparse=False, **options):
    from scipy import sparse as matrices

    weights = matrices.coo_array(weights) if sparse else weights
    network = bk.Network(Late(t0=t0 * u.ms), weights, source="o", target="I", k=0.5 / u.mV, delays=BETWEEN * DT * u.ms)
    start = {"x": np.broadcast_to(np.linspace(0.3, 0.6, N), (*batch, N))}
    return bk.simulate(network, 30, DT * u.ms, initial=start, **options)


def coupled(t0, weights=WEIGHTS):
    def arriving(past):
        late = [[past[max(0, len(past) - 1 - BETWEEN[i, j])][j] for j in range(N)] for i in range(N)]
        return 0.5 * np.sum(weights * np.array(late), axis=1)

    if np.ndim(t0) == 0:
        return looped(t0, x=np.linspace(0.3, 0.6, N), steps=30, arriving=arriving)
    return _of_regions(t0, arriving)


def _of_regions(t0, arriving):
    """`looped` with a delay for each region."""
    global back
    whole = back

    def each(past, steps):
        if np.ndim(steps) == 0:
            return whole(past, steps)
        return np.array([whole([x[k] for x in past], one) for k, one in enumerate(steps)])

    try:
        back = each
        return looped(np.asarray(t0), x=np.linspace(0.3, 0.6, N), steps=30, arriving=arriving)
    finally:
        back = whole


@compiled
@pytest.mark.parametrize("sparse", [False, True])
def test_beside_the_couplings_of_a_network(implementation, sparse, x64):
    if sparse:
        pytest.importorskip("scipy")
    found = networked(0.5, sparse=sparse, implementation=implementation)
    np.testing.assert_allclose(found["o"].mantissa, coupled(0.5), rtol=0, atol=1e-13)
    # What is sent to other regions and to itself is one quantity, with one history.
    assert {*found.final["history"]} == {"o", "y"}
    own = np.array([0.0, 0.1, 0.25, 1.4])
    found = networked(own, sparse=sparse, implementation=implementation)
    np.testing.assert_allclose(found["o"].mantissa, coupled(own), rtol=0, atol=1e-13)
    both = networked(np.array([[0.5], [0.25]]), batch=(2,), sparse=sparse, implementation=implementation)
    for k, t0 in enumerate((0.5, 0.25)):
        np.testing.assert_allclose(both["o"].mantissa[:, k], coupled(t0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", [pytest.param("triton", marks=needs.interpreter), "mosaic_tpu"])
def test_a_network_in_interpreters(name):
    with testing.interpret():
        found = networked(0.5, implementation=name)
    np.testing.assert_allclose(found["o"].mantissa, coupled(0.5), atol=2e-6)


def test_gradients_of_a_network(x64):
    def loss(t0, weights):
        return jnp.sum(networked(t0, weights, implementation="scan")["o"].mantissa ** 2)

    def oracle(t0, weights=WEIGHTS):
        return np.sum(coupled(t0, weights) ** 2)

    by_time, by_weights = jax.grad(loss, (0, 1))(0.537, jnp.asarray(WEIGHTS))
    np.testing.assert_allclose(by_time, (oracle(0.537 + 1e-6) - oracle(0.537 - 1e-6)) / 2e-6, rtol=1e-5)
    step = np.zeros_like(WEIGHTS)
    step[1, 2] = 1e-6
    both = [oracle(0.537, WEIGHTS + sign * step) for sign in (1, -1)]
    np.testing.assert_allclose(by_weights[1, 2], (both[0] - both[1]) / 2e-6, rtol=1e-5)


@compiled
def test_groups_of_which_one_has_delays(implementation, x64):
    """Each group is as if alone where no coupling joins them."""
    groups = {"late": (Late(t0=np.array([0.25, 0.6]) * u.ms), [0, 2]), "hopf": (bk.Hopf(a=0.1), [1])}
    coupling = bk.Coupling(np.zeros((3, 3)), source="hopf.x", target="late.I")
    network = bk.Network(groups, couplings=[coupling])
    options: dict[str, Any] = {"scheme": "heun", "implementation": implementation}
    found = bk.simulate(network, 30, DT * u.ms, record=["late.o"], initial={"hopf.x": 0.3}, **options)["late.o"]
    for k, t0 in enumerate((0.25, 0.6)):
        np.testing.assert_allclose(found.mantissa[:, k], looped(t0, steps=30), rtol=0, atol=1e-13)


# What is refused -----------------------------------------------------------------------------------------------------


def declared(delayed, **more):
    body = {
        "__annotations__": {"t0": Any, "gain": Any}, "__module__": __name__, "t0": 1.0 * u.ms, "gain": 2.0,
        "states": {"x": u.UNITLESS}, "inputs": {"I": 0.0}, "observables": {"o": u.UNITLESS}, "time_unit": u.ms,
        "delayed": delayed, "drift": staticmethod(lambda s, p, i: {"x": -i.late}),
        "observe": staticmethod(lambda s, p: {"o": s.x}), **more,
    }  # fmt: skip
    return bk.model(type("Mine", (bk.Model,), body))


@pytest.mark.parametrize(
    ("delayed", "error", "message"),
    [
        ({"late": bk.Delayed("z", by="t0")}, ValueError, r"unknown observable or state of Mine.delayed\['late'\] 'z'"),
        ({"late": bk.Delayed("x", by="t1")}, ValueError, r"unknown parameter in by= of Mine.delayed\['late'\] 't1'"),
        ({"late": bk.Delayed("x", by="gain")}, ValueError, "by='gain', which is in dimensionless, but takes .* a time"),
        ({"I": bk.Delayed("x", by="t0")}, ValueError, "Mine has 'I' as an input and as a delayed quantity"),
        ({"t0": bk.Delayed("x", by="t0")}, ValueError, "Mine has 't0' as a parameter and as a delayed quantity"),
        ({"x": bk.Delayed("x", by="t0")}, ValueError, "Mine has 'x' as a state and as a delayed quantity"),
        ({"o": bk.Delayed("x", by="t0")}, ValueError, "Mine has 'o' as an observable and as a delayed quantity"),
        ({"late": "x"}, TypeError, r"Mine.delayed\['late'\] got 'x', but takes bk.Delayed"),
        ({"too late": bk.Delayed("x", by="t0")}, ValueError, "got the name 'too late', but takes a word"),
        ([bk.Delayed("x", by="t0")], TypeError, "Mine.delayed got list, but takes a dict of bk.Delayed by name"),
    ],
)
def test_declarations_that_are_refused(delayed, error, message):
    with pytest.raises(error, match=message):
        declared(delayed)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"of": 1, "by": "t0"}, TypeError, "'of' got 1, but takes a name"),
        ({"of": "x", "by": None}, TypeError, "'by' got None, but takes a name"),
        ({"of": "x", "by": "t0", "factor": 0.0}, ValueError, "'factor' got 0.0, but takes a positive number"),
        ({"of": "x", "by": "t0", "interpolate": 1}, TypeError, "'interpolate' got 1, but takes True or False"),
        ({"of": "x", "by": "t0", "max_delay": 3.0}, ValueError, "'max_delay'"),
        ({"of": "x", "by": "t0", "max_delay": -3.0 * u.ms}, ValueError, "'max_delay'"),
    ],
)
def test_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        bk.Delayed(**arguments)


@pytest.mark.parametrize(
    ("t0", "message"),
    [
        (-1.0, "'t0' got negative or infinite values, but takes finite ones from 0 on"),
        (np.array([1.0, -0.5]), "'t0' got negative or infinite values"),
        (np.inf, "'t0' got negative or infinite values"),
        (np.nan, "'t0' got NaN"),
        (3.5, "'t0' got delays up to 3.5 ms, but takes at most max_delay, 3 ms"),
    ],
)
def test_delays_that_are_refused(t0, message):
    with pytest.raises(ValueError, match=message):
        run(t0=t0)


def test_what_tracing_needs(x64):
    cls = declared({"late": bk.Delayed("x", by="t0")})

    def final(t0, cls=cls):
        return bk.simulate(cls(t0=t0 * u.ms), 5, DT * u.ms, implementation="scan").final["x"]

    with pytest.raises(TypeError, match="'t0' is traced by jit, vmap or grad, so that the longest delay"):
        jax.jit(final)(1.0)
    rounded = declared({"late": bk.Delayed("x", by="t0", max_delay=2 * u.ms)})
    with pytest.raises(TypeError, match="with interpolate=True"):
        jax.grad(lambda t0: final(t0, rounded))(1.0)
    assert np.isnan(jax.jit(lambda t0: final(t0, rounded))(2.5))
    bad = declared({"late": bk.Delayed("x", by="t0")}, drift=staticmethod(lambda s, p, i: {"x": -s.late}))
    with pytest.raises(ValueError, match=r"Mine.drift reads s.late, but 'late' is a input: i.late"):
        bk.simulate(bad(), 5, DT * u.ms)


def test_what_takes_no_delays():
    with pytest.raises(bk.Unsupported, match=r"no delays inside a mass; .*scan"), testing.interpret():
        run("mosaic_gpu")
    from brainmass_kernels.sensitivity import sensitivities

    with pytest.raises(TypeError, match="delays inside a mass, whose derivatives are not carried"):
        sensitivities(Late(), 10, DT * u.ms, wrt="a")


@pytest.mark.slow
def test_least_squares_by_forward_mode():
    """The delay's derivative is not carried in the loop: JAX takes it through `scan`."""
    data = bk.simulate(Late(a=1.6), 60, DT * u.ms)["o"]
    target, call = bk.TimeSeries(data), {"duration": 60, "dt": DT * u.ms, "transient": 0, "every": 1, "record": "o"}
    found = bk.fit(
        Late(), target, {"a": (1.0, 2.0)}, realisations=1, starts=1, steps=8, optimiser="levenberg_marquardt", **call
    )  # fmt: skip
    np.testing.assert_allclose(found.parameters["a"], 1.6, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["scan", pytest.param("numba", marks=needs.numba)])
def test_a_gradient_counts_what_is_stored_of_the_past(implementation):
    """At least what was sent in each step of a segment, and the histories; as a compiled gradient takes, in order."""
    lanes, steps = 512, 400
    model, settings = Late(a=jnp.full(lanes, 1.3)), {"duration": steps, "dt": DT * u.ms, "record": "o"}
    planned = bk.explain(model, implementation=implementation, **settings).bytes_gradient

    def loss(a):
        result = bk.simulate(Late(a=a), every=steps, implementation=implementation, **settings)
        return jnp.sum(result["o"].mantissa ** 2)

    stored = jax.jit(jax.grad(loss)).lower(model.a).compile().memory_analysis().temp_size_in_bytes
    assert 0.3 < planned / stored < 3
