"""How `mosaic_gpu` should lay a run out on this GPU: ``python -m benchmarks.tune [--out DIR] [--first N]``.

Each case is timed with one, two and four masses a thread and with shorter and longer unrolled bodies, by the side of
what the backend itself chooses. Every figure is a line of ``tune.jsonl`` at once; `mosaic_gpu.Layout` and the numbers
above it are what to change by it. ``--compile h200`` only compiles, for a GPU that is not there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import brainmass_kernels as bk
from brainmass_kernels import bench
from brainmass_kernels.backends import mosaic_gpu
from brainmass_kernels.bench import Case
from brainmass_kernels.testing import compile_for

from .parts import note

LINES = "tune.jsonl"
BIG, MID, FEW = 1_048_576, 4096, 128
CASES = (
    Case(BIG, 10_000, precision="fast"),
    Case(BIG, 10_000, gradient=True, precision="fast"),
    Case(BIG, 10_000, noisy=True, precision="fast"),
    Case(BIG, 10_000),
    Case(MID, 10_000, precision="fast"),
    Case(FEW, 10_000, precision="fast"),
    Case(BIG, 1000, gradient=True, noisy=True, precision="fast"),
)


class Variant(NamedTuple):
    """Masses a thread, and instructions and steps of an unrolled body; ``None`` as the backend has it."""

    vec: int | None = None
    body: int | None = None
    steps: int | None = None


CHOOSE, BODY, UNROLL = mosaic_gpu.Layout.choose, mosaic_gpu._BODY, mosaic_gpu._UNROLL


def variants(case: Case) -> Iterator[Variant]:
    yield Variant()
    short, shorter, long = (500, None), (250, None), (2000, 40)
    if case.lanes < BIG:
        yield from (Variant(None, *body) for body in (shorter, short, long))
        return
    if not case.gradient:
        yield from (Variant(4, *body) for body in (shorter, short))
    yield from (Variant(2, *body) for body in ((None, None), shorter, short, long))
    yield from (Variant(1, *body) for body in ((None, None), short, long))


def lay_out(case: Case, variant: Variant) -> None:
    """From now on; of a gradient the way back, which the backend gives one mass a thread."""

    def choose(lanes: int, most: int):
        chosen = CHOOSE(lanes, most)
        forth = case.gradient and most > 1
        return chosen if variant.vec is None or forth else chosen._replace(vec=variant.vec)

    mosaic_gpu.Layout.choose = staticmethod(choose)  # pyright: ignore[reportAttributeAccessIssue]
    mosaic_gpu._BODY, mosaic_gpu._UNROLL = variant.body or BODY, variant.steps or UNROLL
    jax.clear_caches()
    bk.clear_caches()


def lowered(case: Case, variant: Variant):
    lay_out(case, variant)
    shape = jax.ShapeDtypeStruct((case.lanes,), jnp.float32)
    return jax.jit(bench.fused(case, "mosaic_gpu")).lower(shape, shape, shape)


def timed(case: Case, pool: ThreadPoolExecutor, path: Path) -> None:
    jobs = {variant: pool.submit(lowered(case, variant).compile) for variant in variants(case)}
    for variant, job in jobs.items():

        def measured(job=job) -> dict[str, Any]:
            (seconds,) = bench.timed({"": job.result()}, case.lanes, 0.15).values()
            return {"rate": float(f"{case.mass_steps / seconds:.4g}")}

        report(path, {"case": str(case), **variant._asdict()}, measured)


def report(path: Path, row: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> None:
    """A line of what was measured, or of why it was not: the next is tried."""
    try:
        row |= measured()
    except (Exception, SystemExit) as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    note(path, **row)
    print(row, flush=True)


def compiled(chip: str, case: Case) -> None:
    """What the kernels of each variant hold."""
    for variant in variants(case):
        lay_out(case, variant)
        shape = jax.ShapeDtypeStruct((case.lanes,), jnp.float32)
        held(case, variant, compile_for(chip, bench.fused(case, "mosaic_gpu"), shape, shape, shape).kernels)


def held(case, variant, kernels) -> None:
    """Print registers, bytes put aside and instructions of kernels."""
    counts = {n: (k.registers, k.spill_bytes, sum(x.total for x in k.loops)) for n, k in kernels.items()}
    print(case, variant, counts, flush=True)


def run(
    doc: str | None, cases: Sequence, timed: Callable, compiled: Callable, lines: str, argv: list[str] | None
) -> None:
    """The command of a tuning: time each case in all its variants, or compile them for a chip."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of the lines (default: $OUT, or here)")
    parser.add_argument("--first", type=int, help="at most so many cases")
    parser.add_argument("--compile", metavar="CHIP", help="compile each variant for a chip and print what it holds")
    options = parser.parse_args(argv)
    if options.compile:
        for case in cases[: options.first]:
            compiled(options.compile, case)
        return
    out = options.out or Path(os.environ.get("OUT") or ".")
    out.mkdir(parents=True, exist_ok=True)
    note(out / lines, **bench.machine())
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        for case in cases[: options.first]:
            timed(case, pool, out / lines)


def main(argv: list[str] | None = None) -> None:
    run(__doc__, CASES, timed, compiled, LINES, argv)


if __name__ == "__main__":
    sys.exit(main())
