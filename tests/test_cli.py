"""The command line: what it prints and writes, and how it refuses."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import brainunit as u
import numpy as np
import pytest
from test_spectra import write_edf

import brainmass_kernels as bk
from brainmass_kernels import cli, commands, report
from brainmass_kernels.fitting.result import Fit

FREQS = np.arange(2.0, 40.5, 0.5)
QUICK = ["--starts", "2", "--steps", "2", "--screen", "0", "--realisations", "1", "--duration", "4", "--quiet"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Files are written to the folder one is in, so be in one of the test's own."""
    monkeypatch.chdir(tmp_path)


def test_an_argument_is_refused_before_anything_is_imported_that_takes_long(tmp_path):
    refused = [
        ["fit", "--free", "be"], ["fit", "--free", "bee=1:2"], ["fit", "--free", "be=9:2"], ["fit", "--starts", "0"],
        ["fit", "--band", "40", "2"], ["fit", "--target", "absent.csv"], ["fit", "--out", "fit.txt"],
        ["fit", "--implementation", "mosaic"], ["fit", "--model", "JansenRitt"], ["fit", "--model", "WilsonCowan"],
        ["fit", "--set", "C"], ["sweep", "--over", "C=1:2"], ["sweep", "--model", "Jansen"], ["bench", "--steps", "7"],
        ["sweep", *["--over", "C=1:2:3"] * 2], ["sweep", *"--over C=1:2:3 --over Ae=1:2:3 --over Ai=1:2:3".split()],
        ["sweep", "--over", "C=1:2:-3"], ["sweep", "--every", "0"], ["fit", "--report", "page.htm"],
        ["sweep", "--report", "absent/page.html"], ["sample", "--method", "nutz"], ["sample", "--draws", "0"],
        ["sample", "--free", "be=1:2"], ["sample", "--save", "draws.csv"], ["sample", "--target", "absent.csv"],
    ]  # fmt: skip
    code = (
        f"import sys\nfrom brainmass_kernels import cli\nprint([cli.main(argv) for argv in {refused!r}])\n"
        "print({'jax', 'numpy', 'brainunit', 'matplotlib', 'optax', 'rich'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:2] == [str([2] * len(refused)), "set()"]
    assert ran.stderr.count("brainmass-kernels: error: ") == ran.stderr.count("\n") == len(refused)


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["fit", "--help"]])
def test_asking_is_answered(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert (bk.__version__ if "--version" in argv else "usage:") in printed


def test_implementations_are_listed_with_reasons(capsys):
    assert cli.main(["implementations"]) == 0
    printed = capsys.readouterr().out
    for name, reason in bk.implementations().items():
        assert any(line.startswith(name) and reason in line for line in printed.splitlines())


def test_info_tells_versions_and_what_runs_without_the_name_of_the_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BRAINMASS_KERNELS_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setenv("BRAINMASS_KERNELS_OTHER", f"{tmp_path}/dump:{tmp_path}beside")
    (tmp_path / "kernels" / "xla").mkdir(parents=True)
    (tmp_path / "kernels" / "one").write_bytes(b"x" * 2_000_000)
    (tmp_path / "kernels" / "xla" / "two").write_bytes(b"x" * 500_000)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if "beside" not in line) < 80
    assert len(printed.splitlines()) < 40
    text = " ".join(printed.split())
    for name in ("jax", "jaxlib", "brainunit", "numpy"):
        assert f" {name} {importlib.metadata.version(name)}" in text
    assert "cache ~/kernels: 2 files, 2.5 MB" in text
    assert f"BRAINMASS_KERNELS_OTHER=~/dump:{tmp_path}beside" in text
    assert f"{tmp_path}/" not in printed
    for name, reason in bk.implementations().items():
        assert f" {name} {'' if reason == 'runs here' else 'not here: '}{reason}" in text

    assert cli.main(["info", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about == report.installation()
    assert report.installation_text(about) == printed.rstrip("\n")
    assert about["cache"] == {"folder": "~/kernels", "files": 2, "bytes": 2_500_000}
    for chip, what in bk.testing.compilers().items():
        (name,) = (name for name, chips in bk.testing.CHIPS.items() if chip in chips)
        able = about["implementations"][name]["compiles_for"]
        assert (chip in able) == (what == "compiles here")


def test_info_where_jax_finds_no_device_and_no_compiler_is_installed(monkeypatch, capsys):
    def refused():
        raise RuntimeError("Unable to\ninitialize the backend")

    monkeypatch.setattr("jax.devices", refused)
    monkeypatch.setattr(bk.testing.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("BRAINMASS_KERNELS_CACHE", "absent")
    assert cli.main(["info"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "devices none: Unable to initialize the backend",
        "scan not here: JAX finds no device",
        "no compiler for v4, v5e, v5p, v6e, tpu7x: it needs libtpu: pip install 'brainmass-kernels[ledger]'",
        "cache absent: 0 files, 0.0 MB",
    ):
        assert part in text


def write(path, rows):
    path.write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--target", "absent.csv"], "absent.csv, but there is no file"),
        (["--target", "negative.csv"], "negative.csv: powers are to be positive"),
        (["--target", "short.csv"], "too few"),
        (["--free", "be"], "takes NAME=LOW:HIGH"),
        (["--free", "bee=1:2"], "did you mean 'be'"),
        (["--free", "be=9:2"], "low < high"),
        (["--starts", "0"], "'starts' got 0"),
        (["--model", "JansenRitt"], "did you mean 'JansenRit'"),
        (["--model", "WilsonCowan"], "takes what is free of WilsonCowan"),
        (["--set", "C=a"], "takes NAME=VALUE"),
        (["--duration", "0.5"], "'transient' got 1 s"),
        (["--duration", "1.5"], "'duration' leaves"),
        (["--band", "40", "2"], "'band' got 40 and 2"),
        (["--out", "absent/fit.png"], "there is no folder"),
        (["--out", "fit.txt"], "ends in .png"),
        (["--json", "."], "which is a folder"),
        (["--report", "fit.txt"], "'--report' got fit.txt, but takes a name that ends in .html"),
        (["--report", "absent/fit.html"], "'--report' got absent/fit.html, but there is no folder"),
        (["--resume", "absent.json"], "'resume' got absent.json"),
        (["--resume", "negative.csv"], "not a fit saved"),
        (["--implementation", "mosaic"], "mosaic"),
        (["--implementation", "mosaic_tpu"], "mosaic_tpu"),
    ],
)
def test_an_error_is_one_line_and_status_2(argv, said, tmp_path, capsys):
    write(tmp_path / "negative.csv", [f"{f},-1" for f in FREQS])
    write(tmp_path / "short.csv", ["1,2", "2,3"])
    assert cli.main(["fit", *argv, "--quiet"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("brainmass-kernels: error: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["fit", "--starts", "many"], ["fitt"]])
def test_misspelt_options_are_status_2(argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_fit", interrupted)
    assert cli.main(["fit"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_fit_writes_figure_and_result_and_goes_on_with_it(tmp_path, capsys):
    rows = ["Hz,a,b"] + [f"{f},{1 / f + 2 * np.exp(-((f - 10) ** 2) / 4)},{1 / f}" for f in FREQS]
    write(tmp_path / "two.csv", rows)
    free = ["--free", "be=60:150", "--free", "noise.E_inp=0.5:10"]
    assert cli.main(["fit", "--target", "two.csv", *free, *QUICK, "--report", "fit.html"]) == 0
    printed = capsys.readouterr().out
    assert "wrote fit.png, fit.json and fit.html" in printed
    page = (tmp_path / "fit.html").read_text()
    assert "brainmass-kernels fit --target two.csv --free be=60:150" in page
    assert "Standard errors are those of the curvature" in page
    chosen = "numba" if importlib.util.find_spec("llvmlite") else "scan"
    for part in ("two.csv: 2 spectra, 2 starts, 2 steps", "be", " Hz", "rms error", "as given", f"ran on {chosen}: "):
        assert part in printed
    assert (tmp_path / "fit.png").stat().st_size > 10_000
    first = Fit.load("fit.json")
    assert json.loads((tmp_path / "fit.json").read_text())["parameters"]["be"]["unit"] == "Hz"

    again = ["--resume", "fit.json", "--steps", "1", "--quiet", "--json", "more.json", "--out", "more.svg"]
    assert cli.main(["fit", *again]) == 0
    second = Fit.load("more.json")
    assert len(second.losses) == 3
    np.testing.assert_array_equal(second.losses[:2], first.losses)
    assert (tmp_path / "more.svg").exists()
    assert cli.main(["fit", *again, "--realisations", "2"]) == 2
    assert "realisations = 1, but this call has 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_linear_fit_stays_one(tmp_path, capsys):
    free = ["--free", "be=60:150", "--set", "E_inp=60"]
    assert cli.main(["fit", "--linear", *free, *QUICK]) == 0
    assert "ran on linear: predict='linear'" in capsys.readouterr().out
    again = ["--set", "E_inp=60", "--resume", "fit.json", "--steps", "1", "--quiet", "--json", "more.json"]
    assert cli.main(["fit", *again]) == 0
    assert Fit.load("more.json").settings["predict"] == "linear"


@pytest.mark.slow
def test_a_channel_of_a_recording_is_fitted(tmp_path, capsys):
    pytest.importorskip("mne")
    ts = np.arange(40 * 200) / 200
    alpha = 20 * np.sin(2 * np.pi * 10 * ts) + np.random.default_rng(0).normal(0, 5, len(ts))
    write_edf(tmp_path / "rest.edf", {"O1": alpha, "O2": alpha}, 200)
    more = ["--optimiser", "levenberg_marquardt", "--checkpoint", "under way.json", "--free", "be=60:150"]
    assert cli.main(["fit", "--target", "rest.edf", "--channel", "O1", *more, *QUICK]) == 0
    assert "rest.edf, O1: 1 spectrum" in capsys.readouterr().out
    assert (tmp_path / "under way.json").exists()
    assert cli.main(["fit", "--target", "rest.edf", "--channel", "Oz", "--quiet"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert cli.main(["fit", "--channel", "O1", "--quiet"]) == 2
    assert "no --target" in capsys.readouterr().err


@pytest.mark.parametrize("ours", [True, False])
def test_only_its_own_process_starts_without_matplotlib(ours):
    """And searches for garbage more seldom; a process that imports the commands is left as it is."""
    name = "brainmass-kernels" if ours else "script.py"
    code = (
        f"import gc, json, sys; sys.argv = [{name!r}]; before = gc.get_threshold()[0];"
        "import brainmass_kernels.commands;"
        "print(json.dumps([gc.get_threshold()[0] > before, 'matplotlib' in sys.modules]));"
        "import matplotlib.figure"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [ours, not ours]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method", "nutz"], "unknown method in '--method' 'nutz'; did you mean 'nuts'"),
        (["--chains", "1"], "'chains' got 1, but takes at least 2"),
        (["--warmup", "0"], "'warmup' got 0, but takes at least 1"),
        (["--save", "draws.csv"], "'--save' got draws.csv, but takes a name that ends in .npz"),
        (["--out", "draws.txt"], "'--out' got draws.txt, but takes a name that ends in .png"),
        (["--segments", "30"], "'--segments' got 30.0, but there is no --target"),
        (["--free", "be=50:180"], "'--free' got ['be=50:180'], but there is no --target"),
        (["--target", "spectrum.csv"], "'--segments' is missing: of how many independent segments"),
        (["--target", "spectrum.csv", "--segments", "-1"], "'--segments' got -1, but takes a positive number"),
        (["--target", "spectrum.csv", "--segments", "9", "--free", "bee=1:2"], "unknown parameter or input 'bee'"),
        (["--target", "spectrum.csv", "--segments", "9", "--model", "Hopf"], "'--free' got nothing, but takes what"),
        (["--target", "spectrum.csv", "--segments", "9", "--band", "40", "2"], "'band' got 40 and 2 Hz"),
    ],
)  # fmt: skip
def test_a_sample_is_refused(argv, said, capsys):
    write(Path("spectrum.csv"), ["freq,power", *(f"{f:g},{1 / f:g}" for f in FREQS)])
    assert cli.main(["sample", *argv]) == 2
    assert said in capsys.readouterr().err


def test_methods_are_those_that_are_sampled_with():
    from brainmass_kernels import options
    from brainmass_kernels.inference.sample import METHODS

    assert tuple(METHODS) == options.METHODS


def test_the_example_is_sampled(capsys):
    """Whose chains agree, about the values that the data were simulated with."""
    pytest.importorskip("blackjax", reason="blackjax is not installed")
    assert cli.main(["sample", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "the data were simulated with C = 150, be = 110, likelihood.sigma = 0.2" in printed
    assert "wrote posterior.png and posterior.npz" in printed
    posterior = bk.Posterior.load("posterior.npz")
    assert posterior.shape == (8, 500)
    for name, known in (("C", 150.0), ("be", 110.0), ("likelihood.sigma", 0.2)):
        row = posterior.summary()[name]
        assert row.r_hat < 1.01
        mean, sd = (float(x.mantissa if hasattr(x, "mantissa") else x) for x in (row.mean, row.sd))
        assert abs(mean - known) < 3 * sd
    assert Path("posterior.png").stat().st_size > 10_000


def test_a_spectrum_is_sampled(capsys):
    """One of the model itself, with the scatter of 40 segments."""
    pytest.importorskip("blackjax", reason="blackjax is not installed")
    freqs = np.arange(2.0, 30.5, 1.0)
    drive = {"inputs": {"E_inp": 220 * u.Hz}, "noise": {"E_inp": 2.0 * u.Hz * u.second**0.5}}
    density = bk.linear_spectrum(bk.JansenRit(C=120.0), freqs * u.Hz, **drive)
    power = np.asarray(u.get_magnitude(density)) * np.random.default_rng(0).gamma(40, 1 / 40, len(freqs))
    write(Path("spectrum.csv"), ["freq,power", *(f"{f:g},{p:.6g}" for f, p in zip(freqs, power))])
    argv = ["--target", "spectrum.csv", "--segments", "40", "--free", "be=60:160", "--quiet", "--chains", "4"]
    assert cli.main(["sample", *argv, "--draws", "100", "--warmup", "100"]) == 0
    posterior = bk.Posterior.load("posterior.npz")
    assert tuple(posterior) == ("be", "likelihood.gain", "likelihood.background", "likelihood.exponent")
    row = posterior.summary()["be"]
    assert abs(float(row.mean / u.Hz) - 100) < 4 * float(row.sd / u.Hz) < 40
