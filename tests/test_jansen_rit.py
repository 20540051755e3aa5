"""Jansen-Rit: brainmass's names and trajectory, and the published rhythms."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk

DEFAULTS = {
    "Ae": 3.25 * u.mV, "Ai": 22.0 * u.mV, "be": 100.0 * u.Hz, "bi": 50.0 * u.Hz, "C": 135.0, "a1": 1.0, "a2": 0.8,
    "a3": 0.25, "a4": 0.25, "s_max": 5.0 * u.Hz, "v0": 6.0 * u.mV, "r": 0.56,
}  # fmt: skip


def test_names_defaults_and_units_are_brainmass():
    model = bk.JansenRit()
    assert set(bk.JansenRit.parameters()) == set(DEFAULTS)
    for name, value in DEFAULTS.items():
        assert u.math.allclose(getattr(model, name), value), name
    assert list(bk.JansenRit.states) == ["M", "E", "I", "Mv", "Ev", "Iv"]
    assert {n: x.unit for n, x in bk.JansenRit.inputs.items()} == {"M_inp": u.mV, "E_inp": u.Hz, "I_inp": u.mV}
    brainmass = pytest.importorskip("brainmass")
    theirs = brainmass.JansenRitStep(1)
    for name, value in DEFAULTS.items():
        assert u.math.allclose(getattr(theirs, name).value(), value), name


@pytest.mark.parametrize(
    "drive", [{"E_inp": 220.0 * u.Hz}, {"E_inp": 90.0 * u.Hz, "M_inp": 1.5 * u.mV, "I_inp": -2.0 * u.mV}]
)
def test_trajectory_is_brainmass_under_exp_euler(drive):
    brainmass, brainstate = pytest.importorskip("brainmass"), pytest.importorskip("brainstate")
    gains = jnp.array([3.0, 3.25, 3.5]) * u.mV
    with brainstate.environ.context(dt=0.1 * u.ms):
        theirs = brainmass.JansenRitStep(3, Ae=gains)
        brainstate.nn.init_all_states(theirs)

        def step(k):
            theirs.update(**drive)
            return theirs.eeg(), theirs.M.value

        eeg, M = brainstate.transform.for_loop(step, jnp.arange(3000))
    ours = bk.simulate(
        bk.JansenRit(Ae=gains), 3000, 0.1 * u.ms, inputs=drive, record=("eeg", "M"), scheme="exp_euler"
    )  # fmt: skip
    for a, b in ((ours["eeg"], eeg), (ours["M"], M)):
        a, b = np.asarray(a / u.mV), np.asarray(b / u.mV)
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)
    for name in bk.JansenRit.states:
        expected = u.get_magnitude(getattr(theirs, name).value)
        np.testing.assert_allclose(u.get_magnitude(ours.final[name]), expected, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def settled():
    """E - I in float64 for 10 s after 15 s of settling from rest, at four drives."""
    with jax.enable_x64(True):
        run = bk.simulate(
            bk.JansenRit(), 25 * u.second, 0.1 * u.ms, inputs={"E_inp": np.array([220.0, 150.0, 120.0, 100.0]) * u.Hz},
            transient=15 * u.second, scheme="strang",
        )  # fmt: skip
        return np.asarray(run["eeg"] / u.mV)


@pytest.mark.parametrize(
    ("lane", "frequency", "low", "high"),
    [(0, 10.938, 6.088, 9.034), (1, 10.623, 5.794, 8.434), (2, 2.385, 1.226, 11.170)],
)
def test_cycles_of_the_published_drives(settled, lane, frequency, low, high):
    x = settled[:, lane]
    np.testing.assert_allclose([x.min(), x.max()], [low, high], atol=2e-3)
    level = 0.5 * (x.min() + x.max())
    up = np.flatnonzero((x[:-1] < level) & (x[1:] >= level))
    crossings = up + (level - x[up]) / (x[up + 1] - x[up])
    assert (len(crossings) - 1) / (crossings[-1] - crossings[0]) * 1e4 == pytest.approx(frequency, abs=2e-3)


def test_fixed_point_of_a_weak_drive(settled):
    np.testing.assert_allclose(settled[:, 3], 1.5603, atol=1e-4)
