"""Orders of convergence, the accuracy that DESIGN promises, and the closed-form flow."""

import functools
from types import SimpleNamespace

import brainunit as u
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

import brainmass_kernels as bk
from brainmass_kernels.schemes import SCHEMES

ORDERS = {"euler": 1, "exp_euler": 1, "symplectic_euler": 1, "exact": 1, "strang": 2, "heun": 2, "rk4": 4}
# rms error in mV at dt = 0.1, 0.5 and 1 ms: 220 Hz from rest for 2 s, at every millisecond (benchmarks/accuracy.py).
TABLE = {
    "exp_euler": (0.965, 2.37, 3.20),
    "euler": (0.536, 2.26, 2.67),
    "symplectic_euler": (0.382, 1.38, 1.57),
    "exact": (0.406, 1.82, 2.11),
    "strang": (0.00105, 0.0263, 0.105),
    "heun": (0.00061, 0.0147, 0.0563),
    "rk4": (1.30e-9, 7.69e-7, 1.15e-5),
}

pytestmark = pytest.mark.usefixtures("x64")
COARSE = pytest.mark.filterwarnings("ignore:'dt' got")  # steps over a time constant are meant here


@functools.lru_cache
def eeg(scheme: str, steps_a_ms: int, steps: int = 20_000) -> np.ndarray:
    """E - I of a mass driven from rest at 220 Hz, at each millisecond; runs of as many steps are one program."""
    res = bk.simulate(
        bk.JansenRit(), steps, 1.0 / steps_a_ms * u.ms, inputs={"E_inp": 220.0 * u.Hz}, scheme=scheme,
        implementation="scan",
    )  # fmt: skip
    return np.asarray(res["eeg"] / u.mV)[steps_a_ms - 1 :: steps_a_ms]


def rms(scheme: str, steps_a_ms: int, ms: int) -> float:
    fine, found = eeg("rk4", 50, 100_000), eeg(scheme, steps_a_ms)
    return float(np.sqrt(np.mean((found[:ms] - fine[:ms]) ** 2)))


def test_every_scheme_is_held_to_its_order():
    # A step that is given has the order that its author gave it.
    assert {n: s.order for n, s in SCHEMES.items() if s.needs != "step"} == ORDERS


@pytest.mark.parametrize("scheme", ORDERS)
def test_order(scheme):
    """Error against the step, both halved; in a short run, before errors in phase fold over."""
    coarse, finer = (1, 2) if scheme == "rk4" else (10, 20)
    measured = np.log2(rms(scheme, coarse, 100) / rms(scheme, finer, 100))
    assert measured == pytest.approx(ORDERS[scheme], abs=0.12)


@pytest.mark.parametrize("scheme", TABLE)
def test_accuracy_table(scheme):
    got = [rms(scheme, steps_a_ms, 2000) for steps_a_ms in (10, 2, 1)]
    np.testing.assert_allclose(got, TABLE[scheme], rtol=0.03)


@bk.model
class Bare(bk.SecondOrderModel):
    """One block driven by its input."""

    A: object = 3.0 * u.mV
    a: object = 80.0 * u.Hz

    states = {"x": u.mV, "v": u.mV / u.second}
    inputs = {"drive": 0.0 * u.Hz}
    blocks = (bk.Block("x", "v", "A", "a"),)

    @staticmethod
    def drive(s, p, i):
        return {"x": i.drive}


MATRIX = np.array([[0.0, 1.0], [-(80.0**2), -160.0]])


BARE_START, BARE_DRIVE = np.array([1.5, -20.0]), 7.0


def run_bare(scheme: str, steps: int, dt: float, **more):
    """The bare block, driven, from its start."""
    x, v = BARE_START
    return bk.simulate(
        Bare(),
        steps,
        dt * u.second,
        inputs={"drive": BARE_DRIVE * u.Hz},
        initial={"x": x * u.mV, "v": v * u.mV / u.second},
        scheme=scheme,
        implementation="scan",
        **more,
    )


@COARSE
@pytest.mark.parametrize("dt", [1e-8, 1e-4, 6.2e-3, 6.3e-3, 0.5])
def test_exact_is_the_matrix_exponential(dt):
    """With the drive held a bare block has the flow expm(matrix dt), at any dt, and for a h small or large."""
    start, res = BARE_START, run_bare("exact", 1, dt, record=())
    augmented = np.zeros((3, 3))
    augmented[:2, :2], augmented[1, 2] = MATRIX, 3.0 * 80.0 * BARE_DRIVE
    want = (expm(augmented * dt) @ np.append(start, 1.0))[:2]
    got = np.array([res.final["x"].mantissa, res.final["v"].mantissa])
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13 * np.linalg.norm(want))
    # The increment too, which is what a small step lives on.
    np.testing.assert_allclose(got - start, want - start, rtol=1e-6, atol=1e-12)


@COARSE
@pytest.mark.parametrize("dt", [1e-4, 6e-3, 0.1])
def test_strang_is_flow_kick_flow(dt):
    res = run_bare("strang", 2, dt)
    half, kick, y = expm(MATRIX * dt / 2), np.array([0.0, dt * 3.0 * 80.0 * BARE_DRIVE]), BARE_START
    for _ in range(2):
        y = half @ (half @ y + kick)
    np.testing.assert_allclose([res.final["x"].mantissa, res.final["v"].mantissa], y, rtol=1e-9)
    np.testing.assert_allclose(res["x"].mantissa[-1], y[0], rtol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_enter_and_exit_are_inverse(scheme):
    rng = np.random.default_rng(0)
    model, p = bk.JansenRit, SimpleNamespace(**bk.JansenRit().magnitudes())
    state = {n: rng.normal(size=4) for n in model.states}
    there = SCHEMES[scheme].enter(model, state, p, 1e-3)
    back = SCHEMES[scheme].exit(model, there, p, 1e-3)
    for n in state:
        np.testing.assert_allclose(back[n], state[n], rtol=1e-12)
    if scheme == "strang":
        assert max(np.max(np.abs(np.asarray(there[n]) - state[n])) for n in state) > 1e-3


@pytest.mark.parametrize("scheme", [n for n, s in SCHEMES.items() if s.limit is not None])
def test_stability_limit(scheme):
    """A free block decays just below the limit of `a h` and grows just above it."""
    step = SCHEMES[scheme].step
    p, i = SimpleNamespace(A=3.0, a=80.0), SimpleNamespace(drive=0.0)

    def largest_eigenvalue(ah):
        columns = [step(Bare, {"x": x, "v": v}, p, i, ah / 80.0) for x, v in ((1.0, 0.0), (0.0, 1.0))]
        return np.max(np.abs(np.linalg.eigvals(np.array([[float(c[n]) for c in columns] for n in ("x", "v")]))))

    limit = SCHEMES[scheme].limit
    assert largest_eigenvalue(limit * 0.99) < 1.0
    assert largest_eigenvalue(limit * 1.01) > 1.0


@COARSE
def test_schemes_without_a_limit_are_stable_at_any_step():
    for scheme in ("exact", "strang"):
        assert SCHEMES[scheme].limit is None
        res = bk.simulate(Bare(), 50, 10.0 * u.second, initial={"x": 1.0 * u.mV}, scheme=scheme, implementation="scan")
        assert abs(float(res.final["x"].mantissa)) < 1e-12
        assert bool(jnp.all(res.ok))
