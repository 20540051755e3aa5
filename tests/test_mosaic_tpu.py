"""The TPU backend, in Pallas's interpreter against float64 scans, and compiled for chips that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from jax import lax
from kernel_suite import Case, KernelSuite, make_data, make_loop

import brainmass_kernels as bk
from brainmass_kernels import _jax
from brainmass_kernels.backends.base import Carry, Loop, Operands, Pullbacks, Request, Wanted
from brainmass_kernels.backends.mosaic_tpu import MosaicTPU, layout
from brainmass_kernels.backends.mosaic_tpu.layout import chunk_time
from brainmass_kernels.backends.mosaic_tpu.optable import LACKING
from brainmass_kernels.pointwise import Program, pullback
from brainmass_kernels.schedule import Schedule
from brainmass_kernels.testing import TPU_TOPOLOGIES

BACKEND = MosaicTPU()


class TestKernels(KernelSuite):
    backend = BACKEND
    interpret = "plain"


# Time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unroll", [2, 20])
@pytest.mark.parametrize("wish", [None, 1, 4, 7, 50])
@pytest.mark.parametrize("most", [1, 3, 8, 64])
@pytest.mark.parametrize("schedule", [
    Schedule(*s) for s in
    [(1, 0, 1), (7, 0, 9), (23, 3, 2), (31, 5, 3), (50, 4, 20), (40, 0, 7), (60, 11, 17), (9, 12, 1), (12, 12, 5)]
])  # fmt: skip
def test_chunks_take_every_step_once_and_meet_the_records(schedule, most, wish, unroll):
    cut = chunk_time(schedule, most, wish, unroll)
    steps = np.asarray(cut.spread(jnp.arange(schedule.steps)))
    assert steps.shape == (cut.chunks * cut.size,)
    np.testing.assert_array_equal(cut.gather(jnp.asarray(steps)), np.arange(schedule.steps))
    taken, records = [], {}
    for chunk in range(cut.chunks):
        start, first, last = (int(x) for x in cut.bounds(jnp.int32(chunk)))
        assert 0 <= first <= last <= cut.size
        np.testing.assert_array_equal(steps[chunk * cut.size :][first:last], start + np.arange(first, last))
        taken += range(start + first, start + last)
        if cut.records(jnp.int32(chunk)) and schedule.count:
            block = int(cut.record_block(jnp.int32(chunk)))
            for k in range(cut.strides):
                records[block * cut.strides + k] = start + (k + 1) * cut.stride
    assert taken == list(range(schedule.steps))
    for k in range(schedule.count):
        assert records[k] == schedule.lead + (k + 1) * schedule.every


# Requests -----------------------------------------------------------------------------------------------------------


def request(platform="tpu", dtype="float32", step=None):
    loop = make_loop(Case(5, 0, 1, 2, 2, driven=False), "")
    if step:
        avals = [jax.ShapeDtypeStruct((), "float32")] * 4
        loop = Loop(Program(step, avals), loop.observe, 2, 2, 0, 0, loop.schedule)
    return Request(loop, 2, jnp.dtype(dtype), platform)


def test_only_a_tpu_runs_it():
    assert BACKEND.unavailable("tpu") is None
    assert "testing.interpret" in BACKEND.unavailable("cpu")
    assert BACKEND.unsupported(request("tpu")) is None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (request("tpu", "float64"), "float64"),
        (request("tpu", step=lambda a, b, x, v: (jnp.arctan(x), v)), "'atan'"),
    ],
)
def test_the_reason_is_named(asked, reason):
    assert reason in BACKEND.unsupported(asked)


# jax 0.11 has reduce_precision, 0.10 has not.
@pytest.mark.parametrize("name", sorted(LACKING - {"reduce_precision"}))
def test_mosaic_lacks(name):
    def step(_, __, x, v):
        return getattr(lax, name)(x), v

    loop, coefs = request("tpu", step=step).loop, (jnp.float32(1.0), jnp.float32(1.0))
    traced = jax.jit(lambda *state: BACKEND.forward(loop, Operands(coefs), Carry(state)).final).trace(
        jnp.ones(3), jnp.ones(3)
    )
    with pytest.raises(NotImplementedError, match=name):
        traced.lower(lowering_platforms=("tpu",))


# Compiled -----------------------------------------------------------------------------------------------------------

COMPILE = """
import sys
sys.path.insert(0, {tests!r})
import test_mosaic_tpu
test_mosaic_tpu.compile_all({chip!r})
"""


def compile_all(chip: str) -> None:
    """Compile the forward and the adjoint kernel with every kind of argument; runs in a process of its own."""
    from brainmass_kernels.testing import compile_for

    case = Case(1000, 95, 10, 2500, 30, noisy=True)
    loop = make_loop(case, interpret="")
    wanted = Wanted((True, True), (True, True))
    flags = (True,) * 4
    pullbacks = Pullbacks(pullback(loop.advance, (*flags, True, True, False)), pullback(loop.observe, flags))

    def gradient(operands, initial, cotangents):
        kept = BACKEND.forward(loop, operands, initial, 30)
        return BACKEND.adjoint(loop, pullbacks, wanted, operands, kept.saved, cotangents, 30)

    text = compile_for(chip, gradient, *make_data(case)).executable.as_text()
    for kernel in ("brainmass_kernels_tpu_forward", "brainmass_kernels_tpu_adjoint"):
        assert kernel in text


@pytest.mark.slow
@needs.libtpu
@pytest.mark.parametrize("chip", TPU_TOPOLOGIES)
def test_both_kernels_compile_for(chip):
    from benchmarks.ledger import TOGETHER, libtpu_lock

    here = Path(__file__).parent
    with libtpu_lock():
        done = subprocess.run(
            [sys.executable, "-c", COMPILE.format(tests=str(here), chip=chip)], cwd=here.parent, text=True,
            capture_output=True, env={**os.environ, "JAX_PLATFORMS": "cpu", **TOGETHER}, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("lanes", "cores", "rows"), [(1024, 2, 8), (2048, 1, 16), (2048, 2, 8), (4096, 1, 32), (4096, 2, 16)]
)
def test_all_cores_of_a_device_get_blocks(monkeypatch, lanes, cores, rows):
    """v4 and v5p have two that make one device, and take the blocks of a grid in turns."""
    monkeypatch.setattr(layout, "tensor_cores", lambda: cores)
    assert layout.block_rows(lanes, layout.FORWARD_BUNDLES, lambda rows: True) == rows


@needs.libtpu
@pytest.mark.parametrize(("chip", "cores"), [("v5e", 1), pytest.param("v5p", 2, marks=pytest.mark.slow)])
def test_the_cores_of_a_chip_are_known_while_it_is_compiled_for(chip, cores):
    seen = []

    def noted(x):
        seen.append(_jax.tensor_cores())
        return x + 1.0

    bk.testing.compile_for(chip, noted, jax.ShapeDtypeStruct((8,), "float32"))
    assert seen == [cores]
    assert _jax.tensor_cores() == 1
