"""Emitted source means what the jaxpr means: as plain Python on numpy scalars; tests/test_numba.py compiles it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import brainmass_kernels as bk
from brainmass_kernels import noise
from brainmass_kernels.backends.numba.optable import NUMBA, NUMBA_FAST
from brainmass_kernels.codegen.writer import Writer, words
from brainmass_kernels.pointwise import ELEMENTWISE, Program, pullback

FLOAT = jax.ShapeDtypeStruct((), "float32")
INT = jax.ShapeDtypeStruct((), "int32")


def bits(x):
    return x.view(np.float32 if x.dtype.kind in "iu" else np.int32)


# What the runtime's names mean, on numpy scalars.
MEANING = {
    "math": math, "np": np, "inf": math.inf, "nan": math.nan, "bits": bits,
    **{f"{k}{n}": getattr(np, f"{word}{n}") for k, word in (("i", "int"), ("u", "uint")) for n in (8, 16, 32, 64)},
    "f32": np.float32, "f64": np.float64,
    "fma": lambda a, b, c: np.float32(np.float64(a) * np.float64(b) + np.float64(c)),
    "absolute": np.abs, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil, "round_even": np.rint,
    "maximum": np.maximum, "minimum": np.minimum, "clamped": lambda x, low, high: np.minimum(np.maximum(x, low), high),
    "tanh32": np.tanh, "fast_tanh32": np.tanh, "tanh_absolute32": np.tanh, "exp32": np.exp, "log32": np.log,
    "logistic2_32": lambda x: np.float32(1) / (np.float32(1) + np.exp2(x)),
    "logistic32": lambda x: np.float32(1) / (np.float32(1) + np.exp(-x)),
    "quotient": lambda x, y: -1 if y == 0 else math.trunc(int(x) / int(y)),
}  # fmt: skip


def source_of(program: Program, optable=NUMBA) -> tuple[list[str], list[str]]:
    writer = Writer(optable)
    results = writer.write(program, [f"a{i}" for i in range(len(program.in_avals))])
    return writer.lines(results), results


def run(program: Program, *arguments):
    """The emitted source of a program, run by Python."""
    lines, results = source_of(program)
    names = {**MEANING, **{f"a{i}": x for i, x in enumerate(arguments)}}
    with np.errstate(all="ignore"):
        exec("\n".join(lines), names)
        return [eval(r, names) for r in results]


# Random programs -----------------------------------------------------------------------------------------------------

UNARY = {
    "tanh": jnp.tanh, "negative": lambda x: -x, "square": lambda x: x * x, "abs": jnp.abs, "cube": lambda x: x**3,
    "logistic": jax.nn.sigmoid, "sine": jnp.sin, "root": lambda x: jnp.sqrt(jnp.abs(x) + 0.1), "sign": jnp.sign,
    "power": lambda x: (1.5 + jnp.tanh(x)) ** -2, "floor": lambda x: jnp.floor(x),
    "slope": lambda x: jax.grad(jnp.tanh)(x),  # an operation of its own since JAX 0.11
    "exp": lambda x: jnp.exp(jnp.clip(x, -3.0, 3.0)), "log": lambda x: jnp.log(jnp.abs(x) + 0.5),
}  # fmt: skip
BINARY = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "max": jnp.maximum,
    "min": jnp.minimum, "div": lambda x, y: x / (2.0 + jnp.abs(y)), "where": lambda x, y: jnp.where(x > y, x, 0.5 * y),
    "fused": lambda x, y: x * y + x, "unfused": lambda x, y: y - x * y,
}  # fmt: skip
ROUGH = {"sign", "floor"}  # a rounding error in their argument may change them by one


@st.composite
def recipes(draw, names=tuple(UNARY) + tuple(BINARY)):
    """Operations one after the other, each on earlier values."""
    steps = []
    for k in range(draw(st.integers(1, 14))):
        earlier = st.integers(0, 2 + k)
        steps.append((draw(st.sampled_from(names)), draw(earlier), draw(earlier)))
    return steps


def follow(recipe):
    def fun(*arguments):
        values = list(arguments)
        for name, i, j in recipe:
            values.append(UNARY[name](values[i]) if name in UNARY else BINARY[name](values[i], values[j]))
        return values[-2:]

    return fun


numbers = st.floats(-3.0, 3.0, width=32)
SMOOTH = tuple(n for n in (*UNARY, *BINARY) if n not in ROUGH)


@settings(max_examples=120, deadline=None)
@given(recipes(SMOOTH), st.tuples(numbers, numbers, numbers))
def test_random_programs_mean_what_their_jaxpr_means(recipe, arguments):
    arguments = [np.float32(x) for x in arguments]
    program = Program(follow(recipe), [FLOAT] * 3)
    want = jax.jit(program)(*arguments)
    for a, b in zip(run(program, *arguments), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-4, atol=3e-4)


@settings(max_examples=40, deadline=None)
@given(recipes(SMOOTH), st.tuples(numbers, numbers, numbers))
def test_and_their_pullbacks(recipe, arguments):
    arguments = [np.float32(x) for x in (*arguments, 1.0, 1.0)]
    program = pullback(Program(follow(recipe), [FLOAT] * 3), [True] * 3)
    want = jax.jit(program)(*arguments)
    for a, b in zip(run(program, *arguments), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-3, atol=3e-3 * (1 + abs(float(b))))


@settings(max_examples=40, deadline=None)
@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**31 - 1))
def test_noise_has_the_same_bits(k0, k1, step):
    program = Program(lambda *a: noise.threefry(*a, jnp.int32(1)), [INT] * 3)
    arguments = [np.int32(x) for x in (k0, k1, step)]
    assert [int(x) for x in run(program, *arguments)] == [int(x) for x in jax.jit(program)(*arguments)]


@pytest.mark.parametrize("by", [0, 1, 31, 32, 40])
@pytest.mark.parametrize("shift", [lax.shift_left, lax.shift_right_logical, lax.shift_right_arithmetic])
def test_shifts_by_what_is_not_known_in_advance(shift, by):
    program = Program(lambda x, n: (shift(x, n),), [INT, INT])
    for x in (-5, 7, -(2**31), 2**31 - 1):
        (got,) = run(program, np.int32(x), np.int32(by))
        assert int(got) == int(shift(jnp.int32(x), jnp.int32(by)))


# Text ---------------------------------------------------------------------------------------------------------------


def test_a_product_and_a_sum_are_fused_and_equal_expressions_written_once():
    program = Program(lambda x, y: (x * y + 1.0, 1.0 - x * y, x * y + 1.0), [FLOAT, FLOAT])
    lines, results = source_of(program)
    assert [line.split(" = ")[1] for line in lines] == ["fma(a0, a1, f32(1.0))", "fma(-a0, a1, f32(1.0))"]
    assert results[0] == results[2]


def test_every_literal_has_a_type():
    lines, _ = source_of(Program(lambda x: (jnp.where(x > 0.25, x * 3.0, 7.5),), [FLOAT]))
    assert "f32(0.25)" in " ".join(lines)
    assert "f32(7.5)" in " ".join(lines)


def test_stages_wait_for_each_other():
    writer = Writer(NUMBA)
    program = Program(lambda x, y: (jnp.tanh(jnp.tanh(x) + y) + jnp.exp(y),), [FLOAT, FLOAT])
    results = writer.write(program, ["x", "y"])
    first, second = writer.stages(results)
    assert sorted(first) == ["exp32({})", "tanh32({})"]
    assert list(second) == ["tanh32({})"]
    (((name, argument),),) = second.values()
    # What the first stage made is not written again.
    given_names = [n for group in first.values() for n, _ in group]
    assert not words(writer.lines([argument], given_names)) & {"tanh32", "exp32"}
    assert name not in given_names


def test_an_unknown_primitive_is_named_with_its_line():
    @bk.model
    class Strange(bk.Model):
        a: float = 0.1
        states = {"x": bk.models.base.u.UNITLESS}
        inputs = {}

        @staticmethod
        def drift(s, p, i):
            return {"x": lax.erf_inv(p.a * s.x)}

    with pytest.raises(bk.Unsupported, match=r"'erf_inv' \(.*test_emit\.py:\d+.*drift"):
        bk.simulate(Strange(), 10, 1.0 * bk.models.base.u.second, implementation="numba")


def test_every_elementwise_primitive_is_spelled_or_known_to_be_missing():
    missing = {"erf_inv"}
    assert set(NUMBA.operations) | missing >= ELEMENTWISE
    assert not missing & set(NUMBA.operations)
    assert set(NUMBA_FAST.operations) == set(NUMBA.operations)
