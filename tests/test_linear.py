"""Linear spectra against transfer functions written out, against long simulations, and their gradients."""

import re
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse
from test_fixed_points import Escaping

import brainmass_kernels as bk
from brainmass_kernels import linear

FREQS = np.array([0.0, 0.5, 3.0, 9.0, 10.0, 11.0, 40.0])


@bk.model
class Oscillator(bk.Model):
    """x'' = gain (x_inp - c x^2) - 2 zeta w x' - w^2 x, in milliseconds."""

    w: object = 2 * np.pi * 10.0 * u.Hz
    zeta: object = 0.1
    gain: object = 1.0 * u.Hz
    c: object = 0.0
    states = {"x": u.mV, "v": u.mV / u.ms}
    inputs = {"x_inp": 0.0 * u.mV / u.ms}
    observables = {"shown": u.mV}
    time_unit = u.ms

    @staticmethod
    def drift(s, p, i):
        return {
            "x": s.v,
            "v": p.gain * (i.x_inp - p.c * s.x**2) - 2.0 * p.zeta * p.w * s.v - p.w**2 * s.x,
        }

    @staticmethod
    def observe(s, p):
        return {"shown": 3.0 * s.x + 0.5 * s.x**2}


def plain(x):
    return np.asarray(u.get_magnitude(x))


def density(transfer, sigma):
    """One-sided, of white noise of intensity sigma; 0 Hz has one side."""
    return np.where(FREQS > 0, 2.0, 1.0) * sigma**2 * np.abs(transfer) ** 2


INPUT_NOISE: Any = 2.0 * u.mV / u.ms * u.ms**0.5
STATE_NOISE: Any = 0.3 * u.mV / u.ms / u.ms**0.5


@pytest.mark.parametrize("wide", [True, False])
def test_a_damped_oscillator(wide):
    """Noise on the input and on the velocity, in the units of `simulate`."""
    with jax.enable_x64(wide):
        noise = {"x_inp": INPUT_NOISE, "v": STATE_NOISE}
        found = bk.linear_spectrum(Oscillator(), FREQS, noise=noise, of="x")
    assert found.unit == u.mV**2 / u.Hz
    assert found.shape == FREQS.shape
    # In seconds: 1 Hz of gain is 1/s; intensities per root of ms.
    s, w = 2j * np.pi * FREQS, 2 * np.pi * 10.0
    filtered = 1.0 / (s**2 + 2 * 0.1 * w * s + w**2)
    onto_input, onto_rate = 2.0 * 1e3 / np.sqrt(1e3), 0.3 * 1e3 * np.sqrt(1e3)
    expected = density(filtered, onto_input) + density(filtered, onto_rate)
    np.testing.assert_allclose(plain(found), expected, rtol=1e-10 if wide else 1e-4)


def test_an_observable_that_is_not_linear(x64):
    """Its slope is that at the fixed point, which the drive moves: x = gain drive / w^2."""
    drive = 4000.0
    inputs, noise = {"x_inp": drive * u.mV / u.ms}, {"x_inp": INPUT_NOISE}
    shown = bk.linear_spectrum(Oscillator(), FREQS, inputs=inputs, noise=noise)
    x = bk.linear_spectrum(Oscillator(), FREQS, inputs=inputs, noise=noise, of="x")
    rest = drive * 1e3 / (2 * np.pi * 10.0) ** 2
    np.testing.assert_allclose(plain(shown), (3.0 + rest) ** 2 * plain(x), rtol=1e-10)


def test_coloured_noise(x64):
    """Noise of a correlation time is white noise through a filter of its own."""
    tau, sigma = 15e-3, 0.4
    model = bk.coloured(Oscillator(), "x_inp", 15.0 * u.ms)
    unit = u.mV / u.ms / u.ms**0.5
    found = bk.linear_spectrum(model, FREQS, noise={"x_inp_noise": sigma * unit}, of="x")
    s, w = 2j * np.pi * FREQS, 2 * np.pi * 10.0
    transfer = 1.0 / (s + 1 / tau) / (s**2 + 2 * 0.1 * w * s + w**2)
    np.testing.assert_allclose(plain(found), density(transfer, sigma * 1e3 * np.sqrt(1e3)), rtol=1e-9)


# Networks -------------------------------------------------------------------------------------------------------------


@bk.model
class Leaky(bk.Model):
    leak: object = 40.0 * u.Hz
    states = {"x": u.mV}
    inputs = {"x_inp": 0.0 * u.mV / u.second, "y_inp": 0.0 * u.mV / u.second}

    @staticmethod
    def drift(s, p, i):
        return {"x": -p.leak * s.x + i.x_inp + 2.0 * i.y_inp}


WEIGHTS = np.array([[0.0, 1.0, 0.0], [-2.0, 0.0, 0.5], [0.0, 1.5, 0.0]])
MILLISECONDS = np.array([[0.0, 12.0, 0.0], [20.0, 0.0, 7.0], [0.0, 3.0, 0.0]])
LEAKS, SIGMAS = np.array([40.0, 30.0, 50.0]), np.array([1.0, 0.5, 2.0])
NOISE = {"x_inp": SIGMAS * u.mV / u.second * u.second**0.5}


def leaky(k: Any = 15.0, weights: Any = WEIGHTS, delays: Any = MILLISECONDS * u.ms, **more):
    return bk.Network(Leaky(leak=LEAKS * u.Hz), weights, delays=delays, source="x", target="x_inp", k=k * u.Hz, **more)


def expected_of_leaky(k, weights, delays, others=None, degree=0.0):
    """The whole system at each frequency, states and all, of ``k sum w exp(-s d) x``."""
    powers = []
    for f in FREQS:
        s = 2j * np.pi * f
        loop = k * weights * np.exp(-s * delays * 1e-3) + (0.0 if others is None else others(s))
        inverse = np.linalg.inv(np.diag(s + LEAKS + k * degree) - loop)
        powers.append(np.sum(np.abs(inverse) ** 2 * SIGMAS**2, -1) * (2.0 if f > 0 else 1.0))
    return np.array(powers)


def test_a_network_with_delays(x64):
    found = bk.linear_spectrum(leaky(), FREQS, noise=NOISE)
    assert found.shape == (len(FREQS), 3)
    assert found.unit == u.mV**2 / u.Hz
    np.testing.assert_allclose(plain(found), expected_of_leaky(15.0, WEIGHTS, MILLISECONDS), rtol=1e-10)
    as_edges = leaky(weights=sparse.BCOO.fromdense(jnp.asarray(WEIGHTS)))
    np.testing.assert_allclose(plain(bk.linear_spectrum(as_edges, FREQS, noise=NOISE)), plain(found), rtol=1e-12)


def test_a_diffusive_network_without_delays(x64):
    weights = np.abs(WEIGHTS)
    network = leaky(weights=weights, delays=None, coupling="diffusive")
    expected = expected_of_leaky(15.0, weights, 0 * weights, degree=weights.sum(1))
    np.testing.assert_allclose(plain(bk.linear_spectrum(network, FREQS, noise=NOISE)), expected, rtol=1e-10)


def test_several_couplings_and_their_delays_in_a_batch(x64):
    """Two couplings share what is sent, one with delays of its own kind; the batch is over a strength."""
    others = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    strengths = np.array([[5.0], [10.0]])
    network = bk.Network(
        Leaky(leak=LEAKS * u.Hz),
        couplings={
            "near": bk.Coupling(WEIGHTS, source="x", target="x_inp", k=15.0 * u.Hz, delays=MILLISECONDS * u.ms),
            "far": bk.Coupling(
                others, source="x", target="y_inp", k=strengths * u.Hz, distances=others * 90.0 * u.mm,
                speed=3.0 * u.meter / u.second,
            ),
        },
    )  # fmt: skip
    found = bk.linear_spectrum(network, FREQS, noise=NOISE)
    assert found.shape == (len(FREQS), 2, 3)
    for j, k in enumerate(strengths[:, 0]):
        far = lambda s, k=k: 2.0 * k * others * np.exp(-s * others * 90e-3 / 3.0)  # noqa: E731
        expected = expected_of_leaky(15.0, WEIGHTS, MILLISECONDS, far)
        np.testing.assert_allclose(plain(found)[:, j], expected, rtol=1e-10)


def test_groups_that_are_not_coupled_are_as_alone(x64):
    network = bk.Network(
        {"fast": (Oscillator(), 2), "slow": (Leaky(), 1)},
        couplings=[bk.Coupling(np.zeros((3, 3)), source="slow.x", target="fast.x_inp", k=1.0 / u.ms)],
    )
    noise = {"fast.x_inp": INPUT_NOISE, "slow.x_inp": 1.0 * u.mV / u.second * u.ms**0.5}
    found = bk.linear_spectrum(network, FREQS, noise=noise, of="fast.shown")
    alone = bk.linear_spectrum(Oscillator(), FREQS, noise={"x_inp": INPUT_NOISE})
    np.testing.assert_allclose(plain(found), np.repeat(plain(alone)[:, None], 2, 1), rtol=1e-10)


# Derivatives and batches ----------------------------------------------------------------------------------------------


def total(power):
    return jnp.sum(jnp.log(u.get_magnitude(power)))


def of_oscillator(values):
    """The log spectrum of a model whose fixed point moves with its parameters and input."""
    zeta, drive, sigma = values
    model = Oscillator(zeta=zeta, c=0.01)
    inputs = {"x_inp": drive * u.mV / u.ms}
    return total(bk.linear_spectrum(model, FREQS, inputs=inputs, noise={"x_inp": sigma * INPUT_NOISE}))


def test_gradients_of_a_mass(x64):
    """In both modes, and the second derivatives."""
    at = jnp.array([0.1, 900.0, 1.5])
    gradient, steps = jax.jit(jax.grad(of_oscillator))(at), np.diag([1e-5, 1e-2, 1e-5])
    expected = [(of_oscillator(at + h) - of_oscillator(at - h)) / (2 * h.sum()) for h in steps]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(of_oscillator)(at), gradient, rtol=1e-12)
    slope = jax.jit(jax.grad(of_oscillator))
    bends = np.array([(slope(at + h) - slope(at - h)) / (2 * h.sum()) for h in steps])
    np.testing.assert_allclose(jax.hessian(of_oscillator)(at), bends, rtol=1e-5, atol=1e-8)


def test_gradients_of_a_network_in_strength_weights_and_delays(x64):
    def of(values):
        scaled = jnp.asarray(WEIGHTS) * values[1]
        delays = jnp.asarray(MILLISECONDS) * values[2] * u.ms
        network = leaky(values[0], scaled, delays, max_delay=40 * u.ms, interpolate=True)
        return total(bk.linear_spectrum(network, FREQS, noise=NOISE))

    at, of = jnp.array([15.0, 0.9, 1.1]), jax.jit(of)
    expected = [(of(at + h) - of(at - h)) / (2 * h.sum()) for h in 1e-5 * np.eye(3)]
    np.testing.assert_allclose(jax.grad(of)(at), expected, rtol=1e-6)


def test_a_batch_vmap_and_jit_agree(x64, monkeypatch):
    zetas, drives = np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([[0.0], [500.0]])

    def of(zeta, drive):
        return bk.linear_spectrum(
            Oscillator(zeta=zeta, c=0.01), FREQS, inputs={"x_inp": drive * u.mV / u.ms}, noise={"x_inp": INPUT_NOISE}
        ).mantissa

    together = of(zetas, drives)
    assert together.shape == (len(FREQS), 2, 5)
    one_by_one = jax.jit(jax.vmap(jax.vmap(of, (0, None)), (None, 0)))(zetas, drives[:, 0])
    np.testing.assert_allclose(together, np.moveaxis(one_by_one, -1, 0), rtol=1e-12)
    # So many at once that memory is bounded, here three of ten.
    monkeypatch.setattr(linear, "_AT_ONCE", 3 * 7 * 4)
    linear._SPECTRA.cache_clear()
    np.testing.assert_allclose(of(zetas, drives), together, rtol=1e-12)
    in_parts = jax.grad(lambda z: jnp.sum(of(z, drives)))(zetas)
    linear._SPECTRA.cache_clear()
    monkeypatch.undo()
    np.testing.assert_allclose(in_parts, jax.grad(lambda z: jnp.sum(of(z, drives)))(zetas), rtol=1e-10)


# Where there is none --------------------------------------------------------------------------------------------------


def test_unstable_points_are_named(x64):
    noise = {"x_inp": INPUT_NOISE}
    with pytest.raises(ValueError, match=r"unstable: what is near it grows by 6.28 1/s at 9.95 Hz"):
        bk.linear_spectrum(Oscillator(zeta=-0.1), FREQS, noise=noise)
    with pytest.warns(UserWarning, match=r"of the 3 members of the batch \(first at \(1,\)\).* unstable in 1"):
        found = bk.linear_spectrum(Oscillator(zeta=np.array([0.1, -0.1, 0.2])), FREQS, noise=noise)
    assert np.isnan(found.mantissa).all(0).tolist() == [False, True, False]
    traced = jax.jit(lambda z: bk.linear_spectrum(Oscillator(zeta=z), FREQS, noise=noise).mantissa)(-0.1)
    assert np.isnan(traced).all()


def test_a_loop_with_a_delay_is_unstable_where_it_turns(x64):
    """x' = -l x - k x(t - d): unstable from where tan(w d) = -w / l and w^2 = k^2 - l^2."""
    k, leak = 60.0, 40.0
    turning = np.sqrt(k**2 - leak**2)
    critical = (np.pi - np.arctan(turning / leak)) / turning

    def of(delay):
        network = bk.Network(
            Leaky(), np.ones((1, 1)), delays=np.array([[delay]]) * u.second, k=-k * u.Hz, self_connection=True
        )
        return bk.linear_spectrum(network, FREQS, noise={"x_inp": 1.0 * u.mV / u.second * u.second**0.5})

    assert np.isfinite(of(0.99 * critical).mantissa).all()
    with pytest.raises(ValueError, match="unstable") as told:
        of(1.01 * critical)
    assert float(re.findall(r"at ([\d.]+) Hz", str(told.value))[0]) == pytest.approx(turning / 2 / np.pi, rel=0.01)


def test_a_model_without_a_fixed_point():
    noise = {"x_inp": 1.0 * u.second**0.5}
    with pytest.raises(ValueError, match="no state at rest was found from the model's initial state"):
        bk.linear_spectrum(Escaping(), FREQS, noise=noise)


@bk.model
class TwoWells(bk.Model):
    states = {"x": u.UNITLESS}
    inputs = {"x_inp": 0.0}
    initial = {"x": 0.2}

    @staticmethod
    def drift(s, p, i):
        return {"x": s.x * (s.x + 1.0) * (2.0 - s.x) + i.x_inp}


def test_the_fixed_point_is_that_where_a_run_from_the_start_settles(x64):
    noise = {"x_inp": 1.0 * u.second**0.5}
    rates = {0.2: -6.0, -0.2: -3.0}
    for start, rate in rates.items():
        found = bk.linear_spectrum(TwoWells(), FREQS, noise=noise, initial={"x": start})
        np.testing.assert_allclose(found.mantissa, density(1 / (2j * np.pi * FREQS - rate), 1.0), rtol=1e-9)
    points = bk.fixed_points(TwoWells())
    assert len(points) == 3
    by_default = bk.linear_spectrum(TwoWells(), FREQS, noise=noise, of="x")
    of_point = bk.linear_spectrum(TwoWells(), FREQS, noise=noise, initial=points[2])
    np.testing.assert_allclose(by_default.mantissa, of_point.mantissa, rtol=1e-9)
    with pytest.raises(ValueError, match=r"unstable: what is near it grows by 2 1/s\. Take"):
        bk.linear_spectrum(TwoWells(), FREQS, noise=noise, initial=points[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"noise": None}, ValueError, "'noise' names nothing"),
        ({"noise": {"y": 1.0}}, ValueError, "unknown input or state 'y'"),
        ({"noise": {"x_inp": 1.0 * u.Hz}}, ValueError, r"noise\['x_inp'\]"),
        ({"noise": {"x_inp": -INPUT_NOISE}}, ValueError, "takes an intensity from 0 on"),
        ({"of": "eeg"}, ValueError, "unknown observable or state in 'of' 'eeg'"),
        ({"of": 3}, TypeError, "'of' got int"),
        ({"freqs": [[1.0]]}, ValueError, "'freqs' got"),
        ({"freqs": [-1.0]}, ValueError, "none of them negative"),
        ({"freqs": 3 * u.mV}, TypeError, "'freqs' got mV"),
        ({"inputs": {"x_inp": np.zeros(3) * u.mV / u.ms}, "initial": {"x": np.zeros(2) * u.mV}}, ValueError, "shapes"),
        ({"initial": {"y": 1.0}}, ValueError, "unknown state 'y'"),
        ({"initial": {"x": np.nan * u.mV}}, ValueError, "'x' got NaN"),
    ],
)
def test_refused(arguments, error, message):
    known = {"freqs": FREQS, "noise": {"x_inp": INPUT_NOISE}} | arguments
    with pytest.raises(error, match=message):
        bk.linear_spectrum(Oscillator(), known.pop("freqs"), **known)


# Simulations ----------------------------------------------------------------------------------------------------------


def against_a_simulation(model, dt, inputs, noise, shape, seconds=60.0, highest=45.0):
    """The mean and the largest of the relative differences, in standard errors of Welch's estimate."""
    inputs = {n: np.full(shape, u.get_magnitude(x)) * u.get_unit(x) for n, x in inputs.items()}
    every = round(2e-3 / dt)
    run = bk.simulate(
        model, round((seconds + 2) / dt / every) * every, dt * u.second, inputs=inputs, noise=noise,
        key=jax.random.key(3), every=every, transient=2 * u.second,
    )  # fmt: skip
    freqs, power = run.psd(segment=2 * u.second)
    use = (plain(freqs) > 0.9) & (plain(freqs) < highest)
    expected = bk.linear_spectrum(model, plain(freqs)[use], inputs=inputs, noise=noise)
    assert expected.unit == power.unit
    lanes = tuple(range(1, len(shape))) if isinstance(model, bk.Network) else tuple(range(1, len(shape) + 1))
    ratio = (plain(power)[use] / plain(expected)).mean(lanes[: 1 if isinstance(model, bk.Network) else None])
    # Hann windows that overlap by half: each counts for 18/19 of a window of its own.
    windows = (seconds / 2.0 * 2 - 1) * 18 / 19 * shape[0] / 1.0
    return (ratio - 1) * np.sqrt(windows)


def holds(differences):
    """The differences of independent estimates are normal; those of neighbours are a little correlated."""
    assert np.abs(differences).max() < 5.0
    assert differences.std() < 1.3
    assert np.abs(differences.mean()) < 0.6


WEAK = 2.0 * u.Hz * u.second**0.5


def test_jansen_and_rit_as_simulated():
    holds(against_a_simulation(bk.JansenRit(), 2e-4, {"E_inp": 60.0 * u.Hz}, {"E_inp": WEAK}, (32,)))


def test_robinson_with_eyes_closed_as_simulated():
    noise = {"phi_n": 1e-3 * u.Hz * u.second**0.5}
    holds(against_a_simulation(bk.Robinson(), 1e-4, {"phi_n": 1.0 * u.Hz}, noise, (32,)))


def test_two_delayed_regions_as_simulated():
    weights, delays = np.array([[0.0, 1.0], [0.7, 0.0]]), np.array([[0.0, 12.0], [18.0, 0.0]])
    network = bk.Network(
        bk.JansenRit(), weights, delays=delays * u.ms, source="eeg", target="E_inp", k=10.0 * u.Hz / u.mV
    )
    for region in against_a_simulation(network, 2e-4, {"E_inp": 60.0 * u.Hz}, {"E_inp": WEAK}, (32, 2)).T:
        holds(region)
