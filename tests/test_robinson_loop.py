"""The corticothalamic loop with its delay: against an independent float64 loop, and the published transfer function."""

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

import brainmass_kernels as bk

MODEL = bk.RobinsonCorticothalamic
DT = 0.5
# Of the defaults, the eyes-closed state, in ms, mV and Hz.
DECAY, RISE, GAMMA, THETA, SIGMA, MOST = 12.0, 1.3, 0.116, 12.92, 3.8, 340.0
NU = {
    "ee": 1.5316368, "ei": -9.6390641, "es": 9.7322420, "re": 0.1428004, "rs": 0.0577027, "se": 1.1354746,
    "sr": -1.2216477, "sn": 8.2218638,
}  # fmt: skip
NAMES = ("V_e", "V_r", "V_s", "phi_e", "V_et", "V_rt", "V_st", "phi_et")


def fired(V):
    return MOST / (1 + np.exp((THETA - V) / SIGMA))


def looped(state, steps: int, t0: float, phi_n=1.0):
    """Euler's rule with a list of all that was: ``state`` is potentials, field, and their velocities a ms."""
    position, velocity = np.array(state[:4], float), np.array(state[4:], float)
    past, seen = [], []

    def ago(steps):
        k = int(np.floor(steps))
        first, second = (past[max(0, len(past) - 1 - n)] for n in (k, k + 1))
        return first + (steps - k) * (second - first)

    for _ in range(steps):
        past.append(position)
        (V_e, V_r, V_s, phi), late = position, ago(0.5 * t0 / DT)
        drive = np.array([
            NU["ee"] * phi + NU["ei"] * fired(V_e) + NU["es"] * fired(late[2]),
            NU["re"] * late[3] + NU["rs"] * fired(V_s),
            NU["se"] * late[3] + NU["sr"] * fired(V_r) + NU["sn"] * phi_n,
        ])  # fmt: skip
        bent = (drive - position[:3] - (DECAY + RISE) * velocity[:3]) / (DECAY * RISE)
        field = GAMMA**2 * (fired(V_e) - phi) - 2 * GAMMA * velocity[3]
        position, velocity = position + DT * velocity, velocity + DT * np.array([*bent, field])
        seen.append(position)
    return np.array(seen)


def started(state):
    """The initial state, as `looped` has it."""
    units = (*(u.mV,) * 3, u.Hz, *(u.mV / u.ms,) * 3, u.Hz / u.ms)
    return {n: x * unit for n, x, unit in zip(NAMES, state, units)}


START = (-1.0, 2.0, -2.0, 9.0, 0.01, 0.0, -0.02, 0.05)


@pytest.mark.parametrize("implementation", ["scan", pytest.param("numba", marks=needs.numba)])
def test_against_a_loop_over_the_past(implementation, x64):
    times = np.array([0.0, 2.0, 84.3, 85.0])
    run = bk.simulate(
        MODEL(t0=times * u.ms), 400, DT * u.ms, initial=started(START), scheme="euler", record=NAMES[:4],
        implementation=implementation,
    )  # fmt: skip
    for k, t0 in enumerate(times):
        want = looped(START, 400, t0)
        for n, x in zip(NAMES, want.T):
            np.testing.assert_allclose(u.get_mantissa(run[n])[:, k], x, rtol=1e-10, atol=1e-10)


def test_gradients_in_the_time_around_and_in_a_strength(x64):
    def last(t0, nu_es):
        model = MODEL(t0=t0 * u.ms, nu_es=nu_es * u.mV * u.second)
        options = {"initial": started(START), "scheme": "euler", "implementation": "scan"}
        return bk.simulate(model, 300, DT * u.ms, **options).final["phi_e"].mantissa

    at, step = (84.3, NU["es"]), 1e-5
    for k, gradient in enumerate(jax.jit(jax.grad(last, (0, 1)))(*at)):
        moved = []
        for sign in (1, -1):
            NU["es"] = at[1] + sign * step * (k == 1)
            moved.append(looped(START, 300, at[0] + sign * step * (k == 0))[-1, 3])
        NU["es"] = at[1]
        np.testing.assert_allclose(gradient, (moved[0] - moved[1]) / (2 * step), rtol=1e-5)


def fixed_point(phi_n=1.0):
    """The potentials at rest, by halving an interval of the field's rate."""

    def potentials(phi):
        V_e = THETA - SIGMA * np.log(MOST / phi - 1)
        Q_s = (V_e - (NU["ee"] + NU["ei"]) * phi) / NU["es"]
        return V_e, NU["re"] * phi + NU["rs"] * Q_s, THETA - SIGMA * np.log(MOST / Q_s - 1)

    def missing(phi):
        _, V_r, V_s = potentials(phi)
        return NU["se"] * phi + NU["sr"] * fired(V_r) + NU["sn"] * phi_n - V_s

    low, high = 5.0, 10.0
    assert missing(low) * missing(high) < 0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if missing(low) * missing(middle) > 0 else (low, middle)
    return potentials(low)


def rest_rates(potentials):
    return [fired(V) for V in potentials]


def transfer(frequencies, rest, t0):
    """phi_e over phi_n about the fixed point, Robinson et al. 2004, for a field that is the same everywhere.

    ``rest`` has the rates of excitatory, reticular and relay cells in Hz, ``t0`` is in s.
    """
    slope = dict(zip("ers", (Q / SIGMA * (1 - Q / MOST) for Q in rest)))
    gain = {ab: slope[ab[0]] * nu for ab, nu in NU.items()}
    w = 2j * np.pi * frequencies
    dendrite = 1 / ((1 + w * DECAY / 1e3) * (1 + w * RISE / 1e3))
    inside, around = 1 - gain["ei"] * dendrite, 1 - gain["sr"] * gain["rs"] * dendrite**2
    thalamic = gain["es"] * (gain["se"] * dendrite**2 + gain["sr"] * gain["re"] * dendrite**3)
    field = (1 + w / (1e3 * GAMMA)) ** 2 - (gain["ee"] * dendrite + thalamic * np.exp(-w * t0) / around) / inside
    return gain["es"] * gain["sn"] * dendrite**2 * np.exp(-w * t0 / 2) / (around * inside * field)


def test_alpha_is_that_of_the_published_transfer_function(x64):
    """The response to a pulse about rest, one lane with it and one without."""
    rest = fixed_point()
    steps, pulse = 6000, 1e-3
    phi_n = np.ones((steps, 2))
    phi_n[0, 1] += pulse
    run = bk.simulate(
        MODEL(), steps, DT * u.ms, initial=started((*rest, rest_rates(rest)[0], 0.0, 0.0, 0.0, 0.0)),
        inputs={"phi_n": phi_n * u.Hz}, implementation="scan",
    )  # fmt: skip
    response = np.fft.rfft(np.diff(run["phi_e"].mantissa, axis=1)[:, 0] / pulse, 8 * steps)
    frequencies = np.fft.rfftfreq(8 * steps, DT * 1e-3)
    want = np.abs(transfer(frequencies, rest_rates(rest), 0.085))
    near = (frequencies > 2) & (frequencies < 40)
    # What is late is held for a step.
    np.testing.assert_allclose(np.abs(response)[near], want[near], rtol=0.06)

    def peak(values, low, high):
        within = (frequencies > low) & (frequencies < high)
        return frequencies[within][np.argmax(values[within] ** 2)]

    for low, high, published in ((7.0, 13.0, 9.63), (15.0, 25.0, 18.71)):
        assert peak(want, low, high) == pytest.approx(published, abs=0.05)
        assert peak(np.abs(response), low, high) == pytest.approx(published, abs=0.15)
    without = np.abs(transfer(frequencies, rest_rates(rest), 0.0))
    assert peak(without, 4.0, 13.0) < 4.1


def test_float32_is_float64():
    runs = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            gains = jnp.asarray(np.linspace(9.0, 10.0, 4), jnp.float64 if x64 else jnp.float32)
            model = MODEL(nu_es=gains * u.mV * u.second)
            options = {"initial": started(START), "implementation": "scan"}
            runs.append(np.asarray(bk.simulate(model, 1000, DT * u.ms, **options)["phi_e"].mantissa))
    assert runs[0].dtype == np.float32
    assert np.linalg.norm(runs[0] - runs[1]) < 1e-5 * np.linalg.norm(runs[1])
