"""Grids: the same numbers as one run, whatever the chunks; on disk and back; interrupted and gone on with."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import cli

OVER = {"E_inp": np.linspace(100.0, 300.0, 5) * u.Hz, "C": np.linspace(110.0, 150.0, 4)}
RUN = {"duration": 1 * u.second, "dt": 0.5 * u.ms, "transient": 500 * u.ms, "every": 10}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same(got: bk.Sweep, want: bk.Sweep):
    assert list(got.axes) == list(want.axes)
    assert list(got.records) == list(want.records)
    for group in ("axes", "records", "record_axes"):
        for name, x in getattr(want, group).items():
            found = getattr(got, group)[name]
            assert u.get_unit(found) == u.get_unit(x)
            np.testing.assert_array_equal(u.get_magnitude(found), u.get_magnitude(x))
    assert got.about == want.about


class TestAGrid:
    def test_is_the_run_of_all_its_points(self):
        record = {"mean": bk.Mean(), "power": bk.Spectrum([5.0, 10.0]), "eeg": "eeg"}
        found = bk.sweep(bk.JansenRit(), OVER, record=record, chunk=7, **RUN)
        E_inp, C = (jnp.asarray(u.get_magnitude(x), jnp.float32) for x in OVER.values())
        model = bk.JansenRit(C=jnp.broadcast_to(C[None], (5, 4)))
        want = bk.simulate(model, inputs={"E_inp": E_inp[:, None] * u.Hz}, record=record, **RUN)
        assert found.shape == (5, 4)
        for name in record:
            assert u.get_unit(found[name]) == u.get_unit(want[name])
            np.testing.assert_allclose(u.get_magnitude(found[name]), u.get_magnitude(want[name]), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(found.record_axes["power"] / u.Hz, [5.0, 10.0])

    def test_has_the_same_noise_in_any_chunks(self):
        over = {"noise.E_inp": np.array([0.5, 2.0, 4.0]) * u.Hz * u.second**0.5, "be": np.array([90.0, 100.0]) * u.Hz}
        two, six = (bk.sweep(bk.JansenRit(), over, chunk=n, key=jax.random.key(1), **RUN) for n in (2, 6))
        for name, x in six.records.items():
            np.testing.assert_allclose(u.get_magnitude(two[name]), u.get_magnitude(x), rtol=1e-5)
        assert len(np.unique(u.get_magnitude(six["eeg_mean"]))) == 6

    def test_of_any_model_and_one_parameter(self):
        found = bk.sweep(bk.VanDerPol(), {"mu": np.array([0.9, 1.0, 1.1])}, 1000, 0.1 * u.ms)
        assert found.shape == (3,)
        assert any(n.endswith("_peak_frequency") for n in found.records)

    def test_is_drawn(self):
        found = bk.sweep(bk.JansenRit(), OVER, **RUN)
        titles = [ax.get_ylabel() for ax in found.plot().axes]
        assert {"eeg mean (mV)", "eeg amplitude (mV)", "eeg peak frequency (Hz)"} <= set(titles)
        one = bk.sweep(bk.JansenRit(), {"C": OVER["C"]}, **RUN).plot()
        assert [ax.get_xlabel() for ax in one.axes][-1] == "C"


@pytest.mark.parametrize("name", ["grid.npz", "grid.nc", "grid.zarr"])
def test_to_disk_and_back(elsewhere, name):
    if name != "grid.npz":
        pytest.importorskip("xarray")
        pytest.importorskip("zarr" if name.endswith("zarr") else "scipy")
    record = [bk.Mean(), bk.Spectrum([5.0, 10.0])]
    found = bk.sweep(bk.JansenRit(), OVER, record=record, out=name, chunk=8, **RUN)
    assert os.listdir() == [name]
    assert_same(bk.Sweep.load(name), found)
    if name == "grid.nc":
        data = found.to_xarray()
        assert data["eeg_spectrum"].dims == ("eeg_spectrum_axis", "E_inp", "C")
        assert data["E_inp"].attrs["units"] == "Hz"
        assert data["eeg_spectrum"].attrs["units"] == "mV^2 / Hz"
    found.save(name)
    assert_same(bk.Sweep.load(name), found)


class TestInterrupted:
    COMMAND = (
        "sweep --over E_inp=100:300:16 --over C=110:150:16 --set be=95 --set noise.E_inp=2 --chunk 32 --duration 2 "
        "--transient 1 --out grid.npz --picture grid.png"
    ).split()

    @pytest.mark.slow
    def test_killed_and_gone_on_with(self, elsewhere):
        assert cli.main([*self.COMMAND[:-3], "whole.npz", "--picture", "whole.png"]) == 0
        program = [sys.executable, "-m", "brainmass_kernels.cli", *self.COMMAND]
        with subprocess.Popen(program, stdout=subprocess.DEVNULL) as running:
            parts = elsewhere / "grid.npz.parts"
            until = time.monotonic() + 120
            while len(list(parts.glob("chunk*.npz"))) < 2 and time.monotonic() < until:
                time.sleep(0.005)
            running.send_signal(signal.SIGKILL)
        done = len(list(parts.glob("chunk*.npz")))
        assert 2 <= done < 8
        assert not (elsewhere / "grid.npz").exists()
        again = subprocess.run(program, capture_output=True, text=True, check=True).stdout
        assert f"resuming after {done} of 8 chunks" in again
        assert again.count(" masses, about") == 8 - done
        assert_same(bk.Sweep.load("grid.npz"), bk.Sweep.load("whole.npz"))
        assert not parts.exists()

    def test_chunks_of_another_sweep_are_refused(self, elsewhere):
        def stop(line):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            bk.sweep(bk.JansenRit(), OVER, out="grid.npz", chunk=5, progress=stop, **RUN)
        assert len(list(elsewhere.glob("grid.npz.parts/chunk*.npz"))) == 1
        for other in ({"model": bk.JansenRit(be=99 * u.Hz)}, {"duration": 2 * u.second}, {"record": bk.Mean()}):
            arguments = {"model": bk.JansenRit(), "over": OVER, "out": "grid.npz", "chunk": 5, **RUN, **other}
            with pytest.raises(ValueError, match="chunks of a sweep with other arguments: delete it"):
                bk.sweep(**arguments)
        said = []
        bk.sweep(bk.JansenRit(), OVER, out="grid.npz", chunk=5, progress=said.append, **RUN)
        assert said[0] == "resuming after 1 of 4 chunks"
        assert len(said) == 4


@pytest.mark.slow
def test_a_million_masses_in_bounded_memory(elsewhere):
    """A process's peak, Python and JAX included; benchmarks/results/sweep.json has the run of 10,000 steps."""
    code = """
import numpy as np, brainunit as u, brainmass_kernels as bk
from brainmass_kernels import bench
over = {"E_inp": np.linspace(0, 400, 1024) * u.Hz, "C": np.linspace(60, 240, 1024)}
bk.sweep(bk.JansenRit(), over, 200, 0.5 * u.ms, every=10, record=[bk.Mean(), bk.Maximum()])
print(bench.peak_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2e9


@pytest.mark.slow
def test_statistics_of_an_hour_take_little_more_memory_than_a_mean():
    """Peaks of two processes that run one mass for 3,600 s, every step a record: no table grows with time."""
    code = """
import brainunit as u, brainmass_kernels as bk
from brainmass_kernels import bench, sweeps
record = [bk.Mean()] if {only_mean} else [bk.Mean(), bk.Minimum(), bk.Maximum(), bk.PeakFrequency(sweeps.PEAKS)]
bk.simulate(bk.JansenRit(), 3600 * u.second, 0.1 * u.ms, record=record).records["eeg_mean"].mantissa.block_until_ready()
print(bench.peak_memory())
"""

    def peak(only_mean: bool) -> int:
        command = [sys.executable, "-c", code.format(only_mean=only_mean)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak(False) < peak(True) + 150e6


class TestTheCommand:
    def test_writes_and_says_so(self, elsewhere, capsys):
        argv = (
            "sweep --model Wendling --over B=10:50:3 --duration 1 --transient 0.5 --out w.npz --picture w.png".split()
        )
        assert cli.main(argv) == 0
        printed = capsys.readouterr().out
        assert "Sweep(3 B: " in printed
        assert "wrote w.npz and w.png" in printed
        assert bk.Sweep.load("w.npz").about["model"] == "Wendling"
        assert json.loads(str(np.load("w.npz")["about"]))["units"][0] == {"B": "mV"}
        assert os.path.getsize("w.png") > 10_000

    @pytest.mark.parametrize(
        ("argv", "says"),
        [
            (["--model", "JansenRitt"], "unknown model 'JansenRitt'; did you mean 'JansenRit'?"),
            (["--over", "E_imp=0:1:2"], "did you mean 'E_inp'?"),
            (["--over", "E_inp=0:1"], "takes NAME=LOW:HIGH:COUNT"),
            (["--over", "E_inp=0:1:-2"], "takes NAME=LOW:HIGH:COUNT"),
            (["--set", "C"], "takes NAME=VALUE"),
            (["--over", "C=1:2:2", "--over", "Ae=1:2:2", "--over", "be=1:2:2"], "'--over' got 3 parameters"),
            (["--out", "grid.csv"], "takes a name that ends in .npz, .nc or .zarr"),
            (["--picture", "grid.txt"], "'--picture' got grid.txt"),
        ],
    )
    def test_refuses(self, elsewhere, capsys, argv, says):
        assert cli.main(["sweep", *argv]) == 2
        assert says in capsys.readouterr().err
        assert not os.listdir()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"over": {}}, "'over' got nothing"),
        ({"over": {"C": np.ones((2, 2))}}, "'C' got values of shape (2, 2)"),
        ({"over": {"E_inp": np.ones(2) * u.mV}}, "'E_inp' got mV, but takes Hz"),
        ({"model": bk.JansenRit(C=jnp.ones(3)), "over": {"be": np.ones(2) * u.Hz}}, "'model' has (3,) values of C"),
        ({"chunk": 0}, "'chunk' got 0"),
    ],
)
def test_what_cannot_be_is_refused(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        bk.sweep(**{"model": bk.JansenRit(), "over": OVER, **RUN, **arguments})


def test_a_file_that_is_no_sweep(elsewhere):
    np.savez("other.npz", x=1)
    with pytest.raises(ValueError, match=r"other\.npz: not a sweep"):
        bk.Sweep.load("other.npz")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        bk.Sweep.load("absent.npz")
