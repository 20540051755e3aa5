"""Calling a kernel through `jax_triton`, or in Triton's interpreter."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ... import _context, _jax
from ...codegen.kernel_cache import kernel_module
from . import versions
from .layout import Layout
from .source import Kernel

_MODULE = '''"""Emitted by brainmass_kernels for a kernel of its triton backend; runtime {runtime}."""

from brainmass_kernels.backends.triton.{runtime_name} import *


{text}'''


def run(kernel: Kernel) -> dict[str, Any]:
    """Call a kernel; its results by name."""
    shapes = [jax.ShapeDtypeStruct(shape, kernel.dtype) for shape in kernel.results.values()]
    arrays = (jnp.asarray(kernel.numbers, jnp.int32), *kernel.arguments.values())
    return kernel.named(_call(kernel, arrays, shapes))


def _call(kernel: Kernel, arrays, shapes) -> list[jax.Array]:
    function, layout = _function(kernel), kernel.layout
    if kernel.loop.interpret:
        # A callback's thread may take float64 for float32: everything goes as words.
        interpreted = functools.partial(_interpreted, function, layout, shapes, [x.dtype for x in arrays])
        words = [jax.ShapeDtypeStruct((s.size * s.dtype.itemsize // 4,), jnp.int32) for s in shapes]
        results = jax.pure_callback(interpreted, words, *map(_as_words, arrays))
        return [_as_numbers(x, s) for x, s in zip(results, shapes)]
    calls = _context.TRITON_KERNELS.get()
    if calls is not None:
        calls.append((function, (*arrays, *shapes), layout))
        return [jnp.zeros(s.shape, s.dtype) for s in shapes]
    return _jax.triton_call(
        function,
        arrays,
        shapes,
        grid=(layout.blocks,),
        num_warps=layout.warps,
        constants={"BLOCK": layout.width},
        ptx_version=None if _jax.is_amd() else versions.newest_ptx(),
    )


def _function(kernel: Kernel):
    """The kernel as Triton takes it: for its compiler, which compiles it at its first call, or its interpreter."""
    runtime = "interpreted" if kernel.loop.interpret else "runtime"
    file = Path(__file__).with_name(f"{runtime}.py")
    module = kernel_module(
        f"triton_{runtime}_{kernel.kind}", _MODULE, (file,), runtime_name=runtime, text=kernel.text
    )  # fmt: skip
    return getattr(module, f"brainmass_kernels_triton_{kernel.kind}")


def _as_words(x):
    return lax.bitcast_convert_type(x, jnp.int32).reshape(*x.shape, -1)


def _as_numbers(words, shape):
    parts = words.reshape(*shape.shape, *(() if shape.dtype.itemsize == 4 else (2,)))
    return lax.bitcast_convert_type(parts, shape.dtype)


def _interpreted(kernel, layout: Layout, shapes, dtypes, *words) -> list[np.ndarray]:
    """In Triton's interpreter; what the kernel does not write is NaN."""
    torch: Any = importlib.import_module("torch")
    arrays = [torch.from_numpy(np.array(x).view(dtype)) for x, dtype in zip(words, dtypes)]
    out = [torch.from_numpy(np.full(s.shape, np.nan, s.dtype)) for s in shapes]
    kernel[(layout.blocks,)](*arrays, *out, BLOCK=layout.width)
    return [x.numpy().reshape(-1).view(np.int32) for x in out]
