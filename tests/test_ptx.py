"""The GPU kernels as they are compiled for Hopper: `ptx_machine` runs their PTX.

Pallas's interpreter runs what we wrote, and compiling alone shows no number. What the compiler gets wrong shows here.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math

import backend_suite
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_suite import BackendSuite
from kernel_suite import CASES, Case, KernelSuite, in_place_of_the_interpreter, make_loop
from ptx_machine import Program

import brainmass_kernels as bk
from brainmass_kernels._jax import MOSAIC_GPU, NO_MOSAIC_GPU
from brainmass_kernels.backends import mosaic_gpu

if not MOSAIC_GPU:
    pytest.skip(NO_MOSAIC_GPU, allow_module_level=True)
if missing := [name for name in ("jax_cuda13_plugin", "triton") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"compiling for Hopper needs {', '.join(missing)}", allow_module_level=True)


class OnTheMachine:
    """In place of `plgpu`: a kernel is compiled for an H200, and the machine runs it."""

    def __getattr__(self, name: str):
        return getattr(importlib.import_module("jax.experimental.pallas.mosaic_gpu"), name)

    def kernel(self, body, *, out_type, grid, scratch_types=(), **settings):
        made = self.__getattr__("kernel")(
            body, out_type=out_type, grid=grid, scratch_types=scratch_types, **settings
        )  # fmt: skip
        shared = sum(4 * math.prod(ref.shape) for ref in scratch_types)

        def launch(*operands):
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
            (kernel,) = bk.testing.compile_for("h200", made, *shapes).kernels.values()
            program = Program(kernel.ptx)

            def run(*given):
                return program.run([*map(np.asarray, given)], out_type, grid[0], shared, kernel.arguments)

            return jax.pure_callback(run, out_type, *operands)

        return launch


@pytest.fixture(autouse=True)
def on_the_machine(monkeypatch):
    """Runs on `mosaic_gpu` in the context of the interpreter are the machine's instead."""
    monkeypatch.setattr(mosaic_gpu, "plgpu", OnTheMachine())
    with in_place_of_the_interpreter(monkeypatch, mosaic_gpu.MosaicGPU):
        yield


# Of the suite's cases; the others are slow together.
QUICK = (
    "noise that goes on from an odd step", "1000 lanes, one chunk", "strides of several chunks",
    "segments and strides of several chunks",
)  # fmt: skip


class TestKernels(KernelSuite):
    backend = mosaic_gpu.MosaicGPU()
    contracted = True
    long = (
        *(f"test_forward_and_adjoint_agree_with_a_float64_scan[{name}]" for name in CASES if name not in QUICK),
        *(f"test_an_adjoint_may_walk_back_by_inverse_steps[{name}]" for name in CASES if name not in QUICK),
        *(f"test_an_adjoint_reruns_a_loop_that_has_an_inverse[{name}]" for name in CASES),
    )

    def test_fast_is_about_the_same(self):
        """With the hardware's tanh, here an exact one, besides the products and sums of "exact"."""
        case = Case(14, 2, 3, 5, 4)
        loop = dataclasses.replace(make_loop(case), precision="fast")
        self.check(case, loop, with_inverse=False)


# A fault of the compiler ---------------------------------------------------------------------------------------------


def keep_order(_, ref):
    """Assembly without an instruction that gets an address, and after which any memory may be another."""
    ir = importlib.import_module("jaxlib.mlir.ir")
    arith, llvm, memref = (importlib.import_module(f"jaxlib.mlir.dialects.{n}") for n in ("arith", "llvm", "memref"))
    address = arith.index_cast(ir.IntegerType.get_signless(64), memref.extract_aligned_pointer_as_index(ref))
    llvm.inline_asm(None, [address], "", "l,~{memory}", has_side_effects=True)


STEPS, SEGMENTS = 4, 3


def replay_and_reverse(ordered: bool, x, total, kept):
    """Segments of steps that keep states in shared memory, and then read them from the last on."""
    plgpu, layout = mosaic_gpu.plgpu, mosaic_gpu.plgpu.Layout.WG_STRIDED((128,), vec_size=1)

    def fence():
        if ordered:
            plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(keep_order)(kept)

    def load(ref):
        return plgpu.load(ref, layout=layout, optimized=False)

    def step(j, state):
        kept[j] = state
        return state * 0.5 + 1.0

    def segment(_, carry):
        state, sum_ = carry
        fence()
        state = jax.lax.fori_loop(jnp.int32(0), jnp.int32(STEPS), step, state)
        fence()
        for j in reversed(range(STEPS)):
            sum_ = sum_ * 0.5 + load(kept.at[j])
        return state, sum_

    zeros = plgpu.layout_cast(jnp.zeros(128, jnp.float32), layout)
    total[...] = jax.lax.fori_loop(jnp.int32(0), jnp.int32(SEGMENTS), segment, (load(x), zeros))[1]


@pytest.mark.parametrize("ordered", [True, False])
def test_the_machine_sees_loads_before_their_stores(ordered):
    """Why no kernel of ours has shared memory: LLVM reads it before the loop that writes it (jax 0.11.2)."""
    plgpu, x = mosaic_gpu.plgpu, np.linspace(-1.0, 1.0, 128)
    (got,) = plgpu.kernel(
        functools.partial(replay_and_reverse, ordered),
        out_type=[jax.ShapeDtypeStruct((128,), jnp.float32)],
        scratch_types=[plgpu.SMEM((STEPS, 128), jnp.float32)],
        grid=(1,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=mosaic_gpu.lane_semantics()
        ),
    )(jnp.asarray(x, jnp.float32))
    want = np.zeros(128)
    for _ in range(SEGMENTS):
        kept = []
        for _ in range(STEPS):
            kept.append(x)
            x = x * 0.5 + 1.0
        for state in reversed(kept):
            want = want * 0.5 + state
    assert np.allclose(got, want, rtol=1e-6) == ordered


# Whole runs ---------------------------------------------------------------------------------------------------------


class OfUsers(BackendSuite):
    implementation = "mosaic_gpu"


@pytest.mark.slow
def test_the_gradient_of_the_readme():
    """By nested segments, in bodies as long as on the chip."""
    case = backend_suite.Case(lanes=1, steps=6000, lead=2000, every=10)

    def power(C):
        run = bk.simulate(
            bk.JansenRit(C=C), 3 * u.second, 0.5 * u.ms, inputs={"E_inp": 220 * u.Hz}, transient=1 * u.second,
            every=10, implementation="mosaic_gpu",
        )  # fmt: skip
        return jnp.var(run["eeg"] / u.mV)

    def wanted(C):
        theta = {"parameters": {"C": C}, "inputs": {"E_inp": 220.0}, "initial": {}}
        return jnp.var(backend_suite.reference(jnp, case, theta)[0]["eeg"])

    got = jax.value_and_grad(power)(jnp.float32(135.0))
    with jax.enable_x64(True):
        want = jax.jit(jax.value_and_grad(wanted))(np.float64(135.0))
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("reach", [pytest.param(0.0, id="by replay"), pytest.param(2.0, id="by inverse steps")])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(backend_suite.Case(3, 90, 30, 4, 30, kind="lane rows", noisy=True), id="drives and noise"),
        pytest.param(backend_suite.Case(3, 120, 0, 10, 30, scheme="exp_euler", kind="rows"), id="exp_euler"),
    ],
)
def test_gradients_of_jansen_rit(case, reach, monkeypatch):
    monkeypatch.setattr(importlib.import_module("brainmass_kernels.run"), "MAX_INVERSE_GROWTH", reach)
    OfUsers().check(case)
