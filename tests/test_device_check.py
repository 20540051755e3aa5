"""The device check: its plan, parts that crash or wait, what it expects of a device, and a run without one."""

import json
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases, checks, chips, crossovers, device_check, device_parts, parts
from benchmarks.device_check import Planned
from brainmass_kernels import bench

ABLE = ["mosaic_gpu", "triton"]


# What is planned ----------------------------------------------------------------------------------------------------


def names(stages):
    return [[part.name for part in stage] for stage in stages]


def test_quick_is_correctness_alone_and_full_has_speed_too():
    correct, alone = names(device_check.wanted(device_check.planned(ABLE, ["triton"], True, True), []))
    assert len(correct) == 8
    assert "use" in correct
    assert "networks-triton" in correct
    assert "networks-mosaic_gpu" not in correct
    assert alone == []
    both = names(device_check.wanted(device_check.planned(ABLE, ["triton"], False, True), []))
    assert both[0] == correct
    assert both[1] == [
        "speed-mosaic_gpu", "speed-triton", "large-mosaic_gpu", "large-triton", "network_speed",
    ]  # fmt: skip


@pytest.mark.parametrize(("quick", "minutes"), [(True, 3.0), (False, 8.0)])
def test_the_parts_fit_into_their_time(quick, minutes):
    """Those of correctness run side by side; what there is no time for is said, and not waited for."""
    correct, alone = device_check.wanted(device_check.planned(ABLE, ["triton"], quick, True), [])
    longest = max(part.seconds for part in correct) + device_check.RESERVE
    assert (
        longest + sum(part.seconds for part in alone[:2])
        < 60 * minutes
        == 60 * device_check.MINUTES["quick" if quick else "full"]
    )


def test_parts_by_name_and_by_kind():
    stages = device_check.planned(ABLE, ["triton"], False, True)
    found = names(device_check.wanted(stages, ["forward", "speed-triton", "profile"]))
    assert found == [
        ["forward-mosaic_gpu", "forward-triton"], ["speed-triton", "profile-mosaic_gpu", "profile-triton"],
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"'--only' got sped, but takes some of .*speed-triton"):
        device_check.wanted(stages, ["sped"])


def test_every_kind_that_is_planned_is_there():
    assert {*device_check.CORRECT, *device_check.ALONE, "machine"} == set(device_parts.KINDS)


def test_what_a_user_runs_first_must_print_what_is_shown():
    code = "print('0.496 more')"
    assert device_parts.used(code, "0.496 more\n")["ok"]
    assert "0.496" in device_parts.used(code, "0.339 more\n")["error"]
    assert "ZeroDivisionError" in device_parts.used("1 / 0", "")["error"]
    poor = "import json; json.dump({'rms': [0.2]}, open('fit.json', 'w'))"
    assert not device_parts.used(poor, "")["ok"]
    assert device_parts.used(poor.replace("0.2", "0.06"), "")["ok"]


def test_names_of_checks_are_unique():
    for listed in (cases.FORWARD_CHECKS, cases.GRADIENT_CHECKS, cases.MODEL_CHECKS, cases.NETWORK_CHECKS):
        assert len({check.name for check in listed}) == len(listed)


def test_few_programs_are_compiled():
    """Of both implementations, forward runs, gradients and models together."""
    listed = [*cases.FORWARD_CHECKS, *cases.GRADIENT_CHECKS, *cases.MODEL_CHECKS]
    programs = {check._replace(name="", bound=0.0, rates=1.0) for check in listed}
    assert len(programs) + len(cases.NETWORK_CHECKS) <= 30
    assert len({checks.plain(check) for check in listed}) < len(listed)


def test_a_second_implementation_is_timed_where_dispatch_chooses_between_them():
    second = cases.second_cases("gpu")
    forward = {c for c in cases.device_cases("gpu") if not (c.gradient or c.noisy) and c.scheme == "strang"}
    assert forward == {c for c in second if not c.gradient}
    assert set(second) < set(cases.device_cases("gpu"))


# Processes ----------------------------------------------------------------------------------------------------------


def scripted(monkeypatch, tmp_path, script: str, seconds: float = 60.0) -> device_check.Check:
    """A check whose parts are this script; it is given the folder and the item to begin with."""
    check = device_check.Check(tmp_path, time.monotonic() + seconds, True, None, str(tmp_path))

    def command(self, part, seconds, skip):
        return [sys.executable, "-c", script, str(tmp_path / parts.LINES), str(skip)]

    monkeypatch.setattr(device_check.Check, "command", command)
    return check


CRASHES_AT_ONE = """
import os, signal, sys
from benchmarks.parts import note
for at in range(int(sys.argv[2]), 3):
    note(sys.argv[1], part="forward-x", began=f"item {at}", at=at)
    if at == 1:
        print("about to crash", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    note(sys.argv[1], part="forward-x", check=f"item {at}", ok=True)
"""


def test_a_crash_costs_one_item(monkeypatch, tmp_path):
    check = scripted(monkeypatch, tmp_path, CRASHES_AT_ONE)
    check.run(Planned("forward-x", 60.0))
    rows = parts.read(tmp_path / parts.LINES)
    assert [row["check"] for row in rows if "check" in row] == ["item 0", "item 2"]
    assert [(row["exit"], row["skip"]) for row in rows if "exit" in row] == [(-9, 0), (0, 2)]
    failed = device_check.failures(rows)
    assert [row.get("item") for row in failed] == ["item 1", None]
    assert failed[1]["error"] == "ended with -9"
    assert failed[1]["tail"] == ["about to crash"]
    assert "about to crash" in (tmp_path / parts.LOGS).read_text()


def test_a_crash_before_the_first_item_is_not_tried_again(monkeypatch, tmp_path):
    scripted(monkeypatch, tmp_path, "raise SystemExit(5)").run(Planned("forward-x", 60.0))
    (row,) = parts.read(tmp_path / parts.LINES)
    assert (row["exit"], row["skip"]) == (5, 0)


WAITS = """
import subprocess, sys, time
from benchmarks.parts import note
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
note(sys.argv[1], part="forward-x", began="a long one", at=0, child=child.pid)
time.sleep(100)
"""


def test_a_part_that_waits_is_ended_with_all_that_it_started(monkeypatch, tmp_path):
    check = scripted(monkeypatch, tmp_path, WAITS, seconds=4.0)
    check.run(Planned("forward-x", 60.0))
    first, last = parts.read(tmp_path / parts.LINES)
    assert last["exit"] == "out of time"
    assert [row.get("item") for row in device_check.failures([first, last])] == ["a long one", None]
    for _ in range(100):  # until whoever inherited it has reaped it
        if not alive(first["child"]):
            return
        time.sleep(0.1)
    raise AssertionError("what the part started lives on")


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def failing(error: Exception):
    raise error


def test_what_fails_is_reported_and_the_next_is_tried(tmp_path):
    part = device_parts.Part("forward-scan", tmp_path, 60.0, skip=1, dry=True, first=None)
    items = {
        "skipped": lambda: failing(AssertionError("it was run")),
        "wrong": lambda: {"ok": False, "off": 1.0},
        "raises": lambda: failing(ValueError("no such thing")),
        "right": lambda: {"ok": True},
        "poisoned": lambda: failing(RuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")),
        "after it": lambda: failing(AssertionError("it was run")),
    }
    with pytest.raises(SystemExit) as left:
        part.each(items, lambda run: run(), "check")
    assert left.value.code == parts.LOST
    rows = parts.read(tmp_path / parts.LINES)
    assert [row["began"] for row in rows if "began" in row] == ["wrong", "raises", "right", "poisoned"]
    found = {row["check"]: row for row in rows if "check" in row}
    assert [name for name, row in found.items() if not row["ok"]] == ["wrong", "raises", "poisoned"]
    assert found["raises"]["error"] == "ValueError: no such thing"
    assert [row["check"] for row in device_check.failures(rows)] == ["wrong", "raises", "poisoned"]


def test_what_there_is_no_time_for_is_said(tmp_path):
    part = device_parts.Part("speed-scan", tmp_path, -1.0, skip=0, dry=True, first=None)
    part.each({"a": None, "b": None}, failing, "case")
    (row,) = parts.read(tmp_path / parts.LINES)
    assert row["not_reached"] == ["a", "b"]
    assert device_check.not_reached([row]) == ["speed-scan: a", "speed-scan: b"]


# What is right ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "off"),
    [(lambda x: x, 0.0), (lambda x: 1.1 * x, 0.1), (lambda x: x[:-1], None), (lambda x: jnp.nan * x, None)],
    ids=["right", "off", "of another shape", "not finite"],
)
def test_every_leaf_is_held_against_what_is_wanted(wrong, off):
    want = {"a": np.arange(1.0, 4.0), "b": np.ones(2)}
    found = checks.compared(lambda x: {**x, "b": wrong(x["b"])}, want, want, 1e-3)
    assert found["ok"] == (off == 0.0)
    assert found["off"] == (off if off is None else pytest.approx(off))
    assert off == 0.0 or found["worst"] == "['b']"


def test_two_runs_must_have_the_same_bits():
    calls = iter([1.0, 1.0 + 1e-12])
    found = checks.compared(lambda x: x * next(calls), np.ones(3), np.ones(3), 1e-3)
    assert not found["same_bits_twice"]
    assert not found["ok"]


SMALL = cases.Check("small", 50, True, 1e-4, steps=12, every=3, driven=True, noisy=True)


def test_a_check_holds_for_more_lanes_than_a_period_and_finds_what_is_wrong(monkeypatch):
    assert SMALL.lanes > checks.PERIOD
    found = checks.run(SMALL, "scan")
    assert found["ok"], found
    right = checks.compiled(SMALL._replace(name="", bound=0.0), "scan")

    def one_lane_off(theta):
        seen, gradient = right(theta)
        row = gradient["inputs"]["M_inp"]
        return seen, {**gradient, "inputs": {**gradient["inputs"], "M_inp": row.at[7].multiply(1.01)}}

    monkeypatch.setattr(checks, "compiled", lambda *_: one_lane_off)
    found = checks.run(SMALL, "scan")
    assert not found["ok"]
    assert found["worst"] == "[1]['inputs']['M_inp']"


def test_rates_are_data_of_one_program():
    slow, fast = (check for check in cases.GRADIENT_CHECKS if check.name.startswith("129 masses"))
    assert fast.rates > slow.rates
    ratio = checks.drawn(checks.plain(fast))["parameters"]["be"] / checks.drawn(checks.plain(slow))["parameters"]["be"]
    np.testing.assert_allclose(ratio, fast.rates)
    # Rounding over the longest segment of either, exp(a dt) a step, on the two sides of what inverse steps may do.
    longest = 15
    reach = sys.modules["brainmass_kernels.run"].MAX_INVERSE_GROWTH
    growths = [
        float(checks.drawn(checks.plain(check))["parameters"]["be"].max()) * 1e-4 * longest for check in (slow, fast)
    ]
    assert growths[0] < reach < growths[1]


# What is expected ---------------------------------------------------------------------------------------------------


def fast(lanes: int, **more) -> bench.Case:
    return bench.Case(lanes, 10_000, precision="fast", **more)


def test_the_ceiling_is_the_ledgers():
    forward = chips.ceiling(fast(1), "mosaic_gpu", "NVIDIA H200")
    both = chips.ceiling(fast(1, gradient=True), "mosaic_gpu", "NVIDIA H200")
    assert 1e11 < both < forward < 2e12
    assert chips.ceiling(fast(1), "triton", "an unknown device") is None


@pytest.mark.parametrize("implementation", ABLE)
@pytest.mark.parametrize("gradient", [False, True])
def test_cards_of_one_architecture_differ_by_multiprocessors_and_clock(implementation, gradient):
    of = {
        name: chips.ceiling(fast(1, gradient=gradient), implementation, f"NVIDIA {name}")
        for name in ("H100 80GB HBM3", "H100 PCIe", "H200")
    }
    assert of["H100 80GB HBM3"] == of["H200"]
    assert of["H100 PCIe"] == pytest.approx(114 * 1.755 / (132 * 1.98) * of["H200"], rel=1e-3)


def test_every_chip_of_a_device_is_in_the_ledger():
    known = {row["chip"] for row in chips.counted()}
    assert {chip for device in chips.CHIPS.values() for chip in (device.mosaic, device.triton) if chip} <= known


def test_few_lanes_wait_for_latency_and_many_for_the_issue():
    def share(case):
        return chips.expected(case, "mosaic_gpu", "NVIDIA H200") / chips.ceiling(case, "mosaic_gpu", "NVIDIA H200")

    # Each scheduler has one warp or none up to 16,896 masses: the time is that of one.
    rates = [chips.expected(fast(lanes), "mosaic_gpu", "NVIDIA H200") for lanes in (1, 128, 16_896)]
    np.testing.assert_allclose(np.divide(rates, rates[0]), [1, 128, 16_896], rtol=1e-6)
    assert share(fast(128)) < 0.01
    assert 0.7 < share(fast(1_048_576)) < 1.0
    assert 0.7 < share(fast(1_048_576, gradient=True)) < 1.0


def test_nothing_is_expected_without_counts_or_latencies():
    assert chips.expected(fast(1), "mosaic_gpu", "an unknown device") is None
    assert chips.expected(fast(1), "triton", "NVIDIA A100-SXM4-80GB") is None
    assert chips.expected(fast(1)._replace(scheme="heun"), "mosaic_gpu", "NVIDIA H200") is None


# The result ---------------------------------------------------------------------------------------------------------


def test_crossovers_reads_the_result(tmp_path):
    about = {"device": "NVIDIA H100 80GB HBM3", "platform": "gpu", "date": "2026-01-02", "cores": 16, "versions": {}}
    measured = bench.Measured(bench.Case(4096, 10_000), "mosaic_gpu", 1.0, 50.0, 1e-6, 0)
    row = {**bench.record(measured), "expected": None, "share_of_expected": None, "share_of_ceiling": 0.5}
    lines = [
        {"part": "speed-mosaic_gpu", "began": "a", "at": 0},
        {"part": "speed-mosaic_gpu", "case": "a", "ok": True, "row": row},
        {"part": "speed-mosaic_gpu", "began": "b", "at": 1},
        {"part": "speed-mosaic_gpu", "case": "b", "ok": False, "error": "no speed"},
    ]
    found = device_check.result(about, lines, "full")
    path = device_check.save(found, tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3-2026-01-02.json"
    (table,) = crossovers.from_results([json.loads(path.read_text())]).values()
    assert table["rows"] == [{"lanes": 4096, "steps": 10_000, "seconds": {"mosaic_gpu": 1.0, "scan": 50.0}}]
    printed = "\n".join(device_check.table(found))
    assert "50%" in printed
    assert "FAILED speed-mosaic_gpu b: no speed" in printed


@pytest.mark.parametrize(("given", "variable", "where"), [("x", "y", "x"), (None, "y", "y"), (None, None, None)])
def test_where_results_go(monkeypatch, given, variable, where):
    monkeypatch.delenv("OUT", raising=False)
    if variable:
        monkeypatch.setenv("OUT", variable)
    found = device_check.chosen_out(given and device_check.Path(given))
    assert found == (device_check.Path(where) if where else device_check.RESULTS)


@pytest.mark.slow
def test_the_whole_script_runs_without_a_chip(tmp_path, capsys):
    """Every part, in processes of their own; kernels that run here, in tiny sizes."""
    status = device_check.main(["--dry", "--minutes", "9", "--out", str(tmp_path), "--only", *WHOLE])
    printed = capsys.readouterr().out
    rows = parts.read(tmp_path / parts.LINES)
    assert status == 0, printed + (tmp_path / parts.LOGS).read_text()[-5000:]
    assert {row["part"].partition("-")[0] for row in rows if row.get("exit") == 0} == {"machine", *WHOLE}
    (path,) = tmp_path.glob("*-dry.json")
    found = json.loads(path.read_text())
    assert len(found["checks"]) == 9
    assert all(row["ok"] for row in found["checks"])
    assert [row["gradient"] for row in found["rows"]] == [False, True]
    # Of 2,000 steps, of which the scan ran half.
    assert [row["reference_steps"] for row in found["rows"]] == [1000, 1000]
    assert [row["what"] for row in found["networks"]] == ["Jansen-Rit, forward", "Jansen-Rit, gradient in k"]
    (table,) = crossovers.from_results([found]).values()
    assert [(row["lanes"], row.get("regions")) for row in table["rows"]] == [(4, None), (10, 5)]
    assert "checks hold" in printed


WHOLE = [*device_check.CORRECT, *device_check.ALONE]
