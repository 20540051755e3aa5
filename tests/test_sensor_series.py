"""Series at sensors as targets: names, noise of each channel, missing samples; and fits that go on from others."""

import dataclasses
from typing import Any

import brainunit as u
import jax.numpy as jnp
import numpy as np
import pytest
from test_fit_targets import Follower

import brainmass_kernels as bk
from brainmass_kernels.fitting import targets

N, STEPS, EVERY = 3, 120, 4
NAMES = ("Fz", "Cz", "Oz", "Pz")
GAINS = np.array([[1.0, 0.2, -0.3], [0.1, 0.9, 0.4], [-0.5, 0.3, 0.8], [0.6, -0.7, 0.2]])


def lead_field(gains=GAINS) -> bk.Readout:
    """In the precision of the test."""
    return bk.Readout(gains.astype(jnp.result_type(float)), of="eeg", unit=u.uvolt, sensors=NAMES)


EEG = lead_field()
TRUTH = np.array([2.0, 1.0, 3.0])
FREE = {"gain": (0.2, 5.0), "coupling.k": (0.02, 1.0)}


WAVE = np.sin(np.arange(STEPS) / 11.0)
WEIGHTS = np.array([[0.0, 0.5, 0.2], [0.5, 0.0, 0.7], [0.2, 0.7, 0.0]])
RUN: dict[str, Any] = {"duration": STEPS, "dt": 5 * u.ms, "every": EVERY, "transient": None}
OPTIONS = {**RUN, "scheme": None, "implementation": None}


def driven() -> dict[str, Any]:
    """In the precision of the test."""
    return {"drive": WAVE.astype(jnp.result_type(float)) * u.mV}


def network(gain: Any = 1.0, k: Any = 0.3):
    return bk.Network(Follower(gain=gain), WEIGHTS, source="eeg", target="drive", k=k)


def potentials(gain: Any = TRUTH, k: Any = 0.3) -> np.ndarray:
    """(K, sensors) in uV."""
    run = bk.simulate(network(gain, k), inputs=driven(), record={"eeg": lead_field()}, **RUN)
    return np.asarray(run["eeg"].mantissa)


@pytest.fixture(scope="module")
def seen() -> np.ndarray:
    clean = potentials()
    return clean + 0.02 * np.random.default_rng(0).standard_normal(clean.shape)


def compared(target, record: Any = EEG, model=None) -> Any:
    return targets.compare(target, model or network(), record, OPTIONS, (2.0, 40.0), False)


def fit(target, **changes):
    given = {"regional": "gain", "record": lead_field(), "realisations": 1, "starts": 2, "steps": 2, **RUN}
    given["inputs"] = driven()
    return bk.fit(network(), target, FREE, **(given | changes))


# How runs are compared ----------------------------------------------------------------------------------------------


def some_data(rng):
    """Two targets (2, 30, 4) in which other samples are missing, and runs (30, 1, 3, 2, 4)."""
    values = rng.normal(size=(2, STEPS // EVERY, 4)).cumsum(1)
    values[0, :, 1] = np.nan
    values[1, 5:12] = np.nan
    values[1, 20, 2] = np.nan
    return values, rng.normal(size=(STEPS // EVERY, 1, 3, 2, 4)).cumsum(0)


@pytest.mark.parametrize(("scale", "offset"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("sigma", [None, 0.4, np.array([0.2, 0.5, 1.0, 0.3])])
def test_errors_are_those_of_weighted_least_squares(scale, offset, sigma, x64):
    values, run = some_data(np.random.default_rng(1))
    given = None if sigma is None else sigma * u.uvolt
    target = bk.TimeSeries(values * u.uvolt, given, scale, offset, channels=NAMES, missing="mask")
    comparison = compared(target)
    error, nuisances = comparison.error(comparison.predict({"eeg": run}), comparison.data)
    errors = comparison.measure(error)
    sigmas = np.broadcast_to(0.1 if sigma is None else sigma, 4)
    weights = np.broadcast_to(np.mean(sigmas**-2.0) ** -0.5 / sigmas, values.shape[1:])
    for n in range(2):
        there = np.isfinite(values[n])
        w, y = weights[there], values[n][there]
        spread = np.std(w * y)
        for start in range(3):
            x = run[:, 0, start].mean(1)[there]
            columns = np.stack([w * x] * scale + [w] * offset, 1) if scale or offset else np.zeros((len(y), 0))
            known = w * y - (0.0 if scale else w * x)
            found = np.linalg.lstsq(columns, known)[0]
            want = np.sqrt(np.mean((columns @ found - known) ** 2)) / spread
            np.testing.assert_allclose(errors[n, start], want, rtol=1e-9)
            np.testing.assert_allclose([x[n, start] for x in nuisances.values()], found, rtol=1e-9)
    assert list(nuisances) == ["scale"] * scale + ["offset"] * offset
    assert comparison.absent.tolist() == [30, 4 * 7 + 1]


def test_a_baseline_is_taken_from_data_and_runs(x64):
    """So constants of channels count for nothing, and a model at rest stays at rest."""
    rng = np.random.default_rng(7)
    values, run = (
        rng.normal(size=(STEPS // EVERY, 4)).cumsum(0),
        rng.normal(size=(STEPS // EVERY, 1, 3, 2, 4)).cumsum(0),
    )
    values[:, 3] = np.nan
    target = bk.TimeSeries(values * u.uvolt, 0.3 * u.uvolt, missing="mask", baseline=100 * u.ms)
    comparison = compared(target)
    averaged = run[:, 0].mean(2)
    less = [x - x[:5].mean(0) for x in (values[:, :3], averaged[..., :3])]
    want = np.sqrt(np.mean((less[1] - less[0][:, None]) ** 2, (0, 2))) / np.std(less[0])
    target = dataclasses.replace(target, of=comparison.target.of)
    moved = dataclasses.replace(target, values=(values + np.array([1.0, -2.0, 3.0, 0.0])) * u.uvolt)
    for each, constant in ((comparison, 0.0), (compared(moved), np.array([5.0, 0.0, -7.0, 1.0]))):
        error = each.error(each.predict({"eeg": run + constant}), each.data)[0]
        np.testing.assert_allclose(each.measure(error)[0], want, rtol=1e-9)
    assert comparison.same(target)
    assert comparison.same(moved)
    assert not comparison.same(dataclasses.replace(target, values=2 * values * u.uvolt))
    rest = np.full_like(run, 3.0) + 1e-15 * rng.normal(size=run.shape)
    np.testing.assert_array_equal(comparison.predict({"eeg": rest}), 0.0)


def test_weights_that_are_equal_and_a_mask_of_nothing_change_no_bit():
    values, run = some_data(np.random.default_rng(2))
    values = np.nan_to_num(values)
    plain, masked, weighted = (
        compared(bk.TimeSeries(values * u.uvolt, sigma * u.uvolt, True, True, missing=missing))
        for sigma, missing in ((0.3, "error"), (0.3, "mask"), (np.full(4, 0.3), "mask"))
    )
    prediction = plain.predict({"eeg": run.astype(np.float32)})
    errors = [np.asarray(x.error(prediction, x.data)[0]) for x in (plain, masked, weighted)]
    np.testing.assert_array_equal(errors[0], errors[1])
    np.testing.assert_allclose(errors[0], errors[2], rtol=1e-5)
    assert plain.sigma == masked.sigma == pytest.approx(weighted.sigma, rel=1e-12)


def test_a_joint_target_counts_what_was_measured():
    values, run = some_data(np.random.default_rng(3))
    series = bk.TimeSeries(values[:1] * u.uvolt, 0.2 * u.uvolt, missing="mask")
    of_state = bk.TimeSeries(np.random.default_rng(4).normal(size=(STEPS // EVERY, N)) * u.mV, 0.5 * u.mV)
    record = {"erp": {"eeg": EEG}, "local": "x"}
    joint = compared(bk.Joint({"erp": series, "local": of_state}, {"erp": 3.0}), record)
    local = np.random.default_rng(5).normal(size=(STEPS // EVERY, 1, 3, 2, N))
    error, _ = joint.error(joint.predict({"erp": run, "local": local}), joint.data)
    there, averaged = np.isfinite(values[0]), run[:, 0].mean(2)
    erp = [np.mean((averaged[:, s] - values[0])[there] ** 2) / 0.2**2 for s in range(3)]
    own = [np.mean((local[:, 0, s].mean(1) - of_state.values.mantissa) ** 2) / 0.5**2 for s in range(3)]
    np.testing.assert_allclose(error[0], (3.0 * np.array(erp) + np.array(own)) / 4.0, rtol=1e-4)
    assert joint.recorded == {"erp": joint.parts["erp"].readout, "local": "x"}
    assert joint.absent.tolist() == [30]


def test_channels_are_sensors_by_their_names(seen):
    """In any order, and some of them; so the model at the truth is as near, whichever order they have."""
    order = [3, 0, 2]
    some = bk.TimeSeries(seen[:, order] * 1e-6 * u.volt, channels=[NAMES[k] for k in order])
    comparison = compared(some)
    assert comparison.readout.sensors == ("Pz", "Fz", "Oz")
    np.testing.assert_allclose(np.asarray(comparison.readout.matrix), GAINS[order], rtol=1e-6)
    at_truth = {"gain": TRUTH[None, None], "coupling.k": [0.3]}
    found = fit(some, starts=at_truth, steps=1)
    assert float(found.losses[0, 0, 0]) == pytest.approx(0.02 / np.std(seen[:, order]), rel=0.2)
    assert found.prediction.channels == some.channels
    assert u.get_unit(found.prediction.values) == u.uvolt


# Fits ---------------------------------------------------------------------------------------------------------------


def test_least_squares_go_on_from_gradients_and_have_errors_of_regions(seen, x64, tmp_path):
    """Of the best starts of a fit by gradients, with a value for each region; errors against finite differences."""
    sigmas = np.array([0.02, 0.03, 0.02, 0.04]) * u.uvolt
    holed = seen.copy()
    holed[3:9, 2] = np.nan
    target = bk.TimeSeries(holed * u.uvolt, sigmas, missing="mask")
    first = fit(target, starts=4, steps=3, implementation="scan")
    refined = fit(target, starts=first.places(2), steps=8, optimiser="levenberg_marquardt")
    assert refined.losses.shape[2] == 2
    assert float(refined.losses[0].min()) == pytest.approx(float(np.nanmin(first.state["best"])) ** 0.5, rel=0.05)
    errors, gain = refined.standard_errors(), np.asarray(refined.parameters["gain"])
    assert (np.abs(gain[0] - TRUTH) < 4 * np.asarray(errors["gain"][0])).all()
    values = [*gain[0], float(refined.parameters["coupling.k"][0])]
    weights, there = 0.02 / np.asarray(sigmas.mantissa), np.isfinite(holed)

    def weighted(values):
        return (potentials(np.array(values[:3]), values[3]) * weights)[there]

    steps = 1e-5 * np.eye(4)
    jacobian = np.stack([(weighted(values + h) - weighted(values - h)) / 2e-5 for h in steps], 1)
    away = weighted(values) - (holed * weights)[there]
    variance = away @ away / (len(away) - 4)
    want = np.sqrt(np.diag(variance * np.linalg.inv(jacobian.T @ jacobian)))
    got = [*np.asarray(errors["gain"])[0], float(errors["coupling.k"][0])]
    np.testing.assert_allclose(got, want, rtol=1e-3)
    assert np.abs(away @ jacobian).max() < 0.05 * np.sqrt(variance) * np.linalg.norm(jacobian, axis=0).max()
    refined.save(tmp_path / "fit.json")
    loaded = bk.Fit.load(tmp_path / "fit.json", network())
    again = loaded.standard_errors()["gain"]
    np.testing.assert_allclose(np.asarray(again), np.asarray(errors["gain"]), rtol=1e-6)


def test_a_fit_at_sensors_is_saved_and_resumed(seen, tmp_path):
    holed = seen.copy()
    holed[:, 0] = np.nan
    target = bk.TimeSeries(holed * u.uvolt, np.full(4, 0.02) * u.uvolt, channels=NAMES, missing="mask", of=lead_field(),
                           baseline=60 * u.ms)  # fmt: skip
    one = fit(target, record=None)
    one.save(tmp_path / "fit.json")
    loaded = bk.Fit.load(tmp_path / "fit.json", network())
    assert (loaded.target.channels, loaded.target.missing, loaded.target.of.sensors) == (NAMES, "mask", NAMES)
    np.testing.assert_allclose(np.asarray(loaded.target.of.matrix), GAINS, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(loaded.target.values.mantissa[0]), np.isnan(holed))
    np.testing.assert_array_equal(np.asarray(loaded.places(1)["gain"]), np.asarray(one.places(1)["gain"]))
    longer = fit(None, record=None, resume=loaded, steps=1, starts=None)
    assert len(longer.losses) == 3
    others = {
        "values": -holed * u.uvolt,
        "channels": NAMES[::-1],
        "of": lead_field(1.1 * GAINS),
    }  # fmt: skip
    for name, other in others.items():
        with pytest.raises(ValueError, match="a fit to another target"):
            fit(dataclasses.replace(target, **{name: other}), record=None, resume=loaded, starts=None)
    with pytest.raises(ValueError, match=r"'optimiser' is another.*give the fit as starts="):
        fit(None, record=None, resume=loaded, starts=None, optimiser="levenberg_marquardt")
    pytest.importorskip("matplotlib", reason="figures are in the extra `fit`")
    assert loaded.plot().get_axes()[0].get_ylabel() == "eeg at Cz (uV)"


# Where another fit starts -------------------------------------------------------------------------------------------


def test_places_are_the_best_of_each_start(seen):
    two = bk.TimeSeries(np.stack([seen, 0.8 * seen]) * u.uvolt)
    found = fit(two, starts=3, steps=2, shared="coupling.k")
    every, best = found.places(), np.asarray(found.state["best"])
    assert np.shape(every["gain"]) == (2, 3, N)
    assert np.shape(every["coupling.k"]) == (2, 3)
    order = np.argsort(best.mean(0))  # a value that both share binds their starts
    np.testing.assert_array_equal(np.asarray(found.places(2)["gain"]), np.asarray(every["gain"])[:, order[:2]])
    again = fit(two, starts=found, steps=1, shared="coupling.k")
    np.testing.assert_allclose(again.state["first"]["gain"], found.state["best_z"]["gain"][:, :1], atol=1e-4)
    np.testing.assert_allclose(again.losses[0] ** 2, best, rtol=1e-3)
    alone = fit(two, starts=3, steps=2)
    order = np.argsort(np.asarray(alone.state["best"]), 1)[:, :2]
    want = np.take_along_axis(np.asarray(alone.places()["gain"]), order[..., None], 1)
    np.testing.assert_array_equal(np.asarray(alone.places(2)["gain"]), want)
    for count, said in ((4, "'count' got 4, but the fit has 3 starts"), (0, "'count' got 0")):
        with pytest.raises(ValueError, match=said):
            found.places(count)


def test_starts_of_regions(seen):
    target = bk.TimeSeries(seen * u.uvolt)
    said = r"'starts' got shapes .*\(1, starts, 3\) of the regional "
    for gain in (np.ones((1, 2, 4)), np.ones((2, 2, 3)), np.ones((1, 3, 3))):
        with pytest.raises(ValueError, match=said):
            fit(target, starts={"gain": gain, "coupling.k": [0.1, 0.2]})
    with pytest.raises(ValueError, match="'starts' got gain = 9, outside of its bounds"):
        fit(target, starts={"gain": np.array([[[1.0, 9.0, 1.0]]]), "coupling.k": [0.1]})
    with pytest.raises(ValueError, match=r"takes .*of each$"):
        fit(target, starts={"gain": np.ones((1, 2, 3)), "coupling.k": [0.1, 0.2]}, regional=())


# What is refused ----------------------------------------------------------------------------------------------------

SOME = np.random.default_rng(0).normal(size=(STEPS // EVERY, 4))
BROKEN = np.where(np.arange(4) == 2, np.nan, SOME)

HOLED = np.where((np.arange(30) == 2)[:, None], np.nan, SOME)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (
            lambda: bk.TimeSeries(BROKEN, channels=NAMES),
            ValueError,
            "got 30 values .* not finite, of Oz; missing='mask'",
        ),
        (
            lambda: bk.TimeSeries(BROKEN * np.inf, channels=NAMES, missing="mask"),
            ValueError,
            "not finite, of Fz, Cz, Pz",
        ),
        (lambda: bk.TimeSeries(SOME, channels=NAMES, missing="drop"), ValueError, "'missing' of .* got 'drop'"),
        (lambda: bk.TimeSeries(SOME, channels=NAMES[:3]), ValueError, r"'channels' of .* got 3 names, .*\(30, 4\)"),
        (lambda: bk.TimeSeries(SOME[:, 0], channels=NAMES), ValueError, r"'channels' of .*shape \(30,\)"),
        (lambda: bk.TimeSeries(SOME, channels=("Fz",) * 4), ValueError, "'channels' of time series has Fz more than"),
        (lambda: bk.TimeSeries(SOME, channels="FzCz"), TypeError, "'channels' of .* got 'FzCz'"),
        (lambda: bk.TimeSeries(SOME, sigma=np.ones(3)), ValueError, r"'sigma' of .* got shape \(3,\)"),
        (lambda: bk.TimeSeries(SOME, sigma=np.array([1.0, 0.0, 1.0, 1.0])), ValueError, "'sigma' of .*positive"),
        (lambda: bk.TimeSeries(SOME, sigma=np.array([1.0, np.inf, 1.0, 1.0])), ValueError, "'sigma' of .*positive"),
        (lambda: bk.TimeSeries(SOME, of=GAINS), TypeError, "'of' of time series got ndarray, but takes a Readout"),
        (lambda: bk.TimeSeries(np.full((30, 4), np.nan), missing="mask"), ValueError, "over a range of 0"),
        (lambda: bk.TimeSeries(SOME, baseline=-1 * u.ms), ValueError, "'baseline' got -1.* takes a positive time"),
        (lambda: bk.TimeSeries(SOME, baseline=100), ValueError, "'baseline' got .*multiply it by its unit"),
    ],
)
def test_series_are_checked(make, error, said):
    with pytest.raises(error, match=said):
        make()


@pytest.mark.parametrize(
    ("target", "record", "error", "said"),
    [
        ({"values": SOME[:, :3]}, EEG, ValueError, r"shape \(1, 30, 3\), but this run records \(30, 4\) at 4 sensors"),
        ({"values": SOME * u.mV**2}, EEG, ValueError, "'values' got mV"),
        ({"channels": ("Fz", "Cz", "O1", "O2")}, EEG, ValueError, "'channels' of .* has O1, O2, which no sensor"),
        ({"values": np.stack([SOME, SOME * np.nan]), "missing": "mask"}, EEG, ValueError, "NaN alone in target 2"),
        ({"of": EEG.average_reference()}, EEG, ValueError, "'record' got Readout.* of another"),
        ({"of": EEG}, "x", ValueError, "'record' got 'x', but .* Readout of 'eeg'"),
        ({"baseline": 600 * u.ms}, EEG, ValueError, "'baseline' .* takes a part of the 30 records, 0.02 s apart"),
        ({"baseline": 5 * u.ms}, EEG, ValueError, "'baseline' .* takes a part of the 30 records"),
        ({"values": HOLED, "missing": "mask", "baseline": 80 * u.ms}, EEG, ValueError, "some were not measured"),
        ({}, bk.Readout(GAINS, of="y"), ValueError, "unknown record 'y'"),
        ({}, bk.Readout(GAINS, of=bk.Readout(np.eye(3))), TypeError, "takes one of an observable or a state"),
        ({}, bk.Readout(np.ones((4, 2))), ValueError, r"'matrix' .* \(4, 2\), of 2 regions, but the network has 3"),
        ({}, {"a": EEG, "b": EEG}, TypeError, "'record' got"),
    ],
)
def test_what_is_fitted_is_checked(target, record, error, said):
    series = bk.TimeSeries(**({"values": SOME, "sigma": None} | target))
    with pytest.raises(error, match=said):
        compared(series, record)


def test_one_mass_has_no_sensors():
    with pytest.raises(ValueError, match=r"what is fitted is one mass: it takes a bk\.Network"):
        bk.fit(Follower(), bk.TimeSeries(SOME), {"gain": (0.2, 5.0)}, record=EEG, inputs=driven(), **RUN)
