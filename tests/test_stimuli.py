"""Stimuli: functions of time within the loop, against plain NumPy loops, streamed arrays and finite differences."""

import contextlib
import math
from fractions import Fraction

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from test_schemes import Bare

import brainmass_kernels as bk
from brainmass_kernels import run, timing
from brainmass_kernels.arguments import prepare
from brainmass_kernels.stimuli import names_of

INTERPRETED = ("triton", "mosaic_gpu", "mosaic_tpu")
EACH = [
    "scan",
    pytest.param("numba", marks=needs.numba),
    pytest.param("triton", marks=needs.interpreter),
    pytest.param("mosaic_gpu", marks=needs.mosaic_gpu),
    "mosaic_tpu",
]
ON_CPUS = EACH[:2]
DT = 0.5 * u.ms


@bk.model
class Leak(bk.Model):
    """x' = drive - rate x."""

    rate: object = 40.0 * u.Hz

    states = {"x": u.UNITLESS}
    inputs = {"drive": 0.0 * u.Hz}

    @staticmethod
    def drift(s, p, i):
        return {"x": i.drive - p.rate * s.x}


def interpreted(implementation: str):
    return bk.testing.interpret() if implementation in INTERPRETED else contextlib.nullcontext()


def leak(drive, steps=240, dt=DT, rate=40.0, **arguments):
    """The state after each step."""
    given = {"inputs": {"drive": drive}, "record": "x", "scheme": "euler", "implementation": "scan", **arguments}
    return bk.simulate(Leak(rate=rate * u.Hz), steps, dt, **given)["x"]


# Formulas of their own, of seconds -----------------------------------------------------------------------------------


def logistic(x):
    return 1.0 / (1.0 + np.exp(-x))


def pulse(t, onset, width, amplitude, edge):
    return amplitude * (logistic((t - onset) / edge) - logistic((t - onset - width) / edge))


def train(t, onset, width, period, amplitude, edge, count):
    middle = onset + width / 2
    number = np.round((t - middle) / period)
    there = (number >= 0) & (number < count)
    return there * pulse(t - number * period, onset, width, amplitude, edge)


def sine(t, frequency, amplitude, phase):
    return amplitude * np.sin(2 * np.pi * frequency * t + phase)


def ramp(t, onset, width, amplitude):
    return amplitude * np.clip((t - onset) / width, 0, 1)


def bump(t, onset, peak, amplitude, order):
    x = np.maximum(t - onset, 0) / peak
    return amplitude * x ** (order - 1) * np.exp((order - 1) * (1 - x))


MS = 1e-3
EVERY_KIND = {
    "pulse": (
        bk.Pulse(20.3 * u.ms, 30 * u.ms, 50 * u.Hz, 2 * u.ms),
        lambda t: pulse(t, 20.3 * MS, 30 * MS, 50.0, 2 * MS),
    ),
    "train": (
        bk.PulseTrain(10.1 * u.ms, 4 * u.ms, 17.3 * u.ms, 60 * u.Hz, count=3, edge=0.2 * u.ms),
        lambda t: train(t, 10.1 * MS, 4 * MS, 17.3 * MS, 60.0, 0.2 * MS, 3),
    ),
    "sine": (bk.Sine(33 * u.Hz, 20 * u.Hz, phase=0.4), lambda t: sine(t, 33.0, 20.0, 0.4)),
    "ramp": (bk.Ramp(30.2 * u.ms, 40 * u.ms, 25 * u.Hz), lambda t: ramp(t, 30.2 * MS, 40 * MS, 25.0)),
    "bump": (
        bk.GammaBump(15.7 * u.ms, 12 * u.ms, 70 * u.Hz, order=3.4),
        lambda t: bump(t, 15.7 * MS, 12 * MS, 70.0, 3.4),
    ),
}  # fmt: skip


def oracle(drive, scheme, steps=240, dt=0.5 * MS, rate=40.0):
    """The state after each step by a plain loop."""
    rates, x, xs = lambda t, x: drive(t) - rate * x, 0.0, []
    for n in range(steps):
        t = n * dt
        k1 = rates(t, x)
        if scheme == "euler":
            x = x + dt * k1
        elif scheme == "heun":
            x = x + dt / 2 * (k1 + rates(t + dt, x + dt * k1))
        else:
            k2 = rates(t + dt / 2, x + dt / 2 * k1)
            k3 = rates(t + dt / 2, x + dt / 2 * k2)
            x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + rates(t + dt, x + dt * k3))
        xs.append(x)
    return np.array(xs)


@pytest.mark.parametrize("scheme", ["euler", "heun", "rk4"])
def test_each_kind_against_a_plain_loop(x64, scheme):
    for name, (stimulus, formula) in EVERY_KIND.items():
        got = leak(3.0 * u.Hz + stimulus, scheme=scheme)
        want = oracle(lambda t, f=formula: 3.0 + f(t), scheme)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_values_are_the_formulas(x64, name):
    stimulus, formula = EVERY_KIND[name]
    t = np.linspace(-0.02, 0.12, 141)
    np.testing.assert_allclose(stimulus.values(t * u.second).to_decimal(u.Hz), formula(t), rtol=1e-9, atol=1e-9)


@needs.numba
def test_numba_has_the_numbers_of_scan(x64):
    drive = sum(stimulus for stimulus, _ in EVERY_KIND.values())
    one, other = (leak(drive, implementation=name) for name in ("scan", "numba"))
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_rk4_keeps_its_order_and_heun(x64):
    """x' = cos(w t) - a x in closed form; an input that is held within a step would leave the order 1."""
    a, w, end = 40.0, 2 * math.pi * 25.0, 0.08
    exact = (a * math.cos(w * end) + w * math.sin(w * end) - a * math.exp(-a * end)) / (a**2 + w**2)
    for scheme, order in (("heun", 2), ("rk4", 4)):
        errors = []
        for steps in (80, 160):
            wave = bk.Sine(25 * u.Hz, 1 * u.Hz, phase=math.pi / 2)
            errors.append(abs(leak(wave, steps, end / steps * u.second, scheme=scheme)[-1] - exact))
        assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1


def test_strang_and_exact_take_the_middle_of_a_step(x64):
    stimulus, formula = EVERY_KIND["pulse"]
    streamed = (100.0 + formula((np.arange(120) + 0.5) * 0.5 * MS)) * u.Hz
    for scheme in ("strang", "exact"):
        call = {"record": "x", "scheme": scheme, "implementation": "scan"}
        one = bk.simulate(Bare(), 120, DT, inputs={"drive": 100 * u.Hz + stimulus}, **call)["x"]
        other = bk.simulate(Bare(), 120, DT, inputs={"drive": streamed}, **call)["x"]
        np.testing.assert_allclose(one.to_decimal(u.mV), other.to_decimal(u.mV), rtol=1e-10)


def test_a_hard_edge_is_the_nearest_step(x64):
    """In every scheme and at every stage, so that a step is wholly before or after it."""
    onsets = np.array([10.0, 10.2, 10.3, 0.7, 12.49])
    first = np.round(onsets / 0.5).astype(int)
    n = np.arange(60)
    on = (n[:, None] >= first) & (n[:, None] < first + 8)
    for scheme in ("euler", "rk4"):
        hard = bk.Pulse(onsets * u.ms, 4 * u.ms, 50 * u.Hz)
        np.testing.assert_allclose(leak(hard, 60, scheme=scheme), leak(50.0 * on * u.Hz, 60, scheme=scheme), rtol=1e-12)


def test_a_hard_train_is_pulses(x64):
    n = np.arange(120)
    on = ((n - 6) % 18 < 5) & (n >= 6)
    hard = bk.PulseTrain(3 * u.ms, 2.5 * u.ms, 9 * u.ms, 50 * u.Hz)
    np.testing.assert_allclose(leak(hard, 120), leak(50.0 * on * u.Hz, 120), rtol=1e-12)
    two = bk.PulseTrain(3 * u.ms, 2.5 * u.ms, 9 * u.ms, 50 * u.Hz, count=2)
    np.testing.assert_allclose(leak(two, 120), leak(50.0 * (on & (n < 42)) * u.Hz, 120), rtol=1e-12)


# Every implementation ------------------------------------------------------------------------------------------------


def measure(values, implementation):
    """A number that depends on all of some parameters, and whose program has all kinds."""
    onset, width = values["onset"] * u.ms, values["width"] * u.ms
    drive = 100 * u.Hz + bk.Pulse(onset, width, values["amplitude"] * u.Hz, 1 * u.ms)
    drive += bk.Sine(values["frequency"] * u.Hz, 30 * u.Hz) + bk.GammaBump(onset, width, 40 * u.Hz)
    drive += bk.PulseTrain(onset, 2 * u.ms, values["period"] * u.ms, 60 * u.Hz, count=2, edge=0.5 * u.ms)
    drive += bk.Pulse(3 * u.ms, 2 * u.ms, 20 * u.Hz) + bk.Ramp(onset, width, 30 * u.Hz)
    result = bk.simulate(Bare(), 24, 1 * u.ms, inputs={"drive": drive}, record="x", every=4, scheme="strang",
                         implementation=implementation)  # fmt: skip
    return jnp.sum(result["x"].to_decimal(u.mV) ** 2 * jnp.arange(6, dtype=float)[:, None])


VALUES = {"onset": [4.3, 7.0, 9.1], "width": 5.2, "amplitude": 80.0, "frequency": 40.0, "period": 6.3}


@pytest.fixture(scope="module")
def reference():
    """The number and its gradient in float64."""
    with jax.enable_x64(True):
        return jax.value_and_grad(lambda v: measure(v, "scan"))({n: jnp.asarray(x) for n, x in VALUES.items()})


@pytest.mark.parametrize("implementation", EACH)
def test_every_implementation_and_its_gradient(implementation, reference):
    value, slopes = reference
    given = {n: jnp.asarray(x, jnp.float32) for n, x in VALUES.items()}
    with interpreted(implementation):
        got, found = jax.value_and_grad(lambda v: measure(v, implementation))(given)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for name, slope in slopes.items():
        np.testing.assert_allclose(found[name], slope, rtol=3e-4, atol=1e-4 * np.max(np.abs(slope)), err_msg=name)


@pytest.mark.parametrize("implementation", ON_CPUS)
def test_gradients_against_finite_differences(x64, implementation):
    given = {n: jnp.asarray(x) for n, x in VALUES.items()}
    found = jax.grad(lambda v: measure(v, implementation))(given)
    value = jax.jit(lambda v: measure(v, implementation))
    for name, x in given.items():
        h = 1e-5 * jnp.max(x)
        there, back = (value({**given, name: x + s * h}) for s in (1, -1))
        np.testing.assert_allclose(jnp.sum(found[name]), (there - back) / (2 * h), rtol=1e-5, err_msg=name)


CHIPS = [
    pytest.param("v5e", "mosaic_tpu", marks=needs.libtpu),
    pytest.param("sm_90", "triton", marks=needs.triton),
    pytest.param("h200", "mosaic_gpu", marks=needs.gpu_compiler),
]


@pytest.mark.parametrize(("chip", "implementation"), CHIPS)
def test_gradients_compile_for_absent_chips(chip, implementation):
    given = {n: jnp.asarray(x, jnp.float32) for n, x in VALUES.items()}
    assert bk.testing.compile_for(chip, jax.grad(lambda v: measure(v, implementation)), given) is not None


# Late times ----------------------------------------------------------------------------------------------------------


def counted(n: int, digits: int):
    return [jnp.float32(n // timing.BASE**k % timing.BASE) for k in range(digits)]


@pytest.mark.parametrize("start", [0, 4094, 2**24 - 2, 10**8, timing.MOST_STEPS - 4])
def test_digits_count(start):
    digits = timing.digits_of(start + 4)
    at = counted(start, digits)
    for n in range(start + 1, start + 4):
        after = timing.after(at)
        np.testing.assert_array_equal(after, counted(n, digits))
        np.testing.assert_array_equal(timing.before(after), at)
        at = after


@pytest.mark.parametrize("late", [1_000, 5_000_000, 10**8, 3 * 10**10])
def test_times_since_a_moment_are_exact(late):
    """To a millionth of a step near it, whatever its number."""
    digits, dt = timing.digits_of(late + 5000), 1e-4
    values = timing.moment("m", np.float64((late + 0.25) * dt), dt, digits)
    values = {n: jnp.float32(x) for n, x in values.items()}
    for n in (late - 900, late - 3, late, late + 1, late + 4097):
        time = timing.InLoop(counted(n, digits), values, jnp.float32(dt), 0.5)
        # A float64 holds the onset to a hundred-thousandth of such a step.
        near = 1e-4 if late > 10**10 else 1e-6 * max(1, abs(n - late))
        assert abs(float(time.steps("m")) - (n + 0.5 - late - 0.25)) <= near


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("late", [777, 10**7 + 1, 10**8 + 3, 6 * 10**10])
def test_phases_are_exact(late, traced):
    """To less than a millionth of a cycle, also of a frequency and a period that are traced as float32."""
    digits, dt = timing.digits_of(late), 1e-4
    for given, period in ((np.float32(9.87654321), False), (np.float32(0.0123456), True)):
        split = lambda x, period=period: timing.cycle("c", x, np.float32(0.0), dt, digits, period)  # noqa: E731
        values = jax.jit(split)(given) if traced else split(np.float64(given))
        values = {n: jnp.float32(x) for n, x in values.items()}
        time = timing.InLoop(counted(late, digits), values, jnp.float32(dt), 0.0)
        rate = 1 / Fraction(float(given)) if period else Fraction(float(given))
        phase = rate * Fraction(dt) * late
        difference = float(phase - Fraction(float(time.cycle("c"))))
        # Traced, the time of a step is known to 36 bits.
        assert abs(difference - round(difference)) < 5e-7 + float(phase) * (1e-11 if traced else 1e-14)


@needs.numba
def test_a_pulse_at_step_100_million():
    """In float32, whose numbers are 8 steps apart there."""
    late, steps = 10**8, 10**8 + 12
    wave = bk.Sine(9.7 * u.Hz, 1 * u.Hz)
    late_pulse = bk.Pulse(late * 1e-4 * u.second, 5e-4 * u.second, 50 * u.Hz)
    for drive, formula in (
        (late_pulse, lambda n: 50.0 * ((n >= late) & (n < late + 5))),
        (wave, lambda n: np.sin(2 * np.pi * np.float64((9.7e-4 * n) % 1.0))),
    ):
        # Each state is what drove it in the step before.
        x = leak(drive, steps, 0.1 * u.ms, rate=1e4, transient=steps - 20, implementation="numba")
        n = np.arange(steps - 20, steps)
        np.testing.assert_allclose(x / 1e-4, formula(n), atol=2e-5)


def test_more_steps_than_digits_count_are_refused():
    with pytest.raises(ValueError, match="a run with stimuli takes at most 68,719,476,736"):
        bk.explain(Leak(), 2**37, DT, inputs={"drive": bk.Sine(1 * u.Hz, 1 * u.Hz)}, every=2**33, record="x")


# Arguments -----------------------------------------------------------------------------------------------------------


def test_sums_from_both_sides_and_of_units():
    one, other = bk.Pulse(10 * u.ms, 5 * u.ms, 0.05 * u.kHz), bk.Sine(20 * u.Hz, 3 * u.Hz)
    sums = [5 * u.Hz + one + other, one + 5 * u.Hz + other, one + (other + 5 * u.Hz), sum([one, other]) + 0.005 * u.kHz]
    found = [leak(x, 80) for x in sums]
    for x in found:
        np.testing.assert_allclose(x, found[0], rtol=1e-6)
    assert repr(5 * u.Hz + other).count("Sine(") == 1
    rows = np.linspace(0.0, 5.0, 80, dtype="float32") * u.Hz
    apart = leak(rows, 80) + leak(one, 80)
    np.testing.assert_allclose(leak(rows + one, 80), apart, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((5 * u.Hz + other).values([0.0] * u.ms).to_decimal(u.Hz), [5.0])


def test_numbers_without_a_unit_have_stimuli_too():
    @bk.model
    class Bare(bk.Model):
        states = {"x": u.UNITLESS}
        inputs = {"drive": 0.0}

        @staticmethod
        def drift(s, p, i):
            return {"x": i.drive - s.x}

    def run(drive):
        return bk.simulate(Bare(), 20, DT, inputs={"drive": drive}, record="x", scheme="euler")["x"]

    step = bk.Pulse(2 * u.ms, 3 * u.ms, 2.0)
    for base in (1.0, np.ones(3, "float32"), jnp.ones(3)):
        np.testing.assert_array_equal(run(base + step), run(step + base))


def test_lanes_and_vmap_and_pytrees():
    onsets = jnp.asarray([5.0, 11.0, 20.0])
    lanes = leak(bk.Pulse(onsets * u.ms, 5 * u.ms, 50 * u.Hz, 1 * u.ms), 80)
    mapped = jax.vmap(lambda x: leak(bk.Pulse(x * u.ms, 5 * u.ms, 50 * u.Hz, 1 * u.ms), 80), out_axes=1)(onsets)
    np.testing.assert_allclose(mapped, lanes, rtol=1e-5, atol=1e-7)
    drive = 0.0 * u.Hz + bk.Pulse(onsets[1] * u.ms, 5.0 * u.ms, 50.0 * u.Hz, 1.0 * u.ms)
    np.testing.assert_allclose(jax.jit(lambda d: leak(d, 80))(drive), lanes[:, 1], rtol=1e-5, atol=1e-7)
    slopes = jax.grad(lambda d: jnp.sum(leak(d, 80)))(drive)
    assert float(slopes.stimuli[0].amplitude.mantissa) > 0.0


def test_lanes_over_devices():
    """A share of the onsets lies on each device, and so does the result."""
    onsets = jnp.linspace(3.0, 17.0, 8)
    drive = lambda x: bk.Pulse(x * u.ms, 5 * u.ms, 50 * u.Hz, 1 * u.ms) + bk.Sine(20 * u.Hz, 9 * u.Hz)  # noqa: E731
    whole = leak(drive(onsets), 60)
    mesh = jax.make_mesh((2,), ("lanes",), devices=jax.devices()[:2])
    spread = jax.device_put(onsets, jax.NamedSharding(mesh, jax.P("lanes")))
    parts = leak(drive(spread), 60)
    assert len(parts.sharding.device_set) == 2
    assert not parts.sharding.is_fully_replicated
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-7)


def test_second_derivatives_and_forward_mode(x64):
    def total(x):
        return jnp.sum(leak(bk.Pulse(x * u.ms, 5 * u.ms, 50 * u.Hz, 1 * u.ms), 60) ** 2)

    h = 1e-4
    slope = jax.jacfwd(total)
    np.testing.assert_allclose(slope(11.0), jax.grad(total)(11.0), rtol=1e-9)
    np.testing.assert_allclose(jax.hessian(total)(11.0), (slope(11.0 + h) - slope(11.0 - h)) / (2 * h), rtol=1e-5)


def test_another_value_compiles_nothing():
    def call(onset):
        return leak(1.0 * u.Hz + bk.Pulse(onset, 5 * u.ms, 50 * u.Hz), 60)

    call(3.0 * u.ms)
    before = len(run.RUNS.values())
    sizes = [x._cache_size() for x in run.RUNS.values()]
    call(7.1 * u.ms)
    assert len(run.RUNS.values()) == before
    assert [x._cache_size() for x in run.RUNS.values()] == sizes


def test_no_array_has_a_value_for_each_step():
    steps, lanes = 7919, 31

    def shapes(drive):
        def call(drive):
            return leak(drive, steps, every=steps)

        return str(jax.make_jaxpr(call)(drive))

    rows = np.ones((steps, lanes), "float32") * u.Hz
    assert f"[{steps},{lanes}]" in shapes(rows)
    onset = np.linspace(1.0, 50.0, lanes, dtype="float32") * u.ms
    text = shapes(1.0 * u.Hz + bk.Pulse(onset, 5 * u.ms, 50 * u.Hz, 1 * u.ms) + bk.Sine(10 * u.Hz, 1 * u.Hz))
    assert f"[{lanes}]" in text
    assert f"[{steps}," not in text


def test_runs_without_stimuli_carry_no_clock():
    plain = prepare(bk.JansenRit(), 100, DT)[0]
    with_one = prepare(bk.JansenRit(), 100, DT, inputs={"E_inp": bk.Sine(1 * u.Hz, 1 * u.Hz)})[0]
    assert plain.spec.carried == tuple(bk.JansenRit.states)
    assert plain.spec.digits == 0
    assert with_one.spec.carried == (*bk.JansenRit.states, "step digit 0")
    assert set(bk.simulate(Leak(), 5, DT, inputs={"drive": bk.Sine(1 * u.Hz, 1 * u.Hz)}).final) == {"x"}


@pytest.mark.parametrize("implementation", ON_CPUS)
def test_regions_of_a_network(x64, implementation):
    """Region 1 alone is driven, and drives region 0 after its delay."""
    weights, delays = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.0, 5.0], [0.0, 0.0]])
    network = bk.Network(
        Leak(), weights, source="x", target="drive", coupling="additive", k=30.0 * u.Hz, delays=delays * u.ms
    )
    drive = bk.Pulse(np.array([5.0, 10.0]) * u.ms, 5 * u.ms, np.array([0.0, 50.0]) * u.Hz)
    call = {"record": "x", "scheme": "euler", "implementation": implementation}
    got = bk.simulate(network, 80, DT, inputs={"drive": drive}, **call)["x"]
    rows = np.zeros((80, 2))
    rows[20:30, 1] = 50.0
    want = bk.simulate(network, 80, DT, inputs={"drive": rows * u.Hz}, **call)["x"]
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert np.max(got[:, 0]) > 0.0


def test_groups_of_models(x64):
    network = bk.Network(
        {"a": (Leak(rate=9.0 * u.Hz), 2), "b": (Leak(), 3)}, np.zeros((5, 5)), source={"a": "x", "b": "x"},
        target={"a": "drive", "b": "drive"}, k=1.0 * u.Hz,
    )  # fmt: skip
    onsets = np.array([2.0, 5.0, 9.0])
    drive = bk.Pulse(onsets * u.ms, 5 * u.ms, 50 * u.Hz)
    got = bk.simulate(network, 60, DT, inputs={"b.drive": drive}, record="b.x", scheme="heun")["b.x"]
    np.testing.assert_allclose(got, leak(drive, 60, scheme="heun"), rtol=1e-12)


def test_sweeps_and_fits_name_them():
    drive = 2.0 * u.Hz + bk.Pulse(10 * u.ms, 5 * u.ms, 50 * u.Hz)
    call = {"record": "x", "scheme": "euler"}
    onsets = [5.0, 10.0, 20.0] * u.ms
    over = {"drive.onset": onsets, "drive": [1.0, 2.0] * u.Hz}
    sweep = bk.sweep(Leak(), over, 80, DT, inputs={"drive": drive}, **call)
    alone = leak(2.0 * u.Hz + bk.Pulse(20 * u.ms, 5 * u.ms, 50 * u.Hz), 80)
    np.testing.assert_allclose(np.asarray(sweep["x"])[:, 2, 1], alone, rtol=1e-5)
    with pytest.raises(ValueError, match=r"drive\.onsett.*did you mean 'drive\.onset'"):
        bk.sweep(Leak(), {"drive.onsett": onsets}, 80, DT, inputs={"drive": drive}, **call)
    two = drive + bk.Pulse(30 * u.ms, 5 * u.ms, 50 * u.Hz)
    assert next(iter(names_of({"drive": two}))) == "drive.0.onset"
    with pytest.raises(TypeError, match=r"a gradient in 'drive: Pulse\.onset': this stimulus has a hard edge"):
        bk.sensitivities(Leak(), 80, DT, "drive.onset", inputs={"drive": drive}, **call)


def test_sensitivities_of_other_parameters(x64):
    """The clock of the stimuli is carried beside states and derivatives."""
    drive = bk.Pulse(10 * u.ms, 5 * u.ms, 50 * u.Hz)
    call = {"inputs": {"drive": drive}, "record": "x", "scheme": "heun"}
    _, slopes = bk.sensitivities(Leak(), 60, DT, "rate", **call)
    there, back = (leak(drive, 60, rate=40.0 + h, scheme="heun") for h in (1e-4, -1e-4))
    np.testing.assert_allclose(slopes["rate"]["x"].to_decimal(u.second), (there - back) / 2e-4, atol=1e-9)


def test_a_fit_finds_an_onset_and_is_saved(tmp_path):
    def drive(onset, amplitude):
        return 2.0 * u.Hz + bk.Pulse(onset * u.ms, 12.0 * u.ms, amplitude * u.Hz, 2.0 * u.ms)

    target = bk.TimeSeries(np.asarray(leak(drive(20.0, 50.0), 100)))
    free = {"drive.onset": (5 * u.ms, 40 * u.ms), "drive.amplitude": (5 * u.Hz, 100 * u.Hz)}
    call = {"duration": 100 * DT, "dt": DT, "record": "x", "transient": None, "every": 1, "scheme": "euler"}
    fit = bk.fit(Leak(), target, free, inputs={"drive": drive(15.0, 35.0)}, starts=1, steps=80, **call)
    np.testing.assert_allclose(fit.parameters["drive.onset"].to_decimal(u.ms), 20.0, rtol=0.01)
    fit.save(tmp_path / "fit.json")
    loaded = bk.Fit.load(tmp_path / "fit.json", Leak())
    one, other = (leak(f.inputs["drive"], 60) for f in (fit, loaded))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert loaded.settings["fixed"]["stimuli"] == {"drive": [["Pulse", ["onset", "width", "amplitude", "edge"]]]}


# Stimuli of one's own ------------------------------------------------------------------------------------------------


@bk.stimulus
def alpha(t, tau=5.0 * u.ms):
    """A bump that is largest a time tau after its onset."""
    return t / tau * jnp.exp(1.0 - t / tau)


def test_a_function_is_a_stimulus(x64):
    own = alpha(onset=10 * u.ms, amplitude=60 * u.Hz, tau=0.012 * u.second)
    same = bk.GammaBump(10 * u.ms, 12 * u.ms, 60 * u.Hz, order=2.0)
    np.testing.assert_allclose(leak(own), leak(same), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(own.values([22.0] * u.ms).to_decimal(u.Hz), 60.0)
    assert "largest" in alpha.__doc__
    slope = jax.grad(lambda x: jnp.sum(leak(alpha(onset=x * u.ms, amplitude=60 * u.Hz))))(10.2)
    h = 1e-4
    there, back = (jnp.sum(leak(alpha(onset=x * u.ms, amplitude=60 * u.Hz))) for x in (10.2 + h, 10.2 - h))
    np.testing.assert_allclose(slope, (there - back) / (2 * h), rtol=1e-4)


@pytest.mark.parametrize(
    "of", [lambda x: 2 * x, lambda x: x * 2.0, lambda x: 3 * u.Hz - x, lambda x: x - x, lambda x: -x]
)
def test_a_stimulus_takes_part_in_sums_alone(of):
    pulse = bk.Pulse(onset=1 * u.ms, width=1 * u.ms, amplitude=1 * u.Hz)
    for each in (pulse, 2 * u.Hz + pulse):
        with pytest.raises(TypeError, match=r"a stimulus takes '\+' alone: give it another 'amplitude'"):
            of(each)


def test_functions_that_are_no_stimulus_are_refused():
    @bk.stimulus
    def mixes(t, tau=5.0 * u.ms):
        return jnp.sum(t) / tau

    with pytest.raises(bk.NotPointwise, match="the stimulus 'mixes'"):
        leak(mixes(onset=1 * u.ms, amplitude=1 * u.Hz))
    with pytest.raises(TypeError, match="no default of 'tau'"):
        bk.stimulus(lambda t, tau: t)
    with pytest.raises(ValueError, match="every stimulus has by itself"):
        bk.stimulus(lambda t, onset=1.0: t)
    with pytest.raises(TypeError, match="takes a function"):
        bk.stimulus(3)  # pyright: ignore

    @bk.stimulus(time_unit=u.second)
    def decay(t, tau=5.0 * u.ms):
        return jnp.exp(-t / tau)

    with pytest.raises(TypeError, match="hard edge"):
        jax.grad(lambda x: jnp.sum(leak(decay(onset=x * u.ms, amplitude=1 * u.Hz))))(10.0)
    jax.grad(lambda x: jnp.sum(leak(decay(onset=10 * u.ms, amplitude=1 * u.Hz, tau=x * u.ms))))(10.0)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [None, 0.0 * u.ms])
@pytest.mark.parametrize("name", ["onset", "width"])
def test_gradients_of_a_hard_edge_are_refused(name, edge):
    def total(x):
        times = {"onset": 10 * u.ms, "width": 5 * u.ms, name: x * u.ms}
        return jnp.sum(leak(bk.Pulse(amplitude=50 * u.Hz, edge=edge, **times), 60))

    with pytest.raises(TypeError, match=rf"'drive: Pulse\.{name}'.*hard edge.*give Pulse an `edge`"):
        jax.grad(total)(6.0)
    jax.jit(total)(6.0)


def test_the_amplitude_of_a_hard_pulse_has_a_gradient(x64):
    def total(x):
        return jnp.sum(leak(bk.Pulse(10 * u.ms, 5 * u.ms, x * u.Hz), 60))

    np.testing.assert_allclose(jax.grad(total)(3.0), total(1.0), rtol=1e-12)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: bk.Pulse(10 * u.ms, -5 * u.ms, 5 * u.Hz), r"'Pulse\.width' got -5.*positive time"),
    (lambda: bk.Pulse(10 * u.mV, 5 * u.ms, 5 * u.Hz), r"'Pulse\.onset' got mV"),
    (lambda: bk.Pulse(10, 5 * u.ms, 5 * u.Hz), r"'Pulse\.onset' got a plain int"),
    (lambda: bk.Pulse(np.nan * u.ms, 5 * u.ms, 5 * u.Hz), r"'Pulse\.onset' got NaN"),
    (lambda: bk.PulseTrain(0 * u.ms, 9 * u.ms, 5 * u.ms, 5 * u.Hz), r"'PulseTrain\.width' got 9.*pulses would meet"),
    (lambda: bk.PulseTrain(0 * u.ms, 1 * u.ms, 5 * u.ms, 5 * u.Hz, count=0), r"'PulseTrain\.count' got 0"),
    (lambda: bk.Sine(10 * u.ms, 5 * u.Hz), r"'Sine\.frequency' got ms"),
    (lambda: bk.GammaBump(0 * u.ms, 5 * u.ms, 5 * u.Hz, order=1.0), r"'GammaBump\.order' got 1\.0.*more than 1"),
    (lambda: leak(bk.Pulse(0 * u.ms, 5 * u.ms, 5 * u.mV)), r"'drive: Pulse\.amplitude' got mV, but takes Hz"),
    (lambda: leak(bk.Pulse(0 * u.ms, 5 * u.ms, 5 * u.Hz, [0.0, 1.0] * u.ms)), r"Pulse\.edge'.*or 0 for all"),
    (lambda: bk.simulate(Leak(), 9, DT, inputs={"drive": bk.Sine}), "got the class Sine, but takes a stimulus of it"),
    (lambda: bk.simulate(Leak(), 9, DT, initial={"x": bk.Sine(1 * u.Hz, 1 * u.Hz)}), "stimuli are added to inputs"),
    (lambda: leak(1 * u.mV + bk.Sine(1 * u.Hz, 1 * u.Hz)), "'drive' got mV, but takes Hz"),
    (lambda: bk.simulate(Leak(), 9, DT, inputs={"driv": bk.Sine(1 * u.Hz, 1 * u.Hz)}), "did you mean 'drive'"),
])  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        bk.Pulse(onset=1 * u.ms, widht=2 * u.ms, amplitude=1 * u.Hz)
