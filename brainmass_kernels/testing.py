"""Tests of accelerator kernels on a machine without the accelerator: interpreters and compilers."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from ._context import ABSENT, INTERPRETED, TARGET, TRITON_KERNELS, Target, setting
from .errors import Unsupported


def interpret(races: bool = False):
    """A context in which accelerator implementations run in their interpreters, slowly, on the CPU.

    Parameters
    ----------
    races : also raise if two threads of a GPU kernel access the same memory unordered; much slower
    """
    return setting(INTERPRETED, "races" if races else "plain")


def without(*names: str):
    """A context in which these implementations are not chosen, as on a machine that cannot run them."""
    return setting(ABSENT, ABSENT.get() | frozenset(names))


#: The smallest topology of each TPU, and the axes of larger ones: those of 8 chips are v5e:2x4 and v4:2x2x2.
TPU_TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


class Gpu(NamedTuple):
    """An NVIDIA GPU, as its compiler describes it.

    Attributes
    ----------
    device_kind : JAX's name of it
    capability : compute capability, major and minor
    architecture : ptxas's name of it
    multiprocessors, clock_ghz : at the boost clock
    memory_bytes, bandwidth : of device memory
    """

    device_kind: str
    capability: tuple[int, int]
    architecture: str
    multiprocessors: int
    clock_ghz: float
    memory_bytes: int
    bandwidth: int

    def target(self) -> Target:
        """For the layout of kernels."""
        return Target("gpu", self.multiprocessors, float(".".join(map(str, self.capability))))

    def config(self) -> str:
        """XLA's description of the target, as the text of its protocol buffer."""
        major, minor = self.capability
        return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
            shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {self.multiprocessors}
            fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            memory_bandwidth: {self.bandwidth} l2_cache_size: 62914560 clock_rate_ghz: {self.clock_ghz}
            device_memory_size: {self.memory_bytes} shared_memory_per_block_optin: 232448
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
            device_description_str: "{self.device_kind}" """


GPUS = {
    "h200": Gpu("NVIDIA H200", (9, 0), "sm_90a", 132, 1.98, 150_000_000_000, 4_814_000_000_000),
    "b200": Gpu("NVIDIA B200", (10, 0), "sm_100a", 148, 1.965, 192_000_000_000, 8_000_000_000_000),
}

# Targets of Triton, by compute capability: Ampere, Ada and Hopper.
TRITON_GPUS = ("sm_80", "sm_86", "sm_89", "sm_90")
#: The chips of `compile_for`, by the implementation whose kernels they run.
CHIPS = {"mosaic_tpu": tuple(TPU_TOPOLOGIES), "mosaic_gpu": tuple(GPUS), "triton": TRITON_GPUS}
# Mosaic compiles for the same architecture throughout a process, the first.
_GPU_OF_PROCESS: list[str] = []


class Compiled(NamedTuple):
    """A function compiled for a chip.

    Attributes
    ----------
    chip : its name
    cost : what the compiler counts: flops, bytes, and the bytes of the program's buffers; on a GPU also the
        registers, spilled bytes and shared bytes of the worst kernel
    executable : JAX's compiled object, which cannot run here; ``None`` for Triton
    kernels : on a GPU, `assembly.Kernel` of each kernel, by name
    """

    chip: str
    cost: dict[str, float]
    executable: Any
    kernels: dict[str, Any]


def compile_for(chip: str, fn, *args, devices: int = 1) -> Compiled:
    """Compile ``fn`` ahead of time for a chip that this machine may lack, or for some of them.

    Parameters
    ----------
    chip : "v4", "v5e", "v5p", "v6e" or "tpu7x", for which libtpu must be installed; "h200" or "b200", for which
        jax-cuda13-plugin of JAX's own version and triton (its ptxas and nvdisasm) must be; "sm_80", "sm_86", "sm_89"
        or "sm_90" for the kernels of the implementation "triton" alone, for which triton must be
    fn : a function of arrays, such as a call of `simulate` with ``implementation="mosaic_tpu"``
    args : arrays or ``jax.ShapeDtypeStruct``, which lie on the chips as on the mesh of their `NamedSharding`, if they
        have one, whose size is ``devices``
    devices : chips that share the program

    Raises
    ------
    ValueError : an unknown chip, or a mesh of another size
    Unsupported : the chip's compiler is not installed, or this process has compiled for another GPU
    """
    chips = [name for group in CHIPS.values() for name in group]
    if chip not in chips:
        raise ValueError(f"'chip' got {chip!r}, but takes one of {', '.join(chips)}")
    if lacking := _lacking(chip):
        raise Unsupported(f"compiling for {chip} needs {lacking}")
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"'devices' got {devices!r}, but takes a number of chips, at least 1")
    layout = _Layout.of(args, devices)
    compilers = {**dict.fromkeys(TPU_TOPOLOGIES, _compile_tpu), **dict.fromkeys(GPUS, _compile_gpu)}
    with setting(TARGET, Target("tpu" if chip in TPU_TOPOLOGIES else "gpu")):
        executable, kernels = compilers.get(chip, _compile_triton)(chip, fn, args, layout)
    cost: dict[str, float] = {}
    if executable is not None:
        memory: Any = executable.memory_analysis()
        cost |= {k: v for k, v in (executable.cost_analysis() or {}).items() if k in ("flops", "bytes accessed")}
        cost |= {"temporary_bytes": memory.temp_size_in_bytes, "output_bytes": memory.output_size_in_bytes}
    for name in ("registers", "spill_bytes", "shared_bytes") if kernels else ():
        cost[name] = max(getattr(kernel, name) for kernel in kernels.values())
    return Compiled(chip, cost, executable, kernels)


def compilers() -> dict[str, str]:
    """For each chip of `compile_for` "compiles here", or the reason why its kernels cannot be compiled."""
    from ._jax import MOSAIC_GPU, NO_MOSAIC_GPU

    old = {} if MOSAIC_GPU else dict.fromkeys(GPUS, NO_MOSAIC_GPU)
    about = {}
    for chip in (name for group in CHIPS.values() for name in group):
        lacking = _lacking(chip)
        about[chip] = old.get(chip) or (f"it needs {lacking}" if lacking else "compiles here")
    return about


def _lacking(chip: str) -> str | None:
    """The packages that a chip's compiler lacks here, or ``None``."""
    needed = ("libtpu",) if chip in TPU_TOPOLOGIES else ("jax_cuda13_plugin", "triton") if chip in GPUS else ("triton",)
    missing = [name.replace("_", "-") for name in needed if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)}: pip install 'brainmass-kernels[ledger]'" if missing else None


class _Layout(NamedTuple):
    """How arguments lie on a mesh of chips.

    Attributes
    ----------
    devices : of the mesh
    names, shape : of its axes
    """

    devices: int
    names: tuple[str, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, args, devices: int) -> _Layout:
        import jax
        from jax.sharding import NamedSharding

        places = [getattr(x, "sharding", None) for x in jax.tree.leaves(args)]
        meshes = [place.mesh for place in places if isinstance(place, NamedSharding) and place.mesh.size > 1]
        if not meshes:
            return cls(devices, ("x",), (devices,))
        if meshes[0].size != devices:
            raise ValueError(f"'devices' got {devices}, but an argument lies on a mesh of {meshes[0].size}")
        return cls(devices, meshes[0].axis_names, tuple(meshes[0].shape.values()))

    def placed(self, chips, args):
        """The arguments on a mesh of these chips, and the mesh."""
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        mesh = Mesh(np.asarray(chips[: self.devices]).reshape(self.shape), self.names)

        def place(x):
            old = getattr(x, "sharding", None)
            spec = old.spec if isinstance(old, NamedSharding) and old.mesh.size > 1 else PartitionSpec()
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(place, args), mesh


def _tpu_topology(chip: str, devices: int):
    from jax.experimental import topologies

    name, axes = TPU_TOPOLOGIES[chip].split(":")
    sizes = [int(size) for size in axes.split("x")]
    while True:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{'x'.join(map(str, sizes))}")
        if len(topology.devices) >= devices:
            return topology
        # Each axis in turn, the last first.
        sizes[max(k for k, size in enumerate(sizes) if size == min(sizes))] *= 2


def _compile_tpu(chip: str, fn, args, layout: _Layout):
    import contextlib

    import jax

    topology = _tpu_topology(chip, layout.devices)
    args, mesh = layout.placed(topology.devices, args)
    within = jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if layout.devices > 1 else contextlib.nullcontext()
    with setting(TARGET, Target("tpu", getattr(topology.devices[0], "num_cores", None) or 1)), within:
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).compile(), {}


def _compile_gpu(chip: str, fn, args, layout: _Layout):
    """The executable, and its kernels, read from the PTX that Mosaic writes to a folder."""
    import jax
    from jax.experimental import topologies

    from .assembly import assemble, launch_arguments

    if _GPU_OF_PROCESS and chip not in _GPU_OF_PROCESS:
        raise Unsupported(f"this process has compiled for {_GPU_OF_PROCESS[0]}; compile for {chip} in another")
    _GPU_OF_PROCESS.append(chip)
    gpu = GPUS[chip]
    topology = topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=gpu.config(), topology=f"1x1x{layout.devices}"
    )
    args, _ = layout.placed(topology.devices, args)
    device = jax.sharding.AbstractDevice(device_kind=gpu.device_kind, num_cores=gpu.multiprocessors, platform="gpu")
    automatic = (jax.sharding.AxisType.Auto,) * len(layout.shape)
    mesh = jax.sharding.AbstractMesh(layout.shape, layout.names, axis_types=automatic, abstract_device=device)
    with tempfile.TemporaryDirectory() as dump:
        before = os.environ.get("MOSAIC_GPU_DUMP_TO")
        os.environ["MOSAIC_GPU_DUMP_TO"] = dump
        try:
            with jax.sharding.use_abstract_mesh(mesh), setting(TARGET, gpu.target()):
                lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
            executable = lowered.compile()
        finally:
            if before is None:
                del os.environ["MOSAIC_GPU_DUMP_TO"]
            else:
                os.environ["MOSAIC_GPU_DUMP_TO"] = before
        paths = sorted(Path(dump).glob("*.ptx"))
        sources = [(path.read_text(), path.with_suffix(".mlir-passes.log").read_text()) for path in paths]
    kernels = {}
    for ptx, passes in sources:
        (name,) = re.findall(r"\.entry (\w+?)(?:_mosaic_gpu_kernel)?\(", ptx)
        kernels[name] = assemble(ptx, gpu.architecture)._replace(arguments=launch_arguments(passes))
    return executable, kernels


def _compile_triton(chip: str, fn, args, layout: _Layout):
    """The kernels that ``fn`` would call, compiled by Triton."""
    import jax

    if layout.devices > 1:
        raise Unsupported(f"compiling for {chip} compiles kernels alone, each for one device")

    with setting(TRITON_KERNELS, []) as calls:
        # An earlier trace in JAX's cache would call no kernel.
        jax.clear_caches()
        jax.eval_shape(fn, *args)
    if not calls:
        raise Unsupported(f'the function calls no Triton kernel: name implementation="triton" to compile for {chip}')
    return None, {kernel.__name__: _assembled(chip, kernel, arrays, layout) for kernel, arrays, layout in calls}


def _assembled(chip: str, kernel, arrays, layout):
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

    from .assembly import assemble

    kinds = {"float32": "*fp32", "float64": "*fp64", "int32": "*i32"}
    names = kernel.arg_names[: len(arrays)]
    signature = {name: kinds[str(array.dtype)] for name, array in zip(names, arrays)}
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={**signature, "BLOCK": "constexpr"},
        constexprs={"BLOCK": layout.width},
        # As jax_triton calls it: arrays begin at multiples of 16 bytes.
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(names))},
    )
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", int(chip.removeprefix("sm_")), 32),
        options={"num_warps": layout.warps, "num_stages": 1, "enable_fp_fusion": False},
    )
    return assemble(binary.asm["ptx"], {"sm_90": "sm_90a"}.get(chip, chip))
