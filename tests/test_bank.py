"""Banks of simulations: draws are the priors' quantiles, runs are `simulate`'s, and a resumed bank is the same."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
import scipy.stats
from scipy.stats import qmc

import brainmass_kernels as bk
from brainmass_kernels import grids, sweeps
from brainmass_kernels.inference.draws import sobol

PRIORS = {
    "C": bk.priors.Uniform(100.0, 160.0),
    "be": bk.priors.LogNormal(100 * u.Hz, 0.2),
    "noise.E_inp": bk.priors.HalfNormal(2 * u.Hz * u.second**0.5),
}
KEY = jax.random.key(3)
RUN = {"duration": 100, "dt": 1 * u.ms, "inputs": {"E_inp": 120 * u.Hz}, "key": KEY, "implementation": "scan"}
STATISTICS = {"mean": bk.Mean(), "power": bk.Spectrum([10.0, 20.0])}
OUTS = ["bank.npz", pytest.param("bank.zarr", marks=needs.zarr)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grids, "SPLIT", False)


def bank(**arguments) -> bk.SimulationBank:
    given = {"model": bk.JansenRit(), "priors": PRIORS, "statistics": STATISTICS, "n": 10, "chunk": 4, **RUN}
    return bk.simulation_bank(**{**given, **arguments})


def assert_same(got: bk.SimulationBank, want: bk.SimulationBank):
    """Bit for bit, units too."""
    np.testing.assert_array_equal(got.ok, want.ok)
    for mine, other in ((got.parameters, want.parameters), (got.statistics, want.statistics)):
        assert list(mine) == list(other)
        for name in mine:
            assert u.get_unit(mine[name]) == u.get_unit(other[name])
            assert np.asarray(mine[name].mantissa if hasattr(mine[name], "mantissa") else mine[name]).tobytes() == (
                np.asarray(other[name].mantissa if hasattr(other[name], "mantissa") else other[name]).tobytes()
            )


# --- the draws ---


def test_draws_are_the_quantiles_of_the_priors():
    found = bank(n=16, seed=5, free={"C": (110.0, 150.0)})
    scrambled: dict[str, Any] = {name_of_seed(): np.random.default_rng(5)}
    points = qmc.Sobol(3, bits=30, **scrambled).random(16) + 0.5**31
    want = [
        scipy.stats.uniform(110.0, 40.0).ppf(points[:, 0]),
        scipy.stats.lognorm(0.2, scale=100.0).ppf(points[:, 1]),
        scipy.stats.halfnorm(scale=2.0).ppf(points[:, 2]),
    ]
    assert list(found.parameters) == ["C", "be", "noise.E_inp"]
    for (name, unit), x in zip({"C": None, "be": u.Hz, "noise.E_inp": u.Hz * u.second**0.5}.items(), want):
        values = found.parameters[name]
        np.testing.assert_allclose(values if unit is None else values.to_decimal(unit), x, rtol=2e-6)


def name_of_seed() -> str:
    return "rng" if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 15) else "seed"


def test_a_point_depends_on_its_number_alone():
    whole = sobol(3, 1, 0, 100)
    np.testing.assert_array_equal(np.concatenate([sobol(3, 1, 0, 7), sobol(3, 1, 7, 8), sobol(3, 1, 8, 100)]), whole)
    assert (sobol(3, 2, 0, 100) != whole).all(1).mean() > 0.9
    # Of 64 points each 64th of an axis has one.
    cells = np.floor(sobol(3, 1, 0, 64) * 64).astype(int)
    assert (np.sort(cells, 0) == np.arange(64)[:, None]).all()


# --- the runs ---


def test_statistics_are_those_of_single_runs():
    found = bank()
    for i in (0, 7):
        values = {name: x[i] for name, x in found.parameters.items()}
        one = bk.simulate(
            bk.JansenRit(C=values["C"], be=values["be"]),
            noise={"E_inp": values["noise.E_inp"]},
            record=STATISTICS,
            **{**RUN, "key": jax.random.fold_in(KEY, i)},
        )
        for name in STATISTICS:
            got, want = found.statistics[name][i], one[name]
            assert u.get_unit(got) == u.get_unit(want)
            np.testing.assert_allclose(u.get_magnitude(got), np.squeeze(u.get_magnitude(want)), rtol=2e-5)
    assert found.statistics["power"].shape == (10, 2)
    assert found.columns == (["C", "be", "noise.E_inp"], ["mean", "power[10 Hz]", "power[20 Hz]"])


def test_matrices_have_the_columns_that_their_names_say():
    found = bank()
    theta, x = found.arrays()
    assert theta.dtype == x.dtype == np.float32
    assert (theta.shape, x.shape) == ((10, 3), (10, 3))
    np.testing.assert_array_equal(theta[:, 1], found.parameters["be"].mantissa)
    np.testing.assert_array_equal(x[:, 0], found.statistics["mean"].mantissa)
    np.testing.assert_array_equal(x[:, 1:], found.statistics["power"].mantissa)


class TestNetworks:
    WEIGHTS = np.array([[0.0, 1.0, 0.5], [0.3, 0.0, 0.0], [1.0, 0.2, 0.0]])
    PRIORS = {"coupling.k": bk.priors.Uniform(0.0, 0.3), "w": bk.priors.Normal(0.2, 0.01)}
    STATISTICS = [bk.Covariance(), bk.Correlation(), bk.Spectrum([10.0, 30.0]), bk.Mean(of=bk.Readout(np.ones((2, 3))))]

    def network(self, **fields):
        a = np.array([0.1, 0.2, 0.3])
        return bk.Network(bk.Hopf(a=a, **fields), self.WEIGHTS, source="x", target="x_inp", delays=0.5 * u.ms)

    @pytest.mark.parametrize("out", OUTS)
    def test_is_the_run_of_one_network(self, out):
        run = {"duration": 60, "dt": 0.5 * u.ms, "noise": {"x_inp": 0.1 * u.ms**0.5}, "implementation": "scan"}
        found = bk.simulation_bank(
            self.network(), self.PRIORS, self.STATISTICS, n=5, chunk=2, out=out, key=KEY, **run
        )  # fmt: skip
        i = 3
        values = {name: x[i] for name, x in found.parameters.items()}
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(KEY, i), jnp.arange(3))
        network = self.network(w=values["w"]).replace(k=values["coupling.k"])
        one = bk.simulate(network, record=self.STATISTICS, key=keys, **run)
        for name, want in one.records.items():
            got = found.statistics[name][i]
            assert u.get_unit(got) == u.get_unit(want)
            np.testing.assert_allclose(u.get_magnitude(got), u.get_magnitude(want), rtol=1e-4, atol=1e-6)
        assert found.statistics["x_spectrum"].shape == (5, 2, 3)
        names = ["x_covariance", "x_correlation", "x_spectrum", "x_readout_mean"]
        assert list(found.statistics) == names
        columns = found.columns[1]
        pairs = {name: [n for n in columns if n.startswith(f"{name}[")] for name in names}
        assert pairs["x_covariance"] == [f"x_covariance[{i}, {j}]" for i in range(3) for j in range(i, 3)]
        assert pairs["x_correlation"] == [f"x_correlation[{i}, {j}]" for i, j in ((0, 1), (0, 2), (1, 2))]
        assert pairs["x_spectrum"][:4] == [*(f"x_spectrum[10 Hz, {j}]" for j in range(3)), "x_spectrum[30 Hz, 0]"]
        assert pairs["x_readout_mean"] == ["x_readout_mean[0]", "x_readout_mean[1]"]
        x = found.arrays()[1]
        assert x.shape == (5, len(columns))
        np.testing.assert_array_equal(
            x[:, columns.index("x_covariance[1, 2]")], found.statistics["x_covariance"][:, 1, 2]
        )
        assert_same(bk.SimulationBank.load(out), found)


# --- on disk ---


@pytest.mark.parametrize("out", OUTS)
class TestResumed:
    def test_gives_the_same_bits(self, out, monkeypatch):
        want = bank(out=f"whole-{out}")

        def stop(line):
            if line.startswith("chunk 2"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            bank(out=out, progress=stop)
        assert sorted(os.listdir()) == [f"{out}.parts", f"whole-{out}"]
        ran, run = [], sweeps._Job.run
        monkeypatch.setattr(sweeps._Job, "run", lambda job, number: ran.append(number) or run(job, number))
        assert_same(bank(out=out), want)
        assert ran == [2]
        assert_same(bk.SimulationBank.load(out), want)
        # It is there: nothing is run.
        assert_same(bank(out=out), want)
        assert ran == [2]

    def test_parts_make_one_bank(self, out):
        want = bank()
        first = bank(out=out, part=(0, 2))
        assert isinstance(first, bk.SweepPart)
        assert (first.done, first.chunks) == (2, 3)
        assert_same(bank(out=out, part=(1, 2)), want)

    def test_what_holds_something_else_is_refused(self, out):
        bank(out=out)
        before = bk.SimulationBank.load(out)
        for change, what in (
            ({"n": 12}, "n"),
            ({"seed": 1}, "seed"),
            ({"priors": {**PRIORS, "C": bk.priors.Uniform(90.0, 160.0)}}, "priors"),
            ({"duration": 90}, "duration"),
        ):
            with pytest.raises(ValueError, match=rf"'out' got {out}, .* What differs: .*{what}"):
                bank(out=out, **change)
        assert_same(bk.SimulationBank.load(out), before)

    def test_chunks_of_other_draws_are_refused(self, out):
        bank(out=out, part=(0, 2))
        with pytest.raises(ValueError, match=r"chunks of a sweep with other arguments.*'seed' \(0 then, 1 now\)"):
            bank(out=out, part=(1, 2), seed=1)


def test_a_file_that_is_no_bank_is_refused():
    Path("bank.npz").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"'out' got bank\.npz, which is there and can't be read"):
        bank(out="bank.npz")
    assert Path("bank.npz").read_bytes() == b"mine"
    over = {"C": np.array([120.0, 130.0])}
    bk.sweep(bk.JansenRit(), over, 100, 1 * u.ms, record=bk.Mean(), out="grid.npz", implementation="scan")
    with pytest.raises(ValueError, match=r"'path' got grid\.npz, but it is a sweep over a grid"):
        bk.SimulationBank.load("grid.npz")
    with pytest.raises(ValueError, match=r"'out' got grid\.npz, which holds the runs of other arguments"):
        bank(out="grid.npz")


def test_is_saved_in_another_form():
    found = bank()
    found.save("copy.npz")
    assert_same(bk.SimulationBank.load("copy.npz"), found)
    assert repr(found) == "SimulationBank(10 draws: C, be, noise.E_inp -> mean, power)"


@needs.zarr
def test_is_a_dataset():
    data = bank(out="bank.zarr").to_xarray()
    assert data["power"].dims == ("power_axis", "draw")
    assert data["be"].attrs["units"] == "Hz"


# --- runs that are not finite ---


def test_draws_that_diverged_are_marked_and_left_out():
    priors = {"mu": bk.priors.Uniform(0.5, 60.0)}
    run = {"duration": 200, "dt": 0.05 * u.ms, "implementation": "scan"}
    with pytest.warns(RuntimeWarning, match=r"of 32 draws did not stay finite \(bank.ok says which\)"):
        found = bk.simulation_bank(bk.VanDerPol(), priors, bk.Mean(), n=32, initial={"x": 2.0}, **run)
    finite = np.isfinite(np.asarray(u.get_magnitude(found.statistics["x_mean"])))
    assert 0 < finite.sum() < 32
    np.testing.assert_array_equal(found.ok, finite)
    theta, x = found.arrays()
    np.testing.assert_array_equal(theta[:, 0], np.asarray(found.parameters["mu"])[finite])
    assert np.isfinite(x).all()
    assert f"{32 - finite.sum()} did not stay finite" in repr(found)


def test_a_statistic_without_a_value_is_named():
    # At rest there is no frequency of most power.
    run = {"duration": 64, "dt": 1 * u.ms, "implementation": "scan"}
    found = bk.simulation_bank(
        bk.Hopf(), {"a": bk.priors.Uniform(-0.3, -0.1)}, [bk.Mean(), bk.PeakFrequency([16.0, 32.0, 48.0])], n=4,
        initial={"x": 0.0, "y": 0.0}, **run,
    )  # fmt: skip
    assert found.ok.all()
    with (
        pytest.warns(RuntimeWarning, match="4 of 4 draws are left out, as x_peak_frequency"),
        pytest.raises(ValueError, match="none of the 4 draws"),
    ):
        found.arrays()


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "'n' got 0, but takes at least 1"),
        ({"n": 10.0}, TypeError, "'n' got 10.0, but takes a whole number"),
        ({"n": 2**30 + 1}, ValueError, "'n' got 1,073,741,825, but takes at most"),
        ({"seed": -1}, ValueError, "'seed' got -1"),
        ({"statistics": "eegs"}, ValueError, "unknown record 'eegs'.*eeg"),
        ({"statistics": 3}, TypeError, "'statistics' got int, but takes names"),
        ({"statistics": None}, TypeError, "'statistics' got None"),
        ({"statistics": bk.Correlation()}, ValueError, "Correlation of a model without a network"),
        ({"statistics": {"C": bk.Mean()}}, ValueError, "'statistics' got the name 'C' of a parameter"),
        ({"statistics": {"draw": bk.Mean()}}, ValueError, "the name 'draw' of the axis"),
        ({"statistics": {"ok": bk.Mean()}}, ValueError, "'statistics' and 'priors' take other names than 'ok'"),
        ({"record": bk.Mean()}, TypeError, "'record' is not an argument of simulation_bank"),
        ({"priors": {}}, ValueError, "'priors' got nothing"),
        ({"priors": [1]}, TypeError, "'priors' got list, but takes a dict"),
        ({"priors": {"CC": PRIORS["C"]}}, ValueError, "unknown parameter in 'priors' or 'free' 'CC'"),
        ({"priors": {"C": 3.0}}, TypeError, "'priors' got 3.0 for 'C'"),
        ({"priors": {"be": bk.priors.Normal(100.0, 3.0)}}, ValueError, "for 'be', whose centre and width have no unit"),
        ({"priors": {"be": (100.0 * u.Hz, 3.0)}}, ValueError, "whose width have no unit, but takes Hz"),
        ({"priors": {"be": bk.priors.Normal(1 * u.mV, 3 * u.mV)}}, ValueError, "be"),
        ({"priors": {"C": bk.priors.Beta(1.0, 1.0)}}, ValueError, "takes bounds: give them in 'free'"),
        ({"priors": {}, "free": {"C": None}}, ValueError, "'priors' has nothing for 'C'"),
        ({"free": {"C": (90.0, 150.0)}}, ValueError, "does not cover the bounds"),
        ({"out": "bank.csv"}, ValueError, "'out' got bank.csv, but takes a name that ends in .npz, .nc or .zarr"),
        ({"part": (0, 2)}, ValueError, "'part' got .* without 'out'"),
        ({"chunk": 0}, ValueError, "'chunk' got 0"),
        ({"key": None}, ValueError, "key"),
        ({"model": bk.JansenRit(Ae=np.array([3.0, 3.1]) * u.mV)}, ValueError, "give them in priors={'Ae': ...}"),
        ({"model": "JansenRit"}, TypeError, "model"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        bank(**arguments)


# --- the page ---


def blocks() -> list[str]:
    """The code of the section in docs/posteriors.md."""
    page = (Path(__file__).parents[1] / "docs" / "posteriors.md").read_text()
    section = page.partition("## Banks of simulations")[2].partition("\n## ")[0]
    return re.findall(r"```py\n(.*?)```", section, re.S)


def run_block(block: str, namespace: dict) -> None:
    """With the promotion that users have."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "posteriors.md", "exec"), namespace)


def test_the_page_makes_a_bank_and_a_grid():
    namespace, (first, _, last) = {}, blocks()
    assert "n=2**13" in first
    run_block(first.replace("2**13", "2**6"), namespace)
    assert namespace["x"].shape == (64, 20)
    true = bk.simulate(bk.JansenRit(C=140.0, be=95.0 * u.Hz), **namespace["run"])["eeg"]
    namespace |= {"data": true, "sigma": 0.5, "neural": namespace["theta"]}
    run_block(last, namespace)
    np.testing.assert_allclose(namespace["mean"], [140.0, 95.0], rtol=5e-3)


# --- in bounded memory, and with a neural estimator ---

_PEAK = """
import resource, sys
import brainunit as u, jax
import numpy as np
import brainmass_kernels as bk

bk.simulation_bank(
    bk.JansenRit(), {"C": bk.priors.Uniform(100.0, 160.0), "be": bk.priors.LogNormal(100 * u.Hz, 0.2)},
    [bk.Spectrum(np.arange(2.0, 42.0)), bk.Mean()], n=int(sys.argv[1]), chunk=2048, out="bank.zarr", duration=100,
    dt=1 * u.ms, inputs={"E_inp": 120 * u.Hz},
)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@needs.zarr
@pytest.mark.slow
def test_a_hundred_thousand_pairs_need_the_memory_of_ten_thousand():
    peaks = {}
    for n in (10_000, 100_000):
        Path(str(n)).mkdir()
        command = [sys.executable, "-c", _PEAK, str(n)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=str(n), check=True)
        peaks[n] = int(done.stdout.split()[-1]) / 1024
    # Their parameters and statistics alone are 17 MiB in memory.
    assert peaks[100_000] - peaks[10_000] < 40, peaks
    assert bk.SimulationBank.load("100000/bank.zarr").n == 100_000


@pytest.mark.slow
def test_a_neural_posterior_is_that_of_a_grid():
    """The code of docs/posteriors.md: `sbi` on a bank, beside the density on a grid of the two parameters."""
    pytest.importorskip("sbi", reason="sbi is not installed: pip install sbi")
    namespace: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks():
            run_block(block, namespace)
    neural, mean, width = (namespace[name] for name in ("neural", "mean", "width"))
    assert (np.abs(neural.mean(0) - mean) < 0.35 * width).all()
    assert (np.abs(neural.std(0) / width - 1) < 0.25).all()
