"""Which implementation of `sigmoid_sys2nd` to run, by the bytes that the chips' compilers were counted to move."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import _context, dispatch
from .errors import Unsupported
from .models.base import check_name

#: What counts are of: a forward step, and with it a gradient in some of its arguments.
STATE, PARAMETERS = ("x", "v", "potential"), ("A", "a", "vmax", "v0", "r", "dt", "gain", "offset", "bound")
FORWARD, IN_STATE, IN_PARAMETERS, IN_ALL = "forward", "in x, v and potential", "in A, a, vmax, v0 and r", "in all"
#: The kernels of accelerators, and the chip that each was counted on.
KERNELS = {"tpu": ("mosaic_tpu", "v5e"), "gpu": ("mosaic_gpu", "h200")}
#: Elements of the arrays that were counted; each array moves once for each time it is read, whatever their number.
COUNTED = 2**20


class StepPlan(NamedTuple):
    """What `sigmoid_sys2nd` would run; ``str()`` is a table.

    Attributes
    ----------
    implementation : "scan", which is plain jnp, or a kernel
    reason : why
    elements : of the batch
    bytes : by implementation, what this device moves for these elements and this gradient; empty where none was counted
    """

    implementation: str
    reason: str
    elements: int
    bytes: Mapping[str, int]

    def __str__(self) -> str:
        rows = {"implementation": f"{self.implementation} ({self.reason})", "elements": f"{self.elements:,}"}
        rows |= {f"bytes, {name}": f"{count:,}" for name, count in self.bytes.items()}
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


@functools.lru_cache
def counts() -> dict[str, dict[str, dict[str, float]]]:
    """MB (2^20 bytes) by chip, implementation and gradient, for `COUNTED` elements: `python -m benchmarks.op_bytes`."""
    return json.loads(Path(__file__).with_name("op_bytes.json").read_text())


def explain_step(
    shape: Sequence[int], *, wrt: str | Sequence[str] = (), dtype: Any = np.float32, implementation: str | None = None
) -> StepPlan:
    """What `sigmoid_sys2nd` would run for arrays of a shape, and why; nothing is run.

    Parameters
    ----------
    shape : of the batch
    wrt : names of the arguments that a gradient is taken in
    dtype : of the arrays
    implementation : as `sigmoid_sys2nd` takes it

    Raises
    ------
    ValueError, TypeError : an argument, by its name
    Unsupported : the named implementation cannot run here
    """
    elements, dtype = math.prod(_shape(shape)), _dtype(dtype)
    wrt = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in wrt:
        check_name(name, (*STATE, *PARAMETERS), "argument in 'wrt'")
    name, reason = choose(implementation, dtype)
    check(name, dtype)
    kernel, chip = KERNELS.get(dispatch.platform(), ("", ""))
    what = _gradient(wrt)
    moved = {n: round(c[what] * elements / COUNTED * 2**20) for n, c in counts().get(chip, {}).items()}
    return StepPlan(name, reason, elements, {n: count for n, count in moved.items() if n in ("scan", kernel)})


def choose(implementation: str | None, dtype) -> tuple[str, str]:
    """The implementation of a step, and the reason.

    ``None`` is jnp, which has every derivative. "auto" is the kernel of the device, which has reverse mode only, where
    it moves fewer bytes in some gradient and at most a tenth more in any: in float32 on TPUs and on Hopper and newer.
    """
    dispatch.check_known(implementation, "auto")
    if implementation is None:
        return "scan", "plain jnp, which has every derivative and moves each array of a forward step once"
    if implementation != "auto":
        return implementation, "asked for by name"
    kernel, chip = KERNELS.get(dispatch.platform(), (None, ""))
    if kernel is None:
        return "scan", f"on {dispatch.platform()} a kernel would move as many bytes as plain jnp"
    if reason := unavailable(kernel, dtype):
        return "scan", f"plain jnp, for {kernel} cannot run this: {reason}"
    table = counts()[chip]
    least = table["scan"][IN_PARAMETERS] / table[kernel][IN_PARAMETERS]
    why = f"as many bytes forward as jnp, {least:.3g} times fewer for gradients in parameters"
    return kernel, f"counted on {chip}: {why}"


def unavailable(name: str, dtype) -> str | None:
    """Why an implementation cannot run a step here, or ``None``."""
    backend = dispatch.load(name)
    interpreted = _context.INTERPRETED.get() and backend.interpretable
    if not interpreted and (reason := backend.unavailable(dispatch.platform())):
        return reason
    if is_kernel(name) and dtype != np.float32:
        return f"it computes in float32 only, not in {np.dtype(dtype)}"
    return None


def is_kernel(name: str | None) -> bool:
    """Whether an implementation has a kernel of one step, rather than a loop of one."""
    return name in [kernel for kernel, _ in KERNELS.values()]


def check(name: str, dtype) -> None:
    """Raise `Unsupported` where an implementation that was asked for by name cannot run."""
    if reason := unavailable(name, dtype):
        raise Unsupported(f"implementation '{name}' cannot run this: {reason}")


def _shape(shape) -> tuple[int, ...]:
    sizes = shape if isinstance(shape, tuple | list) else (shape,)
    if not all(isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 0 for n in sizes):
        raise ValueError(f"'shape' got {shape!r}, but takes numbers of elements from 0 on, such as (64, 76)")
    return tuple(sizes)


def _dtype(dtype) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not np.issubdtype(found, np.floating):
        raise TypeError(f"'dtype' got {dtype!r}, but takes a dtype of real numbers, such as 'float32'")
    return found


def _gradient(wrt: Sequence[str]) -> str:
    """What the counts call a gradient in these arguments, or in more."""
    kinds = {name in STATE for name in wrt}
    return {frozenset(): FORWARD, frozenset({True}): IN_STATE, frozenset({False}): IN_PARAMETERS}.get(
        frozenset(kinds), IN_ALL
    )
