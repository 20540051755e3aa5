"""Every wrong argument: its name, what it got, what it takes; and runs that diverge say so."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk


def run(duration=100, dt=0.1 * u.ms, **arguments):
    fields = {name: arguments.pop(name) for name in list(arguments) if name in ("Ce", *bk.JansenRit.parameters())}
    return bk.simulate(bk.JansenRit(**fields), duration, dt, **arguments)


VALUES = [
    ({"dt": -0.1 * u.ms}, "'dt' got -0.1 ms, but takes a positive time"),
    ({"dt": 0.0 * u.ms}, r"'dt' got 0\.0? ms, but takes a positive time"),
    ({"dt": 0.1}, "'dt' got a plain float"),
    ({"dt": 0.1 * u.mV}, "'dt' got mV, but takes s"),
    ({"dt": 25 * u.ms, "scheme": "euler"}, "'dt' got 0.025 s, at which 'euler' is unstable for be = 100"),
    ({"dt": 10 * u.ms, "scheme": "symplectic_euler"}, "it takes dt below 0.008284"),
    ({"be": 400.0 * u.Hz, "dt": 10 * u.ms, "scheme": "rk4"}, "unstable for be = 400"),
    ({"duration": 1.05 * u.ms}, "'duration' got .* which is 10.5 steps of dt = 0.1 ms"),
    ({"duration": 0}, "'duration' got 0, but takes at least one step"),
    ({"transient": 101}, "'transient' got 101, but takes a time from 0 to the duration"),
    ({"transient": -1}, "'transient' got -1"),
    ({"every": 0}, "'every' got 0, but takes at least 1"),
    ({"inputs": {"E_in": 220 * u.Hz}}, "unknown input 'E_in'; did you mean 'E_inp'"),
    ({"inputs": {"E_inp": 220 * u.mV}}, "'E_inp' got mV, but takes Hz"),
    ({"inputs": {"E_inp": 220}}, "'E_inp' got a plain int .no unit., but takes Hz"),
    ({"inputs": {"E_inp": np.nan * u.Hz}}, "'E_inp' got NaN"),
    ({"record": "egg"}, "unknown record 'egg'; did you mean 'eeg'"),
    ({"scheme": "strange"}, "unknown scheme 'strange'; did you mean 'strang'"),
    ({"initial": {"Mw": 0 * u.mV}}, "unknown state 'Mw'; did you mean 'M"),
    ({"initial": {"M": 0 * u.mV / u.ms}}, "'M' got mV / ms, but takes mV"),
    ({"noise": {"E_inp": 1 * u.Hz}, "key": jax.random.key(0)}, "noise.'E_inp'.*got Hz, but takes Hz"),
    ({"noise": {"E_inp": 1 * u.Hz * u.second**0.5}}, "'noise' needs 'key'"),
    ({"implementation": "scann"}, "implementation got 'scann', but takes None or one of"),
    ({"precision": "quick"}, "'precision' got 'quick', but takes 'exact' or 'fast'"),
    ({"checkpoint_every": 0}, "'checkpoint_every' got 0, but takes a positive number"),
    ({"Ae": np.array([3.0, np.nan]) * u.mV}, r"'Ae' got NaN \(first at \(1,\)\)"),
    ({"Ae": 3.25}, "'Ae' got a plain float .no unit., but takes mV"),
    ({"be": 100 * u.mV}, "'be' got mV, but takes Hz"),
    ({"C": 135 * u.mV}, "'C' got mV, but takes dimensionless"),
    (
        {"C": np.ones(3), "noise": {"E_inp": 1 * u.Hz * u.second**0.5}, "key": jax.random.split(jax.random.key(0), 4)},
        r"do not broadcast to one batch: .*C \(3,\).*key \(4,\)",
    ),
    ({"C": np.ones(3), "Ae": np.ones(4) * u.mV}, r"do not broadcast to one batch: .*Ae \(4,\).*C \(3,\)"),
    (
        {"C": np.full(100, 135.0), "inputs": {"E_inp": np.ones(100) * u.Hz}},
        r"'E_inp' got shape \(100,\), which could be one value a step or one a lane.*give it as \(steps, \*batch\)",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), VALUES)
def test_value_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**arguments)


TYPES = [
    ({"duration": 1.0}, "'duration' got a plain float .no unit., but takes a time"),
    ({"every": 1.5}, "'every' got 1.5, but takes a whole number"),
    ({"every": True}, "'every' got True"),
    ({"C": True}, "'C' got bool, but takes a real number"),
    ({"C": 1j}, "'C' got complex, but takes a real number"),
    ({"C": np.array([1j])}, "'C' got dtype complex128"),
    ({"inputs": [220 * u.Hz]}, "'inputs' got list, but takes a dict"),
    ({"Ce": 1.0}, "unknown parameter 'Ce'; did you mean"),
]


@pytest.mark.parametrize(("arguments", "message"), TYPES)
def test_type_errors(arguments, message):
    with pytest.raises(TypeError, match=message):
        run(**arguments)


def test_a_model_is_asked_for():
    with pytest.raises(TypeError, match="'model' got str, but takes a model such as"):
        bk.simulate("JansenRit", 10, 0.1 * u.ms)


def test_schemes_of_blocks_need_blocks():
    @bk.model
    class Decay(bk.Model):
        states = {"x": u.UNITLESS}

        @staticmethod
        def drift(s, p, i):
            return {"x": -s.x}

    with pytest.raises(ValueError, match="scheme 'strang' needs a model made of second-order blocks, and Decay is not"):
        bk.simulate(Decay(), 10, 0.1 * u.ms, scheme="strang")


def test_integers_are_promoted():
    whole = run(C=135, be=np.array([100]) * u.Hz, inputs={"E_inp": 220 * u.Hz})["eeg"]
    np.testing.assert_array_equal(
        whole / u.mV, run(be=np.array([100.0]) * u.Hz, inputs={"E_inp": 220.0 * u.Hz})["eeg"] / u.mV
    )


def test_a_trajectory_that_cannot_fit_says_what_would_cut_it():
    with pytest.raises(MemoryError, match=r"recording eeg needs [\d,]+ bytes .* every=\d+ or more would fit"):
        run(duration=10_000_000, C=jnp.full(1_000_000, 135.0))


def test_a_run_that_diverges_says_so_for_each_lane():
    @bk.model
    class Explosion(bk.Model):
        rate: float = 1.0

        states = {"x": u.UNITLESS}
        inputs = {"push": 0.0}

        @staticmethod
        def drift(s, p, i):
            return {"x": p.rate * s.x * s.x + i.push}

    result = bk.simulate(Explosion(rate=jnp.array([1e4, 0.0])), 2000, 1 * u.ms, inputs={"push": 1.0})
    jax.block_until_ready(result)
    with pytest.warns(RuntimeWarning, match="1 of the 2 lanes of this run did not stay finite"):
        np.testing.assert_array_equal(result.ok, [False, True])
    assert not np.isfinite(result["x"][-1, 0])


def test_unknown_record_of_a_result():
    with pytest.raises(ValueError, match="unknown record 'eg'; did you mean 'eeg'"):
        run()["eg"]
