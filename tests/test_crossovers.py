"""Dispatch by what was measured: the nearest size, its order, and what is said of it."""

import json

import brainunit as u
import jax.numpy as jnp
import needs
import pytest

import brainmass_kernels as bk
from benchmarks import crossovers
from benchmarks.cases import crossover_cases
from brainmass_kernels import bench, dispatch, testing


def plan(lanes: int, steps: int):
    return bk.explain(bk.JansenRit(C=jnp.linspace(100.0, 160.0, lanes)), steps, 0.1 * u.ms)


def measured(monkeypatch, *rows, kind: str = "cpu"):
    """Dispatch as if these had been measured: (lanes, steps, seconds of each)."""
    monkeypatch.setattr(dispatch, "crossovers", lambda: {kind: tuple(dispatch.Row(*row) for row in rows)})


# The choice ---------------------------------------------------------------------------------------------------------


@needs.numba
def test_the_nearest_size_decides(monkeypatch):
    slow, fast = {"numba": 2.0, "scan": 1.0}, {"numba": 1.0, "scan": 3.0}
    measured(monkeypatch, (1, 10, slow), (1, 1000, fast), (100, 10, fast))
    assert [plan(*size).implementation for size in [(1, 10), (5, 50), (1, 10), (9, 99)]] == ["scan"] * 4
    assert [plan(*size).implementation for size in [(1, 900), (2, 101), (11, 10), (10**4, 10)]] == ["numba"] * 4


@needs.numba
def test_the_reason_names_the_size_and_the_ratio(monkeypatch):
    measured(monkeypatch, (64, 1000, {"scan": 4.4, "numba": 1.0}))
    chosen = plan(50, 2000)
    assert chosen.reason == "measured on cpu, 64 lanes x 1,000 steps: 4.4x as fast as scan"
    assert chosen.passed_over["scan"] == "takes 4.4x as long as numba, at 64 lanes x 1,000 steps"
    assert "not 'tpu'" in chosen.passed_over["mosaic_tpu"]
    assert set(chosen.passed_over) == set(bk.implementations()) - {"numba"}
    assert chosen.reason in str(chosen)


@needs.numba
def test_where_scan_was_the_fastest_it_is_chosen(monkeypatch):
    measured(monkeypatch, (1, 10, {"numba": 3.0, "scan": 1.0}))
    chosen = plan(1, 10)
    assert chosen.implementation == "scan"
    assert chosen.reason == "measured on cpu, 1 lanes x 10 steps: the fastest there that runs"
    assert chosen.passed_over["numba"] == "takes 3x as long as scan, at 1 lanes x 10 steps"


def test_what_is_missing_passes_to_the_next(monkeypatch):
    measured(monkeypatch, (1, 10, {"mosaic_gpu": 1.0, "numba": 2.0, "scan": 4.0}))
    with testing.without("numba"):
        chosen = plan(1, 10)
    assert chosen.implementation == "scan"
    assert chosen.passed_over["numba"] == "left out by testing.without"
    assert chosen.passed_over["mosaic_gpu"] == dispatch.load("mosaic_gpu").unavailable("cpu")


@needs.numba
def test_a_device_that_nobody_measured_has_the_order_of_preference(monkeypatch):
    measured(monkeypatch, (1, 10, {"numba": 2.0, "scan": 1.0}), kind="another device")
    chosen = plan(1, 10)
    assert chosen.implementation == "numba"
    assert chosen.reason == "nothing was measured on cpu: the first that runs, in order of preference"
    assert chosen.passed_over["scan"] == "numba comes first"


def test_another_platform_than_this_machines_has_no_rows(monkeypatch):
    measured(monkeypatch, (1, 10, {"numba": 2.0, "scan": 1.0}))
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    with testing.without("mosaic_gpu", "triton"):
        chosen = plan(1, 10)
    assert chosen.implementation == "scan"
    assert chosen.reason == "nothing was measured on this gpu: the first that runs, in order of preference"


PREFERENCE = ["mosaic_tpu", "mosaic_gpu", "triton", "numba", "scan"]


@pytest.mark.parametrize(
    ("seconds", "order"),
    [
        (None, PREFERENCE),
        ({"triton": 1.0, "mosaic_gpu": 2.0, "scan": 9.0}, ["triton", "mosaic_gpu", "mosaic_tpu", "numba", "scan"]),
        ({"triton": 1.0, "scan": 2.0, "numba": 3.0}, ["triton", "mosaic_tpu", "mosaic_gpu", "scan", "numba"]),
        ({"scan": 1.0, "numba": 2.0}, ["scan", "numba", "mosaic_tpu", "mosaic_gpu", "triton"]),
        ({"numba": 1.0}, ["numba", "mosaic_tpu", "mosaic_gpu", "triton", "scan"]),
    ],
)
def test_the_order_in_which_implementations_are_tried(seconds, order):
    assert list(dispatch._order(seconds and dispatch.Row(1, 10, seconds))) == order


# The table of the package -------------------------------------------------------------------------------------------


def test_the_table_holds_known_names_and_each_size_once():
    known = set(bk.implementations())
    for kind, rows in dispatch.crossovers().items():
        assert len({(row.lanes, row.steps, row.regions) for row in rows}) == len(rows) > 0, kind
        for row in rows:
            assert "scan" in row.seconds
            assert set(row.seconds) <= known
            assert all(seconds > 0 for seconds in row.seconds.values())


def test_the_table_is_written_as_the_command_writes_it():
    text = crossovers.TABLE.read_text()
    assert crossovers.text_of(json.loads(text)) == text


def test_cpus_were_measured_at_the_sizes_of_the_cases():
    sizes = {(row.lanes, row.steps) for row in dispatch.crossovers()["cpu"]}
    assert sizes == {(case.lanes, case.steps) for case in crossover_cases("cpu")}


def test_networks_are_held_against_networks(monkeypatch):
    masses, network = dispatch.Row(76, 1000, {"scan": 2.0, "triton": 1.0}), dispatch.Row(760, 10, {"scan": 1.0}, 76)
    monkeypatch.setattr(dispatch, "crossovers", lambda: {"one": (masses, network), "other": (masses,)})
    assert dispatch._nearest("one", 76, 1000) is masses
    assert dispatch._nearest("one", 76, 1000, regions=76) is network
    assert dispatch._nearest("other", 760, 10, regions=76) is masses
    assert str(network) == "10 networks of 76 regions x 10 steps"


# The command --------------------------------------------------------------------------------------------------------


def test_measured_rows_replace_those_of_the_same_device_alone(tmp_path, monkeypatch):
    out = tmp_path / "table.json"
    other = {"date": "2020-01-01", "command": "a command", "versions": {}, "rows": [crossovers.row(1, 10, {"scan": 1})]}
    out.write_text(json.dumps({"cpu": other, "another device": other}))
    monkeypatch.setattr(crossovers, "crossover_cases", lambda platform: [bench.Case(2, 10)])
    crossovers.main(["--seconds", "0.01", "--out", str(out)])
    kept = json.loads(out.read_text())
    assert kept["another device"] == other
    assert kept["cpu"]["command"] == "python -m benchmarks.crossovers"
    (row,) = kept["cpu"]["rows"]
    runs_here = {name for name, why in bk.implementations().items() if why == "runs here"}
    assert (row["lanes"], row["steps"], set(row["seconds"])) == (2, 10, runs_here)


def test_what_is_wrong_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(crossovers, "crossover_cases", lambda platform: [bench.Case(2, 10)])
    monkeypatch.setattr(bench, "reference", lambda case: lambda *args: jnp.full((1, 2), jnp.nan))
    with pytest.raises(FloatingPointError, match="no speed"):
        crossovers.main(["--seconds", "0.01", "--out", str(tmp_path / "table.json")])
    assert not list(tmp_path.iterdir())


def result_of(date: str, *measured) -> dict:
    rows = [bench.record(bench.Measured(*found, error=0.0, bytes=0)) for found in measured]
    return {"device": "NVIDIA H200", "date": date, "command": "a command", "versions": {"jax": date}, "rows": rows}


def test_results_of_the_device_check_become_rows(tmp_path):
    small, large = bench.Case(128, 1000, precision="fast"), bench.Case(4096, 1000)
    first = result_of(
        "2026-01-01",
        (small, "mosaic_gpu", 1.0, 8.0),
        (small._replace(gradient=True), "mosaic_gpu", 0.1, 8.0),
        (small._replace(noisy=True), "mosaic_gpu", 0.1, 8.0),
        (small._replace(scheme="exp_euler"), "mosaic_gpu", 0.1, 8.0),
        (large, "mosaic_gpu", 1.0, 8.0),
    )
    second = result_of(
        "2026-02-02",
        (large, "triton", 3.0, 12.0),
        (large._replace(precision="fast"), "triton", 0.5, 8.0),
        (small, "mosaic_gpu", 2.0, 8.0),
    )
    paths = [tmp_path / name for name in ("b.json", "a.json")]
    for path, result in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(result))
    out = tmp_path / "table.json"
    crossovers.main([*map(str, paths), "--out", str(out)])
    table = json.loads(out.read_text())["NVIDIA H200"]
    assert table["versions"] == {"jax": "2026-02-02"}
    assert table["rows"] == [
        {"lanes": 128, "steps": 1000, "seconds": {"mosaic_gpu": 2.0, "scan": 8.0}},
        # Each by its ratio to the scan beside it, 8 and 4.
        {"lanes": 4096, "steps": 1000, "seconds": {"mosaic_gpu": 1.25, "triton": 2.5, "scan": 10.0}},
    ]


def test_networks_of_a_result_become_rows_of_their_own():
    size = {"regions": 76, "batch": 10, "steps": 100, "mass_steps_per_second": {"fused": 152.0, "scan": 76.0}}
    forward = {"what": "Jansen-Rit, forward", "implementation": "triton", **size}
    found = result_of("2026-01-01", (bench.Case(1, 10), "mosaic_gpu", 1.0, 8.0))
    found["networks"] = [forward, {**forward, "what": "Jansen-Rit, gradient in k"}]
    (table,) = crossovers.from_results([found]).values()
    assert table["rows"][1:] == [
        {"lanes": 760, "steps": 100, "seconds": {"triton": 500.0, "scan": 1000.0}, "regions": 76}
    ]


def test_a_result_without_timed_runs_replaces_no_row(tmp_path):
    quick, out = tmp_path / "quick.json", tmp_path / "table.json"
    quick.write_text(json.dumps(result_of("2026-03-03")))
    out.write_text("{}")
    with pytest.raises(SystemExit, match="no plain forward run"):
        crossovers.main([str(quick), "--out", str(out)])
    assert out.read_text() == "{}"
    first = result_of("2026-01-01", (bench.Case(1, 10), "mosaic_gpu", 1.0, 8.0))
    (table,) = crossovers.from_results([first, result_of("2026-03-03")]).values()
    assert [row["seconds"] for row in table["rows"]] == [{"mosaic_gpu": 1.0, "scan": 8.0}]
