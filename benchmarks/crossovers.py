"""Which implementation is the fastest at which size, for `dispatch`; ``python -m benchmarks.crossovers``.

It times forward runs of Jansen-Rit on the device at hand, each implementation in turn in one process, after comparing
each with `bench.reference`, and replaces the rows of this kind of device in ``brainmass_kernels/crossovers.json``.
Given result files of `benchmarks.device_check`, it takes their plain forward rows instead, and those of networks, and
times nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import brainmass_kernels as bk
from brainmass_kernels import bench

from .cases import crossover_cases

ABOUT = ("date", "command", "cores", "versions")
ROUNDS = 9
TABLE = Path(bk.__file__).parent / "crossovers.json"


def measured(cases: list[bench.Case], names: list[str], seconds: float) -> list[dict[str, Any]]:
    """A row for each case.

    Raises
    ------
    FloatingPointError : a result is wrong, so there is no time to write down
    """
    rows = []
    for case in cases:
        theirs = bench.compiled(bench.reference(case), case.lanes)
        functions = {name: compiled_alone(case, name, names) for name in names}
        for name, ours in functions.items():
            distance = bench.error(case, name, ours, theirs)
            if not distance <= bench.AGREES[case.precision]:
                raise FloatingPointError(f"{name}, {case}: off by {distance:.2g} of the reference, so it has no speed")
        # A round of short runs is over in milliseconds, and may fall into a busy spell of the machine.
        rounds = [bench.timed(functions, case.lanes, seconds / ROUNDS) for _ in range(ROUNDS)]
        rows.append(row(case.lanes, case.steps, {n: statistics.median(r[n] for r in rounds) for n in functions}))
        print(f"{case!s:<36}" + "".join(f"  {n} {t:.3g} s" for n, t in rows[-1]["seconds"].items()), flush=True)
    return rows


def compiled_alone(case: bench.Case, name: str, names: list[str]):
    """An implementation as it runs when it is chosen: `scan` asked for by name would be another scan."""
    with bk.testing.without(*(other for other in names if other != name)):
        return bench.compiled(bench.fused(case, None), case.lanes)


def row(lanes: int, steps: int, seconds: dict[str, float], **more: int) -> dict[str, Any]:
    return {"lanes": lanes, "steps": steps, "seconds": {n: float(f"{t:.4g}") for n, t in seconds.items()}, **more}


def from_results(results: list[dict]) -> dict[str, dict]:
    """The tables of the devices of some results, the latest result of each implementation and size."""
    tables: dict[str, dict] = {}
    for result in sorted(results, key=lambda result: result["date"]):
        earlier = tables.get(result["device"], {"kept": {}, "networks": {}})
        latest = earlier["kept"] | plain_forward(result["rows"])
        tables[result["device"]] = {
            **about(result), "kept": latest, "networks": earlier["networks"] | of_networks(result.get("networks", [])),
        }  # fmt: skip
    timed = {kind: table for kind, table in tables.items() if table["kept"]}
    return {
        kind: {**about(table), "rows": [*merged(table["kept"]), *table["networks"].values()]}
        for kind, table in timed.items()
    }


def of_networks(results: list[dict]) -> dict[tuple, dict[str, Any]]:
    """Rows of forward runs of networks, by size."""
    rows = {}
    for each in results:
        if each["what"].endswith("forward") and "implementation" in each:
            lanes, steps = each["regions"] * each["batch"], each["steps"]
            rates = each["mass_steps_per_second"]
            seconds = {each["implementation"]: lanes * steps / rates["fused"], "scan": lanes * steps / rates["scan"]}
            rows[lanes, steps, each["regions"]] = row(lanes, steps, seconds, regions=each["regions"])
    return rows


def about(result: dict) -> dict[str, Any]:
    return {name: result[name] for name in ABOUT if name in result}


def plain_forward(rows: list[dict]) -> dict[tuple, dict]:
    """Runs as `bench.Case` has them unasked, by size, precision and implementation."""
    plain = bench.Case(1, 10)._asdict().items() - {"lanes": 1, "steps": 10, "precision": "exact"}.items()
    return {
        (r["lanes"], r["steps"], r["precision"], r["implementation"]): r
        for r in rows
        if plain <= r.items() and r["reference_seconds"] > 0
    }


def merged(latest: dict[tuple, dict]) -> list[dict[str, Any]]:
    """A row for each size, in precision "exact" where it was measured.

    Each implementation was timed beside a scan of its own, and only ratios within one run hold: all are brought to
    the median of those scans.
    """
    sizes: dict[tuple, dict] = defaultdict(lambda: defaultdict(list))
    for (lanes, steps, precision, _), found in latest.items():
        sizes[lanes, steps][precision].append(found)
    rows = []
    for (lanes, steps), by_precision in sorted(sizes.items()):
        group = by_precision.get("exact") or by_precision["fast"]
        scan = statistics.median(found["reference_seconds"] for found in group)
        seconds = {f["implementation"]: scan * f["seconds"] / f["reference_seconds"] for f in group}
        rows.append(row(lanes, steps, {**seconds, "scan": scan}))
    return rows


def text_of(tables: dict[str, dict]) -> str:
    """JSON with a line for each row."""
    kinds = []
    for kind, table in sorted(tables.items()):
        head = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in about(table).items()]
        rows = ",\n".join(f"   {json.dumps(row)}" for row in table["rows"])
        kinds.append("\n".join([f" {json.dumps(kind)}: {{", *head, f'  "rows": [\n{rows}\n  ]\n }}']))
    return "{\n" + ",\n".join(kinds) + "\n}\n"


def here(seconds: float) -> dict[str, dict]:
    """The table of the device at hand."""
    machine = {"command": "python -m benchmarks.crossovers", **bench.machine()}
    names = [name for name, reason in bk.implementations().items() if reason == "runs here"]
    rows = measured(crossover_cases(machine["platform"]), names, seconds)
    return {machine["device"]: {**about(machine), "rows": rows}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", metavar="RESULT.json", nargs="*", type=Path, help="of benchmarks.device_check")
    parser.add_argument("--seconds", type=float, default=2.0, help="a size and implementation (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to update (default: the package's)")
    options = parser.parse_args(argv)
    results = [json.loads(path.read_text()) for path in options.results]
    new = from_results(results) if results else here(options.seconds)
    if not new:
        raise SystemExit("these results time no plain forward run: they are of a quick check, or of parts of one")
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.write_text(text_of(kept | new))
    print(f"wrote the rows of {', '.join(new)} to {options.out.name}")


if __name__ == "__main__":
    main()
