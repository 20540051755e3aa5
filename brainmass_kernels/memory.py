"""How many bytes a run holds, and whether they fit."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import jax

from .recording import Reduction

# Steps of a network of which a gradient keeps all that was sent, or eight times the longest delay.
LONGEST = 8192

# What a gradient keeps a step and region of such a block: on the CPU what was sent; on GPUs and TPUs the sums and, for
# the weights, their cotangents and what was sent.
KEPT_A_STEP = {"triton": 3, "mosaic_tpu": 3}

if TYPE_CHECKING:
    from .run import Run


def recorded(run: Run) -> int:
    """Bytes of all records: of those that are stored, and of statistics, their tables, and the block of records."""
    count, sampling = run.schedule.count, run.sampling
    if sampling is None:
        return count * len(run.entries) * _lane_bytes(run)
    held = [what.size(sampling) if isinstance(what, Reduction) else count for _, what in run.entries]
    shared = sum(what.shared(sampling) for _, what in run.entries if isinstance(what, Reduction))
    held = sum(held) + min(count, sampling.block) * len(run.spec.record)
    return held * _lane_bytes(run) + shared * run.spec.dtype.itemsize


def copied(run: Run) -> int:
    """Bytes that a kernel's own records take while they are copied to those that are returned."""
    count = run.schedule.count if run.sampling is None else min(run.schedule.count, run.sampling.block)
    return count * len(run.spec.record) * run.copied.lanes * run.spec.dtype.itemsize


def gradient(run: Run) -> int:
    """Bytes that a gradient holds beyond the records: checkpoints, and one replayed segment."""
    steps = run.schedule.steps
    kept = -(-steps // run.checkpoint_every) + run.checkpoint_every
    return (kept * len(run.spec.model.states) + sent(run)) * _lane_bytes(run)


def sent(run: Run) -> int:
    """What a gradient of a network keeps of all that each region sent or got: histories, and one block of steps.

    Of what the weights' cotangents need it is the most, for who asks for them is not known before.
    """
    if run.spec.link is None:
        return 0
    steps = run.schedule.steps
    if run.native_autodiff:
        return -(-steps // run.checkpoint_every) * run.depth + run.checkpoint_every * run.batch[-1]
    most = min(steps, block(run))
    return KEPT_A_STEP.get(run.implementation, 1) * most + -(-steps // most) * run.depth


def block(run: Run) -> int:
    """Steps of a network of which a gradient keeps all that was sent, at most."""
    return max(LONGEST, 8 * run.depth)


def _lane_bytes(run: Run) -> int:
    return math.prod(run.batch) * run.spec.dtype.itemsize


def available() -> int | None:
    """Bytes of memory on the device that JAX computes on, or ``None`` where that is not known."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def check(run: Run) -> None:
    """Raise MemoryError where the records cannot fit, naming the argument that would cut them."""
    needed, limit = recorded(run) + copied(run), available()
    if limit is not None and needed > limit:
        fitting = math.ceil(run.schedule.every * needed / limit)
        raise MemoryError(
            f"recording {', '.join(run.spec.record)} needs {needed:,} bytes ({run.schedule.count:,} records of "
            f"{math.prod(run.batch):,} lanes), and this device has {limit:,}: every={fitting} or more would fit, "
            f"or a longer transient, fewer observables, or a smaller batch{_without_a_copy(run)}"
        )


def _without_a_copy(run: Run) -> str:
    if not copied(run) or not run.copied.block:
        return ""
    return f"; {copied(run):,} bytes are a copy, which a multiple of {run.copied.block} lanes needs not"
