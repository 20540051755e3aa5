"""benchmarks/peers: the worker's protocol, the float64 answers, rounds and tables; nothing is timed here."""

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import accuracy
from benchmarks.peers import __main__ as command
from benchmarks.peers import by_c, environments, oracle, rounds, table
from benchmarks.peers import work as w
from benchmarks.peers.rounds import Plan, Worker, WorkerFailed
from benchmarks.peers.work import Work
from benchmarks.peers.worker import Server

ROOT = Path(__file__).parents[1]
FORWARD = Work("forward", 128, 200)


# What peers should compute --------------------------------------------------------------------------------------------


def derivative(t, x, Ae, be, C):
    """Jansen and Rit's equations of one mass, in mV and seconds, at 220 Hz."""

    def rate(v):
        return 5.0 / (1.0 + np.exp(0.56 * (6.0 - v)))

    y, v = x[:3], x[3:]
    push = [
        Ae * be * rate(y[1] - y[2]),
        Ae * be * (220.0 + 0.8 * C * rate(C * y[0])),
        22.0 * 50.0 * 0.25 * C * rate(0.25 * C * y[0]),
    ]
    a = np.array([be, be, 50.0])
    return np.concatenate([v, np.array(push) - 2.0 * a * v - a**2 * y])


def test_rk4_is_what_a_solver_of_high_order_finds():
    from scipy.integrate import solve_ivp

    lanes = oracle.picked(FORWARD.lanes)
    for i in (0, -1):
        args = [float(x[lanes][i]) for x in w.parameters(FORWARD.lanes)]
        times = np.arange(1, FORWARD.records + 1) * w.DT * w.EVERY
        run = solve_ivp(
            derivative, (0.0, times[-1]), np.zeros(6), "DOP853", times, args=args, rtol=1e-10, atol=1e-10
        )  # fmt: skip
        np.testing.assert_allclose(oracle.answer(FORWARD, "rk4").records[:, i], run.y[1] - run.y[2], atol=1e-7)


@pytest.mark.parametrize(("scheme", "order"), [("euler", 1), ("exp_euler", 1), ("heun", 2)])
def test_schemes_are_of_their_order(scheme, order, monkeypatch):
    def error():
        p = {**w.SHARED, **{name: np.full(1, value) for name, value in w.ONE.items()}}
        steps = round(0.02 / oracle.DT)
        exact = oracle.simulated(steps, p, "rk4")[-1]
        return float(np.abs(oracle.simulated(steps, p, scheme)[-1] - exact)[0])

    coarse = error()
    monkeypatch.setattr(oracle, "DT", w.DT / 2.0)
    assert coarse / error() == pytest.approx(2.0**order, rel=0.15)


@pytest.fixture
def connectome(tmp_path):
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((w.REGIONS, w.REGIONS)) < 0.2, rng.random((w.REGIONS, w.REGIONS)), 0.0)
    path = tmp_path / "connectome.npz"
    np.savez(path, weights=weights.astype(np.float32), delays=rng.integers(1, 40, weights.shape, np.int32))
    return str(path)


def test_a_network_without_strength_is_its_masses(connectome):
    records = oracle.network(Work("network", 2, 50, connectome), "exp_euler")
    alone = oracle.simulated(
        50, {**w.SHARED, **{name: np.full(1, value) for name, value in w.ONE.items()}}, "exp_euler"
    )[:, 0]
    np.testing.assert_allclose(records[:, 0], np.tile(alone[:, None], w.REGIONS), rtol=1e-12)
    # The other network has the greatest strength.
    assert np.abs(records[:, 1] - records[:, 0]).max() > 1e-4


def test_a_delayed_pulse_arrives_when_it_should(tmp_path):
    """What one region receives before its delay has gone by is nothing."""
    weights = np.zeros((w.REGIONS, w.REGIONS), np.float32)
    weights[0, 1] = 1.0
    path = tmp_path / "one.npz"
    np.savez(path, weights=weights, delays=np.full(weights.shape, 30, np.int32))
    records = oracle.network(Work("network", 2, 60, str(path)), "euler")[:, 1]
    apart = np.abs(records[:, 0] - records[:, 2])
    assert (apart[:3] == 0.0).all()
    assert apart[-1] > 0.0


def test_a_spectral_loss_is_of_welch():
    from scipy.signal import welch

    work = Work("fit", 3, 1000)
    eeg = np.random.default_rng(0).normal(size=(work.records, 3))
    power = welch(eeg, 1.0 / (w.DT * w.EVERY), nperseg=work.segment, axis=0)[1][w.band(work)]
    expected = np.sum(np.mean((np.log10(power) - w.wanted(work)[:, None]) ** 2, 0))
    assert w.spectral_loss(eeg, work) == pytest.approx(expected, rel=1e-6)


def test_wrong_results_are_found():
    right = np.zeros((FORWARD.records, FORWARD.lanes))
    right[:, oracle.picked(FORWARD.lanes)] = oracle.answer(FORWARD, "euler").records
    assert "wrong" not in oracle.compared(FORWARD, "euler", {"records": right.astype(np.float32)})
    assert "from euler in float64" in oracle.compared(FORWARD, "euler", {"records": 1.01 * right})["wrong"]
    assert "from exp_euler" in oracle.compared(FORWARD, "exp_euler", {"records": right})["wrong"]
    assert oracle.compared(FORWARD, "euler", {"records": np.nan * right}) == {"wrong": "not all numbers are finite"}


def test_noise_of_a_wrong_width_is_found():
    work, rng = Work("noise", 256, 200), np.random.default_rng(1)
    p = oracle._of_lanes(*w.parameters(work.lanes))

    def run(width):
        def noise():
            return width * w.NOISE / np.sqrt(w.DT) * rng.standard_normal(work.lanes)

        return {"records": oracle.simulated(work.steps, p, "heun", noise)}

    assert "wrong" not in oracle.compared(work, "heun", run(1.0))
    assert "a spread of" in oracle.compared(work, "heun", run(1.4))["wrong"]
    assert "a spread of" in oracle.compared(work, "heun", run(0.0))["wrong"]


# The worker -----------------------------------------------------------------------------------------------------------


def peer(**more):
    """A peer without a library, whose records are right."""

    def prepared(work, setting):
        lanes = oracle.picked(work.lanes)
        records = np.zeros((work.records, work.lanes), np.float32)
        records[:, lanes] = oracle.answer(work, "euler").records * (1.1 if setting == "wrong" else 1.0)
        return lambda: {"records": records}

    given = {"HOW": "by hand", "PACKAGES": (), "SCHEMES": {"forward": "euler"}, "REFUSED": {"fit": "it cannot"}}
    return SimpleNamespace(**given, settings=lambda work: ["wrong", "right"], prepared=prepared, **more)


def test_the_protocol(tmp_path):
    server, out = Server(peer()), str(tmp_path / "out.npz")
    hello = server.answer({"do": "hello"})
    assert hello["ok"]
    assert hello["schemes"] == {"forward": "euler"}
    assert "numpy" in hello["versions"]
    assert server.answer({"do": "run", "seconds": 0.0})["error"] == "RuntimeError: nothing is prepared"
    assert server.answer({"do": "settings", "work": list(FORWARD)})["settings"] == ["wrong", "right"]
    first = server.answer({"do": "prepare", "work": list(FORWARD), "setting": "right", "out": out})
    assert first["ok"]
    assert first["first"] >= 0.0
    with np.load(out) as got:
        assert got["records"].shape == (FORWARD.records, FORWARD.lanes)
    assert server.answer({"do": "run", "seconds": 0.0})["calls"] == 1
    assert "takes hello, settings" in server.answer({"do": "sing"})["error"]
    assert "unexpected keyword" in server.answer({"do": "run", "secondes": 1})["error"]


def test_a_peer_that_cannot_prepare_leaves_nothing_to_run(tmp_path):
    broken = peer()
    server, out = Server(broken), str(tmp_path / "out.npz")
    server.answer({"do": "prepare", "work": list(FORWARD), "setting": "right", "out": out})

    def prepared(work, setting):
        raise MemoryError("too much\nof it")

    broken.prepared = prepared
    answer = server.answer({"do": "prepare", "work": list(FORWARD), "setting": "right", "out": out})
    assert answer == {"ok": False, "error": "MemoryError: too much"}
    assert not server.answer({"do": "run", "seconds": 0.0})["ok"]


def process(tmp_path, program: str) -> Worker:
    return Worker("c", str(tmp_path), [sys.executable, "-c", program])


def test_a_process_that_dies_tells_its_last_words(tmp_path):
    worker = process(tmp_path, "import sys; sys.exit('no such library')")
    with pytest.raises(WorkerFailed, match="ended with 1: no such library"):
        worker.ask(do="hello")


def test_a_process_that_does_not_answer_is_ended(tmp_path):
    worker = process(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(WorkerFailed, match=r"no answer within 0\.2 s"):
        worker.ask(patience=0.2, do="hello")
    assert not worker.alive


def test_there_is_no_such_peer(tmp_path):
    command = [sys.executable, "-m", "benchmarks.peers.worker", "nobody"]
    worker = Worker("c", str(tmp_path), command)
    with pytest.raises(WorkerFailed, match="there is no peer 'nobody'"):
        worker.ask(do="hello")


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("cc")), reason="no C compiler")
def test_c_in_its_process(tmp_path, monkeypatch):
    """A whole peer: forward and the gradient in C alone, both within rounding of float64."""
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(rounds, "interpreter", environments.interpreter)
    said: list[str] = []
    works = [FORWARD, Work("gradient", 128, 200), Work("fit", 4, 1000)]
    numbers = rounds.compared(["c"], works, Plan(2, 0.0, True), said.append)
    forward, gradient, fit = (result["peers"]["c"] for result in numbers["results"])
    assert forward["from_scheme"] < 1e-5
    assert forward["rms_mV"] < 0.02
    assert forward["seconds"] > 0.0
    assert gradient["from_scheme"] < 1e-4
    assert gradient["slopes_from_rk4"] < 0.01
    assert fit == {"refused": by_c.REFUSED["fit"]}
    assert numbers["peers"]["c"]["environment"] == "the one at hand"


# Rounds ---------------------------------------------------------------------------------------------------------------


class Instant:
    """A worker in this process, of which each call takes so long as is said."""

    def __init__(self, server: Server, seconds, calls: list[str], name: str):
        self.server, self.seconds, self.calls, self.name, self.alive = server, iter(seconds), calls, name, True

    def ask(self, **request):
        answer = self.server.answer(request)
        if request["do"] == "run":
            self.calls.append(self.name)
            answer["seconds"] = next(self.seconds)
        if not answer.pop("ok"):
            raise WorkerFailed(answer["error"])
        return answer


@pytest.fixture
def peers(tmp_path):
    made, calls = rounds.Peers([], str(tmp_path)), []
    # One call when the setting is tried, then one a round.
    for name, seconds in {"ours": [9.0, 1.0, 2.0, 4.0], "scan": [9.0, 4.0, 6.0, 8.0]}.items():
        made.about[name] = Server(peer()).do_hello()
        made.workers[name] = Instant(Server(peer()), seconds, calls, name)
    made.about["vbjax"] = {"skipped": "not made"}
    return made, calls


def test_ratios_are_medians_over_rounds_of_those_that_are_right(peers):
    random.seed(0)
    made, calls = peers
    result = rounds.case(made, FORWARD, Plan(3, 0.0, True), lambda text: None)
    rows = result["peers"]
    assert rows["scan"]["ratios"] == [4.0, 3.0, 2.0]
    assert rows["scan"]["ratio"] == 3.0
    assert rows["ours"]["ratio"] == 1.0
    assert rows["ours"]["seconds"] == 2.0
    assert rows["vbjax"] == {"skipped": "not made"}
    assert rows["scan"]["setting"] == "right"
    assert rows["scan"]["settings"]["wrong"].startswith("wrong: ")
    turns = calls[2:]
    assert [sorted(turns[i : i + 2]) for i in (0, 2, 4)] == [["ours", "scan"]] * 3


def test_a_peer_of_wrong_results_has_no_speed(peers):
    made, calls = peers
    # Not thorough: its first setting alone, which is wrong.
    result = rounds.case(made, FORWARD, Plan(3, 0.0, False), lambda text: None)
    assert all("from euler in float64" in result["peers"][name]["skipped"] for name in ("ours", "scan"))
    assert calls == []


def test_a_peer_that_fails_in_a_round_is_left_out(peers):
    made, _ = peers
    made.workers["scan"].seconds = iter([9.0, 4.0])
    made.workers["scan"].ask = failing_after(made.workers["scan"].ask, runs=2)
    rows = rounds.case(made, FORWARD, Plan(3, 0.0, True), lambda text: None)["peers"]
    assert rows["scan"] == {"skipped": "its process ended with -9"}
    assert rows["ours"]["ratios"] == [1.0, 1.0, 1.0]


def failing_after(ask, runs: int):
    left = iter(range(runs))

    def failing(**request):
        if request["do"] == "run" and next(left, None) is None:
            raise WorkerFailed("its process ended with -9")
        return ask(**request)

    return failing


def test_a_table(peers):
    made, _ = peers
    random.seed(0)
    case = rounds.case(made, FORWARD, Plan(3, 0.0, True), lambda text: None)
    case["peers"]["diffrax"] = {"refused": "it has no delays"}
    numbers = {"peers": made.about, "results": [case]}
    text = table.markdown(numbers)
    assert re.search(r"^\| forward, 128 x 200 \| lax.scan by hand \| Euler \| 3.00x \| 3.8x \|", text, re.M), text
    assert "- not run: vbjax (forward): not made" in text
    assert "- not run: diffrax (forward): it has no delays" in text
    assert all(line.count("|") == 9 for line in text.splitlines() if line.startswith("|"))
    assert "- forward, lax.scan by hand: right\n" in text
    case["peers"]["scan"].update(setting="right, 2 devices", settings={"right": 6.0, "right, 2 devices": 4.0})
    assert "right, 2 devices (the fastest on one device took 1.5 times as long)" in table.markdown(numbers)
    # A goal is of the whole work.
    assert table.goals(numbers) == []
    case["masses"] = w.FULL["forward"].masses
    assert table.goals(numbers) == ["forward: 3.00x lax.scan by hand, goal 3.8x: missed"]
    case["peers"]["scan"]["ratio"] = 3.8
    assert table.goals(numbers) == ["forward: 3.80x lax.scan by hand, goal 3.8x: met"]


# Environments and the command -----------------------------------------------------------------------------------------


def test_an_environment_that_cannot_be_made_is_skipped_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    assert environments.interpreter("diffrax")[1].startswith("diffrax not installed: python -m benchmarks.peers --make")

    def run(command, **_):
        wrong = "pip" in command
        return SimpleNamespace(returncode=int(wrong), stdout="", stderr="note\nERROR: No matching distribution" * wrong)

    monkeypatch.setattr(environments.subprocess, "run", run)
    assert environments.make(["diffrax"]) == {"diffrax": "ERROR: No matching distribution"}
    assert environments.interpreter("diffrax") == (None, "ERROR: No matching distribution")
    made = rounds.Peers(["diffrax"], str(tmp_path))
    assert made.about == {"diffrax": {"skipped": "ERROR: No matching distribution"}}


def test_every_peer_has_its_file_and_pins_its_versions():
    for name, environment in environments.PEERS.items():
        assert (ROOT / "benchmarks" / "peers" / f"by_{name}.py").exists()
        pinned = [p for p in environment.packages if p not in ("-e", str(ROOT))]
        assert pinned
        assert all("==" in package for package in pinned)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "nobody"], "--peers got nobody, but takes ours, scan"),
        (["--only", "forward,backward"], "--only got backward, but takes forward, gradient"),
        (["--rounds", "0"], "--rounds got 0, but takes 1 or more"),
        (["--table", "--out", "none.json"], "none.json is not there yet"),
    ],
)
def test_options(arguments, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peers", *arguments])
    with pytest.raises(SystemExit, match=said):
        command.main()


@pytest.mark.slow
def test_it_runs_with_what_is_here():
    """Forward and gradient of ours and of those written by hand, from the command to the table."""
    run = [sys.executable, "-m", "benchmarks.peers", "--quick", "--only", "forward,gradient,fit,noise"]
    done = subprocess.run([*run, "--peers", "ours,scan,c,numba"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in ("forward, 128 x 200", "gradient, 128 x 200", "noise, 1,024 x 200", "fit, 4 x 1,000"):
        for name in ("brainmass_kernels", "lax.scan by hand"):
            assert re.search(rf"^\| {case} \| {name} ", done.stdout, re.M), done.stdout


# Time to accuracy -----------------------------------------------------------------------------------------------------


def test_the_largest_step_that_is_near_enough(monkeypatch):
    monkeypatch.setattr(accuracy, "exact", lambda milliseconds: np.zeros((milliseconds, accuracy.FEW)))

    def off(dt_ms, milliseconds):
        return lambda *args: np.full((milliseconds, accuracy.FEW), dt_ms)

    assert accuracy.largest_step(off, (1.0, 0.5, 0.1, 0.05), 10, 0.2) == (0.1, pytest.approx(0.1))
    assert accuracy.largest_step(off, (1.0, 0.05), 10, 0.01) is None

    def less_off(dt_ms, milliseconds):
        return lambda *args: np.full((milliseconds, accuracy.FEW), dt_ms / 10.0)

    assert accuracy.first_within({32: off, 64: less_off}, (1.0, 0.1), 10, 0.05) == (64, 0.1, pytest.approx(0.01))
    with pytest.raises(SystemExit, match=r"no step from 1 to 0\.1 ms is within 0\.05 mV"):
        accuracy.first_within({32: off}, (1.0, 0.1), 10, 0.05)


@pytest.mark.slow
def test_time_to_accuracy_runs(capsys):
    pytest.importorskip("brainmass")
    result = accuracy.time_to_accuracy(16, 100, 0.5, 1)
    assert result["rms_mV"]["ours"] <= 0.5
    assert result["rms_mV"]["brainmass"] <= 0.5
    assert "times as soon as brainmass's default (goal 20)" in capsys.readouterr().out
