"""Times are exact to the step however long a run is, and the same under jit and vmap."""

import pickle

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk

LONG = {"duration": 2000 * u.second, "dt": 0.1 * u.ms, "every": 10, "implementation": "scan"}


def test_times_of_a_long_run_rise_and_are_exact():
    """2,000 s at 0.1 ms, of which float32 holds no step; nothing is run."""
    found = jax.eval_shape(lambda: bk.simulate(bk.Linear(), record="x", transient=1 * u.second, **LONG))
    ts = found.ts.mantissa
    assert ts.dtype == np.float64
    assert ts.shape == found["x"].shape
    assert (np.diff(ts) > 0).all()
    steps = 10_000 + 10 * np.arange(1, len(ts) + 1)
    assert abs(ts / 0.1 - steps).max() < 1e-6
    assert found.ts.unit == u.ms


def test_averages_of_a_long_run_too():
    found = jax.eval_shape(lambda: bk.simulate(bk.Linear(), record=bk.Average(2 * u.ms), **LONG))
    (axis,) = found.axes.values()
    assert axis.mantissa.dtype == np.float64
    np.testing.assert_allclose(axis / u.ms, 2.0 * np.arange(1, 1_000_001), rtol=1e-14)


def short(a) -> bk.Result:
    record = ["x", bk.Average(2 * u.ms), bk.Spectrum([10.0])]
    return bk.simulate(bk.Linear(gamma=a), 12, 0.5 * u.ms, every=2, record=record, implementation="scan")


@pytest.mark.parametrize("how", ["plain", "jit", "vmap", "jit of vmap"])
def test_under_transformations(how):
    over = -jnp.ones(3) if "vmap" in how else jnp.float32(-1.0)
    fun = jax.vmap(short) if "vmap" in how else short
    found = (jax.jit(fun) if "jit" in how else fun)(over)
    assert isinstance(found.ts.mantissa, np.ndarray)
    np.testing.assert_array_equal(found.ts / u.ms, np.arange(1.0, 7.0))
    np.testing.assert_array_equal(found.axes["x"] / u.ms, np.arange(1.0, 7.0))
    np.testing.assert_array_equal(found.axes["x_average"] / u.ms, [2.0, 4.0, 6.0])
    np.testing.assert_array_equal(found.axes["x_spectrum"] / u.Hz, [10.0])
    assert found["x"].shape[-1] == 6 if "vmap" in how else found["x"].shape == (6,)


def test_times_are_no_leaves():
    """So that results of one run can be mapped and added; those of other times cannot."""
    one = short(jnp.float32(-1.0))
    twice = jax.tree.map(lambda x: 2 * x, one)
    np.testing.assert_array_equal(twice.ts.mantissa, one.ts.mantissa)
    assert len(jax.tree.leaves(one)) == len(one.records) + len(one.final)
    again = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(again.ts.mantissa, one.ts.mantissa)
    assert again.axes.keys() == one.axes.keys()
    other = bk.simulate(bk.Linear(), 12, 0.25 * u.ms, every=2, record="x", implementation="scan")
    with pytest.raises(ValueError, match="pytree"):
        jax.tree.map(lambda x, y: x, one, other)


def test_times_in_jnp():
    found = short(jnp.float32(-1.0))
    wave = jnp.sin(2 * jnp.pi * 10.0 * found.ts.to_decimal(u.second)) * found["x"]
    assert wave.dtype == jnp.float32
    assert jax.jit(lambda x: x * found.ts.to_decimal(u.second))(found["x"]).shape == (6,)


def test_sensitivities_have_them():
    found, slopes = bk.sensitivities(bk.Linear(), 12, 0.5 * u.ms, "gamma", every=2, implementation="scan")
    for result in (found, slopes["gamma"]):
        np.testing.assert_array_equal(result.ts / u.ms, np.arange(1.0, 7.0))
        assert result.axes.keys() == result.records.keys()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, int])
def test_delays_are_whole_steps_whatever_the_precision(dtype):
    """Lengths over a speed, a whole number of steps each: none is rounded up by what float32 adds."""
    lengths = np.arange(1, 26).reshape(5, 5) * 100
    network = bk.Network(
        bk.Linear(), np.ones((5, 5)), source="x", target=next(iter(bk.Linear.inputs)), k=1.0,
        distances=jnp.asarray(lengths.astype(dtype)) * u.mm, speed=np.float32(0.1) * u.meter / u.second,
    )  # fmt: skip
    want = np.round(lengths / 0.1 / 0.1) * (1 - np.eye(5))
    np.testing.assert_array_equal(network.delay_steps(0.1e-3), want)
    delays = bk.Network(
        bk.Linear(), np.ones((5, 5)), source="x", target=next(iter(bk.Linear.inputs)), k=1.0,
        delays=jnp.asarray(0.1 * lengths, jnp.float32) * u.ms,
    )  # fmt: skip
    np.testing.assert_array_equal(delays.delay_steps(0.1e-3), lengths)


def test_the_history_is_asked_at_times_of_float64():
    seen = []

    def history(ts):
        seen.append(ts)
        return np.zeros(len(ts))

    network = bk.Network(
        bk.Linear(), np.ones((2, 2)), source="x", target=next(iter(bk.Linear.inputs)), k=1.0, delays=0.5 * u.ms
    )
    bk.simulate(network, 3, 0.1 * u.ms, initial={"history": history}, implementation="scan")
    assert seen[0].mantissa.dtype == np.float64
    np.testing.assert_allclose(seen[0] / u.ms, [-0.5, -0.4, -0.3, -0.2, -0.1], rtol=1e-14)


def test_axes_of_a_sweep():
    drive = next(iter(bk.Linear.inputs))
    over = {drive: np.linspace(0.0, 1.0, 3) * u.get_unit(bk.Linear.inputs[drive])}
    found = bk.sweep(bk.Linear(), over, 12, 0.5 * u.ms, record=["x"], every=2, implementation="scan")
    assert found.record_axes["x"].mantissa.dtype == np.float64
    np.testing.assert_array_equal(found.record_axes["x"] / u.ms, np.arange(1.0, 7.0))
