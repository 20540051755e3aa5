"""The only file that knows which JAX version it runs on."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.extend.core import jaxpr_as_fun as jaxpr_as_fun

from ._context import TARGET

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
# Whether there is `pallas.mosaic_gpu.kernel` as the GPU backend uses it, and the reason if not.
MOSAIC_GPU = VERSION >= (0, 11)
NO_MOSAIC_GPU = f"it needs jax 0.11 or newer, and this is {jax.__version__}"


def compute_capability() -> float | None:
    """Of the first GPU, such as 9.0 for Hopper, 0 if it is not NVIDIA's; ``None`` without a GPU."""
    if (target := TARGET.get()) is not None:
        return target.capability
    text = getattr(jax.devices()[0], "compute_capability", None)
    if text is None:
        return None
    return float(text) if text.replace(".", "", 1).isdigit() else 0.0


def multiprocessors(otherwise: int = 132) -> int:
    """The number of multiprocessors of the GPU; without a GPU, Hopper's 132."""
    target = TARGET.get()
    return (target and target.cores) or getattr(jax.devices()[0], "core_count", None) or otherwise


def tensor_cores() -> int:
    """The number of TensorCores of a TPU device: two on v4 and v5p, else one."""
    if (target := TARGET.get()) is not None:
        return target.cores or 1
    return (getattr(jax.devices()[0], "num_cores", None) or 1) if jax.default_backend() == "tpu" else 1


def is_amd() -> bool:
    """Whether the GPU that JAX computes on is AMD's."""
    device = jax.devices()[0]
    return device.platform == "rocm" or "rocm" in getattr(device.client, "platform_version", "").lower()


def cuda_version() -> tuple[int, int] | None:
    """The CUDA release that JAX's plugin was built with, (13, 0); ``None`` without a plugin."""
    from jax._src.lib import cuda_versions

    if cuda_versions is None:
        return None
    version = cuda_versions.cuda_runtime_build_version()
    return version // 1000, version % 1000 // 10


def cuda_folder() -> str | None:
    """The folder of CUDA's packages that JAX uses, or ``None``."""
    from jax._src.lib import cuda_path

    return cuda_path


def triton_call(
    kernel, arrays, shapes, *, grid: tuple[int], num_warps: int, constants: dict[str, Any], ptx_version: int | None
):
    """Call a Triton kernel through `jax_triton`, whose arguments changed their names in 0.4.

    Before 0.4 it cannot pass ``ptx_version`` on: Triton then writes PTX for the ptxas of its wheel.
    """
    import inspect

    import jax_triton  # pyright: ignore[reportMissingImports]

    # Products are fused with sums only where the source says so: a replay must have the bits of the run.
    if "backend_options" in inspect.signature(jax_triton.triton_call).parameters:
        pinned = {} if ptx_version is None else {"ptx_version": ptx_version}
        options = {"out_type": list(shapes), "backend_options": {"enable_fp_fusion": False, **pinned}}
    else:
        options = {"out_shape": list(shapes), "enable_fp_fusion": False}
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=1,
        name=kernel.__name__,
        **options,
        **constants,
    )


def meshless():
    """A context without a mesh, so that a traced program can be used under any mesh.

    Under a mesh, JAX traces 'reshard' and shardings, which no kernel can contain.
    """
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def varying_axes(tree) -> frozenset[str]:
    """The mesh axes of a `jax.shard_map` that some array of a pytree varies over, as far as JAX keeps count of it."""
    types = [getattr(jax.typeof(x), "manual_axis_type", None) for x in jax.tree.leaves(tree)]
    return frozenset().union(*(t.varying for t in types if t is not None))


def aligned(tree, like=()):
    """The pytree; all its arrays vary over the mesh axes that any of them, or of ``like``, varies over."""
    # Outside of a `jax.shard_map` nothing varies, and this is asked for each equation.
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    axes = varying_axes((tree, like))
    if not axes:
        return tree

    def cast(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def shaped_like(shape: tuple[int, ...], dtype, avals):
    """The type of a result that varies over the mesh axes that any of ``avals`` varies over."""
    for aval in avals:
        if aval.manual_axis_type.varying:
            place = jax.sharding.NamedSharding(aval.sharding.mesh, jax.sharding.PartitionSpec(*[None] * len(shape)))
            return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=place)
    return jax.core.ShapedArray(shape, dtype)  # pyright: ignore[reportAttributeAccessIssue]


def axes_along(sharding, axis: int) -> tuple[str, ...]:
    """The axes of the mesh along which an axis of an array lies."""
    spec: tuple[Any, ...] = tuple(getattr(sharding, "spec", ()))
    axes = spec[axis] if axis < len(spec) else None
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def devices_here(count: int) -> int:
    """How many of so many devices this process has, if all processes have as many."""
    return min(count, jax.local_device_count())


def needs_devices(primitive: Primitive) -> None:
    """Let the lowering rule of a primitive know the devices of its program."""
    from jax._src import dispatch

    dispatch.prim_requires_devices_during_lowering.add(primitive)


def lowered_devices(ctx) -> int:
    """Devices over which XLA may split what is lowered; 1 within a `jax.shard_map`."""
    context = ctx.module_context.axis_context
    if getattr(context, "manual_axes", None):
        return 1
    mesh = getattr(context, "mesh", None)
    return mesh.size if mesh is not None else getattr(context, "num_devices", None) or 1


def mapped_devices(ctx) -> int:
    """Devices along the axes of a `jax.shard_map` within which something is lowered."""
    context = ctx.module_context.axis_context
    return math.prod(context.mesh.shape[name] for name in getattr(context, "manual_axes", ()))


def reciprocal(x):
    """The hardware's reciprocal of an array in Mosaic GPU's registers, within 1 ulp; Mosaic lacks this function."""
    return x._pointwise(x._lift_fast_instr("rcp.approx.ftz.f32"))


def store_warp_sums(_, x, ref):
    """Store the sum over each warp of an array in Mosaic GPU's registers, one number a warp; no warp waits."""
    ir, utils = map(importlib.import_module, ("jaxlib.mlir.ir", "jax.experimental.mosaic.gpu.utils"))
    arith, memref, vector = (
        importlib.import_module(f"jaxlib.mlir.dialects.{n}") for n in ("arith", "memref", "vector")
    )
    parts = [
        vector.extract(register, dynamic_position=[], static_position=[k])
        for register in x.registers.flat
        for k in range(register.type.shape[0])
    ]
    total = utils.warp_tree_reduce(functools.reduce(arith.addf, parts), arith.addf, 32)
    warp = arith.index_cast(ir.IndexType.get(), utils.warp_idx(sync=False))
    with utils.single_thread(scope=utils.ThreadSubset.WARP):
        memref.store(total, ref, [warp])


def gpu_races_found() -> bool:
    """Whether the GPU interpreter has found a race."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # pyright: ignore[reportMissingImports]

    return gpu_callbacks.get_races().races_found


def clients() -> list[Any]:
    """The backends that JAX has started so far; this starts none."""
    from jax._src import xla_bridge

    return list(xla_bridge._backends.values())


@contextlib.contextmanager
def programs_kept(folder: Path | None):
    """A context in which compiled programs are kept in a folder, unless the user has set one; ``None``, as they are."""
    if folder is None or jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        yield
        return
    from jax.experimental.compilation_cache import compilation_cache

    # All of them: those that are compiled in no time are the most.
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def eqn_source(eqn) -> str:
    """The line of user code that an equation comes from, as ``file:line``."""
    from jax._src import source_info_util

    return source_info_util.summarize(eqn.source_info)


def at_source(eqn):
    """A context in which traced operations have the source of an equation."""
    from jax._src import source_info_util

    return source_info_util.user_context(eqn.source_info.traceback, name_stack=eqn.source_info.name_stack)


def is_traced(value) -> bool:
    """Whether a value is known only when the program runs."""
    return isinstance(value, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def is_whole(value) -> bool:
    """Whether this process can read all of a value: none that is traced, or that several processes share."""
    return not is_traced(value) and getattr(value, "is_fully_addressable", True)


def of_one_shape(*values) -> tuple[Any, ...]:
    """Arrays that broadcast to each other, each of the shape of all; numbers stay numbers."""
    shape = np.broadcast_shapes(*map(np.shape, values))
    same = (
        x if np.shape(x) in ((), shape) else (jax.numpy if is_traced(x) else np).broadcast_to(x, shape) for x in values
    )
    return tuple(same)


def values_here(value) -> np.ndarray:
    """The values of an array; of one that several processes share, those on the devices of this one, flat."""
    if is_whole(value):
        return np.asarray(value)
    return np.concatenate([np.ravel(shard.data) for shard in value.addressable_shards])


def set_linearisation(primitive: Primitive, rule) -> None:
    """Set ``rule(reverse, nonzero, *primals, **params)``; ``reverse`` tells `jax.vjp` from `jax.linearize`."""
    from jax._src.interpreters import ad

    structured = "structured_residuals" in ad.LinearizeTrace.process_primitive.__code__.co_names

    def of_newer(*args, **params):
        """Since 0.11 there are structured residuals as well, here none."""
        *results, push = rule(*args, **params)
        return *results, None, lambda residuals, _, *tangents: push(residuals, *tangents)

    getattr(ad, "primitive_linearizations", {})[primitive] = of_newer if structured else rule
