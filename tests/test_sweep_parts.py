"""Sweeps that workers share: parts, Dask, submitit; by regions of a Zarr store; of networks; over devices."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import brainunit as u
import jax
import numpy as np
import pytest
from needs import dask, submitit, zarr

import brainmass_kernels as bk
from brainmass_kernels import cli, files, grids, sweep_parts, sweeps

MODEL = bk.Hopf()
OVER = {"a": np.linspace(-0.2, 0.5, 5), "w": np.linspace(0.05, 0.2, 7)}
RUN = {"duration": 40, "dt": 0.1 * u.ms, "record": {"m": bk.Mean(), "p": bk.Spectrum([500.0, 1000.0])}}
RUN |= {"noise": {"x_inp": 0.01 * u.ms**0.5}, "key": jax.random.key(0), "implementation": "scan"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # One device, so that the grid and a worker's process have the same lanes on it.
    monkeypatch.setattr(grids, "SPLIT", False)
    return tmp_path


def swept(**changes):
    return bk.sweep(**{"model": MODEL, "over": OVER, "chunk": 4, **RUN, **changes})


def assert_same(got: bk.Sweep, want: bk.Sweep, rtol: float = 0.0):
    assert list(got.records) == list(want.records)
    for name, x in {**want.axes, **want.records, **want.record_axes}.items():
        found = {**got.axes, **got.records, **got.record_axes}[name]
        assert u.get_unit(found) == u.get_unit(x)
        np.testing.assert_allclose(u.get_magnitude(found), u.get_magnitude(x), rtol=rtol)
    np.testing.assert_array_equal(got.ok, want.ok)


OUTS = ["grid.npz", pytest.param("grid.zarr", marks=zarr)]


class TestParts:
    @pytest.mark.parametrize("out", OUTS)
    def test_the_last_one_joins_them(self, out):
        want = swept(out=f"whole.{out[5:]}")
        found = [swept(out=out, part=(i, 3)) for i in (2, 0, 1)]
        count = sweep_parts_count(out)
        assert [(x.part, x.chunks) for x in found[:2]] == [((2, 3), count), ((0, 3), count)]
        assert str(found[0]).startswith(
            f"part 2 of 0 to 2 is done; {count // 3:,} of {count} chunks of {out} are there"
        )
        with pytest.raises(ValueError, match="'m' is not there yet: part 2"):
            found[0]["m"]
        for joined in (found[-1], bk.Sweep.load(out)):
            assert_same(joined, want)
            assert joined.about == want.about
        assert sorted(os.listdir()) == sorted([out, f"whole.{out[5:]}"])

    def test_what_is_finished_is_not_run_again(self, monkeypatch):
        swept(out="grid.npz", part=(1, 2))
        said = []
        monkeypatch.setattr(sweeps._Job, "run", counted(sweeps._Job.run, ran := []))
        swept(out="grid.npz", part=(1, 2), progress=said.append)
        assert said == ["resuming after 4 of 4 chunks"]
        assert ran == []
        # A plain call does the rest, in the chunks of the parts.
        whole = swept(out="grid.npz", chunk=None)
        assert ran == [0, 2, 4, 6, 8]
        assert isinstance(swept(out="grid.npz", part=(0, 2), progress=said.append), bk.Sweep)
        assert_same(swept(out="grid.npz", chunk=None), whole)
        assert len(ran) == 5
        assert said[-1] == "grid.npz holds this sweep: nothing is run"
        assert os.listdir() == ["grid.npz"]

    def test_another_sweep_replaces_the_file(self):
        swept(out="grid.npz")
        found = swept(out="grid.npz", duration=50)
        assert found.about["duration"] == "50"
        assert_same(bk.Sweep.load("grid.npz"), found)

    def test_a_damaged_file_is_written_again(self):
        want = swept(out="grid.npz")
        with np.load("grid.npz") as archive:
            np.savez("grid.npz", **{**archive, "m_1": 2 * archive["m_1"]})
        with pytest.warns(RuntimeWarning, match=r"grid\.npz: not a sweep .*: now it is written again"):
            assert_same(swept(out="grid.npz"), want)
        assert_same(bk.Sweep.load("grid.npz"), want)

    @pytest.mark.parametrize("out", OUTS)
    def test_two_that_join_at_once(self, out, monkeypatch):
        """The second finds all chunks while the first has not yet written, and then a folder that is gone."""
        want, both = swept(), threading.Barrier(2)
        result, found = sweeps._result, {}

        def together(*arguments):
            both.wait(60)
            return result(*arguments)

        monkeypatch.setattr(sweeps, "_result", together)
        swept(out=out, part=(2, 3))
        # Those of the other two parts wait for each other's last chunk.
        run = sweeps._run

        def waiting(*arguments):
            run(*arguments)
            both.wait(60)

        monkeypatch.setattr(sweeps, "_run", waiting)

        def work(i: int) -> None:
            found[i] = swept(out=out, part=(i, 3))

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert sorted(found) == [0, 1]
        for x in (*found.values(), bk.Sweep.load(out)):
            assert_same(x, want, rtol=1e-5)
        assert os.listdir() == [out]

    def test_the_same_part_twice_at_once_is_refused(self):
        def again(line):
            for part in ((0, 2), None):
                with pytest.raises(ValueError, match="is being written by another run"):
                    swept(out="grid.npz", part=part)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            swept(out="grid.npz", part=(0, 2), progress=again)

    def test_no_chunk_is_smaller_than_the_parts_need(self):
        found = swept(out="grid.npz", part=(0, 5), chunk=None)
        assert (found.done, found.chunks) == (1, 5)

    @pytest.mark.parametrize(
        ("changes", "error", "says"),
        [
            ({"part": (3, 3)}, ValueError, r"'part' got \(3, 3\), but takes \(i, n\) with 0 <= i < n"),
            ({"part": (-1, 3)}, ValueError, r"'part' got \(-1, 3\)"),
            ({"part": 2}, ValueError, r"'part' got 2, but takes \(i, n\)"),
            ({"part": (0, 3), "out": None}, ValueError, r"'part' got \(0, 3\) without 'out'"),
            ({"client": "tcp://here"}, TypeError, r"'client' got str, but takes a dask\.distributed\.Client"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes, error, says):
        with pytest.raises(error, match=says):
            swept(**{"out": "grid.npz", **changes})
        assert not os.listdir()


def sweep_parts_count(out: str) -> int:
    """Chunks of the grid of 35 points: 4 in a row, or in a rectangle within the 7 of one axis."""
    return 9 if out.endswith(".npz") else 10


def counted(method, numbers: list):
    def run(self, number):
        numbers.append(number)
        return method(self, number)

    return run


WORKER = """
import os, sys, time
import brainunit as u, jax, numpy as np
import brainmass_kernels as bk
from brainmass_kernels import grids, sweep_parts
grids.SPLIT = False
out, part, slow = sys.argv[1], tuple(map(int, sys.argv[2].split("/"))), sys.argv[3:]
pack = sweep_parts.pack
def half(path, *arguments):
    # The second chunk is written, but has not got its name yet.
    pack(path, *arguments)
    if arguments[1]["chunk"] == part[0] + part[1]:
        print("half", flush=True)
        time.sleep(600)
if slow:
    sweep_parts.pack = half
over = {"a": np.linspace(-0.2, 0.5, 5), "w": np.linspace(0.05, 0.2, 7)}
found = bk.sweep(
    bk.Hopf(), over, 40, 0.1 * u.ms, record={"m": bk.Mean(), "p": bk.Spectrum([500.0, 1000.0])},
    noise={"x_inp": 0.01 * u.ms**0.5}, key=jax.random.key(0), implementation="scan", chunk=4, out=out, part=part,
)
print(found)
"""


def test_three_workers_of_which_one_is_killed():
    Path("worker.py").write_text(WORKER)

    def begun(part: str, *slow: str):
        command = [sys.executable, "worker.py", "grid.npz", part, *slow]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=alone())

    workers = [begun("0/3"), begun("1/3", "slow"), begun("2/3")]
    assert workers[1].stdout.readline() == "half\n"
    workers[1].send_signal(signal.SIGKILL)
    told = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, -signal.SIGKILL, 0]
    assert "of 9 chunks of grid.npz are there" in told[0]
    parts = Path("grid.npz.parts")
    # Nothing that was half written has the name of a chunk.
    assert sorted(p.name for p in parts.glob("chunk*")) == [f"chunk{k:06d}.npz" for k in (0, 1, 2, 3, 5, 6, 8)]
    said = []
    found = swept(out="grid.npz", part=(1, 3), progress=said.append)
    assert said[0] == "resuming after 1 of 3 chunks"
    assert len(said) == 3
    assert_same(found, swept())
    assert sorted(os.listdir()) == ["grid.npz", "worker.py"]


def alone() -> dict[str, str]:
    """The environment of a process with one device, as a worker has."""
    return {**os.environ, "XLA_FLAGS": ""}


# --- Dask and submitit ---


@dask
@pytest.mark.parametrize("out", [None, *OUTS])
def test_by_threads_of_dask(out):
    distributed = pytest.importorskip("distributed")
    cluster = {"processes": False, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    said = []
    with distributed.Client(**cluster) as client:
        found = swept(out=out, client=client, progress=said.append)
        assert len(said) == sweep_parts_count(out or "grid.npz")
        with pytest.raises(ValueError, match=r"'part' got .* beside 'client'"):
            swept(out="grid.npz", client=client, part=(0, 2))
    assert_same(found, swept(out=out and f"whole.{out[5:]}"))


@dask
def test_by_processes_of_dask():
    """Also what the page on clusters shows: parts by ``client.map``."""
    distributed = pytest.importorskip("distributed")
    with distributed.Client(n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        assert_same(swept(client=client), swept(), rtol=1e-5)
        parts = client.map(lambda i: swept_as_part(i, str(Path("mapped.npz").absolute())), range(2))
        found = client.gather(parts)
    assert any(type(x).__name__ == "Sweep" for x in found)


def swept_as_part(i: int, out: str):
    return bk.sweep(MODEL, OVER, out=out, part=(i, 2), **RUN)


@dask
def test_an_error_of_a_worker_is_raised(monkeypatch):
    distributed = pytest.importorskip("distributed")
    cluster = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    identity = sweeps._Job.identity
    monkeypatch.setattr(sweeps, "_run_there", other_versions(sweeps._run_there))
    with (
        distributed.Client(**cluster) as client,
        pytest.raises(ValueError, match="this worker would run another sweep"),
    ):
        swept(client=client)
    assert sweeps._Job.identity is identity


def other_versions(run):
    def there(job, chunks, expected, number):
        return run(job, chunks, {**expected, "jax": "0.1"}, number)

    return there


@submitit
def test_by_submitit(monkeypatch):
    package = pytest.importorskip("submitit")
    # The worker imports this file.
    path = [os.path.dirname(__file__), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*path, os.path.dirname(path[0])]))
    executor = package.LocalExecutor(folder="logs")
    executor.update_parameters(timeout_min=5)
    out = str(Path("grid.npz").absolute())
    jobs = executor.map_array(swept_as_part, range(2), [out] * 2)
    found = [job.result() for job in jobs]
    assert any(isinstance(x, bk.Sweep) for x in found)
    want = bk.sweep(MODEL, OVER, **RUN)
    assert_same(bk.Sweep.load(out), want, rtol=1e-5)


@dask
@submitit
@zarr
def test_the_page_on_clusters(monkeypatch):
    root = Path(__file__).parents[1]
    # The workers are new processes, in a folder of their own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs/clusters.md").read_text(), re.S)
    # Functions of `__main__` go to workers by value.
    namespace: dict = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, "clusters.md", "exec"), namespace)
    assert isinstance(namespace["found"][0], bk.Sweep) or isinstance(namespace["found"][1], bk.Sweep)
    for name in ("by_submitit.npz", "by_client.npz", "by_map.npz"):
        assert_same(bk.Sweep.load(name), bk.Sweep.load("grid.npz"), rtol=1e-4)
    assert namespace["near"].shape == ()


# --- by regions of a Zarr store ---


@zarr
class TestRegions:
    def test_a_chunk_of_the_sweep_is_a_chunk_of_the_array(self):
        swept(out="grid.zarr")
        names = {str(p.relative_to("grid.zarr/p/c")) for p in Path("grid.zarr/p/c").rglob("*") if p.is_file()}
        assert names == {f"0/{i}/{j}" for i in range(5) for j in range(2)}

    def test_records_are_read_when_asked_for(self, monkeypatch):
        want = swept(out="grid.zarr")
        with monkeypatch.context() as patched:
            patched.setattr("brainmass_kernels.sweep_files.Stored.__getitem__", lambda *_: 1 / 0)
            found = bk.Sweep.load("grid.zarr")
            assert found.ok.all()
            assert "in the file" in found._repr_html_()
            assert repr(found) == "Sweep(5 a x 7 w: m, p)"
            data = found.to_xarray()
        assert data["p"].dims == ("p_axis", "a", "w")
        np.testing.assert_array_equal(data["p"][:, 2, 3].values, u.get_magnitude(want["p"])[:, 2, 3])

    def test_a_store_is_saved_in_any_format(self):
        found = swept(out="grid.zarr")
        for name in ("copy.npz", "copy.nc", "grid.zarr"):
            found.save(name)
            assert_same(bk.Sweep.load(name), found)

    def test_damage_is_noticed(self):
        swept(out="grid.zarr")
        chunk = Path("grid.zarr/p/c/0/2/1")
        whole = chunk.read_bytes()
        chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"grid\.zarr: not a sweep .* or damaged"):
            bk.Sweep.load("grid.zarr")["p"]
        chunk.unlink()
        with pytest.raises(ValueError, match="1 of the 10 chunks of p are missing"):
            bk.Sweep.load("grid.zarr")

    def test_an_interrupted_one_resumes(self):
        def stop(line):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            swept(out="grid.zarr", progress=stop)
        assert os.listdir() == ["grid.zarr.parts"]
        said = []
        assert_same(swept(out="grid.zarr", progress=said.append), swept(), rtol=1e-5)
        assert said[0] == "resuming after 1 of 10 chunks"


@pytest.mark.parametrize(
    ("shape", "most", "tile"),
    [
        ((5, 7), 4, (1, 4)),
        ((1000, 1000), 65_536, (63, 1000)),
        ((3, 70_000), 65_536, (1, 35_000)),
        ((4, 3, 2), 99, (4, 3, 2)),
    ],
)
def test_rectangles_cover_a_grid(shape, most, tile):
    tiles = grids.Tiles.rectangles(shape, most)
    assert tiles.tile == tile
    assert tiles.size <= most
    places = np.concatenate([tiles.places(k) for k in range(tiles.count)])
    np.testing.assert_array_equal(np.sort(places), np.arange(np.prod(shape)))
    if len(shape) == 2 and tiles.count < 20:
        grid = np.arange(np.prod(shape)).reshape(shape)
        for k in range(tiles.count):
            np.testing.assert_array_equal(grid[tiles.slices(k)].ravel(), tiles.places(k))


# --- of networks ---


class TestNetworks:
    WEIGHTS = np.array([[0.0, 1.0, 0.5], [0.3, 0.0, 0.0], [1.0, 0.2, 0.0]])
    OVER = {"coupling.k": np.array([0.0, 0.1, 0.2]), "x_inp": np.array([0.0, 0.1])}
    RUN = {"duration": 30, "dt": 0.1 * u.ms, "record": {"m": bk.Mean(), "x": "x"}, "implementation": "scan"}

    def network(self, **fields):
        a = np.array([0.1, 0.2, 0.3])
        return bk.Network(bk.Hopf(a=a), self.WEIGHTS, source="x", target="x_inp", delays=0.5 * u.ms, **fields)

    @pytest.mark.parametrize("out", [None, *OUTS])
    def test_is_the_run_of_a_batch_of_networks(self, out):
        found = bk.sweep(self.network(), self.OVER, out=out, chunk=4, **self.RUN)
        k, drive = np.meshgrid(*self.OVER.values(), indexing="ij")
        batch = self.network(k=k.reshape(-1, 1))
        want = bk.simulate(batch, inputs={"x_inp": drive.reshape(-1, 1)}, **self.RUN)
        np.testing.assert_allclose(found["m"], want["m"].reshape(3, 2, 3), rtol=1e-5)
        np.testing.assert_allclose(found["x"], want["x"].reshape(30, 3, 2, 3), rtol=1e-5, atol=1e-7)
        assert found.ok.shape == (3, 2)
        assert found.about["masses"] == 18
        if out:
            assert_same(bk.Sweep.load(out), found)
            assert bk.Sweep.load(out).to_xarray()["x"].dims == ("x_axis", "coupling.k", "x_inp", "region")

    def test_noise_depends_on_the_place_alone(self):
        noise = {"noise": {"x_inp": 0.1 * u.ms**0.5}, "key": jax.random.key(2)}
        two, six = (bk.sweep(self.network(), self.OVER, chunk=n, **noise, **self.RUN)["m"] for n in (2, 6))
        np.testing.assert_allclose(two, six, rtol=1e-5)
        assert len(np.unique(six)) == 18

    def test_a_chunk_has_fewer_networks_the_more_regions_they_have(self, monkeypatch):
        monkeypatch.setattr(sweeps, "CHUNK", {"cpu": 7})
        said = []
        bk.sweep(self.network(), self.OVER, progress=said.append, **self.RUN)
        assert said[0].startswith("chunk 1 of 3: 2 networks")

    def test_other_connections_are_another_sweep(self):
        bk.sweep(self.network(), self.OVER, chunk=4, out="grid.npz", part=(0, 2), **self.RUN)
        other = bk.Network(bk.Hopf(a=0.1), 2 * self.WEIGHTS, source="x", target="x_inp", delays=0.5 * u.ms)
        with pytest.raises(ValueError, match="What differs: 'a', 'weights'"):
            bk.sweep(other, self.OVER, chunk=4, out="grid.npz", part=(1, 2), **self.RUN)

    def test_a_batch_is_refused(self):
        with pytest.raises(ValueError, match=r"'model' has \(4, 1\) values of coupling\.k: give them in over="):
            bk.sweep(self.network(k=np.ones((4, 1))), {"x_inp": [0.0]}, **self.RUN)

    def test_a_picture_shows_means(self):
        pytest.importorskip("matplotlib")
        found = bk.sweep(self.network(), self.OVER, **self.RUN)
        assert [ax.get_ylabel() for ax in found.plot().axes][-1] == "m"


# --- over the local devices ---

DEVICES = """
import brainunit as u, jax, numpy as np
import brainmass_kernels as bk
from brainmass_kernels import grids, sweeps
seen = []
simulate = sweeps.simulate
def noted(**arguments):
    seen.append(arguments)
    return simulate(**arguments)
sweeps.simulate = noted
over, run = {"a": np.linspace(-0.2, 0.5, 21)}, {"duration": 40, "dt": 0.1 * u.ms, "record": bk.Mean()}
run |= {"noise": {"x_inp": 0.01 * u.ms**0.5}, "key": jax.random.key(0), "implementation": "scan"}
many = bk.sweep(bk.Hopf(), over, chunk=12, **run)
values, keys = seen[-1]["model"].a, seen[-1]["key"]
assert values.shape == keys.shape == (16,), (values.shape, keys.shape)
for x in (values, keys):
    assert len(x.sharding.device_set) == 8
    assert {s.data.shape for s in x.addressable_shards} == {(2,)}
result = simulate(**seen[-1])
assert len(result["x_mean"].sharding.device_set) == 8
grids.SPLIT = False
one = bk.sweep(bk.Hopf(), over, chunk=12, **run)
assert len(seen[-1]["model"].a.sharding.device_set) == 1
np.testing.assert_allclose(many["x_mean"], one["x_mean"], rtol=1e-5)
"""


def test_a_chunk_lies_on_all_local_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# --- the command line and files ---


def test_the_command_line(capsys):
    pytest.importorskip("matplotlib")
    command = "sweep --model Hopf --over a=0:1:4 --duration 0.05 --transient 0.01 --every 1 --dt 0.1 --quiet".split()
    command += ["--implementation", "scan", "--part"]
    assert cli.main([*command, "0/2"]) == 0
    assert "part 0 of 0 to 1 is done; 1 of 2 chunks of sweep.npz are there" in capsys.readouterr().out
    assert os.listdir() == ["sweep.npz.parts"]
    assert cli.main([*command, "1/2"]) == 0
    assert "wrote sweep.npz and sweep.png" in capsys.readouterr().out
    for wrong in ("2/2", "1", "a/b", "-1/2", "0/0"):
        assert cli.main([*command[:-1], f"--part={wrong}"]) == 2
        assert f"'--part' got {wrong}, but takes I/N with 0 <= I < N" in capsys.readouterr().err


def test_a_folder_that_two_remove(monkeypatch):
    folder = Path("parts")
    folder.mkdir()
    (folder / "a").write_text("")
    rmtree = files.shutil.rmtree

    def late(path):
        rmtree(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr(files.shutil, "rmtree", late)
    files.remove(folder)
    assert not folder.exists()


def test_names_tell_host_and_process():
    name = files.beside(Path("folder/grid.npz")).name
    assert name.startswith(".grid.")
    assert f".{os.getpid()}." in name
    assert name.endswith(".npz")
    assert files.beside(Path("grid.npz")) != files.beside(Path("grid.npz"))


def test_workers_that_begin_at_once_write_one_description():
    """A worker that sees no description, and then chunks, looks for the description again."""
    folder = Path("grid.npz.parts")
    folder.mkdir()
    sweep_parts._check_manifest(folder, {"x": "1"})
    sweep_parts._check_manifest(folder, {"x": "1"})
    with pytest.raises(ValueError, match=r"What differs: 'x' \(1 then, 2 now\)"):
        sweep_parts._check_manifest(folder, {"x": "2"})
    (folder / "sweep.json").unlink()
    (folder / "chunk000000.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds chunks, but no sweep\.json"):
        sweep_parts._check_manifest(folder, {"x": "1"})
