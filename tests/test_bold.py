"""The Balloon-Windkessel states against scipy's solution of the published equations."""

import pickle
import re

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import brainmass_kernels as bk

PULSE = 2.0  # seconds


@bk.model
class Relaxing(bk.Model):
    """Activity that follows its input in 50 ms."""

    rate: object = 20.0 * u.Hz
    states = {"x": u.mV}
    inputs = {"x_inp": 0.0 * u.mV}
    observables = {"activity": u.mV}

    @staticmethod
    def drift(s, p, i):
        return {"x": p.rate * (i.x_inp - s.x)}

    @staticmethod
    def observe(s, p):
        return {"activity": s.x}


def expected(times, gain, tau=0.98):
    kappa, gamma, alpha, rho, V0 = 0.65, 0.41, 0.32, 0.34, 0.02

    def slope(t, y):
        x, s, f, v, q = y
        return [
            20.0 * ((1.0 if t < PULSE else 0.0) - x),
            gain * x - kappa * s - gamma * (f - 1),
            s,
            (f - v ** (1 / alpha)) / tau,
            (f / rho * (1 - (1 - rho) ** (1 / f)) - q * v ** (1 / alpha - 1)) / tau,
        ]

    options = {"rtol": 1e-10, "atol": 1e-12}
    first = solve_ivp(slope, (0, PULSE), [0, 0, 1, 1, 1], t_eval=times[times <= PULSE], **options)
    middle = solve_ivp(slope, (0, PULSE), [0, 0, 1, 1, 1], **options).y[:, -1]
    second = solve_ivp(slope, (PULSE, times[-1]), middle, t_eval=times[times > PULSE], **options)
    _, _, _, v, q = np.concatenate([first.y, second.y], axis=1)
    return V0 * (7 * rho * (1 - q) + 2 * (1 - q / v) + (2 * rho - 0.2) * (1 - v))


def run(dt, implementation="scan", every=0.1, gain=0.5, tau=0.98, duration=20.0, scheme="heun", **more):
    model = bk.with_bold(Relaxing(), gain=gain / u.second / u.mV, tau=tau * u.second)
    pulse = (np.arange(round(duration / dt)) * dt < PULSE - dt / 2).astype(float)
    return bk.simulate(
        model, duration * u.second, dt * u.second, inputs={"x_inp": pulse * u.mV}, every=round(every / dt),
        scheme=scheme, implementation=implementation, **{"record": "bold", **more},
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["scan", pytest.param("numba", marks=needs.numba)])
def test_against_the_published_equations(x64, implementation):
    found = run(0.002, implementation)
    want = expected(np.asarray(found.ts.mantissa), 0.5)
    errors = [np.abs(run(dt, implementation)["bold"] - want).max() / want.max() for dt in (0.02, 0.01, 0.002)]
    assert errors[2] < 1e-5
    # Of second order.
    assert 3.0 < errors[0] / errors[1] < 5.0
    # A response of 1 to 3%, its peak some five seconds after the pulse began, and an undershoot.
    assert 0.01 < want.max() < 0.03
    assert 3.0 < float(found.ts.mantissa[np.argmax(want)]) < 6.0
    assert want.min() < -0.001


def test_a_gradient(x64):
    def peak(tau):
        return jnp.max(run(0.01, tau=tau, duration=8.0)["bold"])

    difference = (peak(0.98 + 1e-5) - peak(0.98 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(peak)(0.98), difference, rtol=1e-6)


def test_means_over_a_repetition_time():
    found = run(0.01, every=0.01, record={"scan": bk.Average(2 * u.second, of="bold"), "bold": "bold"})
    assert found["scan"].shape == (10,)
    np.testing.assert_allclose(found["scan"], found["bold"].reshape(10, 200).mean(1), rtol=1e-4, atol=1e-8)


def test_beside_a_model_of_blocks_in_milliseconds(x64):
    """The model's own states are as without it, and time is counted in the model's unit."""
    drive = {"inputs": {"E_inp": 220 * u.Hz}, "every": 100}
    plain = bk.simulate(bk.JansenRit(), 2 * u.second, 0.5 * u.ms, **drive)
    blooded = bk.with_bold(bk.JansenRit(), gain=0.05 / u.second / u.mV, rest=5 * u.mV)
    both = bk.simulate(blooded, 2 * u.second, 0.5 * u.ms, record=("eeg", "bold"), **drive)
    np.testing.assert_allclose(both["eeg"].mantissa, plain["eeg"].mantissa, rtol=1e-9)
    assert float(both["bold"][-1]) > 1e-4
    hopf = bk.with_bold(bk.Hopf(a=0.0, w=0.0), source="x", gain=0.5 / u.second)
    still = bk.simulate(
        hopf, 2 * u.second, 1 * u.ms, initial={"x": 1.0}, scheme="heun", record=("x", "bold"), every=100
    )
    want = np.trapezoid(still["x"], dx=0.1)
    assert 0 < float(still["bold"][-1]) < 0.1 * want


# Kernels ------------------------------------------------------------------------------------------------------------

KERNEL = bk.HRF((1.2, -0.2, 0.1), (6, 16, 2), [1.0, 1.0, 0.5] * u.second)


def with_kernel(dt, kernel=KERNEL, duration=40.0, record="bold", **fields):
    model = bk.with_bold(Relaxing(), gain=0.5 / u.mV, kernel=kernel).replace(**fields)
    pulse = (np.arange(round(duration / dt)) * dt < PULSE - dt / 2).astype(float)
    return bk.simulate(
        model, duration * u.second, dt * u.second, inputs={"x_inp": pulse * u.mV}, every=round(0.1 / dt), scheme="heun",
        record=record, implementation="scan",
    )  # fmt: skip


def test_low_passes_are_the_kernel(x64):
    """The density of shape n is n low-passes in a row: against the integral of kernel times activity."""
    found = with_kernel(0.01)
    # Of the activity, which is an exponential, at every millisecond.
    fine = np.arange(0.0, 30.0, 1e-3)
    active = np.where(fine < PULSE, 1.0 - np.exp(-20.0 * fine), np.exp(-20.0 * (fine - PULSE)))
    kernel = KERNEL(fine)
    times = np.asarray(found.ts.to_decimal(u.second))[:250]
    want = [
        0.5 * np.trapezoid(kernel[: k + 1][::-1] * active[: k + 1], dx=1e-3) for k in np.rint(times * 1e3).astype(int)
    ]
    np.testing.assert_allclose(found["bold"][:250], want, atol=2e-4 * np.abs(want).max())
    assert len(bk.with_bold(Relaxing(), kernel=KERNEL).states) == 1 + 16 + 2


def test_gradients_in_the_kernel(x64):
    def peak(scale, weight):
        fields = {"bold_scale_1": scale * u.second, "bold_weight_2": weight}
        return jnp.sum(with_kernel(0.05, duration=8.0, **fields)["bold"] ** 2)

    slopes, e = jax.grad(peak, (0, 1))(1.0, -0.2), 1e-5
    np.testing.assert_allclose(slopes[0], (peak(1.0 + e, -0.2) - peak(1.0 - e, -0.2)) / (2 * e), rtol=1e-6)
    np.testing.assert_allclose(slopes[1], (peak(1.0, -0.2 + e) - peak(1.0, -0.2 - e)) / (2 * e), rtol=1e-6)


def test_a_kernel_beside_a_model_of_blocks_in_milliseconds(x64):
    """The same constants, in a model that counts milliseconds: a lasting activity gives a signal of its own size."""
    model = bk.with_bold(bk.JansenRit(), source="eeg", kernel=bk.HRF.gamma(2, 20 * u.ms), gain=0.1 / u.mV)
    found = bk.simulate(
        model, 1 * u.second, 0.5 * u.ms, inputs={"E_inp": 90 * u.Hz}, record=["eeg", "bold"], every=100,
        implementation="scan",
    )  # fmt: skip
    assert float(found["bold"][-1]) == pytest.approx(0.1 * float(found["eeg"][-1] / u.mV), rel=1e-3)
    assert pickle.loads(pickle.dumps(model)).bold_scale_1 == 20 * u.ms
    assert type(bk.with_bold(Relaxing(), kernel="balloon")) is type(bk.with_bold(Relaxing()))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"kernel": bk.HRF.gamma(2.5)}, ValueError, "'kernel' got shapes (2.5,), but with_bold takes whole ones"),
        ({"kernel": "gamma"}, ValueError, "'kernel' got 'gamma', but takes 'balloon', a bk.HRF, or None"),
        ({"kernel": KERNEL, "kappa": 1 * u.Hz}, TypeError, "'kappa' is a constant of the balloon, but 'kernel' got"),
        ({"kernel": KERNEL, "gain": 1 / u.second / u.mV}, ValueError, "'bold_gain' got"),
    ],
)
def test_kernels_that_are_refused(arguments, error, says):
    with pytest.raises(error, match=re.escape(says)):
        bk.with_bold(bk.JansenRit(), **arguments)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="unknown observable or state 'eeq'"):
        bk.with_bold(bk.JansenRit(), source="eeq")
    with pytest.raises(TypeError, match="unknown constant 'bold_kapa'; did you mean 'bold_kappa'"):
        bk.with_bold(bk.JansenRit(), kapa=1 * u.Hz)
    with pytest.raises(ValueError, match="'bold_gain' got"):
        bk.with_bold(bk.JansenRit(), gain=1.0 / u.second)
