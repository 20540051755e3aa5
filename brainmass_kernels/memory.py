"""The memory that a run needs, and whether it fits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from .signals import chain_of

# Steps of a network for which a gradient stores all that was sent, or eight times the longest delay.
LONGEST = 8192

# Values a step and region that a gradient stores of such a block: on the CPU what was sent; on GPUs and TPUs the sums
# and, for the weights, their cotangents and what was sent.
STORED_A_STEP = {"triton": 3, "mosaic_tpu": 3}

if TYPE_CHECKING:
    from .run import Run


def recorded(run: Run) -> int:
    """Bytes of all records: stored quantities, statistics with their tables, and the block of records."""
    count, sampling = run.schedule.count, run.sampling
    if sampling is None:
        return count * len(run.entries) * _lane_bytes(run)
    lanes = math.prod(run.batch)
    sizes = [
        count * lanes if isinstance(what, str) else chain_of(what, sampling).values(lanes) for _, what in run.entries
    ]
    values = sum(sizes) + min(count, sampling.block) * len(run.spec.record) * lanes
    return values * run.spec.dtype.itemsize


def copied(run: Run) -> int:
    """Bytes of a kernel's records while they are copied to the returned ones."""
    count = run.schedule.count if run.sampling is None else min(run.schedule.count, run.sampling.block)
    return count * len(run.spec.record) * run.copied.lanes * run.spec.dtype.itemsize


def gradient(run: Run) -> int:
    """Bytes of a gradient beyond the records: checkpoints, and one replayed segment."""
    steps = run.schedule.steps
    states = -(-steps // run.checkpoint_every) + run.checkpoint_every
    return (states * len(run.spec.carried) + sent(run)) * _lane_bytes(run)


def sent(run: Run) -> int:
    """Values a lane that a network's gradient stores of what regions sent or got: histories, and one block of steps.

    It includes what cotangents of the weights need, as it is not known whether they are wanted.
    """
    if not run.spec.links:
        return 0
    steps = run.schedule.steps
    if run.native_autodiff:
        return -(-steps // run.checkpoint_every) * sum(run.depths) + run.checkpoint_every * run.arriving
    most = min(steps, block(run))
    a_step = STORED_A_STEP.get(run.implementation, 1) * max(len(run.depths), run.spec.totals)
    return a_step * most + -(-steps // most) * sum(run.depths)


def block(run: Run) -> int:
    """Most steps of a network for which a gradient stores all that was sent."""
    return max(LONGEST, 8 * run.depth)


def _lane_bytes(run: Run) -> int:
    return math.prod(run.batch) * run.spec.dtype.itemsize


def available() -> int | None:
    """Bytes of memory of the device that JAX computes on, or ``None`` if that is not known."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def check(run: Run, traced: bool = False) -> None:
    """Raise MemoryError if the records cannot fit, with a value of the argument that would reduce them.

    Parameters
    ----------
    run : of which each device has its share
    traced : whether XLA may still split a run that has no split
    """
    needed, limit = _on_a_device(run, lambda share: recorded(share) + copied(share), traced), available()
    if limit is not None and needed > limit:
        fitting = math.ceil(run.schedule.every * needed / limit)
        raise MemoryError(
            f"recording {', '.join(run.spec.record)} needs {needed:,} bytes ({run.schedule.count:,} records of "
            f"{_lanes(run)}), and this device has {limit:,}: every={fitting} or more would fit, "
            f"or a longer transient, fewer observables, or a smaller batch{_without_a_copy(run)}"
        )


def check_gradient(run: Run) -> None:
    """Raise MemoryError if a gradient cannot fit; for a run whose gradient is being traced."""
    needed, limit = (
        _on_a_device(run, lambda share: recorded(share) + copied(share) + gradient(share), True),
        available(),
    )
    if limit is not None and needed > limit:
        raise MemoryError(
            f"a gradient over {run.schedule.steps:,} steps of {_lanes(run)} needs {needed:,} bytes (the records, "
            f"checkpoints every {run.checkpoint_every} steps, and the states between two of them), and this device has "
            f"{limit:,}: a smaller batch would fit, a shorter duration, or a 'checkpoint_every' nearer to the square "
            "root of the steps"
        )


def _on_a_device(run: Run, size: Callable[[Run], int], traced: bool) -> int:
    """Bytes on one device; all devices of a CPU share its memory."""
    needed = size(run.share)
    on_cpu = run.platform == "cpu"
    if run.split is not None:
        return needed * (run.split.local if on_cpu else 1)
    return needed if on_cpu or not traced else -(-needed // jax.device_count())


def _lanes(run: Run) -> str:
    share = run.share
    text = f"{math.prod(share.batch):,} lanes"
    return text if run.split is None else f"{text} on each device"


def _without_a_copy(run: Run) -> str:
    if not copied(run) or not run.copied.block:
        return ""
    return f"; {copied(run):,} bytes are a copy, which a multiple of {run.copied.block} lanes does not need"
