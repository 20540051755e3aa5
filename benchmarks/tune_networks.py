"""How `triton` should sum what arrives in networks on this GPU: ``python -m benchmarks.tune_networks [--out DIR]``.

The network of `benchmarks.networks` is timed with sums of more and fewer steps at once, of none, with more and fewer
networks a program, by the side of what the backend chooses; each is first compared with `scan`. Every figure is a line
of ``tune_networks.jsonl`` at once; the numbers at the head of `triton.networks`, and `Layout.of_networks`, are what to
change by it. ``--compile sm_90`` only compiles, for a GPU that is not there.
"""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk
from brainmass_kernels.backends.triton import layout as layouts
from brainmass_kernels.backends.triton import networks as kernels
from brainmass_kernels.testing import compile_for

from . import networks, tune
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
    Variant(), Variant(far=0), Variant(far=4), Variant(far=8), Variant(far=16), Variant(together=4),
    Variant(together=16), Variant(far=0, at_once=16),
)  # fmt: skip
FAR, AT_ONCE, OF_NETWORKS = (kernels.FAR, kernels.FAR_FORWARD), kernels.AT_ONCE, layouts.Layout.of_networks
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

    kernels.FAR, kernels.FAR_FORWARD = FAR if variant.far is None else [variant.far or NEVER] * 2
    kernels.AT_ONCE = variant.at_once or AT_ONCE
    layouts.Layout.of_networks = staticmethod(of_networks)  # pyright: ignore[reportAttributeAccessIssue]
    jax.clear_caches()
    bk.clear_caches()


def program(size, implementation: str, steps: int):
    regions, share, _, _, gradient = size
    run = functools.partial(networks.fused, implementation=implementation)
    run = functools.partial(networks.gradient, run) if gradient else run
    return functools.partial(run, *networks.connectome(regions, share), steps)


def timed_variants(size, pool: ThreadPoolExecutor, path: Path) -> None:
    regions, _, batch, steps, _ = size
    k, jobs = networks.strengths(batch), {}
    want = np.asarray(jax.jit(program(size, "scan", COMPARED))(k))
    for variant in VARIANTS:
        lay_out(variant)
        # What is lowered is as this variant has it; what compiles meanwhile is that no more.
        lowered = [jax.jit(program(size, "triton", count)).lower(k) for count in (COMPARED, steps)]
        jobs[variant] = [pool.submit(each.compile) for each in lowered]
    for variant, job in jobs.items():

        def measured(job=job) -> dict[str, Any]:
            short, whole = (each.result() for each in job)
            close(short(k), want, 1e-3)
            (seconds,) = timed({"": functools.partial(whole, k)}, 5).values()
            rate = float(f"{regions * batch * steps / seconds:.4g}")
            return {"us_a_step": round(seconds / steps * 1e6, 2), "rate": rate}

        tune.report(path, {"size": size, **variant._asdict()}, measured)


def compiled(chip: str, size) -> None:
    """What the kernels of each variant hold."""
    for variant in VARIANTS:
        lay_out(variant)
        shape = jax.ShapeDtypeStruct((size[2],), jnp.float32)
        tune.held(size, variant, compile_for(chip, program(size, "triton", size[3]), shape).kernels)


def main(argv: list[str] | None = None) -> None:
    tune.run(__doc__, SIZES, timed_variants, compiled, LINES, argv)


if __name__ == "__main__":
    sys.exit(main())
