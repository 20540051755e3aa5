"""The step as a jaxpr: what is refused, what is inlined, what is hoisted, and that nothing of it changes a number."""

import functools
import inspect
import re
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

import brainmass_kernels as bk
from brainmass_kernels.affine import hoist
from brainmass_kernels.jaxprs import CALLS
from brainmass_kernels.pointwise import RULES, Program, pullback
from brainmass_kernels.step import StepSpec, build


def avals(count: int, dtype=np.float64):
    return [jax.ShapeDtypeStruct((), dtype)] * count


def names(program: Program) -> list[str]:
    return [eqn.primitive.name for eqn in program.jaxpr.jaxpr.eqns]


# Refused ------------------------------------------------------------------------------------------------------------


def model_of(rate, observed=lambda x: x):
    """A model of one state with the given rate."""

    @bk.model
    class Mixing(bk.Model):
        states = {"x": u.UNITLESS}
        observables = {"seen": u.UNITLESS}

        @staticmethod
        def drift(s, p, i):
            return {"x": rate(s.x)}

        @staticmethod
        def observe(s, p):
            return {"seen": observed(s.x)}

    return Mixing()


MIXERS = {
    "reduce_sum": lambda x: x - jnp.sum(x),
    "reduce_max": lambda x: x / jnp.max(x),
    "concatenate|slice|roll": lambda x: jnp.roll(x, 1),
    "cumsum": lambda x: jnp.cumsum(x),
    "dot_general": lambda x: jnp.ones((5, 5), x.dtype) @ x if x.ndim else x,
    "sort": lambda x: jnp.sort(x),
    "rev": lambda x: x[::-1] if x.ndim else x,
    "slice|squeeze|gather|dynamic_slice": lambda x: x * x[0] if x.ndim else x,
    "iota": lambda x: x * jnp.arange(x.size, dtype=x.dtype) if x.ndim else x,
}


@pytest.mark.parametrize("primitive", MIXERS)
@pytest.mark.parametrize("place", ["drift", "observable"])
def test_mixing_lanes_is_refused(primitive, place):
    mixer = MIXERS[primitive]
    model = model_of(mixer) if place == "drift" else model_of(lambda x: -x, mixer)
    with pytest.raises(bk.NotPointwise) as caught:
        bk.simulate(model, 5, 1 * u.ms)
    message = str(caught.value)
    assert re.search(f"'({primitive})'", message)
    line = inspect.getsourcelines(mixer)[1]
    assert f"test_pointwise.py:{line}" in message
    assert place in message
    assert "Mixing" in message


@pytest.mark.parametrize("size", [3, 5])
def test_a_captured_array_is_refused(size):
    """An array in the text of a model is not one value a lane, whatever its length."""
    weights = np.linspace(1.0, 2.0, size, dtype=np.float32)
    with pytest.raises((ValueError, TypeError)) as caught:
        bk.simulate(model_of(lambda x: -weights * x), 5, 1 * u.ms)
    assert "Mixing" in str(caught.value)


def test_random_bits_are_refused():
    with pytest.raises(bk.NotPointwise, match="random"):
        bk.simulate(model_of(lambda x: -x + jax.random.normal(jax.random.key(0))), 5, 1 * u.ms)


# Inlined ------------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _doubled(x):
    return 2.0 * x


_doubled.defvjp(lambda x: (2.0 * x, None), lambda _, g: (2.0 * g,))

CALLING = {
    "jit": jax.jit(lambda x: jnp.sin(x) + 1.0),
    "nested jit": jax.jit(lambda x: jax.jit(jnp.cos)(x) * x),
    "custom_jvp": jax.nn.relu,
    "custom_jvp in jit": lambda x: jax.nn.silu(x) + jax.nn.softplus(x),
    "custom_vjp": _doubled,
    "remat": jax.checkpoint(lambda x: jnp.tanh(x) ** 2),
    "where": lambda x: jnp.where(x > 0.3, x, jnp.exp(x)),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
}


@pytest.mark.parametrize("name", CALLING)
def test_calls_are_inlined(name, x64):
    fun = CALLING[name]
    program = Program(lambda x: (fun(x),), avals(1))
    assert not set(names(program)) & CALLS
    assert not any("call" in n or "jit" in n for n in names(program))
    x = np.linspace(-2.0, 2.0, 11)
    np.testing.assert_allclose(program(x)[0], fun(jnp.asarray(x)), rtol=1e-14)


def test_dead_code_is_dropped():
    def doubled(x, y):
        _ = jnp.exp(y) + jnp.sin(x)
        return (x * 2.0,)

    program = Program(doubled, avals(2, np.float32))
    assert names(program) == ["mul"]
    assert program.uses() == (True, False)


def test_a_program_takes_lanes_of_any_shape(x64):
    program = Program(lambda x, y: (x * y + 1.0, jnp.float64(3.0)), avals(2))
    x, y = np.arange(6.0).reshape(2, 3), np.float64(2.0)
    first, second = program(x, y)
    np.testing.assert_array_equal(first, x * 2 + 1)
    assert float(second) == 3.0


@pytest.mark.parametrize("power", [-3, -1, 0, 1, 2, 5, 8])
def test_integer_powers(power, x64):
    x = np.linspace(0.5, 2.0, 5)
    np.testing.assert_allclose(RULES["integer_pow"](x, y=power), x**power, rtol=1e-14)


# Hoisted ------------------------------------------------------------------------------------------------------------


def jansen_rit(scheme: str, dtype=np.float32, base_two: bool = False):
    held = ("M_inp", "E_inp", "I_inp")
    return build(StepSpec(bk.JansenRit, scheme, held, (), (), ("eeg",), np.dtype(dtype), base_two=base_two))


@pytest.mark.parametrize("rate", ["tanh_absolute", "logistic2"])
@pytest.mark.parametrize(("scheme", "most"), [("strang", 43), ("exp_euler", 37)])
def test_operations_left_in_the_loop(scheme, most, rate):
    """Either way of making a logistic function: its scales and offsets are in the coefficients."""
    step = jansen_rit(scheme, base_two=rate == "logistic2")
    assert step.parts.operations[0] <= most
    in_loop = names(step.advance)
    assert in_loop.count(rate) == 3
    assert len(in_loop) <= most
    assert set(in_loop) <= {"add", "sub", "mul", "neg", rate}
    if rate == "tanh_absolute":  # as it is where these tests run
        plan = bk.explain(bk.JansenRit(), 10, 0.1 * u.ms, scheme=scheme)
        assert plan.operations == step.parts.operations[0]


@pytest.mark.parametrize("base_two", [False, True])
@pytest.mark.parametrize("scheme", ["euler", "exp_euler", "symplectic_euler", "exact", "strang", "heun", "rk4"])
def test_the_hoisted_step_is_the_step(scheme, base_two, x64):
    step = jansen_rit(scheme, np.float64, base_two)
    rng = np.random.default_rng(0)
    p = bk.JansenRit().magnitudes()
    hoisted = [np.float64(x) * rng.uniform(0.8, 1.2, 6) for x in p.values()]
    hoisted += [np.full(6, 0.5), rng.uniform(100.0, 240.0, 6), np.full(6, -0.3), np.full(6, 5e-4)]
    state = [rng.normal(size=6) * s for s in (0.1, 10, 10, 5, 200, 200)]
    got = step.advance(*step.setup(*hoisted), *state)
    want = step._advance(*map(jnp.asarray, (*hoisted, *state)))
    for g, w, s in zip(got, want, state):
        np.testing.assert_allclose(g, w, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(g - s, w - s, rtol=1e-9, atol=1e-11)
    seen = step.observe(*step.setup(*hoisted), *state)
    np.testing.assert_allclose(seen[0], step._observe(*map(jnp.asarray, (*hoisted, *state)))[0], rtol=1e-11)


def test_a_rate_may_err_as_much_as_the_hardware_does(monkeypatch):
    """The tanh of a rate that GPUs make of exp2 and a reciprocal leaves the error of a run within its contract."""

    def run(dtype):
        arguments = {"inputs": {"E_inp": np.array([90.0, 220.0], dtype) * u.Hz}, "implementation": "scan"}
        result = bk.simulate(bk.JansenRit(), 1000, 0.1 * u.ms, record=tuple(bk.JansenRit.states), **arguments)
        return {name: np.asarray(u.get_magnitude(x)) for name, x in result.records.items()}

    with jax.enable_x64(True):
        wanted = run(np.float64)
    for error in (7e-7, -7e-7):
        erring = functools.partial(lambda x, error, **_: jnp.tanh(x) + jnp.asarray(error, x.dtype), error=error)
        monkeypatch.setitem(RULES, "tanh_absolute", erring)
        jax.clear_caches()
        for name, x in run(np.float32).items():
            assert 1e-8 < np.linalg.norm(x - wanted[name]) / np.linalg.norm(wanted[name]) < 1e-5
    jax.clear_caches()


N_HOISTED, N_LOOP = 3, 3
LEAVES = st.one_of(
    st.integers(0, N_HOISTED + N_LOOP - 1).map(lambda n: ("arg", n)),
    st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).map(lambda x: ("lit", x)),
)
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda e: st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "div", "max"]), e, e),
        st.tuples(st.sampled_from(["neg", "tanh", "logistic", "sin", "square", "cube"]), e),
    ),
    max_leaves=12,
)
UNARY = {
    "neg": lambda x: -x,
    "tanh": jnp.tanh,
    "logistic": jax.nn.sigmoid,
    "sin": jnp.sin,
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
}
BINARY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / (1.0 + y * y),
    "max": jnp.maximum,
}


def value(e, args):
    if e[0] == "arg":
        return args[e[1]]
    if e[0] == "lit":
        return jnp.float64(e[1])
    if e[0] in UNARY:
        return UNARY[e[0]](value(e[1], args))
    return BINARY[e[0]](value(e[1], args), value(e[2], args))


def size(e, args) -> np.ndarray:
    """What the rounding of an expression, however it is multiplied out, is small against."""
    if e[0] in ("arg", "lit"):
        return np.abs(value(e, args)) + 1.0
    inner = [size(x, args) for x in e[1:]]
    if e[0] in ("square", "cube"):
        return inner[0] ** (2 if e[0] == "square" else 3)
    if e[0] in ("mul", "div"):
        return inner[0] * inner[1] ** (1 if e[0] == "mul" else 2)
    return sum(inner)


def drawn():
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.uniform(-1.5, 1.5, 5)) for _ in range(N_HOISTED + N_LOOP)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(EXPRESSIONS, min_size=1, max_size=3))
@pytest.mark.parametrize("base_two", [False, True])
def test_hoisting_changes_no_value(base_two, expressions):
    """Any step, affine in parts and not in others: setup and loop together are the step."""
    with jax.enable_x64(True):
        args = drawn()
        program = Program(lambda *a: tuple(value(e, a) + 0.0 * a[0] for e in expressions), avals(len(args)))
        parts = hoist((program,), N_HOISTED, np.float64, base_two)
        got = parts.programs[0](*parts.setup(*args[:N_HOISTED]), *args[N_HOISTED:])
        for e, g in zip(expressions, got):
            wrong = np.abs(np.asarray(g) - np.asarray(value(e, args)))
            assert (wrong <= 1e-12 * size(e, args)).all()
        assert parts.operations[0] <= len(names(program)) + 2 * len(expressions)


@pytest.mark.parametrize("base_two", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_rate_less_a_half_keeps_the_digits_of_its_small_values(base_two, sign):
    """1 / (1 + exp(-r x)) - 1/2 in float32, where x is near 0: r x / 4, and not what rounding leaves of 1/2."""
    shape = jax.ShapeDtypeStruct((), "float32")
    program = Program(lambda g, r, x: (g * sign * (jax.nn.sigmoid(r * x) - 0.5),), [shape] * 3)
    parts = hoist((program,), 2, np.float32, base_two)
    x = np.float32([1e-4, -3e-5, 1e-3])
    (got,) = parts.programs[0](*parts.setup(np.float32(3.0), np.float32(2.0)), x)
    want = sign * 3.0 * 0.5 * np.tanh(x.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(EXPRESSIONS)
def test_pullback_is_vjp(e):
    with jax.enable_x64(True):
        args = drawn()
        program = Program(lambda *a: (value(e, a) + 0.0 * a[0],), avals(len(args)))
        wanted = (True, False, True, True, True, False)
        cotangent = jnp.linspace(0.5, 2.0, 5)
        got = pullback(program, wanted)(*args, cotangent)
        want = jax.vjp(lambda *a: value(e, a) + 0.0 * a[0], *args)[1](cotangent)
        want = [w for w, flag in zip(want, wanted) if flag]
        assert len(got) == 4
        for g, w in zip(got, want):
            np.testing.assert_allclose(np.broadcast_to(g, (5,)), w, rtol=1e-9, atol=1e-9 * np.max(size(e, args)))


@pytest.mark.parametrize("base_two", [False, True])
def test_pullback_of_the_step(base_two, x64):
    step = jansen_rit("strang", np.float64, base_two)
    rng = np.random.default_rng(0)
    hoisted = [jnp.float64(x) for x in bk.JansenRit().magnitudes().values()]
    hoisted += [jnp.float64(x) for x in (0.0, 200.0, 0.0, 1e-3)]
    coefs = [jnp.broadcast_to(c, (4,)) for c in step.setup(*hoisted)]
    args = [*coefs, *(jnp.asarray(rng.normal(size=4) * s) for s in (0.1, 10, 10, 5, 200, 200))]
    cotangents = [jnp.asarray(rng.normal(size=4)) for _ in range(6)]
    got = pullback(step.advance, (True,) * len(args))(*args, *cotangents)
    want = jax.vjp(lambda *a: tuple(step.advance(*a)), *args)[1](tuple(cotangents))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(np.broadcast_to(g, (4,)), w, rtol=1e-10, atol=1e-12)


# A model of one's own -----------------------------------------------------------------------------------------------


@bk.model
class FitzHughNagumo(bk.Model):
    """A spiking membrane and its recovery (FitzHugh 1961)."""

    a: object = 0.7
    b: object = 0.8
    tau: object = 12.5 * u.ms

    states = {"v": u.mV, "w": u.UNITLESS}
    inputs = {"current": 0.0 * u.mV}
    observables = {"spike": u.mV}
    time_unit = u.ms

    @staticmethod
    def drift(s, p, i):
        return {"v": s.v - s.v**3 / 3 - s.w + i.current, "w": (s.v + p.a - p.b * s.w) / p.tau}

    @staticmethod
    def observe(s, p):
        return {"spike": jnp.maximum(s.v, 0.0)}


def spikes(a, b, current, **more):
    return bk.simulate(FitzHughNagumo(a=a, b=b), 60 * u.ms, 0.05 * u.ms, inputs={"current": current * u.mV}, **more)


def test_a_model_of_ones_own_simulates(x64):
    currents = np.array([0.0, 0.5, 1.0])
    res = spikes(0.7, 0.8, currents, record=("v", "w", "spike"), scheme="rk4")
    assert res["v"].unit == u.mV
    for lane, current in enumerate(currents):
        want = solve_ivp(
            lambda t, s, current=current: (s[0] - s[0] ** 3 / 3 - s[1] + current, (s[0] + 0.7 - 0.8 * s[1]) / 12.5),
            (0.0, 60.0),
            (0.0, 0.0),
            t_eval=np.asarray(res.ts / u.ms),
            rtol=1e-10,
            atol=1e-12,
        ).y
        np.testing.assert_allclose(res["v"].mantissa[:, lane], want[0], atol=1e-6)
        np.testing.assert_allclose(res["w"][:, lane], want[1], atol=1e-6)
        np.testing.assert_allclose(res["spike"].mantissa[:, lane], np.maximum(want[0], 0.0), atol=1e-6)


def test_second_order_schemes_want_second_order_blocks():
    for scheme in ("strang", "exact", "symplectic_euler"):
        with pytest.raises(ValueError, match=rf"'{scheme}'.*FitzHughNagumo is not.*heun"):
            bk.simulate(FitzHughNagumo(), 5, 0.1 * u.ms, scheme=scheme)


def test_a_comparison_of_parameters_is_made_in_the_loop():
    """A coefficient is a number: kernels take no others."""

    @bk.model
    class Switched(bk.Model):
        a: Any = 1.0
        states = {"x": u.mV}
        observables = {"y": u.mV}
        time_unit = u.ms

        @staticmethod
        def drift(s, p, i):
            return {"x": jnp.where(p.a == 1.0, -s.x, s.x)}

        @staticmethod
        def observe(s, p):
            return {"y": s.x}

    for implementation in ("scan", *(["numba"] if not needs.numba.args[0] else [])):
        run = bk.simulate(Switched(a=np.array([1.0, 0.0])), 1 * u.ms, 0.1 * u.ms, initial={"x": 1 * u.mV},
                          scheme="euler", implementation=implementation)  # fmt: skip
        np.testing.assert_allclose(run["y"].mantissa[-1], [0.9**10, 1.1**10], rtol=1e-6)
