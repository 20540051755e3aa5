"""Where a fit starts, what it records unless told, a target's diagonal, and the constants of every coupling."""

from typing import Any

import brainunit as u
import jax.numpy as jnp
import numpy as np
import pytest
from backend_suite import slow_but

import brainmass_kernels as bk
from brainmass_kernels.fitting.problem import Free

STEPS = 40
WAVE = np.sin(np.arange(STEPS) / 4.0).astype(np.float32)


@bk.model
class Follower(bk.Model):
    """A model of a user's own, without an ``eeg``; its first observable is not its first state."""

    gain: Any = 1.0
    tau: Any = 50 * u.ms

    states = {"x": u.mV, "y": u.mV}
    inputs = {"drive": 0.0 * u.Hz}
    observables = {"z": u.mV}
    time_unit = u.ms
    scheme = "euler"

    @staticmethod
    def drift(s, p, i):
        return {"x": (p.gain * i.drive - s.x) / p.tau, "y": (s.x - s.y) / p.tau}

    @staticmethod
    def observe(s, p):
        return {"z": s.x + s.y}


@bk.model
class Plain(bk.Model):
    """With states only."""

    gain: Any = 1.0

    states = {"r": u.UNITLESS, "q": u.UNITLESS}
    inputs = {"drive": 0.0}
    scheme = "euler"

    @staticmethod
    def drift(s, p, i):
        return {"r": 10.0 * (p.gain * i.drive - s.r), "q": -s.q}


CALL: dict[str, Any] = {
    "duration": STEPS, "dt": 10 * u.ms, "transient": None, "realisations": 1, "starts": 1, "steps": 1,
    "implementation": "scan",
}  # fmt: skip
DRIVE = {"drive": WAVE * u.Hz}


def records(model, name: str, inputs=DRIVE, every: int = 1):
    run = bk.simulate(model, STEPS, 10 * u.ms, inputs=inputs, every=every, record=name, implementation="scan")
    return run[name]


def fit(target, model=None, free=None, **changes) -> bk.Fit:
    return bk.fit(model or Follower(), target, free or {"gain": (0.5, 4.0)}, **{"inputs": DRIVE, **CALL, **changes})


@pytest.fixture(scope="module")
def target():
    return bk.TimeSeries(records(Follower(gain=2.0), "z"))


# --- what is recorded ---


class TestTheRecord:
    def test_is_the_first_observable(self, target, tmp_path):
        """As of `simulate`; all samples of a series are compared."""
        found = fit(target)
        assert found.settings["record"] == "z"
        assert found.settings["every"] == 1
        by_name = fit(target, record="z", every=1)
        np.testing.assert_array_equal(found.rms, by_name.rms)

    def test_is_the_first_state_where_there_is_none(self):
        target = bk.TimeSeries(np.asarray(records(Plain(gain=2.0), "r", {"drive": WAVE}, every=5)))
        found = fit(target, Plain(), inputs={"drive": WAVE})
        assert found.settings["record"] == "r"
        assert found.settings["every"] == 5
        assert str(found).startswith("Plain fitted to")

    def test_is_that_of_a_resumed_fit(self):
        target = bk.TimeSeries(records(Follower(gain=2.0), "y", every=2))
        found = fit(target, record="y", every=2)
        more = fit(None, free={"gain": (0.5, 4.0)}, resume=found)
        assert (more.settings["record"], more.settings["every"], len(more.losses)) == ("y", 2, 2)

    def test_is_seen_by_a_function(self):
        def error(result):
            assert list(result) == ["z"]
            return jnp.mean((result["z"].mantissa - 1.0) ** 2, 0)

        assert np.isfinite(fit(error).rms).all()


# --- where it starts ---


@pytest.mark.parametrize(
    ("low", "high", "value"),
    [(0.5, 4.0, 0.5), (0.5, 4.0, 4.0), (0.5, 4.0, 0.501), (-1.0, 4.0, 3.9999), (1e-6, 1e6, 3.0), (0.0, 8.0, 0.0)],
)
def test_a_start_is_the_model_as_it_was_given(low, high, value):
    free = Free("gain", low, high, u.UNITLESS)
    got = float(free.value(jnp.asarray(free.z(value, "'model'"), jnp.float32)))
    assert got == pytest.approx(value, rel=2e-6, abs=2e-7 * (high - low))


@pytest.mark.parametrize("gain", [0.5, 3.999])
def test_the_initial_error_is_that_of_the_model(target, gain):
    """At a bound and beside one."""
    found = fit(target, Follower(gain=gain), steps=3)
    wanted = target.values.mantissa
    want = np.sqrt(np.mean((records(Follower(gain=gain), "z").mantissa - wanted) ** 2)) / np.std(wanted)
    np.testing.assert_allclose(found.initial_rms, want, rtol=1e-4)
    assert found.rms < found.initial_rms


class TestAStartOutsideTheBounds:
    @pytest.mark.parametrize("value", [9.0, 0.1, 4.001])
    def test_of_the_model(self, target, value):
        """The start moves to the nearer bound, with a warning; the initial error is that of the model as given."""
        with pytest.warns(RuntimeWarning, match=rf"'model' got gain = {value:g}, outside of its bounds 0.5 to 4"):
            found = fit(target, Follower(gain=value))
        wanted = target.values.mantissa
        want = np.sqrt(np.mean((records(Follower(gain=value), "z").mantissa - wanted) ** 2)) / np.std(wanted)
        np.testing.assert_allclose(found.initial_rms, want, rtol=1e-4)
        first = found.free[0].value(found.state["first"]["gain"])
        assert 0.5 <= float(first[0, 0]) <= 4.0
        assert abs(float(first[0, 0]) - np.clip(value, 0.5, 4.0)) < 0.1

    def test_with_a_unit(self, target):
        with pytest.warns(RuntimeWarning, match="'model' got tau = 50 ms, outside of its bounds 60 to 90 ms"):
            fit(target, free={"tau": (60.0, 90.0)})

    def test_of_noise_that_was_not_given(self, target):
        with pytest.warns(RuntimeWarning, match=r"'model' got noise\.drive = 0"):
            fit(target, free={"noise.drive": (0.1, 1.0)})

    def test_of_a_fit_that_resumes(self, target):
        """It is told once, and the initial error stays that of the model."""
        with pytest.warns(RuntimeWarning, match="'model' got gain = 9"):
            begun = fit(target, Follower(gain=9.0), steps=1)
        longer = fit(target, Follower(gain=9.0), steps=1, resume=begun)
        np.testing.assert_allclose(longer.initial_rms, begun.initial_rms, rtol=1e-6)

    def test_among_starts(self, target):
        with pytest.raises(ValueError, match="'starts' got gain = 5, outside of its bounds"):
            fit(target, starts={"gain": [1.0, 5.0]})

    def test_does_not_matter_where_starts_are_given(self, target):
        assert np.isfinite(fit(target, Follower(gain=9.0), starts={"gain": [1.0]}).rms)

    def test_of_a_profile(self, target):
        found = fit(target)
        with pytest.raises(ValueError, match="'values' got gain = 7, outside of its bounds"):
            found.profile("gain", [1.0, 7.0])

    def test_by_rounding_is_none(self, target):
        assert np.isfinite(fit(target, Follower(gain=np.nextafter(np.float32(4.0), np.float32(9.0)))).rms)


# --- connectivity ---


class TestTheDiagonal:
    @pytest.mark.parametrize("own", [1.0, 0.0, np.nan, np.inf])
    def test_does_not_count(self, own):
        values = np.full((2, 3, 3), 0.4)
        values[:, range(3), range(3)] = own
        target = bk.Connectivity(values)
        assert np.isfinite(target.values).all()
        np.testing.assert_array_equal(np.isnan(values).any(), np.isnan(own))  # the user's own is left as it was

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_elsewhere_is_refused(self, bad):
        values = np.eye(3)
        values[0, 2] = values[2, 0] = bad
        with pytest.raises(ValueError, match=rf"got {bad} at \(0, 2\), 2 such beside the diagonal"):
            bk.Connectivity(values)

    # The strength changes this correlation by less than rounding.
    @pytest.mark.filterwarnings("ignore:nothing improved on the start")
    def test_of_a_fit_survives_json(self, tmp_path):
        values = np.full((2, 2), 0.4)
        np.fill_diagonal(values, np.nan)
        network = bk.Network(Follower(), np.ones((2, 2)), target="drive", source="z", k=0.1 * u.Hz / u.mV)
        call = {"inputs": {"drive": np.stack([WAVE, WAVE[::-1]], -1) * u.Hz}, "every": 1}
        found = fit(bk.Connectivity(values), network, {"coupling.k": (0.01, 1.0)}, **call)
        found.save(tmp_path / "fit.json")
        read = bk.Fit.load(tmp_path / "fit.json", network)
        assert len(fit(None, network, {"coupling.k": (0.01, 1.0)}, resume=read, **call).losses) == 2


# --- couplings ---


COUPLINGS = {
    "additive": 0.5 * u.Hz / u.mV, "diffusive": 0.5 * u.Hz / u.mV, "laplacian": 0.5 * u.Hz / u.mV,
    "sigmoidal": 0.5 * u.Hz, "tanh": 0.5 * u.Hz, "sigmoidal_jansen_rit": 0.5 * u.Hz,
}  # fmt: skip


@pytest.mark.parametrize("kind", slow_but({"diffusive", "sigmoidal_jansen_rit"}, COUPLINGS))
def test_every_coupling_is_fitted_with_its_defaults(kind):
    network = bk.Network(Follower(), np.ones((2, 2)), coupling=kind, target="drive", source="z", k=COUPLINGS[kind])
    target = bk.Connectivity(0.5 + 0.5 * np.eye(2))
    inputs = {"drive": np.stack([WAVE, WAVE[::-1]], -1) * u.Hz}
    found = fit(target, network, {"coupling.k": (0.01, 5.0)}, inputs=inputs, every=1)
    assert np.isfinite(found.rms).all()
    assert found.parameters["coupling.k"].unit.has_same_dim(u.get_unit(COUPLINGS[kind]))


@pytest.mark.parametrize("kind", ["additive", "laplacian"])
def test_the_constant_of_a_coupling_can_be_free(kind):
    network = bk.Network(Follower(), np.ones((2, 2)), coupling=kind, target="drive", source="z", k=COUPLINGS[kind])
    assert u.get_unit(network.parameters["b"]) == u.Hz
    assert bk.Network(Follower(), np.ones((2, 2)), coupling=kind, k=COUPLINGS[kind], b=0).parameters["b"] == 0 * u.Hz
    inputs = {"drive": np.stack([WAVE, WAVE[::-1]], -1) * u.Hz}
    target = bk.Connectivity(0.5 + 0.5 * np.eye(2))
    found = fit(target, network, {"coupling.b": (-1.0, 1.0)}, inputs=inputs, every=1)
    assert found.parameters["coupling.b"].unit == u.Hz
