"""The reference utilities: formulas, units, errors, and every example of the reference text."""

from collections import OrderedDict
from typing import NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brainmass_kernels as bk
from brainmass_kernels.functional import SequenceTypeError

numbers = st.floats(-50, 50)
# The first example of each shape compiles, which takes longer than any deadline.
examples = settings(deadline=None, max_examples=25)


# Formulas -----------------------------------------------------------------------------------------------------------


@examples
@given(numbers, st.floats(0.1, 20), numbers, st.floats(0.01, 2))
def test_sigmoid_is_its_formula(x, vmax, v0, r):
    np.testing.assert_allclose(bk.sigmoid(x, vmax, v0, r), vmax / (1 + np.exp(r * (v0 - x))), rtol=2e-5, atol=1e-30)


def test_sigmoid_alone_is_the_logistic_function():
    x = jnp.array([-2, -1, 0, 1, 2])
    np.testing.assert_allclose(bk.sigmoid(x), [0.119, 0.269, 0.5, 0.731, 0.881], atol=5e-4)


@examples
@given(*[numbers] * 5)
def test_sys2nd_is_its_formula(A, a, drive, x, v):
    expected = A * a * drive - 2 * a * v - a**2 * x
    np.testing.assert_allclose(bk.sys2nd(A, a, drive, x, v), expected, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(bk.sys2nd(x=x, v=v, u=drive, A=A, a=a), expected, rtol=1e-5, atol=1e-2)


def test_sys2nd_of_two_is_the_pair():
    assert bk.sys2nd(2.0, -3.0) == (2.0, -3.0)
    assert bk.sys2nd(acc=-3.0, v=2.0) == (2.0, -3.0)


@examples
@given(numbers, st.floats(0.1, 100))
def test_bounded_input_is_its_formula(x, bound):
    np.testing.assert_allclose(bk.bounded_input(x, bound), bound * np.tanh(x / bound), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"lower": 0, "upper": 100}, [0, 50, 100]),
        ({"lower": 0.0, "upper": jnp.inf}, [0, 50, 150]),
        ({"lower": 0.0}, [0, 50, 150]),
        ({"upper": 60}, [-10, 50, 60]),
        ({"lower": -jnp.inf, "upper": jnp.inf}, [-10, 50, 150]),
    ],
)
def test_bounded_input_clips(limits, expected):
    np.testing.assert_array_equal(bk.bounded_input(jnp.array([-10, 50, 150]), **limits), expected)


@examples
@given(numbers, numbers, numbers)
def test_clipped_is_between_the_limits_and_itself_within(x, one, other):
    lower, upper = np.float32(min(one, other)), np.float32(max(one, other))
    got = bk.bounded_input(np.float32(x), lower=lower, upper=upper)
    assert lower <= got <= upper
    assert got == np.float32(x) or not lower < np.float32(x) < upper


EXTREMES = {
    "sigmoid": (lambda x, b: bk.sigmoid(x, b, 6.0, 0.56)),
    "steep": (lambda x, b: bk.sigmoid(x, 5.0, b, 1e4)),
    "bounded": bk.bounded_input,
    "clipped": (lambda x, b: bk.bounded_input(x, lower=-b, upper=b)),
    "half clipped": (lambda x, b: bk.bounded_input(x, lower=-b, upper=jnp.inf)),
    "sys2nd": (lambda x, b: bk.sys2nd(b, x, x, x, x)),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_no_value_and_no_gradient_is_nan_at_the_extremes(name):
    x = jnp.array([-1e4, -500.0, -30.0, 0.0, 30.0, 500.0, 1e4])
    value, slopes = jax.vmap(jax.value_and_grad(EXTREMES[name], argnums=(0, 1)), (0, None))(x, 500.0)
    for found in (value, *slopes):
        assert np.isfinite(found).all()


CALLS = {
    "sigmoid": (bk.sigmoid, 4, "logistic mul sub"),
    "acceleration": (bk.sys2nd, 5, "mul sub"),
    "pair": (bk.sys2nd, 2, ""),
    "bounded": (bk.bounded_input, 2, "div mul tanh"),
    "clipped": (lambda x, lo, hi: bk.bounded_input(x, lower=lo, upper=hi), 3, "max min"),
    "below": (lambda x, hi: bk.bounded_input(x, upper=hi), 2, "min"),
}


@pytest.mark.parametrize("name", CALLS)
def test_plain_arrays_trace_to_elementwise_operations_alone(name):
    """No cast and no call: the step of a simulation is made of these."""
    function, count, operations = CALLS[name]
    jaxpr = jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct((5,), jnp.float32)] * count)
    assert {eqn.primitive.name for eqn in jaxpr.eqns} == set(operations.split())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtype_is_kept(name, dtype, x64):
    function, count, _ = CALLS[name]
    for found in jax.tree.leaves(function(*[jnp.ones(3, dtype)] * count)):
        assert found.dtype == dtype


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("make", [jnp.ones, np.ones])
def test_integers_become_the_default_float(name, make):
    function, count, _ = CALLS[name]
    for wide in (False, True):
        with jax.enable_x64(wide):
            for found in jax.tree.leaves(function(*[make(3, np.int32)] * count)):
                assert found.dtype == (jnp.float64 if wide else jnp.float32)


@pytest.mark.parametrize("name", CALLS)
def test_double_precision_gradients_against_differences(name, x64):
    function, count, _ = CALLS[name]
    at = [0.7, 0.6, 0.9, 1.1, 0.4][:count]

    def fun(*a):
        return sum(jax.tree.leaves(function(*a)))

    for k, slope in enumerate(jax.grad(fun, argnums=tuple(range(count)))(*at)):
        up, down = list(at), list(at)
        up[k], down[k] = at[k] + 1e-6, at[k] - 1e-6
        np.testing.assert_allclose(slope, (fun(*up) - fun(*down)) / 2e-6, rtol=1e-7, atol=1e-9)


def test_gradients_are_the_derivatives():
    s = float(bk.sigmoid(4.0, 5.0, 6.0, 0.56))
    np.testing.assert_allclose(jax.grad(bk.sigmoid)(4.0, 5.0, 6.0, 0.56), 0.56 * s * (1 - s / 5.0), rtol=1e-5)
    slopes = jax.grad(bk.sys2nd, argnums=(0, 1, 2, 3, 4))(3.0, 10.0, 2.0, 0.5, 0.25)
    np.testing.assert_allclose(slopes, [20.0, 6.0 - 0.5 - 10.0, 30.0, -100.0, -20.0], rtol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_jit_and_vmap(name):
    function, count, _ = CALLS[name]
    x = [jnp.linspace(0.5, 5.0, 7) + k for k in range(count)]
    together, apart = jax.tree.leaves(function(*x)), jax.tree.leaves(jax.jit(jax.vmap(function))(*x))
    for one, other in zip(together, apart):
        np.testing.assert_allclose(one, other, rtol=2e-6)


# Units --------------------------------------------------------------------------------------------------------------


def test_quantities_in_and_out():
    rate = bk.sigmoid(8.0 * u.mV, 5.0 * u.Hz, 0.006 * u.volt, 0.56 / u.mV)
    np.testing.assert_allclose(rate / u.Hz, bk.sigmoid(8.0, 5.0, 6.0, 0.56), rtol=1e-6)
    acc = bk.sys2nd(3.25 * u.mV, 100.0 * u.Hz, 2.0 * u.Hz, 1.0 * u.mV, 5.0 * u.mV / u.second)
    np.testing.assert_allclose(acc / (u.mV / u.second**2), bk.sys2nd(3.25, 100.0, 2.0, 1.0, 5.0), rtol=1e-6)
    v = bk.bounded_input(jnp.array([-80.0, -20.0, 30.0]) * u.mV, lower=-0.06 * u.volt, upper=jnp.inf)
    np.testing.assert_allclose(v / u.mV, [-60.0, -20.0, 30.0], rtol=1e-6)
    assert bk.bounded_input(3.0 * u.mV, 500.0 * u.mV).unit == u.mV


def test_what_is_the_same_in_every_unit_needs_none():
    np.testing.assert_allclose(bk.sigmoid(2.0 * u.mV, r=500 / u.volt), bk.sigmoid(1.0), rtol=1e-6)
    rate = jnp.array([-10.0, 150.0]) * u.Hz
    np.testing.assert_allclose(bk.bounded_input(rate, lower=0, upper=np.float32(np.inf)) / u.Hz, [0.0, 150.0])


def test_a_ratio_of_prefixes_is_a_number():
    ratio = u.Quantity(500.0, unit=u.mV / u.volt)
    np.testing.assert_allclose(bk.sigmoid(ratio), bk.sigmoid(0.5), rtol=1e-6)
    np.testing.assert_allclose(bk.bounded_input(ratio, 1.0), np.tanh(0.5), rtol=1e-6)


def test_sys2nd_takes_any_prefixes():
    x, v, a = 1e-3 * u.volt, 5e-3 * u.volt / u.second, 0.1 / u.ms
    acc = bk.sys2nd(3250.0 * u.uvolt, a, 2.0 * u.Hz, x, v)
    np.testing.assert_allclose(acc / (u.mV / u.second**2), bk.sys2nd(3.25, 100.0, 2.0, 1.0, 5.0), rtol=1e-6)


def test_sys2nd_of_two_with_units():
    assert bk.sys2nd(2.0 * u.mV / u.ms, -3.0 * u.volt / u.second**2)[1].unit == u.volt / u.second**2
    assert bk.sys2nd(2.0 * u.mV, -3.0 * u.mV)[0].unit == u.mV


def test_units_under_jit_and_vmap():
    def step(x, v):
        rate = bk.sigmoid(x, 5.0 * u.Hz, 6.0 * u.mV, 0.56 / u.mV)
        rate = bk.bounded_input(rate, 4.0 * u.Hz)
        return bk.sys2nd(3.25 * u.mV, 100.0 * u.Hz, rate, x, v)

    x, v = jnp.arange(3.0) * u.mV, jnp.ones(3) * u.mV / u.second
    got, expected = jax.jit(jax.vmap(step))(x, v), step(x, v)
    np.testing.assert_allclose(got / (u.mV / u.second**2), expected / (u.mV / u.second**2), rtol=1e-5)


def test_gradients_with_units():
    def acc(a):
        return bk.sys2nd(3.0 * u.mV, a, 2.0 * u.Hz, 0.5 * u.mV, 0.25 * u.mV / u.second)

    slope = u.autograd.grad(acc)(10.0 * u.Hz)
    np.testing.assert_allclose(slope / (u.mV / u.second), 6.0 - 0.5 - 10.0, rtol=1e-6)
    slope = u.autograd.grad(lambda b: bk.bounded_input(2.0 * u.Hz, b))(4.0 * u.Hz)
    np.testing.assert_allclose(u.get_magnitude(slope), np.tanh(0.5) - 0.5 / np.cosh(0.5) ** 2, rtol=1e-5)


def test_gradient_with_units():
    slope = u.autograd.grad(lambda x: bk.sigmoid(x, 5.0 * u.Hz, 6.0 * u.mV, 0.56 / u.mV))(4.0 * u.mV)
    np.testing.assert_allclose(slope / (u.Hz / u.mV), jax.grad(bk.sigmoid)(4.0, 5.0, 6.0, 0.56), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bk.sigmoid(1.0 * u.mV, 5.0, 6.0 * u.second, 0.5 / u.mV), "'v0' got s, but takes mV"),
        (lambda: bk.sigmoid(1.0 * u.mV, 5.0, 6.0 * u.mV, 0.5), "'r' got a plain float"),
        (lambda: bk.sys2nd(3.0 * u.mV, 10.0 * u.Hz, 1.0 * u.Hz, 1.0 * u.mV, 1.0 * u.mV), "'v' got mV, but takes"),
        (lambda: bk.sys2nd(3.0 * u.mA, 10.0 * u.Hz, 1.0 * u.Hz, 1.0 * u.mV, 1.0 * u.mV * u.Hz), "'A . u' got"),
        (lambda: bk.bounded_input(1.0 * u.mV, 2.0 * u.second), "'bound' got s, but takes mV"),
        (lambda: bk.bounded_input(1.0, -2.0), "'bound' got -2.0, but takes a positive"),
        (lambda: bk.bounded_input(1.0, lower=2, upper=1), "'lower' got 2, but takes at most 'upper', which got 1"),
        (lambda: bk.bounded_input(1.0, 3.0, upper=1), "'bound' got 3.0 beside"),
        (lambda: bk.bounded_input(1.0, 500.0, upper=1), "'bound' got 500.0 beside"),
        (lambda: bk.bounded_input(1.0, jnp.inf), "'bound' got inf, but takes a positive finite"),
        (lambda: bk.bounded_input(1.0, lower=jnp.nan), "'lower' got nan"),
        (lambda: bk.bounded_input(1.0 * u.mV, lower=2.0), "'lower' got a plain float .no unit., but takes mV"),
        (lambda: bk.bounded_input(1.0 * u.mV, upper=2.0 * u.Hz), "'upper' got Hz, but takes mV"),
        (lambda: bk.sigmoid(1.0 * u.mV, 5.0, 6.0, 0.5 / u.mV), "'v0' got a plain float .no unit., but takes mV"),
        (lambda: bk.sigmoid(1.0, 5.0, 6.0, 0.5 / u.mV), "'r' got 1 / mV, but takes dimensionless"),
        (lambda: bk.sys2nd(3.0 * u.mV, 1.0 * u.second, 1.0, 1.0 * u.mV, 1.0), "'a' got s, but takes Hz"),
        (lambda: bk.sys2nd(1.0 * u.mV / u.ms, 1.0 * u.second), "'acc' got s, but takes mV"),
        (lambda: bk.sys2nd(1.0, 1.0, 1.0, jnp.ones(3), jnp.ones(2)), r"'v' got shape \(2,\), but takes one"),
        (lambda: bk.sigmoid(jnp.ones(3), v0=jnp.ones(4)), r"'v0' got shape \(4,\), but .* against \(3,\)"),
    ],
)
def test_value_errors_name_argument_and_units(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [True, 1j, np.array([True]), jnp.array([1j]), "a"])
@pytest.mark.parametrize("function", [bk.sigmoid, bk.bounded_input, lambda x: bk.sys2nd(x, 1.0)])
def test_complex_and_boolean_values_are_refused(function, bad):
    with pytest.raises(TypeError, match=r"'[xv]' got (bool|complex|str|dtype)"):
        function(bad)


def test_wrong_number_of_arguments():
    with pytest.raises(TypeError, match=r"sys2nd got 3 by position, but takes"):
        bk.sys2nd(1.0, 2.0, 3.0)


# process_sequence ---------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: object
    y: object


ITEMS = [np.arange(3) + 10 * k for k in range(4)]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("stack", np.stack(ITEMS)),
        ("first", ITEMS[0]),
        ("last", ITEMS[-1]),
        ("avg", np.mean(ITEMS, 0)),
        ("mean", np.mean(ITEMS, 0)),
        ("max", ITEMS[-1]),
        ("min", ITEMS[0]),
        (lambda x: x.sum(axis=0), np.sum(ITEMS, 0)),
    ],
)
def test_modes_on_items_and_on_stacked_data(mode, expected):
    for data in (ITEMS, tuple(ITEMS), jnp.stack([jnp.asarray(i) for i in ITEMS])):
        got = bk.process_sequence(data, mode)
        assert got.dtype == jnp.result_type(float)
        np.testing.assert_array_equal(got, expected)


def test_nested_structures_and_units():
    items = [{"a": (k * u.mV, [k + 1.0]), "b": Pair(1.0 * k, 2)} for k in range(3)]
    got = bk.process_sequence(items, "mean")
    np.testing.assert_allclose(got["a"][0] / u.mV, 1.0)
    assert isinstance(got["a"][1], list)
    assert isinstance(got["b"], Pair)
    np.testing.assert_allclose(got["a"][1][0], 2.0)


def test_dim_is_where_the_new_axis_goes():
    assert bk.process_sequence([jnp.zeros((2, 3))] * 4, dim=1).shape == (2, 4, 3)
    assert bk.process_sequence([jnp.zeros((2, 3))] * 4, "last", dim=-1).shape == (2, 3)


@pytest.mark.parametrize(
    ("data", "mode", "error", "message"),
    [
        ([], "stack", ValueError, "'data' got an empty sequence"),
        (jnp.zeros((0, 3)), "mean", ValueError, "at least one item"),
        (jnp.zeros(()), "mean", ValueError, "at least one item"),
        (ITEMS, "nonsense", ValueError, "'mode' got 'nonsense', but takes 'stack'"),
        (ITEMS, 123, TypeError, "'mode' got int"),
        ({}, "mean", ValueError, "'data' got an empty sequence"),
        ([{}, {}], "mean", ValueError, "at least one array"),
        ({"a": jnp.zeros(4), "b": jnp.zeros(5)}, "mean", ValueError, r"lengths \[4, 5\]"),
        (1.0, "mean", ValueError, "'data' got a single value"),
    ],
)
def test_sequence_errors(data, mode, error, message):
    with pytest.raises(error, match=message):
        bk.process_sequence(data, mode)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1.0, {"a": 1.0}], r"item 1 is \{'a': \*\}, item 0 \*"),
        ([{"a": 1.0}, {"b": 1.0}], r"item 1 is \{'b': \*\}, item 0 \{'a': \*\}"),
        ([(1.0,), [1.0]], "mixes structures"),
        ([(1.0,), (1.0, 2.0)], "mixes structures"),
        ([1.0, None], "mixes structures"),
        ([1.0, "a"], r"'data\[1\]' got str, but takes a real number"),
        ([1.0, 2.0 * u.mV], r"'data\[1\]' got mV, but takes dimensionless"),
        ([{"a": 2.0 * u.mV}, {"a": 1.0}], r"'data\[1\]\['a'\]' got a plain float"),
        ([1.0 * u.mV, 1.0 * u.second], r"'data\[1\]' got s, but takes mV"),
        ([np.zeros(2), np.zeros(3)], r"mixes shapes \[\(2,\), \(3,\)\]"),
        ([True, False], r"'data\[0\]' got bool"),
        (jnp.zeros(3, complex), "'data' got dtype complex"),
    ],
)
def test_items_that_do_not_match_are_a_type_error_and_a_value_error(data, message):
    for error in (TypeError, ValueError, SequenceTypeError):
        with pytest.raises(error, match=message):
            bk.process_sequence(data)


def test_a_mode_of_the_wrong_type_is_a_type_error_and_a_value_error():
    for error in (TypeError, ValueError, SequenceTypeError):
        with pytest.raises(error, match="'mode' got int, but takes a string or a function"):
            bk.process_sequence(ITEMS, 123)


@pytest.mark.parametrize("data", [jnp.zeros((4, 3)), [jnp.zeros(3)]])
def test_an_axis_that_is_not_there(data):
    with pytest.raises(ValueError, match="'dim' got 2, but 'data' has 2 axes"):
        bk.process_sequence(data, dim=2)


def test_stacked_pytrees_keep_their_type():
    stacked = Pair(jnp.arange(3.0), OrderedDict(b=jnp.ones((3, 2)) * u.mV, a=jnp.zeros(3)))
    got = bk.process_sequence(stacked, "last")
    assert isinstance(got, Pair)
    assert list(got.y) == ["b", "a"]
    assert got.x == 2.0
    assert got.y["b"].shape == (2,)
    assert bk.process_sequence(stacked).x is stacked.x


def test_items_in_other_prefixes_come_in_the_unit_of_the_first():
    got = bk.process_sequence([3.0 * u.mV, 0.001 * u.volt], "max")
    assert got.unit == u.mV
    np.testing.assert_allclose(got / u.mV, 3.0)


@examples
@given(st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=3, max_size=3))
def test_modes_agree_with_numpy(rows):
    items, table = [np.array(r) for r in rows], np.array(rows, np.float32)
    for mode, expected in {"avg": table.mean(0), "max": table.max(0), "min": table.min(0), "last": table[-1]}.items():
        np.testing.assert_allclose(bk.process_sequence(items, mode), expected, rtol=1e-5, atol=1e-5)


def test_sequences_under_jit_vmap_and_grad():
    def spread(x):
        return bk.process_sequence([x, 2.0 * x], "max") - bk.process_sequence(jnp.stack([x, x]), "mean")

    x = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(spread))(x), x, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: spread(x).sum())(x), [1.0, 1.0], rtol=1e-6)
    slope = u.autograd.grad(lambda x: bk.process_sequence([x, 3.0 * x], "mean"))(2.0 * u.mV)
    np.testing.assert_allclose(u.get_magnitude(slope), 2.0, rtol=1e-6)


class Counter:
    """A model whose state is a Python attribute."""

    def __init__(self):
        self.total = 0.0

    def update(self, x):
        self.total = self.total + x
        return {"total": self.total}


def test_a_model_runs_over_its_inputs():
    got = bk.process_sequence(Counter(), jnp.arange(4.0))
    np.testing.assert_array_equal(got["total"], [0, 1, 3, 6])


@pytest.mark.parametrize("inputs", [[0.0, 1.0, 2.0], (0, 1, 2), np.arange(3), jnp.arange(3.0)])
def test_inputs_of_a_model_by_name_and_as_items(inputs):
    np.testing.assert_array_equal(bk.process_sequence(Counter(), inputs=inputs)["total"], [0, 1, 3])


def test_inputs_of_a_model_may_be_pytrees_with_units():
    class Sum:
        def update(self, x):
            return x["a"] + x["b"], x["b"]

    got = bk.process_sequence(Sum(), {"a": jnp.ones((4, 2)) * u.mV, "b": jnp.ones((4, 2)) * u.volt})
    assert isinstance(got, tuple)
    np.testing.assert_allclose(got[0] / u.mV, np.full((4, 2), 1001.0), rtol=1e-6)


def test_a_run_of_a_model_is_differentiable_and_compiles():
    def last(x):
        return bk.process_sequence(Counter(), x)["total"][-1]

    np.testing.assert_array_equal(jax.jit(jax.grad(last))(jnp.arange(4.0)), np.ones(4))


class Silent:
    def update(self, x):
        return None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bk.process_sequence(Counter()), TypeError, "'inputs' got 'stack'"),
        (lambda: bk.process_sequence(Counter(), jnp.ones(())), ValueError, "'inputs' got a single value"),
        (lambda: bk.process_sequence(Counter(), jnp.ones((0, 2))), ValueError, "'inputs' got an empty sequence"),
        (lambda: bk.process_sequence(Counter(), []), ValueError, "'inputs' got an empty sequence"),
        (lambda: bk.process_sequence(Counter(), jnp.ones(2), dim=1), ValueError, "'mode' and 'dim' do not go"),
        (lambda: bk.process_sequence(Counter(), "mean", inputs=jnp.ones(2)), TypeError, "'mode' and 'dim' do not go"),
        (lambda: bk.process_sequence(ITEMS, inputs=jnp.ones(2)), TypeError, "'inputs' go with a model"),
        (
            lambda: bk.process_sequence(Silent(), jnp.ones(2)),
            ValueError,
            "'the output of update' got items such as None",
        ),
    ],
)
def test_model_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The reference text's examples --------------------------------------------------------------------------------------


def test_example_harmonic_oscillator():
    omega, x, v, dt = 2.0, 1.0, 0.0, 0.01
    dx_dt, dv_dt = bk.sys2nd(v, -(omega**2) * x)
    assert (x + dx_dt * dt, v + dv_dt * dt) == (1.0, -0.04)


def test_example_firing_rate():
    def firing_rate(membrane_potential, threshold, gain):
        return bk.sigmoid(gain * (membrane_potential - threshold))

    np.testing.assert_allclose(firing_rate(-50.0, -50.0, 2.0), 0.5)


def test_example_potentials():
    V = jnp.array([-80, -65, -40, 20])
    np.testing.assert_array_equal(bk.bounded_input(V, lower=-80, upper=0), [-80, -65, -40, 0])


def test_example_activations():
    def threshold_linear(x, threshold=0.0, slope=1.0):
        return bk.bounded_input(slope * (x - threshold), lower=0.0, upper=jnp.inf)

    def soft_threshold(x, threshold=0.0, gain=1.0):
        return bk.sigmoid(gain * (x - threshold))

    np.testing.assert_array_equal(threshold_linear(jnp.array([-1.0, 2.0]), 1.0, 3.0), [0.0, 3.0])
    np.testing.assert_allclose(soft_threshold(1.0, 1.0, 9.0), 0.5)


def test_example_custom_oscillator():
    class CustomOscillator:
        def __init__(self, omega, damping):
            self.omega, self.damping, self.x, self.v = omega, damping, 0.0, 0.0

        def update(self, external_force):
            acc = external_force - 2 * self.damping * self.omega * self.v - self.omega**2 * self.x
            dx_dt, dv_dt = bk.sys2nd(self.v, acc)
            dt = 0.001
            self.x += dx_dt * dt
            self.v += dv_dt * dt
            return self.x

    got = bk.process_sequence(CustomOscillator(10.0, 0.1), jnp.ones(200))
    t = 0.2
    damped = 10.0 * np.sqrt(1 - 0.01)
    exact = (1 - np.exp(-t) * (np.cos(damped * t) + np.sin(damped * t) / damped)) / 100.0
    np.testing.assert_allclose(got[-1], exact, rtol=0.02)


def test_example_physiological_sigmoid():
    def physiological_sigmoid(x, x_min, x_max, v_min, v_max):
        x_norm = (x - x_min) / (x_max - x_min)
        return v_min + (v_max - v_min) * bk.sigmoid(10 * (x_norm - 0.5))

    rates = physiological_sigmoid(jnp.array([-70, -60, -55, -50, -40]), x_min=-70, x_max=-40, v_min=0, v_max=100)
    np.testing.assert_allclose(rates, 100 / (1 + np.exp([5, 5 / 3, 0, -5 / 3, -5])), rtol=1e-5)


def test_example_brainmass_model():
    brainmass = pytest.importorskip("brainmass")
    brainstate = pytest.importorskip("brainstate")
    drive = jnp.ones((20, 5)) * 0.1
    outputs = []
    for run in (
        lambda m: bk.process_sequence(m, drive),
        lambda m: brainstate.transform.for_loop(lambda k: m.update(drive[k]), jnp.arange(20)),
    ):
        with brainstate.environ.context(dt=0.1 * u.ms):
            model = brainmass.HopfStep(5)
            brainstate.nn.init_all_states(model)
            outputs.append([np.asarray(u.get_magnitude(x)) for x in run(model)])
    assert outputs[0][0].shape == (20, 5)
    np.testing.assert_allclose(*outputs, rtol=1e-6)


# brainmass as an oracle ---------------------------------------------------------------------------------------------


@pytest.fixture
def theirs():
    return pytest.importorskip("brainmass.utils")


def test_plain_arrays_give_what_brainmass_gives(theirs):
    rng = np.random.default_rng(0)
    A, a, drive, x, v = (jnp.asarray(rng.normal(size=200), jnp.float32) for _ in range(5))
    np.testing.assert_allclose(bk.sys2nd(A, a, drive, x, v), theirs.sys2nd(A, a, drive, x, v), rtol=1e-5, atol=1e-6)
    for scale in (1.0, 1e2, 1e4):
        np.testing.assert_allclose(
            bk.sigmoid(scale * x, 5.0, 6.0, 0.56), theirs.sigmoid(scale * x, 5.0, 6.0, 0.56), rtol=1e-6
        )
        np.testing.assert_allclose(bk.bounded_input(scale * x), theirs.bounded_input(scale * x), rtol=1e-6)
        np.testing.assert_allclose(bk.bounded_input(scale * x, 3.0), theirs.bounded_input(scale * x, 3.0), rtol=1e-6)


def test_quantities_give_what_brainmass_gives(theirs):
    sigmoid = (jnp.linspace(-10.0, 20.0, 7) * u.mV, 5.0 * u.Hz, 6.0 * u.mV, 0.56 / u.mV)
    np.testing.assert_allclose(bk.sigmoid(*sigmoid) / u.Hz, theirs.sigmoid(*sigmoid) / u.Hz, rtol=1e-6)
    block = (3.25 * u.mV, 100.0 * u.Hz, 2.0 * u.Hz, 1.0 * u.mV, 5.0 * u.mV / u.second)
    unit = u.mV / u.second**2
    np.testing.assert_allclose(bk.sys2nd(*block) / unit, theirs.sys2nd(*block) / unit, rtol=1e-6)
    bounded = (jnp.linspace(-9.0, 9.0, 7) * u.Hz, 3.0 * u.Hz)
    np.testing.assert_allclose(bk.bounded_input(*bounded) / u.Hz, theirs.bounded_input(*bounded) / u.Hz, rtol=1e-6)


@pytest.mark.parametrize("mode", ["stack", "first", "last", "avg", "mean", "max", "min", lambda x: x.sum(0)])
def test_stacked_data_give_what_brainmass_gives(theirs, mode):
    data = {"a": jnp.arange(12.0).reshape(4, 3), "b": (jnp.arange(4.0) * u.mV, [jnp.ones((4, 2, 2))])}
    got, expected = bk.process_sequence(data, mode), theirs.process_sequence(data, mode)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("name", ["TestSys2nd", "TestSigmoid", "TestBoundedInput", "TestProcessSequence"])
def test_brainmass_own_tests_pass_with_our_functions(theirs, monkeypatch, name):
    module = pytest.importorskip("brainmass.utils_test")
    for function in ("sys2nd", "sigmoid", "bounded_input", "process_sequence"):
        assert getattr(module, function) is getattr(theirs, function)
        monkeypatch.setattr(module, function, getattr(bk, function))
    suite = getattr(module, name)()
    getattr(suite, "setup_method", lambda: None)()
    tests = [getattr(suite, t) for t in dir(suite) if t.startswith("test")]
    assert tests
    for test in tests:
        marks = getattr(test, "pytestmark", [])
        for arguments in [(value,) for mark in marks for value in mark.args[1]] or [()]:
            test(*arguments)
