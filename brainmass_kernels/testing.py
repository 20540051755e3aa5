"""What tests of accelerator kernels need on a machine without the accelerator."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
from typing import Any, NamedTuple

from .backends.base import Unsupported

_INTERPRETED = contextvars.ContextVar("brainmass_kernels_interpreted", default="")
_COMPILED_FOR: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "brainmass_kernels_compiled_for", default=None
)


@contextlib.contextmanager
def interpret(races: bool = False):
    """Within this context accelerator implementations run in their interpreters, on the CPU, slowly.

    Parameters
    ----------
    races : also raise where two threads of a GPU kernel touch the same memory unordered; slower by far
    """
    token = _INTERPRETED.set("races" if races else "plain")
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def interpreting() -> str:
    """How `interpret` asks kernels to run: "plain", "races", or "" outside of it."""
    return _INTERPRETED.get()


_ABSENT: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "brainmass_kernels_absent", default=frozenset()
)


@contextlib.contextmanager
def without(*names: str):
    """Within this context these implementations are not chosen, as on a machine that lacks what they need."""
    token = _ABSENT.set(_ABSENT.get() | frozenset(names))
    try:
        yield
    finally:
        _ABSENT.reset(token)


def absent() -> frozenset[str]:
    """What `without` leaves out."""
    return _ABSENT.get()


TPU_TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


class Compiled(NamedTuple):
    """What a chip's own compiler made of a function.

    Attributes
    ----------
    chip : its name
    cost : what the compiler counts: flops, bytes, and the bytes of the program's buffers
    executable : JAX's compiled object; it cannot run here
    """

    chip: str
    cost: dict[str, float]
    executable: Any


def compile_for(chip: str, fn, *args) -> Compiled:
    """Compile ``fn`` ahead of time for a chip that need not be here.

    Parameters
    ----------
    chip : "v4", "v5e", "v5p", "v6e" or "tpu7x", for which libtpu must be installed
    fn : a function of arrays, such as a call of `simulate` with ``implementation="mosaic_tpu"``
    args : arrays or ``jax.ShapeDtypeStruct``

    Raises
    ------
    ValueError : an unknown chip
    Unsupported : the chip's compiler is not installed
    """
    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if chip not in TPU_TOPOLOGIES:
        raise ValueError(f"'chip' got {chip!r}, but takes one of {', '.join(TPU_TOPOLOGIES)}")
    if importlib.util.find_spec("libtpu") is None:
        raise Unsupported(f"compiling for {chip} needs libtpu: pip install 'brainmass-kernels[ledger]'")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPU_TOPOLOGIES[chip])
    place = NamedSharding(Mesh(topology.devices[:1], ("x",)), PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args)
    token = _COMPILED_FOR.set("tpu")
    try:
        executable = jax.jit(fn).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
    finally:
        _COMPILED_FOR.reset(token)
    memory: Any = executable.memory_analysis()
    cost = {k: v for k, v in (executable.cost_analysis() or {}).items() if k in ("flops", "bytes accessed")}
    cost |= {"temporary_bytes": memory.temp_size_in_bytes, "output_bytes": memory.output_size_in_bytes}
    return Compiled(chip, cost, executable)


def target_platform() -> str | None:
    """The platform that `compile_for` compiles for at this moment, or ``None``."""
    return _COMPILED_FOR.get()
