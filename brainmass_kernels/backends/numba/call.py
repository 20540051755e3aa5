"""Compiling a kernel, or loading what was compiled before, and calling it through XLA's FFI."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...codegen.kernel_cache import kernel_module
from .layout import PLAN, threads
from .source import Kernel

# Work that is worth another thread, in operations: starting one costs some 20 us.
WORTH_A_THREAD = 1_000_000

_MODULE = '''"""Emitted by brainmass_kernels for a kernel of its numba backend; runtime {runtime}."""

import math

import numpy as np

from brainmass_kernels.backends.numba.runtime import *
{also}

def task(job):
    frame = i64_at(job)[2]
    plan = attribute(frame)
    work = job + JOB_BYTES + add_atomically(job + 8, 1) * plan[{scratch}]
    number = add_atomically(job, 1)
    while number < plan[{blocks}]:
{body}
        number = add_atomically(job, 1)
    return 0


run_here, task_address = call_of("{name}"), address_of("{name}")


def handler(frame):
    if not describe(frame):
        job = (result(frame, {results}) + 63) // 64 * 64
        started = start(job, frame, task_address(), attribute(frame)[{threads}])
        run_here(job)
        join(job, started)
    return 0


handler = entry("{name}", task, handler)
register("{name}", handler)
'''


def run(kernel: Kernel) -> dict[str, Any]:
    """Call a kernel; its results by name."""
    from . import runtime

    layout, schedule = kernel.layout, kernel.loop.schedule
    operations = layout.lanes * schedule.steps * len(kernel.loop.advance.jaxpr.jaxpr.eqns)
    count = max(1, min(threads(), layout.blocks, operations // WORTH_A_THREAD, runtime.MOST_THREADS))
    scratch = -(-kernel.scratch_bytes // 64) * 64
    plan = {
        "lanes": layout.lanes, "steps": schedule.steps, "lead": schedule.lead, "every": schedule.every,
        "count": schedule.count, "segment": kernel.segment, "blocks": layout.blocks, "threads": count,
        "scratch": scratch, **kernel.coupling.plan,
    }  # fmt: skip
    dtype = jnp.dtype(f"float{8 * layout.itemsize}")
    buffers = [jax.ShapeDtypeStruct(shape, dtype) for shape in kernel.results.values()]
    buffers.append(jax.ShapeDtypeStruct((runtime.JOB_BYTES + count * scratch + 64,), jnp.uint8))
    call = jax.ffi.ffi_call(register(kernel), buffers)
    *results, _ = call(*kernel.arguments.values(), plan=np.array([plan.get(name, 0) for name in PLAN], np.int64))
    return kernel.named(results)


def register(kernel: Kernel) -> str:
    """Compile a kernel, or load it, and tell XLA of it; the name under which XLA knows it."""
    also = kernel.coupling.runtime
    files = [Path(__file__).with_name(f"{name}.py") for name in ("runtime", also) if name]
    module = kernel_module(
        f"numba_{kernel.kind}", _MODULE, tuple(files),
        body=textwrap.indent(kernel.text, "        "), results=len(kernel.results),
        also=f"from {__package__}.{also} import *\n" if also else "",
        **{name: PLAN.index(name) for name in ("scratch", "blocks", "threads")},
    )  # fmt: skip
    return module.__name__
