"""Arguments that fit by accident, or that cannot be meant: refused by name, or warned of where they may be meant."""

import warnings
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels.spectra import resting_meg


@bk.model
class Leak(bk.Model):
    rate: Any = 1.0
    gain: Any = 1.0

    states = {"x": u.UNITLESS}
    inputs = {"push": 0.0, "pull": 0.0}
    scheme = "euler"

    @staticmethod
    def drift(s, p, i):
        return {"x": i.push - i.pull - p.rate * p.gain * s.x}


def run(duration=40, dt=1.0 * u.ms, model=None, **arguments):
    return bk.simulate(model or Leak(), duration, dt, **{"implementation": "scan", **arguments})


STEPS = 40
WRONG_LENGTHS = [(39,), (41,), (1, 40), (1, 41), (40 + 1, 3), (39, 3), (3, 40), (5, 41)]


@pytest.mark.parametrize("shape", WRONG_LENGTHS)
def test_an_input_that_is_nearly_as_long_as_the_run(shape):
    message = (
        rf"'push' got shape \({', '.join(map(str, shape))},?\), but takes one value a step, \(40,\) or \(40, \*batch\)"
    )
    with pytest.raises(ValueError, match=message):
        run(inputs={"push": np.ones(shape)})
    with pytest.raises(ValueError, match=message):
        run(inputs={"push": np.ones(shape), "pull": np.ones(shape)})


@pytest.mark.parametrize("axis", ["rate", "start", "key", "noise"])
@pytest.mark.parametrize("lanes", [39, 41])
def test_a_batch_that_another_argument_has_is_taken(lanes, axis):
    noisy = {"noise": {"push": 0.1 * u.second**0.5}, "key": jax.random.key(0)}
    more = {
        "rate": {"model": Leak(rate=np.ones(lanes))},
        "start": {"initial": {"x": np.ones(lanes)}},
        "key": {**noisy, "key": jax.random.split(jax.random.key(0), lanes)},
        "noise": {**noisy, "noise": {"push": np.full(lanes, 0.1) * u.second**0.5}},
    }[axis]
    assert run(inputs={"push": np.ones(lanes)}, **more)["x"].shape == (STEPS, lanes)


def test_other_lengths_and_short_runs_are_batches():
    assert run(inputs={"push": np.ones(20)})["x"].shape == (STEPS, 20)
    assert run(inputs={"push": np.ones((2, 3))})["x"].shape == (STEPS, 2, 3)
    assert run(5, inputs={"push": np.ones(4)})["x"].shape == (5, 4)
    assert run(inputs={"push": np.ones((40, 39)), "pull": np.ones(39)}, model=Leak(rate=np.ones(39)))["x"].shape == (
        40,
        39,
    )
    with pytest.raises(ValueError, match=r"'push' got shape \(990,\)"):
        run(1000, inputs={"push": np.ones(990)})


def test_the_regions_of_a_network_are_a_batch():
    network = bk.Network(Leak(), np.zeros((41, 41)))
    assert run(model=network, inputs={"pull": np.ones(41)})["x"].shape == (STEPS, 41)
    with pytest.raises(ValueError, match=r"'pull' got shape \(39, 41\)"):
        run(model=network, inputs={"pull": np.ones((39, 41))})


@pytest.mark.parametrize("points", [40, 41])
def test_a_sweep_over_an_input_of_as_many_values_as_steps(points):
    values = np.linspace(0.0, 1.0, points)
    found = bk.sweep(Leak(), {"push": values}, STEPS, 1 * u.ms, record=bk.Maximum(), implementation="scan")
    want = [np.max(run(inputs={"push": v})["x"]) for v in values[[0, 20, -1]]]
    np.testing.assert_allclose(found["x_maximum"][np.array([0, 20, -1])], want, rtol=1e-6)


KEYS = [0, np.random.default_rng(0), "seed", 1.5, np.zeros(2), np.array([1, 2])]


@pytest.mark.parametrize("key", KEYS, ids=[type(k).__name__ for k in KEYS])
def test_what_is_no_key(key):
    noise = {"push": 0.1 * u.second**0.5}
    with pytest.raises(TypeError, match=r"'key' got .*, but takes a random key of JAX's, such as jax.random.key\(0\)"):
        run(noise=noise, key=key)
    with pytest.raises(TypeError, match="'key' got"):
        bk.sweep(Leak(), {"rate": [1.0]}, 10, 1 * u.ms, noise=noise, key=key)
    if key is KEYS[0]:
        with pytest.raises(TypeError, match="'key' got 0"):
            bk.fit(bk.JansenRit(), resting_meg(), {"be": (60.0, 150.0)}, key=key)


def test_old_and_new_keys_are_taken():
    noise = {"push": 0.1 * u.second**0.5}
    found = [
        run(noise=noise, key=key)["x"] for key in (jax.random.key(3), jax.random.PRNGKey(3), np.array([0, 3], "uint32"))
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


QUIET = {"key": jax.random.key(0)}
ROOT = u.second**0.5
REFUSED = [
    ({"duration": np.nan * u.ms}, ValueError, "'duration' got nan ms, but takes a finite time"),
    ({"duration": np.inf * u.ms}, ValueError, "'duration' got inf ms, but takes a finite time"),
    ({"duration": 2**70}, ValueError, "'duration' got 1180591620717411303424, which is .* but takes at most"),
    ({"transient": np.nan * u.ms}, ValueError, "'transient' got nan ms, but takes a finite time"),
    ({"transient": -np.inf * u.ms}, ValueError, "'transient' got -inf ms, but takes a finite time"),
    ({"dt": np.nan * u.ms}, ValueError, "'dt' got nan ms"),
    ({"dt": 1e-300 * u.second}, ValueError, "'dt' got .*1e-300 s, but takes a time from"),
    ({"dt": 1e-300 * u.second, "duration": 1 * u.second}, ValueError, "'duration' got .* is 1e\\+300 steps of dt"),
    ({"dt": 1e30 * u.second}, ValueError, r"'dt' got 1e\+30 s, but takes a time from"),
    ({"dt": [1 * u.ms, 2 * u.ms]}, TypeError, "'dt' got a list of quantities, but takes one quantity"),
    ({"every": 41}, ValueError, "'every' got 41, but takes at most the 40 steps that are recorded"),
    ({"every": 2**70}, ValueError, "'every' got 1180591620717411303424, but takes at most the 40 steps"),
    ({"every": 31, "transient": 10}, ValueError, "'every' got 31, but takes at most the 30 steps"),
    (
        {"noise": {"push": -0.1 * ROOT}, **QUIET},
        ValueError,
        r"noise\['push'\] got -0.1 .*, but takes an intensity from 0",
    ),
    ({"noise": {"push": np.nan * ROOT}, **QUIET}, ValueError, r"'noise\['push'\]' got NaN"),
    (
        {"noise": {"push": [0.1, np.inf] * ROOT}, **QUIET},
        ValueError,
        r"'noise\['push'\]' got infinity \(first at \(1,\)\)",
    ),
    ({"noise": {"push": [0.1 * ROOT, 0.2 * ROOT]}, **QUIET}, TypeError, "got a list of quantities"),
    ({"initial": {"x": np.nan}}, ValueError, "'x' got NaN"),
    (
        {"initial": {"x": np.array([0.0, -np.inf])}},
        ValueError,
        r"'x' got infinity \(first at \(1,\)\), but takes finite",
    ),
    ({"inputs": {"push": [[1.0], [1.0, 2.0]]}}, ValueError, "'push' got lists of unequal lengths"),
    ({"model": Leak}, TypeError, r"'model' got the class Leak, but takes a model of it: Leak\(\)"),
    ({"record": bk.Mean}, TypeError, r"'record' got the class Mean, but takes one of it: bk.Mean\(...\)"),
    ({"record": [bk.Mean]}, TypeError, "'record' got the class Mean"),
    ({"record": 3}, TypeError, "'record' got int, but takes names"),
]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"), REFUSED, ids=[f"{next(iter(a))}-{n}" for n, (a, *_) in enumerate(REFUSED)]
)
def test_what_cannot_be_meant_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        run(**arguments)


def test_a_list_of_quantities_names_the_field():
    with pytest.raises(
        TypeError, match=r"'Ae' got a list of quantities, .* such as \[1.0, 2.0\] \* u.mV; u.math.stack"
    ):
        bk.JansenRit(Ae=[3.0 * u.mV, 4.0 * u.mV])
    assert bk.JansenRit(Ae=u.math.stack([3.0 * u.mV, 4.0 * u.mV])).Ae.shape == (2,)


@pytest.mark.parametrize(
    "take",
    [
        lambda m: bk.Network(m, np.zeros((2, 2))), lambda m: bk.coloured(m, "E_inp", 1 * u.ms), bk.with_bold,
        lambda m: bk.sweep(m, {"C": [1.0]}, 10, 1 * u.ms), lambda m: bk.fit(m, resting_meg(), {"C": (1.0, 2.0)}),
        lambda m: bk.explain(m, 10, 1 * u.ms), lambda m: bk.sensitivities(m, 10, 1 * u.ms, "C"),
    ],
)  # fmt: skip
def test_a_class_in_place_of_a_model(take):
    with pytest.raises(TypeError, match=r"'model' got the class JansenRit, but takes a model of it: JansenRit\(\)"):
        take(bk.JansenRit)


def test_nothing_recorded_may_be_meant():
    assert run(every=100, record=()).final["x"].shape == ()
    assert run(transient=40)["x"].shape == (0,)


def test_a_step_longer_than_the_fastest_time_constant():
    with pytest.warns(RuntimeWarning, match=r"'dt' got 0.02 s, longer than .* JansenRit, 1 / be = 0.01 s") as told:
        bk.simulate(bk.JansenRit(be=[50.0, 100.0] * u.Hz), 10, 20 * u.ms, implementation="scan")
    assert [w.filename for w in told] == [__file__]
    with pytest.warns(RuntimeWarning, match=r"'dt' got 0.5 s, longer than .* JansenRit, 1 / be = 0.01 s"):
        bk.explain(bk.JansenRit(), 10, 500 * u.ms)
    with pytest.raises(
        ValueError, match=r"'dt' got 200 s, longer than .*, 10000 times or more: nothing of the dynamics"
    ):
        bk.simulate(bk.JansenRit(), 10, 200 * u.second)
    with pytest.warns(RuntimeWarning, match=r"'dt' got 500 ms, longer than .* WilsonCowan, tau_E = 1 ms"):
        bk.simulate(bk.WilsonCowan(), 10, 500 * u.ms, implementation="scan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bk.explain(bk.JansenRit(), 10, 10 * u.ms)
        bk.explain(bk.WilsonCowan(), 10, 1 * u.ms)


def test_two_names_of_one_quantity():
    found = run(record={"a": "x", "b": "x", "mean": bk.Mean(of="x")}, initial={"x": 1.0})
    alone = run(record={"a": "x", "b": "x"}, initial={"x": 1.0})
    for result in (found, alone):
        np.testing.assert_array_equal(result["a"], result["b"])
        np.testing.assert_array_equal(result["a"], run(initial={"x": 1.0})["x"])
    _, by = bk.sensitivities(Leak(), 40, 1 * u.ms, "push", record={"a": "x", "b": "x"}, implementation="scan")
    np.testing.assert_array_equal(by["push"]["a"], by["push"]["b"])


def diverged(rate, **arguments):
    return jax.block_until_ready(
        run(model=Leak(rate=rate), dt=1 * u.second, duration=200, initial={"x": 1.0}, **arguments)
    )


@pytest.mark.parametrize("look", [lambda r: r["x"], lambda r: r.ok, repr])
def test_a_run_that_diverged_warns_once_when_looked_at(look):
    result = diverged(np.array([0.5, 60.0, 70.0]))
    with pytest.warns(
        RuntimeWarning, match="2 of the 3 lanes of this run did not stay finite .*take a shorter dt"
    ) as told:
        look(result)
    assert [w.filename for w in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(result)
        repr(diverged(0.5))
        jax.jit(lambda rate: run(model=Leak(rate=rate), dt=1 * u.second, initial={"x": 1.0})["x"])(60.0)
    with pytest.warns(RuntimeWarning, match="^this run did not stay finite: take"):
        look(diverged(60.0))


@pytest.mark.parametrize("implementation", ["scan", "numba"])
def test_batches_of_no_lanes(implementation):
    none = jnp.zeros(0)

    def of(rate, push=0.0, **more):
        return run(20, model=Leak(rate=rate), inputs={"push": push}, implementation=implementation, **more)

    assert of(none)["x"].shape == (20, 0)
    assert of(jnp.zeros((3, 0)), every=2)["x"].shape == (10, 3, 0)
    assert of(none).ok.shape == (0,)
    assert of(none, record=bk.Mean())["x_mean"].shape == (0,)
    assert jax.vmap(lambda rate: of(rate)["x"])(none).shape == (0, 20)
    assert jax.grad(lambda rate: jnp.sum(of(rate)["x"]))(none).shape == (0,)
    assert jax.grad(lambda push: jnp.sum(of(none, push)["x"]))(jnp.ones(20)).shape == (20,)
    assert jax.vmap(jax.grad(lambda rate: jnp.sum(of(rate)["x"])))(none).shape == (0,)
    _, by = bk.sensitivities(Leak(rate=none), 20, 1 * u.ms, "rate", implementation=implementation)
    assert by["rate"]["x"].shape == (20, 0)
    network = bk.Network(Leak(rate=jnp.zeros((0, 1))), np.ones((3, 3)), delays=2 * u.ms)
    found = run(20, model=network, implementation=implementation)
    assert (found["x"].shape, found.final["history"].shape) == ((20, 0, 3), (2, 0, 3))
