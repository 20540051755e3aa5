"""How `triton` should sum what arrives in networks on this GPU: ``python -m benchmarks.tune_networks [--out DIR]``.

The network of `benchmarks.networks` is timed with sums of more and fewer steps at once, of none, with more and fewer
networks a program, by the side of what the backend chooses; each is first compared with `scan`. Every figure is a line
of ``tune_networks.jsonl`` at once; the numbers at the head of `triton.networks`, and `Layout.of_networks`, are what to
change by it. ``--compile sm_90`` only compiles, for a GPU that is not there.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk
from brainmass_kernels import bench
from brainmass_kernels.backends.triton import layout as layouts
from brainmass_kernels.backends.triton import networks as kernels
from brainmass_kernels.testing import compile_for

from . import networks
from .parts import note
from .timing import close, timed

LINES = "tune_networks.jsonl"
# Regions, share of connections, networks, steps, of a gradient.
SIZES = (
    (76, 0.27, 64, 1000, False),
    (76, 0.27, 1024, 500, False),
    (76, 0.27, 4096, 300, False),
    (192, 0.1, 128, 500, False),
    (76, 0.27, 64, 500, True),
    (76, 0.27, 1024, 300, True),
)
COMPARED = 400


class Variant(NamedTuple):
    """What a kernel of networks is made with; ``None`` as the backend has it.

    Attributes
    ----------
    far : steps whose sums are taken at once; 0: of each step alone
    together : networks a program, where there are many
    at_once : connections that are read at once in the sums of one step
    """

    far: int | None = None
    together: int | None = None
    at_once: int | None = None


VARIANTS = (
    Variant(), Variant(far=0), Variant(far=4), Variant(far=16), Variant(together=4), Variant(together=16),
    Variant(far=0, at_once=16),
)  # fmt: skip
FAR, AT_ONCE, OF_NETWORKS = kernels.FAR, kernels.AT_ONCE, layouts.Layout.of_networks
# Steps that no delay has.
NEVER = 1 << 20


def lay_out(variant: Variant) -> None:
    """From now on."""

    def of_networks(lanes: int, regions: int, depth: int = 0, alike: bool = True) -> layouts.Layout:
        chosen, many = OF_NETWORKS(lanes, regions, depth, alike), variant.together
        if many is None or chosen.together == 1:
            return chosen
        width = 1 << max(5, (many * regions - 1).bit_length())
        warps = min(width // layouts.WARP, 16)
        return layouts.Layout(lanes, warps, width // (layouts.WARP * warps), regions, many)

    kernels.FAR = FAR if variant.far is None else variant.far or NEVER
    kernels.AT_ONCE = variant.at_once or AT_ONCE
    layouts.Layout.of_networks = staticmethod(of_networks)  # pyright: ignore[reportAttributeAccessIssue]
    jax.clear_caches()
    bk.clear_caches()


def program(size, implementation: str, steps: int):
    regions, share, _, _, gradient = size
    run = functools.partial(networks.fused, implementation=implementation)
    run = functools.partial(networks.gradient, run) if gradient else run
    return functools.partial(run, *networks.connectome(regions, share), steps)


def timed_variants(size, pool: ThreadPoolExecutor, out: Path) -> None:
    regions, _, batch, steps, _ = size
    k, jobs = networks.strengths(batch), {}
    want = np.asarray(jax.jit(program(size, "scan", COMPARED))(k))
    for variant in VARIANTS:
        lay_out(variant)
        # What is lowered is as this variant has it; what compiles meanwhile is that no more.
        lowered = [jax.jit(program(size, "triton", count)).lower(k) for count in (COMPARED, steps)]
        jobs[variant] = [pool.submit(each.compile) for each in lowered]
    for variant, job in jobs.items():
        row: dict[str, Any] = {"size": size, **variant._asdict()}
        try:
            short, whole = (each.result() for each in job)
            close(short(k), want, 1e-3)
            (seconds,) = timed({"": functools.partial(whole, k)}, 5).values()
            row |= {
                "us_a_step": round(seconds / steps * 1e6, 2),
                "rate": float(f"{regions * batch * steps / seconds:.4g}"),
            }
        except Exception as error:  # reported, and the next is tried
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        note(out / LINES, **row)
        print(row, flush=True)


def compiled(chip: str) -> None:
    """What the kernels of each variant hold."""
    for size in SIZES:
        for variant in VARIANTS:
            lay_out(variant)
            shape = jax.ShapeDtypeStruct((size[2],), jnp.float32)
            made = compile_for(chip, program(size, "triton", size[3]), shape).kernels
            counts = {n: (k.registers, k.spill_bytes, sum(x.total for x in k.loops)) for n, k in made.items()}
            print(size, variant, counts, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of the lines (default: $OUT, or here)")
    parser.add_argument("--first", type=int, help="at most so many sizes")
    parser.add_argument("--compile", metavar="CHIP", help="compile each variant for a chip and print what it holds")
    options = parser.parse_args(argv)
    if options.compile:
        compiled(options.compile)
        return
    out = options.out or Path(os.environ.get("OUT") or ".")
    out.mkdir(parents=True, exist_ok=True)
    note(out / LINES, **bench.machine())
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        for size in SIZES[: options.first]:
            timed_variants(size, pool, out)


if __name__ == "__main__":
    sys.exit(main())
