"""Statistics of a mass that diverged are NaN, a mass at rest has no peak, and a sweep tells which points diverged."""

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import recording

# That a mass diverges is meant here, and warned of.
pytestmark = pytest.mark.filterwarnings("ignore:.*did not stay finite:RuntimeWarning")

DT, STEPS = 10 * u.ms, 600
WAVE = np.sin(2 * np.pi * 2.0 * 0.01 * np.arange(STEPS)).astype(np.float32)
STATISTICS = {
    "mean": bk.Mean(),
    "variance": bk.Variance(),
    "least": bk.Minimum(),
    "largest": bk.Maximum(),
    "average": bk.Average(200 * u.ms),
    "spectrum": bk.Spectrum([1.0, 2.0, 3.0]),
    "peak": bk.PeakFrequency(np.arange(0.5, 6.0, 0.5)),
    "crossings": bk.Crossings(0.5),
}


@bk.model
class Follower(bk.Model):
    """Follows its input, and with a rate runs away from it; its observable saturates."""

    rate: Any = 0.0
    gain: Any = 1.0

    states = {"x": u.UNITLESS}
    inputs = {"drive": 0.0}
    observables = {"y": u.UNITLESS}
    initial = {"x": 1.0}
    scheme = "euler"

    @staticmethod
    def drift(s, p, i):
        return {"x": 20.0 * (0.5 + p.gain * i.drive - s.x) + p.rate * s.x * s.x}

    @staticmethod
    def observe(s, p):
        return {"y": jnp.tanh(s.x)}


def run(rate, gain, record, **more) -> bk.Result:
    model = Follower(rate=jnp.asarray(rate, jnp.float32), gain=jnp.asarray(gain, jnp.float32))
    arguments = {"inputs": {"drive": WAVE}, "transient": 200, "implementation": "scan", "record": record, **more}
    return bk.simulate(model, STEPS, DT, **arguments)


# A mass that follows, one that runs away, one at rest.
LANES = [0.0, 1e3, 0.0], [0.3, 0.3, 0.0]


@pytest.mark.parametrize(("of", "block"), [("x", recording.BLOCK), ("y", 1)], ids=["at once", "in blocks"])
def test_statistics_of_a_mass_that_diverged_are_nan(monkeypatch, of, block):
    """Of an observable too that stays finite where the state does not."""
    monkeypatch.setattr(recording, "BLOCK", block)
    record = {name: what.bound(of, u.UNITLESS) for name, what in STATISTICS.items()}
    found = run(*LANES, record)
    assert found.ok.tolist() == [True, False, True]
    for name, x in found.records.items():
        x = np.asarray(u.get_magnitude(x))
        assert np.isnan(x[..., 1]).all(), name
        assert np.isfinite(x[..., 0]).all(), name
    assert float(u.get_magnitude(found["peak"])[0]) == pytest.approx(2.0, abs=0.02)
    assert np.isnan(u.get_magnitude(found["peak"])[2])
    assert np.isfinite(u.get_magnitude(found["spectrum"])[:, 2]).all()
    assert u.get_magnitude(found["crossings"])[2] == 0.0


def test_healthy_masses_have_the_bits_they_have_alone():
    """What is beside them does not matter, and nothing is done to them."""
    together, alone = run(*LANES, STATISTICS), run([0.0, 0.0, 0.0], LANES[1], STATISTICS)
    for name, x in together.records.items():
        got, want = (np.asarray(u.get_magnitude(r))[..., [0, 2]] for r in (x, alone[name]))
        np.testing.assert_array_equal(got, want)


def test_gradients_of_what_did_not_diverge():
    smooth = {name: STATISTICS[name] for name in ("variance", "least", "peak")}

    def total(gain, rate):
        records = run(rate, gain, smooth).records
        values = [jnp.log1p(jnp.abs(u.get_magnitude(x))) for x in records.values()]
        return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0.0)) for x in values)

    gain = jnp.asarray(LANES[1], jnp.float32)
    slope = jax.grad(total)
    got, want = slope(gain, LANES[0]), slope(gain, [0.0, 0.0, 0.0])
    assert want[0] != 0
    np.testing.assert_allclose(np.asarray(got)[[0, 2]], np.asarray(want)[[0, 2]], rtol=1e-6)


def test_a_count_of_ones_own_stays_a_count():
    class Records(bk.Reduction):
        def start(self, like, sampling):
            return jnp.zeros(like.shape, jnp.int32)

        def add(self, held, x, first, sampling):
            return held + len(x)

        def finish(self, held, sampling):
            return held

    assert run(*LANES, {"n": Records()})["n"].tolist() == [400, 400, 400]


# --- sweeps ---


OVER = {"rate": np.array([0.0, 1e3]), "gain": np.array([0.0, 0.2, 0.3])}
SWEEP = {"duration": STEPS, "dt": DT, "inputs": {"drive": WAVE}, "transient": 200, "implementation": "scan"}


def test_a_sweep_tells_which_points_diverged(tmp_path):
    record = {"peak": bk.PeakFrequency(np.arange(0.5, 6.0, 0.5)), "mean": bk.Mean()}
    with pytest.warns(RuntimeWarning, match="3 of the 6 points of this sweep did not stay finite"):
        found = bk.sweep(Follower(), OVER, record=record, chunk=4, out=tmp_path / "s.npz", **SWEEP)
    assert found.ok.tolist() == [[True] * 3, [False] * 3]
    assert list(found.records) == ["peak", "mean"]
    assert "3 points diverged" in repr(found)
    assert "3 of 6 points did not stay finite" in found._repr_html_()
    # At rest there is no peak, but nothing went wrong.
    assert np.isnan(u.get_magnitude(found["peak"])).tolist() == [[True, False, False], [True] * 3]
    read = bk.Sweep.load(tmp_path / "s.npz")
    assert list(read.records) == ["peak", "mean"]
    np.testing.assert_array_equal(read.ok, found.ok)


@pytest.mark.parametrize("kind", ["nc", "zarr"])
def test_files_of_xarray_tell_it_too(tmp_path, kind):
    pytest.importorskip("xarray")
    pytest.importorskip({"nc": "scipy", "zarr": "zarr"}[kind])
    axes = {"rate": np.array([0.0, 1.0]), "gain": np.array([1.0, 2.0, 3.0])}
    ok = np.array([[True, False, True], [True, True, True]])
    grid = bk.Sweep(axes, {"mean": np.where(ok, 1.0, np.nan)}, {}, {"model": "Follower"}, ok)
    grid.save(tmp_path / f"s.{kind}")
    read = bk.Sweep.load(tmp_path / f"s.{kind}")
    assert list(read.records) == ["mean"]
    assert read.ok.dtype == bool
    np.testing.assert_array_equal(read.ok, ok)
    assert grid.to_xarray()["ok"].dims == ("rate", "gain")


def test_a_file_without_it_is_read_by_its_records():
    mean, power = np.array([1.0, np.nan]), np.array([[1.0, 2.0], [3.0, np.nan]])
    grid = bk.Sweep({"C": np.array([1.0, 2.0])}, {"mean": mean, "power": power}, {"power": np.array([1.0, 2.0])}, {})
    assert grid.ok.tolist() == [True, False]


def test_pictures_leave_them_blank():
    pytest.importorskip("matplotlib")
    from brainmass_kernels import plots

    axes = {"rate": np.array([0.0, 1.0]), "gain": np.array([1.0, 2.0, 3.0])}
    ok = np.array([[True, False, True], [True, True, True]])
    grid = bk.Sweep(axes, {"n": np.ones((2, 3))}, {}, {"model": "m", "masses": 6, "duration": "1"}, ok)
    (values,) = plots._maps(grid).values()
    np.testing.assert_array_equal(np.isnan(u.get_magnitude(values)), ~ok)
    assert plots.sweep_figure(grid).axes


def test_a_record_of_that_name_is_refused():
    with pytest.raises(ValueError, match="take other names than 'ok'"):
        bk.sweep(Follower(), OVER, record={"ok": bk.Mean()}, **SWEEP)
