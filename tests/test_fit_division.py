"""Fits of many targets: in chunks, over devices, resumed within a step; the result is that of one whole run."""

import dataclasses
import json
import re
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from test_fit import FREQS, SHAKEN, Resonator, resonance

import brainmass_kernels as bk
from brainmass_kernels import grids
from brainmass_kernels.fitting import division, saved, targets
from brainmass_kernels.fitting.division import Division, Rows, a_lane
from brainmass_kernels.fitting.fit import fit
from brainmass_kernels.fitting.problem import Free, Pooling, Problem
from brainmass_kernels.fitting.steps import Plan, adam, evaluated, gradients_at, normal_equations_at
from brainmass_kernels.spectra import Spectrum

pytest.importorskip("llvmlite")

COUNT, STARTS, DEVICES = 5, 3, 8
SPECTRA = Spectrum(FREQS, np.stack([resonance(f0, 0.1) for f0 in (8.0, 9.0, 10.0, 11.0, 12.0)]), "five")
FREE: dict[str, Any] = {"f0": (6.0, 16.0), "damping": (0.03, 0.6)}
CALL: dict[str, Any] = {
    "noise": {"drive": 1.0 * SHAKEN}, "starts": STARTS, "steps": 3, "duration": 4 * u.second, "dt": 2 * u.ms,
    "realisations": 2, "background": False, "record": "eeg", "implementation": "numba",
}  # fmt: skip
LEAST_SQUARES = {"optimiser": "levenberg_marquardt"}
OPTIONS = [{}, LEAST_SQUARES]
_LEAST = pytest.param(LEAST_SQUARES, marks=pytest.mark.slow, id="least squares")
COMMUNICATION = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")

pytestmark = pytest.mark.filterwarnings("ignore:nothing improved")


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(grids, "SPLIT", False)


def five(**changes) -> bk.Fit:
    return fit(Resonator(), changes.pop("target", SPECTRA), FREE, **(CALL | changes))


def arrays(found: bk.Fit) -> dict[str, np.ndarray]:
    """All that a fit found."""
    return {
        "losses": found.losses, "rms": found.rms, "initial_rms": found.initial_rms, "best": found.best_start,
        "power": found.spectrum.power, "initial power": found.initial_spectrum.power, **found.nuisance,
        **{name: u.get_magnitude(x) for name, x in found.parameters.items()},
    }  # fmt: skip


def check_bits(found: bk.Fit, want: bk.Fit):
    for name, x in arrays(want).items():
        np.testing.assert_array_equal(arrays(found)[name], x, err_msg=name)


# --- chunks ---


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        pytest.param(1, {"prune": 2, "screen": 2 * COUNT * STARTS}, marks=pytest.mark.slow),
        pytest.param(1, {"prune": 2, **LEAST_SQUARES}, marks=pytest.mark.slow),
        pytest.param(2, LEAST_SQUARES, marks=pytest.mark.slow),
    ],
)
def test_chunks_have_the_bits_of_the_whole(size, options, one_device):
    """Of one target, or of two, two and one; with candidates, and with starts that are dropped."""
    check_bits(five(targets_at_once=size, **options), five(**options))


@pytest.mark.slow
def test_many_lanes_have_the_bits_of_the_whole():
    """Where XLA shares loops among threads, which changes the order of its sums."""
    targets = Spectrum(FREQS, np.repeat(SPECTRA.power, 10, 0)[:48], "many")
    free = {"be": (60.0, 150.0), "bi": (30.0, 80.0), "C": (80.0, 300.0)}
    noise = {"E_inp": 2 * u.Hz * u.second**0.5}
    problem = problem_of(targets, 4, model=bk.JansenRit(), free=free, noise=noise)
    rng, keys = np.random.default_rng(0), problem.keys(jax.random.key(0))
    z = {name: rng.normal(size=(48, 64)).astype(np.float32) for name in free}
    whole, *parts = (
        rows.without_repeats(gradients_at(problem, rows.of(z), keys, rows.of(problem.comparison.data)))
        for size in (48, 12)
        for rows in Division(48, size).chunks()
    )
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda *x: np.concatenate(x), *parts), whole)


@pytest.mark.slow
def test_a_target_is_fitted_as_if_it_were_alone(one_device):
    together, alone = five(), five(target=Spectrum(FREQS, SPECTRA.power[3:4], "one"))
    np.testing.assert_array_equal(together.losses[:, 3], alone.losses[:, 0])
    np.testing.assert_array_equal(together.rms[3], alone.rms[0])


@pytest.mark.slow
def test_chunks_of_series_have_the_bits_of_the_whole(one_device):
    drive = {"drive": np.random.default_rng(1).normal(0, 1, 200).astype(np.float32) * u.mV}
    series = np.stack([
        bk.simulate(Resonator(f0=f * u.Hz), 200, 2 * u.ms, inputs=drive, every=5, record="eeg")["eeg"].mantissa
        for f in (8.0, 9.0, 11.0)
    ])  # fmt: skip
    call = CALL | {"noise": None, "inputs": drive, "duration": 200, "transient": None, "realisations": 1}
    for options in OPTIONS:
        whole, chunked = (
            fit(Resonator(), bk.TimeSeries(series), FREE, targets_at_once=size, **(call | options)) for size in (3, 2)
        )
        np.testing.assert_array_equal(chunked.losses, whole.losses)
        np.testing.assert_array_equal(chunked.rms, whole.rms)


@pytest.mark.slow
def test_standard_errors_and_profiles_are_computed_in_chunks(one_device, monkeypatch):
    found = five()
    errors, profile = found.standard_errors(), found.profile("f0", [8.0, 10.0], steps=1)
    sizes = []
    chunks = Division.chunks
    monkeypatch.setattr(division, "_ON_CPU", 1)
    monkeypatch.setattr(Division, "chunks", lambda self, *begin: sizes.append(self.size) or chunks(self, *begin))
    for name, x in found.standard_errors().items():
        np.testing.assert_array_equal(u.get_magnitude(x), u.get_magnitude(errors[name]))
    np.testing.assert_array_equal(found.profile("f0", [8.0, 10.0], steps=1).rms, profile.rms)
    assert set(sizes) == {1}


POOLED = {"shared": "f0", "group": {"damping": 0.1}, "priors": {"f0": (9.0, 1.0), "damping": (0.2, 0.1)}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        (3, LEAST_SQUARES),
        (1, {"prune": 2, "screen": 2 * COUNT * STARTS}),
    ],
)
def test_chunks_of_targets_that_depend_on_each_other_have_the_bits_of_the_whole(size, options, one_device):
    """Sums over targets and the mean of the group are of all targets, whatever the chunks."""
    whole, chunked = five(**POOLED, **options), five(targets_at_once=size, **POOLED, **options)
    check_bits(chunked, whole)
    assert len(np.unique(u.get_magnitude(chunked.parameters["f0"]))) == 1


def test_targets_that_depend_on_each_other_are_divided_as_others(one_device, monkeypatch):
    problem = problem_of(SPECTRA, 2)
    plan = problem.plan(jax.random.key(0))
    monkeypatch.setattr(division, "_ON_CPU", int(2.5 * a_lane(problem, plan, False) * STARTS * 2))
    ties = {"apart": Pooling(), "some": Pooling(shared=("f0",), group=(("damping", 0.1),))}
    ties["all"] = Pooling(shared=("f0", "damping"))
    sizes = {
        name: division.divide(dataclasses.replace(problem, pooling=tie), plan, STARTS, False).size
        for name, tie in ties.items()
    }
    assert sizes == {"apart": 2, "some": 2, "all": COUNT}


def test_targets_that_share_every_value_are_one_run():
    with pytest.raises(ValueError, match="'targets_at_once' got 2, but all free values are shared: one run"):
        five(targets_at_once=2, shared=("f0", "damping"))
    with pytest.raises(ValueError, match="'targets_at_once' got 0"):
        five(targets_at_once=0)


@pytest.mark.slow
@pytest.mark.parametrize("least_squares", [False, True])
def test_what_is_found_of_pooled_targets_is_the_derivative_of_the_objective(least_squares, one_device, x64):
    """Against one program of all targets, as it was before there were chunks of them."""
    problem = dataclasses.replace(problem_of(SPECTRA, 2), pooling=Pooling(
        priors=(("f0", 9.0, 1.0), ("damping", 0.2, 0.1)), group=(("damping", 0.1),), shared=("f0",)
    ))  # fmt: skip
    rng, keys, data = np.random.default_rng(0), problem.keys(jax.random.key(0)), problem.comparison.data
    z = {"f0": rng.normal(size=(1, STARTS)), "damping": rng.normal(size=(COUNT, STARTS))}
    z = {name: jnp.asarray(x) for name, x in z.items()}
    plan = Plan("levenberg_marquardt" if least_squares else adam(), Division(COUNT, 2), 1)
    found = evaluated(problem, plan, z, keys)
    whole = (normal_equations_at if least_squares else gradients_at)(problem, z, keys, data)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8), found, whole)


def test_the_last_chunk_repeats_its_last_target():
    rows = list(Division(5, 3).chunks())
    assert [(r.start, r.stop) for r in rows] == [(0, 3), (3, 5)]
    data = np.arange(5.0)[:, None]
    np.testing.assert_array_equal(rows[1].of(data)[:, 0], [3.0, 4.0, 4.0])
    np.testing.assert_array_equal(rows[1].without_repeats(rows[1].of(data))[:, 0], [3.0, 4.0])
    # One row of all targets stays; what is left of a step that was interrupted begins where that ended.
    np.testing.assert_array_equal(rows[1].of(data[:1]), data[:1])
    np.testing.assert_array_equal(Rows(3, 5, 5).of(data)[:, 0], [3.0, 4.0, 4.0, 4.0, 4.0])


# --- memory ---


def problem_of(target, realisations: int, record: str = "eeg", model: Any = None, free=FREE, noise=None) -> Problem:
    options = {
        "duration": 4 * u.second, "dt": 2 * u.ms, "every": 5, "transient": 1 * u.second, "scheme": None,
        "implementation": "numba",
    }  # fmt: skip
    model = Resonator() if model is None else model
    comparison = targets.compare(target, model, record, options, (2.0, 40.0), True)
    unit = {"f0": u.Hz, "be": u.Hz, "bi": u.Hz}
    frees = tuple(Free(name, *bounds, unit.get(name, u.UNITLESS)) for name, bounds in free.items())
    noise = {"drive": 1.0 * SHAKEN} if noise is None else noise
    return Problem(model, {}, noise, frees, comparison, realisations, comparison.recorded, options)


def network_problem(band=None) -> Problem:
    network = bk.Network(bk.Hopf(a=-0.05, w=0.6), np.full((4, 4), 0.1), source="x", target="x_inp", k=0.3)
    target = bk.Connectivity(np.stack([0.5 + 0.5 * np.eye(4)] * 3), band=band)
    return problem_of(target, 2, "x", network, {"coupling.k": (0.05, 3.0)}, {"x_inp": 0.1 * u.ms**0.5})


SERIES = bk.TimeSeries(np.random.default_rng(0).normal(0, 1, (4, 300)) * u.mV, scale=True, offset=True)
PROBLEMS = {
    "spectra": lambda: problem_of(SPECTRA, 4),
    "series": lambda: problem_of(SERIES, 1),
    "series of many realisations": lambda: problem_of(SERIES, 8),
    "connectivity": network_problem,
    "connectivity of amplitudes": lambda: network_problem((8.0, 12.0)),
}
QUICK = ("series", False)
STEPS = [(name, least) for name in PROBLEMS for least in (False, True)]


@pytest.mark.parametrize(
    ("name", "least_squares"), [pytest.param(*x, marks=[pytest.mark.slow] * (x != QUICK)) for x in STEPS]
)
def test_the_estimate_of_memory_is_that_of_the_compiled_step(name, least_squares):
    problem, key, starts = PROBLEMS[name](), jax.random.key(0), 16
    function = normal_equations_at if least_squares else gradients_at
    z = {f.name: jnp.zeros((problem.comparison.count, starts)) for f in problem.frees}
    compiled = function.lower(problem, z, problem.keys(key), problem.comparison.data).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes
    lanes = problem.comparison.count * starts * problem.realisations
    # Forward mode stores less of a transform than a gradient does.
    most = 2.5 if least_squares and "amplitudes" in name else 1.9
    assert 0.6 < a_lane(problem, problem.plan(key), least_squares) * lanes / needed < most


@pytest.mark.parametrize(
    ("count", "most", "devices", "size"),
    [(1000, 400, 1, 334), (10, 3, 1, 3), (10, 10, 8, 10), (100, 30, 8, 24), (9, 5, 8, 5)],
)
def test_chunks_are_even_and_divide_among_devices(count, most, devices, size):
    assert division._even(count, most, devices) == size <= most


def test_the_chunk_is_chosen_so_that_it_fits(one_device, monkeypatch):
    sizes, whole, choose = [], five(), division.divide

    def chosen(problem, plan, starts, least_squares, targets_at_once=None):
        monkeypatch.setattr(division, "_ON_CPU", int(2.5 * a_lane(problem, plan, least_squares) * starts * 2))
        sizes.append(choose(problem, plan, starts, least_squares, targets_at_once).size)
        return choose(problem, plan, starts, least_squares, targets_at_once)

    monkeypatch.setattr("brainmass_kernels.fitting.fit.divide", chosen)
    check_bits(five(), whole)
    assert sizes == [2]


# --- checkpoints ---


class Stop(Exception):
    pass


_POOLED = [pytest.param(POOLED, marks=pytest.mark.slow, id="pooled")]
_POOLED += [pytest.param(POOLED | LEAST_SQUARES, marks=pytest.mark.slow, id="pooled least squares")]


@pytest.mark.parametrize("options", [pytest.param({}, id="gradients"), _LEAST, *_POOLED])
def test_a_fit_resumes_at_the_chunk_that_was_interrupted(options, one_device, monkeypatch, tmp_path):
    """Of three chunks a step, the second of the second step; what is done is not done again."""
    path, whole, call, calls = tmp_path / "fit.part.json", five(**options), Division.call, []
    function = normal_equations_at if "optimiser" in options else gradients_at

    def counted(self, which, problem, z, *rest):
        if which is function:
            if len(calls) == 4 and not path.with_suffix(".stopped").exists():
                path.with_suffix(".stopped").touch()
                raise Stop
            calls.append(z["f0"].shape[0])
        return call(self, which, problem, z, *rest)

    monkeypatch.setattr(Division, "call", counted)
    # Each chunk is written, however long that takes.
    monkeypatch.setattr(saved, "_APART", 0.0)
    with pytest.raises(Stop):
        five(targets_at_once=2, checkpoint=path, **options)
    file = json.loads(path.read_text())
    assert (len(file["losses"]), len(file["part"]["error"])) == (1, 2)
    calls.clear()
    # The rest of the step in chunks of three, then a whole step.
    resumed = five(targets_at_once=3, checkpoint=path, **options)
    assert calls == [3, 3, 3]
    check_bits(resumed, whole)


def test_a_checkpoint_of_an_earlier_version_is_read(one_device, tmp_path):
    path = tmp_path / "fit.part.json"
    whole = five()
    five(checkpoint=path, progress=lambda report: report.step == 1)
    file = json.loads(path.read_text())
    assert "part" not in file
    del file["call"], file["checksum"]
    path.write_text(json.dumps(file))
    check_bits(five(checkpoint=path, targets_at_once=2), whole)


# --- devices ---


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))


@pytest.mark.parametrize("options", [pytest.param({}, id="gradients"), _LEAST, _POOLED[0]])
def test_targets_lie_on_all_devices_with_the_bits_of_one(options, monkeypatch):
    """Of more targets than starts, each device has some; three of the eight repeat the last."""
    over_all = five(**options)
    monkeypatch.setattr(grids, "SPLIT", False)
    check_bits(over_all, five(**options))


@pytest.mark.slow
def test_starts_lie_on_all_devices(monkeypatch):
    """Of one target; XLA compiles the comparison anew for the starts of a device."""
    one = {"target": Spectrum(FREQS, SPECTRA.power[:1], "one"), "starts": 6, "steps": 2}
    over_all = five(**one)
    monkeypatch.setattr(grids, "SPLIT", False)
    alone = five(**one)
    np.testing.assert_allclose(over_all.losses, alone.losses, rtol=1e-4)
    np.testing.assert_allclose(over_all.rms, alone.rms, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_fit_lies_on_the_mesh_that_is_set(kind, monkeypatch):
    """All its axes share the lanes; outside of it nothing has changed."""
    monkeypatch.setattr(grids, "SPLIT", False)
    alone, divisions, call = five(), [], Division.call
    monkeypatch.setattr(Division, "call", lambda self, *rest: divisions.append(self) or call(self, *rest))
    with jax.set_mesh(mesh_of(kind)):
        check_bits(five(), alone)
        assert jax.sharding.get_mesh() == mesh_of(kind)
    assert {d.mesh.size for d in divisions} == {DEVICES}


@pytest.mark.slow
def test_a_fit_lies_on_the_devices_of_its_targets(monkeypatch):
    monkeypatch.setattr(grids, "SPLIT", False)
    drive = {"drive": np.sin(np.arange(100) / 5).astype(np.float32) * u.mV}
    values = np.stack([np.sin(np.arange(20) / k).astype(np.float32) for k in range(1, 9)])
    call = CALL | {"noise": None, "inputs": drive, "duration": 100, "transient": None, "realisations": 1, "steps": 1}
    place = jax.NamedSharding(mesh_of(), jax.P(("a", "b")))
    divisions, run = [], Division.call
    monkeypatch.setattr(Division, "call", lambda self, *rest: divisions.append(self) or run(self, *rest))
    over_all, alone = (
        fit(Resonator(), bk.TimeSeries(x * u.mV), FREE, **call) for x in (jax.device_put(values, place), values)
    )
    assert {d.mesh and d.mesh.size for d in divisions} == {DEVICES, None}
    np.testing.assert_array_equal(over_all.losses, alone.losses)
    np.testing.assert_array_equal(over_all.rms, alone.rms)


@pytest.mark.parametrize(("count", "axis"), [pytest.param(5, 0, marks=pytest.mark.slow), (1, 1)])
def test_a_step_gathers_nothing(count, axis):
    """The devices tell each other nothing, and each has some of the lanes."""
    problem = problem_of(Spectrum(FREQS, SPECTRA.power[:count], "some"), 2)
    z = {f.name: jnp.zeros((count, STARTS if count > 1 else 16)) for f in problem.frees}
    shared = Division(count, count, division._mesh(jax.devices()))
    arguments = shared._arguments(problem, z, problem.keys(jax.random.key(0)), (problem.comparison.data,))
    assert arguments[2] == axis
    text = division._over_devices.lower(gradients_at, *arguments).compile().as_text()
    assert not COMMUNICATION.findall(text)
    place = arguments[-3]["f0"]
    assert place.sharding.shard_shape(place.shape) == ((1, STARTS) if axis == 0 else (1, 2))
