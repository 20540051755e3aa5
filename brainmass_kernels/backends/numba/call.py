"""Compiling a kernel, or loading what was compiled before, and calling it through XLA's FFI."""

from __future__ import annotations

import functools
import hashlib
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .layout import PLAN, threads
from .source import BlockKernel

# Work that is worth another thread, in operations: starting one costs some 20 us.
WORTH_A_THREAD = 1_000_000

_TEXT = """def task(job):
    frame = i64_at(job)[2]
    plan = attribute(frame)
    work = job + JOB_BYTES + add_atomically(job + 8, 1) * plan[{scratch}]
    number = add_atomically(job, 1)
    while number < plan[{blocks}]:
{body}
        number = add_atomically(job, 1)
    return 0


def handler(frame):
    if not describe(frame):
{pages}        job = (result(frame, {results}) + 63) // 64 * 64
        started = start(job, frame, task, attribute(frame)[{threads}])
        task(job)
        join(job, started)
    return 0
"""

# Where Linux backs memory by large pages on demand.
_PAGES = "        in_large_pages(frame, {plan}, {results} + 1)\n"

# Of parts that threads share: they work on them together, and so have to know how many they are.
_TOGETHER = """def task(job):
    frame = i64_at(job)[2]
    plan = attribute(frame)
    me = add_atomically(job + 8, 1)
    threads = wait_for(job + 24, 1)
    parts, common, scratch, times = plan[{blocks}], plan[{common}], plan[{scratch}], 1
    parts_at = job + JOB_BYTES + common
{body}
    return 0


def handler(frame):
    if not describe(frame):
{pages}        job = (result(frame, {results}) + 63) // 64 * 64
        started = start(job, frame, task, attribute(frame)[{threads}])
        add_atomically(job + 24, started + 1)
        task(job)
        join(job, started)
    return 0
"""


#: The text of each kernel of this process, by its name.
SOURCES: dict[str, str] = {}


def run(kernel: BlockKernel, arguments: Sequence[jax.Array] | None = None) -> dict[str, Any]:
    """Call a kernel, by default with the arguments that it was written for; its results by name."""
    from . import runtime

    layout = kernel.layout
    count = max(1, min(threads(), layout.blocks, kernel.operations // WORTH_A_THREAD, runtime.MOST_THREADS))
    scratch, common = (-(-size // 64) * 64 for size in (kernel.scratch_bytes, kernel.common_bytes))
    plan = kernel.plan | {"threads": count, "scratch": scratch, "common": common}
    scratches = common + (layout.parts or count) * scratch
    dtype = jnp.dtype(f"float{8 * layout.itemsize}")
    buffers = [jax.ShapeDtypeStruct(shape, dtype) for shape in kernel.results.values()]
    buffers.append(jax.ShapeDtypeStruct((runtime.JOB_BYTES + scratches + 64,), jnp.uint8))
    call = jax.ffi.ffi_call(register(kernel), buffers)
    *results, _ = call(
        *(kernel.arguments.values() if arguments is None else arguments),
        plan=np.array([*(plan.get(name, 0) for name in PLAN), *map(_bytes, buffers)], np.int64),
    )
    return kernel.named(results)


def _bytes(buffer: jax.ShapeDtypeStruct) -> int:
    return math.prod(buffer.shape) * buffer.dtype.itemsize


def register(kernel: BlockKernel) -> str:
    """Compile a kernel, or load it, and tell XLA of it; the name under which XLA knows it."""
    together, results = kernel.layout.parts > 0, len(kernel.results)
    pages = _PAGES.format(plan=len(PLAN), results=results) if sys.platform == "linux" else ""
    text = (_TOGETHER if together else _TEXT).format(
        body=textwrap.indent(kernel.text, "    " if together else "        "), results=results, pages=pages,
        **{name: PLAN.index(name) for name in ("scratch", "blocks", "threads", "common")},
    )  # fmt: skip
    return _registered(kernel.kind, text)


@functools.lru_cache(maxsize=1024)
def _registered(kind: str, text: str) -> str:
    from . import machine

    name = f"brainmass_kernels_numba_{kind}_{hashlib.sha256((_functions_digest() + text).encode()).hexdigest()[:24]}"
    SOURCES[name] = text
    address = machine.function(name, functools.partial(_assembly, name, text))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform="cpu")
    return name


def _assembly(name: str, text: str) -> str:
    from . import language, network_runtime, runtime

    module = language.Module()
    module.export(language.parsed(text, {**vars(network_runtime), **vars(runtime)})["handler"], name)
    return str(module)


_COMPILED_WITH = ("language", "intrinsics", "machine", "runtime", "network_runtime")


@functools.cache
def _functions_digest() -> str:
    """Of all that a kernel's text refers to, and of its compiler: another text of these is another kernel."""
    files = (Path(__file__).with_name(f"{name}.py") for name in _COMPILED_WITH)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
