"""What is kept in files: whole or not at all, known when damaged, and read back as it was."""

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import files, identity, plots, routing, sweep_files, units
from brainmass_kernels.fitting import saved as fitting

GRID = bk.Sweep(
    {"E_inp": np.array([1.0, 2.0, 3.0]) * u.Hz, "C": np.array([1.0, 2.0])},
    {
        "eeg_mean": np.arange(6, dtype=np.float32).reshape(3, 2) / 7 * u.mV,
        "count": np.arange(6, dtype=np.int32).reshape(3, 2),
        "power": np.where(np.arange(12) == 5, np.nan, 1.5).astype(np.float32).reshape(2, 3, 2) * u.mV**2 / u.Hz,
    },
    {"power": np.array([4.0, 5.0]) * u.Hz},
    {"model": "JansenRit", "masses": 6, "duration": "1 s", "dt": "1 ms", "implementation": "scan"},
)
NAMES = ("grid.npz", "grid.nc", "grid.zarr")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def needed(name: str):
    if not name.endswith(".npz"):
        pytest.importorskip("xarray")
        pytest.importorskip("zarr" if name.endswith(".zarr") else "scipy")


def left() -> list[str]:
    return sorted(os.listdir())


def same(got: bk.Sweep, want: bk.Sweep) -> bool:
    """To the last bit, and with the same units."""
    groups = [(getattr(got, g), getattr(want, g)) for g in ("axes", "records", "record_axes")]
    pairs = [(a[n], b[n]) for a, b in groups for n in b]
    equal = (np.array_equal(u.get_magnitude(a), u.get_magnitude(b), equal_nan=True) for a, b in pairs)
    alike = (units.unit_of(a) == units.unit_of(b) for a, b in pairs)
    return all(list(a) == list(b) for a, b in groups) and all(equal) and all(alike) and got.about == want.about


# --- written whole or not at all ---


class TestReplacing:
    def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_keeps_its_own(self, elsewhere):
        before = os.umask(0o027)
        try:
            files.write_text("new.txt", "a")
        finally:
            os.umask(before)
        assert os.stat("new.txt").st_mode & 0o777 == 0o640
        os.chmod("new.txt", 0o604)
        files.write_text("new.txt", "b")
        assert os.stat("new.txt").st_mode & 0o777 == 0o604
        assert Path("new.txt").read_text() == "b"

    def test_a_link_stays_a_link(self, elsewhere):
        Path("store").mkdir()
        os.symlink("store/kept.txt", "here.txt")
        for text in ("first", "second"):
            files.write_text("here.txt", text)
            assert os.path.islink("here.txt")
            assert Path("store/kept.txt").read_text() == text
        assert left() == ["here.txt", "store"]
        assert os.listdir("store") == ["kept.txt"]

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_what_fails_leaves_nothing_and_the_old_file_whole(self, elsewhere, error):
        Path("kept.txt").write_text("old")

        def fails():
            with files.replacing("kept.txt") as aside:
                aside.write_text("half of")
                raise error

        with pytest.raises(type(error)):
            fails()
        assert left() == ["kept.txt"]
        assert Path("kept.txt").read_text() == "old"

    def test_a_folder_takes_the_place_of_a_folder(self, elsewhere):
        for text in ("first", "second"):
            with files.replacing("store", folder=True) as aside:
                (aside / f"{text}.txt").write_text(text)
        assert os.listdir("store") == ["second.txt"]
        assert left() == ["store"]

    def test_a_path_is_checked_before_anything_is_run(self, elsewhere):
        Path("folder.npz").mkdir()
        with pytest.raises(ValueError, match=r"'out' got absent/a\.npz, but there is no folder"):
            files.absolute("absent/a.npz", "out")
        with pytest.raises(ValueError, match=r"'out' got folder\.npz, which is a folder"):
            files.absolute("folder.npz", "out")

    def test_one_run_at_a_time_has_a_folder(self, elsewhere):
        folder = elsewhere / "parts"
        with files.exclusive(folder):
            with pytest.raises(ValueError, match="parts is being written by another run"), files.exclusive(folder):
                pass
            os.rename(folder, elsewhere / "gone")
            # What was moved away no longer counts.
            with files.exclusive(folder):
                pass
        with files.exclusive(folder):
            pass


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_that_cannot_be_written_leaves_the_old_one(elsewhere, name, monkeypatch):
    needed(name)
    GRID.save(name)
    kind = Path(name).suffix
    write = sweep_files._writer(name)

    def half(found, path):
        write(found, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep_files, "_writer", lambda *_: half)
    with pytest.raises(OSError, match="No space left"):
        bk.Sweep({"C": np.arange(2.0)}, {"x": np.arange(2.0)}, {}, {}).save(name)
    assert left() == [f"grid{kind}"]
    assert same(bk.Sweep.load(name), GRID)


def test_a_folder_that_is_no_zarr_store_is_not_replaced(elsewhere):
    needed("grid.zarr")
    Path("grid.zarr").mkdir()
    Path("grid.zarr/notes.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"'path' got grid\.zarr, which is a folder, and no Zarr store"):
        GRID.save("grid.zarr")
    assert os.listdir("grid.zarr") == ["notes.txt"]


def test_a_sweep_keeps_the_link_that_it_is_saved_through(elsewhere):
    Path("store").mkdir()
    os.symlink("store/kept.npz", "grid.npz")
    bk.sweep(bk.VanDerPol(), {"mu": np.array([0.5, 1.0])}, 10, 0.1 * u.ms, out="grid.npz", **PLAIN)
    assert os.path.islink("grid.npz")
    assert left() == ["grid.npz", "store"]
    assert os.listdir("store") == ["kept.npz"]
    assert bk.Sweep.load("grid.npz").shape == (2,)


def test_a_figure_is_written_whole(elsewhere):
    pytest.importorskip("matplotlib")
    plots.save(GRID.plot(), "grid")
    assert left() == ["grid.png"]
    with pytest.raises(ValueError, match="format"):
        plots.save(GRID.plot(), "grid.unheard")
    assert left() == ["grid.png"]


# --- damaged ---


def flipped(path: Path, count: int):
    """A file with one bit changed, ``count`` times at places all over it."""
    whole = path.read_bytes()
    for place in np.unique(np.linspace(0, len(whole) - 1, count).astype(int)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (int(place) * 5) % 8
        path.write_bytes(changed)
        yield place
    path.write_bytes(whole)


def outcome(call, *arguments, **more):
    """What a call returns, or None and what its ValueError says."""
    try:
        return call(*arguments, **more), ""
    except ValueError as error:
        return None, str(error)


def cut(path: Path):
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        yield length
    path.write_bytes(whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_sweep_is_refused_or_whole(elsewhere, name):
    needed(name)
    GRID.save(name)
    assert same(bk.Sweep.load(name), GRID)
    inside = [Path(name)] if Path(name).is_file() else [p for p in Path(name).rglob("*") if p.is_file()]
    refused = 0
    for path in inside:
        for place in itertools.chain(flipped(path, 160 // len(inside)), cut(path)):
            found, said = outcome(bk.Sweep.load, name)
            refused += found is None
            if found is None:
                assert said.startswith(f"{name}: not a sweep saved by this brainmass_kernels, or damaged")
                assert "run the sweep again" in said
            else:
                assert same(found, GRID), f"byte {place} of {path}"
    assert refused > 80


def test_a_zarr_that_lacks_a_part_is_refused(elsewhere):
    needed("grid.zarr")
    GRID.save("grid.zarr")
    parts = [p for p in Path("grid.zarr/eeg_mean").rglob("*") if p.is_file() and p.name != "zarr.json"]
    parts[0].unlink()
    with pytest.raises(ValueError, match=r"grid\.zarr: .*checksum"):
        bk.Sweep.load("grid.zarr")


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_of_before_there_were_checksums_is_read(elsewhere, name, monkeypatch):
    needed(name)
    monkeypatch.setattr(files, "CHECKSUM", "told nothing")
    GRID.save(name)
    monkeypatch.undo()
    os.chdir(elsewhere)
    assert same(bk.Sweep.load(name), GRID)


def test_a_document_tells_when_it_is_damaged(elsewhere):
    document = {"losses": [0.1, 1e-7, None], "name": "alpha", "steps": 3, "nested": {"a": [1, 2.5]}}
    files.write_document("a.json", document)
    assert files.read_document("a.json") == document
    refused = 0
    for _ in itertools.chain(flipped(Path("a.json"), 10_000), cut(Path("a.json"))):
        found, _ = outcome(files.read_document, "a.json")
        refused += found is None
        if found is not None:
            # The name of the checksum itself was hit, or a space.
            assert {n: x for n, x in found.items() if n in document} == document
    assert refused > 150
    Path("a.json").write_text(json.dumps(document))
    assert files.read_document("a.json") == document


# --- chunks of an interrupted sweep ---

PLAIN: dict[str, Any] = {"record": [bk.Mean()], "implementation": "scan"}
MU = np.linspace(0.2, 0.8, 6)


def stopped(**changes):
    """A sweep that was stopped after two of its three chunks."""
    told = []

    def stop(line):
        told.append(line)
        if len(told) == 2:
            raise KeyboardInterrupt

    arguments = {"model": bk.VanDerPol(), "over": {"mu": MU}, "duration": 20, "dt": 0.5 * u.ms, "out": "grid.npz"}
    arguments |= {"chunk": 2, **PLAIN, **changes}
    with pytest.raises(KeyboardInterrupt):
        bk.sweep(**arguments, progress=stop)
    return arguments


def test_damaged_chunks_are_refused_with_what_to_do(elsewhere):
    arguments = stopped()
    whole = bk.sweep(**{**arguments, "out": None})
    chunk = Path("grid.npz.parts/chunk000001.npz")
    for place in itertools.chain(flipped(chunk, 25), cut(chunk)):
        found, said = outcome(bk.sweep, **arguments)
        if found is None:
            assert said.startswith("chunk000001.npz: not part of an interrupted sweep, or damaged")
            assert f"delete {elsewhere / chunk}" in said
        else:
            # What was hit says nothing, and the sweep has ended.
            assert same(found, whole), f"byte {place}"
            Path("grid.npz").unlink()
            stopped()
    Path("grid.npz.parts/chunk000000.npz").replace(chunk)
    with pytest.raises(ValueError, match=r"chunk000001\.npz: .*it is of another sweep"):
        bk.sweep(**arguments)
    chunk.unlink()
    assert same(bk.sweep(**arguments), whole)
    assert left() == ["grid.npz"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', '{"format": "brainmass_kernels sweep"'])
def test_a_damaged_manifest_is_refused_with_what_to_do(elsewhere, text):
    arguments = stopped()
    Path("grid.npz.parts/sweep.json").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.json: not part of an interrupted sweep, or damaged.*delete .*parts"):
        bk.sweep(**arguments)


def test_chunks_without_a_manifest_or_of_an_earlier_format_are_no_ones(elsewhere):
    arguments = stopped()
    manifest = Path("grid.npz.parts/sweep.json")
    manifest.write_text('{"format": "brainmass_kernels sweep", "digest": "0123456789abcdef01234567"}')
    with pytest.raises(ValueError, match="chunks of another version of brainmass_kernels: delete"):
        bk.sweep(**arguments)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"holds chunks, but no sweep\.json"):
        bk.sweep(**arguments)


@pytest.mark.parametrize("removed", [0, 1, 2, 3, 4])
def test_a_stop_while_chunks_are_removed_leaves_nothing_for_another_sweep(elsewhere, monkeypatch, removed):
    arguments = stopped()
    unlink, count = os.unlink, itertools.count()

    def interrupted(*given, **more):
        # Only a whole folder is removed so.
        if "dir_fd" in more and next(count) == removed:
            raise KeyboardInterrupt
        unlink(*given, **more)

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bk.sweep(**arguments)
    monkeypatch.setattr(os, "unlink", unlink)
    other = {**arguments, "over": {"mu": MU + 1.0}}
    found = bk.sweep(**other)
    assert same(found, bk.sweep(**{**other, "out": None}))
    assert same(bk.Sweep.load("grid.npz"), found)
    assert left() == ["grid.npz"]


def test_a_sweep_that_reads_otherwise_than_it_was_written_keeps_its_chunks(elsewhere, monkeypatch):
    arguments = stopped()
    save = bk.Sweep.save

    def wrong(found, path):
        if len(found.axes["mu"]) > 1:
            found = bk.Sweep(found.axes, {n: x + 1 for n, x in found.records.items()}, found.record_axes, found.about)
        save(found, path)

    monkeypatch.setattr(bk.Sweep, "save", wrong)
    with pytest.raises(OSError, match="its chunks are kept"):
        bk.sweep(**arguments)
    monkeypatch.setattr(bk.Sweep, "save", save)
    assert len(list(Path("grid.npz.parts").glob("chunk*.npz"))) == 3
    assert same(bk.sweep(**arguments), bk.sweep(**{**arguments, "out": None}))


def test_a_relative_path_is_the_same_file_after_a_change_of_folder(elsewhere):
    Path("other").mkdir()
    arguments = {"model": bk.VanDerPol(), "over": {"mu": MU}, "duration": 20, "dt": 0.5 * u.ms, "chunk": 2, **PLAIN}
    bk.sweep(**arguments, out="grid.npz", progress=lambda _: os.chdir(elsewhere / "other"))
    assert sorted(os.listdir(elsewhere)) == ["grid.npz", "other"]
    assert os.listdir(elsewhere / "other") == []


def test_a_sweep_whose_folder_vanished_says_so(elsewhere):
    Path("store").mkdir()
    arguments = {"model": bk.VanDerPol(), "over": {"mu": MU}, "duration": 20, "dt": 0.5 * u.ms, "chunk": 2, **PLAIN}
    with pytest.raises(FileNotFoundError, match=r"store/grid\.npz\.parts"):
        bk.sweep(**arguments, out="store/grid.npz", progress=lambda _: os.rename("store", "moved"))


# --- names and units ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("record", ["a/b", "mu", "", "..", "__x", "string", " x", "x ", "a\nb", "x_axis"])
def test_names_that_a_file_cannot_hold_are_refused_before_the_first_chunk(elsewhere, name, record):
    needed(name)
    told = []
    with pytest.raises(ValueError, match=r"'record' got the name"):
        bk.sweep(
            bk.VanDerPol(), {"mu": MU}, 20, 0.5 * u.ms, record={record: bk.Mean(), "x": "x"}, out=name,
            implementation="scan", progress=told.append,
        )  # fmt: skip
    assert not told
    assert not left()


@pytest.mark.parametrize("name", NAMES)
def test_other_names_are_held(elsewhere, name):
    needed(name)
    record = {"alpha-power": bk.Mean(), "1st": bk.Maximum(), "größe": bk.Minimum(), "a b.c": "x"}
    arguments = {"record": record, "implementation": "scan"}
    found = bk.sweep(bk.VanDerPol(), {"mu": MU[:2]}, 20, 0.5 * u.ms, out=name, **arguments)
    assert same(bk.Sweep.load(name), found)


UNITS = [
    u.uvolt, u.volt, u.ftesla, u.nA * u.meter, u.mV**2 / u.Hz, u.mV * u.second**0.5, u.UNITLESS / u.second / u.mV,
    u.uF / u.cm**2, u.mV / u.volt, u.mV * u.ms / u.second, u.minute, u.pA * u.ms, u.radian, u.mV ** (1 / 3), u.UNITLESS,
    u.siemens / u.cm**2, u.khertz, u.mmolar, u.nS * u.mV, u.degree if hasattr(u, "degree") else u.radian,
]  # fmt: skip


def test_every_unit_that_is_printed_is_read():
    every = [x for x in vars(u).values() if isinstance(x, u.Unit)]
    assert len(every) > 1000
    # As a strength per ms has it, which is printed as kHz once it was read.
    inverse = routing.quantities(bk.Network(bk.Hopf(), np.ones((2, 2)), source="x", k=0.1), {}, {})["coupling.k"][0]
    for unit in [*every, *UNITS, inverse, u.UNITLESS / u.mV, u.UNITLESS / u.ms]:
        assert units.parsed(str(unit)) == unit
        assert units.lasting(units.parsed(str(unit))) == units.lasting(unit)
        assert units.reads(str(unit), unit)
    assert not units.reads("Hz", u.mV)
    assert not units.reads("no unit", u.mV)


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_keeps_any_unit(elsewhere, name):
    needed(name)
    records = {f"r{i}": units.attach(np.arange(2.0), unit) for i, unit in enumerate(UNITS)}
    grid = bk.Sweep({"C": np.arange(2.0)}, records, {}, {})
    grid.save(name)
    assert same(bk.Sweep.load(name), grid)


@pytest.mark.parametrize("unit", [u.uvolt, u.volt, u.ftesla, u.nA * u.meter, u.mV**2 / u.Hz, u.UNITLESS])
def test_a_target_keeps_any_unit(unit):
    target = bk.TimeSeries(units.attach(np.arange(4.0)[None], unit), scale=True)
    saved = json.loads(json.dumps(fitting.encode_target(target)))
    read = fitting._decode_target(saved, units.parsed(saved["unit"]))
    assert units.unit_of(read.values) == unit
    np.testing.assert_array_equal(u.get_magnitude(read.values), u.get_magnitude(target.values))


# --- models that were made ---


def made() -> dict[str, Any]:
    second_order = bk.coloured(bk.JansenRit(C=np.array([120.0, 135.0])), "E_inp", tau=10 * u.ms)
    bold = bk.with_bold(bk.VanDerPol(), "x")
    both = bk.with_bold(bk.coloured(bk.Hopf(a=np.array([0.1, 0.2])), "x_inp", tau=10 * u.ms), "x")
    twice = bk.coloured(bk.coloured(bk.Hopf(), "x_inp", tau=10 * u.ms), "y_inp", tau=5 * u.ms)
    coupled = {"source": "x", "target": "x_inp", "k": 0.3, "delays": 2 * np.ones((2, 2)) * u.ms}
    network = bk.Network(both, np.array([[0.0, 1.0], [0.5, 0.0]]), **coupled)
    return {"second order": second_order, "bold": bold, "both": both, "twice": twice, "network": network}


def run_of(model) -> np.ndarray:
    found = bk.simulate(model, 8, 1 * u.ms, implementation="scan", initial={"x": 0.3})
    return np.stack([np.asarray(u.get_magnitude(x)) for x in found.records.values()])


def leaves_of(model) -> list:
    return [np.asarray(x) for x in jax.tree.leaves(model)]


def test_made_models_are_copied_and_pickled():
    for name, model in made().items():
        again = [pickle.loads(pickle.dumps(model, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)]
        for other in (*again, copy.deepcopy(model), copy.copy(model)):
            # Of one structure, classes included.
            assert jax.tree.structure(other) == jax.tree.structure(model), name
            for ours, theirs in zip(leaves_of(model), leaves_of(other), strict=True):
                np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(run_of(pickle.loads(pickle.dumps(model))), run_of(model))


def test_a_class_written_below_a_made_one_is_pickled_by_its_name():
    kind: Any = Below
    again: Any = pickle.loads(pickle.dumps(kind(tau_E_inp=7 * u.ms)))
    assert type(again) is kind
    assert again.tau_E_inp == 7 * u.ms


@bk.model
class Below(type(bk.coloured(bk.JansenRit(), "E_inp", tau=10 * u.ms))):
    """A subclass that can be imported."""


# --- what a run computes ---


class Tripled(bk.Mean):
    """A statistic whose text hangs on a closure, as one of the user's own may."""

    factor = 3.0

    def finish(self, held, sampling):
        return held[0] * self.factor


def told() -> dict[str, str]:
    """Of the run of a network of made models, what tells it from others."""
    from brainmass_kernels.arguments import prepare

    record = {"x": bk.Mean(), "p": bk.Spectrum([5.0, 10.0]), "own": Tripled(), "all": "x"}
    run, data = prepare(made()["network"], 100, 1 * u.ms, record=record, implementation="scan")
    ramp = jnp.arange(3.0)
    function = lambda x: jax.lax.cond(x.sum() > 0, jnp.linalg.norm, lambda y: (y * ramp).sum(), x)  # noqa: E731
    own = identity.of_function(function, jax.ShapeDtypeStruct((3,), jnp.float32))
    return {**identity.of_run(run), **identity.of_data(run, data), "function": own}


def test_another_process_says_the_same_and_reads_what_was_pickled(tmp_path):
    models = made()
    (tmp_path / "models.pickle").write_bytes(pickle.dumps(models))
    program = (
        "import pickle, sys, brainmass_kernels\n"
        "models = pickle.load(open(sys.argv[1], 'rb'))\n"
        "import json, test_files\n"
        "print(json.dumps([test_files.told(), test_files.run_of(models['network']).tolist()]))"
    )
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", program, str(tmp_path / "models.pickle")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    theirs, run = json.loads(done.stdout)
    assert theirs == told()
    np.testing.assert_array_equal(run, run_of(models["network"]))


def test_the_text_of_a_program_has_no_names_and_no_addresses():
    @jax.custom_jvp
    def helper(x):
        return jnp.sin(x)

    helper.defjvp(lambda p, t: (helper(p[0]), t[0]))

    def one(x):
        return jax.jit(lambda y: helper(y) + 0.1)(x)

    def two(z):
        other = helper(z)
        return jax.jit(lambda w: w + 0.1)(other)

    aval = jax.ShapeDtypeStruct((2,), jnp.float32)
    texts = [identity.text_of(jax.make_jaxpr(f)(aval)) for f in (one, one)]
    assert texts[0] == texts[1]
    assert "0x" not in texts[0]
    assert "test_files" not in texts[0]
    others = [lambda x: helper(x) + 0.2, lambda x: helper(x) - 0.1, lambda x: jnp.cos(x) + 0.1, two]
    assert len({identity.of_function(f, aval) for f in (one, *others)}) == 5
    assert identity.of_function(one, aval) != identity.of_function(one, jax.ShapeDtypeStruct((3,), jnp.float32))
    big = np.arange(1000.0, dtype=np.float32)
    held = [identity.of_function(lambda x, c=c: x + c[-1], aval) for c in (big, big.copy(), big + 1)]
    assert held[0] == held[1] != held[2]


def test_a_folder_that_another_process_moves_there_meanwhile_is_removed(tmp_path, monkeypatch):
    there, is_dir = tmp_path / "finished", Path.is_dir

    def moved_after_the_question(path):
        answer = is_dir(path)
        if path == there and not asked:
            asked.append(path)
            (there / "inside").mkdir(parents=True)
        return answer

    asked: list[Path] = []
    monkeypatch.setattr(Path, "is_dir", moved_after_the_question)
    files.remove(there)
    assert asked
    assert not there.exists()
