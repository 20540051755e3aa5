"""The reference utilities: formulas, units, errors, and every example of the reference text."""

import subprocess
import sys
from typing import NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import brainmass_kernels as bk
from brainmass_kernels.functional import SequenceTypeError

numbers = st.floats(-50, 50)


# Formulas -----------------------------------------------------------------------------------------------------------


@given(numbers, st.floats(0.1, 20), numbers, st.floats(0.01, 2))
def test_sigmoid_is_its_formula(x, vmax, v0, r):
    np.testing.assert_allclose(bk.sigmoid(x, vmax, v0, r), vmax / (1 + np.exp(r * (v0 - x))), rtol=2e-5, atol=1e-30)


def test_sigmoid_alone_is_the_logistic_function():
    x = jnp.array([-2, -1, 0, 1, 2])
    np.testing.assert_allclose(bk.sigmoid(x), [0.119, 0.269, 0.5, 0.731, 0.881], atol=5e-4)


@given(*[numbers] * 5)
def test_sys2nd_is_its_formula(A, a, drive, x, v):
    expected = A * a * drive - 2 * a * v - a**2 * x
    np.testing.assert_allclose(bk.sys2nd(A, a, drive, x, v), expected, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(bk.sys2nd(x=x, v=v, u=drive, A=A, a=a), expected, rtol=1e-5, atol=1e-2)


def test_sys2nd_of_two_is_the_pair():
    assert bk.sys2nd(2.0, -3.0) == (2.0, -3.0)
    assert bk.sys2nd(acc=-3.0, v=2.0) == (2.0, -3.0)


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


@pytest.mark.parametrize("x", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_no_value_and_no_gradient_is_nan_at_the_extremes(x):
    for f in (lambda x: bk.sigmoid(x, 5.0, 6.0, 0.56), bk.bounded_input):
        value, slope = jax.value_and_grad(f)(x)
        assert np.isfinite(value)
        assert np.isfinite(slope)


def test_gradients_are_the_derivatives():
    s = float(bk.sigmoid(4.0, 5.0, 6.0, 0.56))
    np.testing.assert_allclose(jax.grad(bk.sigmoid)(4.0, 5.0, 6.0, 0.56), 0.56 * s * (1 - s / 5.0), rtol=1e-5)
    slopes = jax.grad(bk.sys2nd, argnums=(0, 1, 2, 3, 4))(3.0, 10.0, 2.0, 0.5, 0.25)
    np.testing.assert_allclose(slopes, [20.0, 6.0 - 0.5 - 10.0, 30.0, -100.0, -20.0], rtol=1e-6)


def test_jit_and_vmap():
    x = jnp.linspace(-5.0, 5.0, 7)
    np.testing.assert_allclose(jax.jit(jax.vmap(bk.sigmoid))(x), bk.sigmoid(x), rtol=1e-6)


# Units --------------------------------------------------------------------------------------------------------------


def test_quantities_in_and_out():
    rate = bk.sigmoid(8.0 * u.mV, 5.0 * u.Hz, 0.006 * u.volt, 0.56 / u.mV)
    np.testing.assert_allclose(rate / u.Hz, bk.sigmoid(8.0, 5.0, 6.0, 0.56), rtol=1e-6)
    acc = bk.sys2nd(3.25 * u.mV, 100.0 * u.Hz, 2.0 * u.Hz, 1.0 * u.mV, 5.0 * u.mV / u.second)
    np.testing.assert_allclose(acc / (u.mV / u.second**2), bk.sys2nd(3.25, 100.0, 2.0, 1.0, 5.0), rtol=1e-6)
    v = bk.bounded_input(jnp.array([-80.0, -20.0, 30.0]) * u.mV, lower=-0.06 * u.volt, upper=jnp.inf)
    np.testing.assert_allclose(v / u.mV, [-60.0, -20.0, 30.0], rtol=1e-6)
    assert bk.bounded_input(3.0 * u.mV, 500.0 * u.mV).unit == u.mV


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
        (lambda: bk.bounded_input(1.0, lower=2, upper=1), "'lower' got 2, above 'upper', which got 1"),
        (lambda: bk.bounded_input(1.0, 3.0, upper=1), "'bound' got 3.0 beside"),
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
        ([1.0, {"a": 1.0}], "stack", TypeError, "mixes float and dict"),
        ([1.0, 2.0 * u.mV], "stack", TypeError, "mixes float and Quantity"),
        ([{"a": 1.0}, {"b": 1.0}], "stack", TypeError, "mixes dicts with keys"),
        ([(1.0,), (1.0, 2.0)], "stack", TypeError, "mixes lengths"),
        ([np.zeros(2), np.zeros(3)], "stack", ValueError, "mixes shapes"),
        ([1.0 * u.mV, 1.0 * u.second], "stack", ValueError, "got s, but takes mV"),
        ([True, False], "stack", TypeError, "got bool"),
    ],
)
def test_sequence_errors(data, mode, error, message):
    with pytest.raises(error, match=message):
        bk.process_sequence(data, mode)


def test_type_errors_of_sequences_are_value_errors_too():
    with pytest.raises(ValueError, match="mode"):
        bk.process_sequence(ITEMS, 123)
    assert issubclass(SequenceTypeError, TypeError)


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
    with pytest.raises(TypeError, match="'inputs' got 'stack'"):
        bk.process_sequence(Counter())


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


def test_brainmass_own_tests_pass_with_our_functions():
    pytest.importorskip("brainmass")
    program = (
        "import sys, pytest, brainmass.utils as utils, brainmass_kernels as bk\n"
        "for n in ('sys2nd', 'sigmoid', 'bounded_input', 'process_sequence'): setattr(utils, n, getattr(bk, n))\n"
        "import brainmass.utils_test as t\n"
        "assert t.sigmoid is bk.sigmoid\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-c', '/dev/null', t.__file__]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
