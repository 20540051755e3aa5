"""What a kernel writes in whole blocks is copied to the lanes of the run: counted, explained, and compiled."""

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import dispatch, memory
from brainmass_kernels.backends import mosaic_gpu

STEPS, EVERY = 2000, 2


def planned(lanes, implementation, **options):
    model = bk.JansenRit(C=np.full(lanes, 135.0, np.float32))
    with bk.testing.interpret():
        return bk.explain(model, STEPS, 0.1 * u.ms, every=EVERY, implementation=implementation, **options)


@needs.mosaic_gpu
def test_lanes_beyond_whole_blocks_are_copied():
    assert planned(1024, "mosaic_gpu").bytes_copied == 0
    plan = planned(1000, "mosaic_gpu")
    assert plan.bytes_copied == STEPS // EVERY * 1024 * 4
    assert "3.906 MiB while they are copied: not with a multiple of 128 lanes, such as 896 or 1,024" in str(plan)
    assert "such as 128" in str(planned(3, "mosaic_gpu"))
    assert "copied" not in str(planned(1024, "mosaic_gpu"))


@needs.mosaic_gpu
def test_statistics_copy_no_more_than_their_block():
    plan = planned(1000, "mosaic_gpu", record=[bk.Mean()])
    assert plan.bytes_copied == min(STEPS // EVERY, plan.block) * 1024 * 4


@pytest.mark.parametrize("lanes", [1000, 1024])
def test_a_tpu_copies_whatever_the_lanes(lanes):
    plan = planned(lanes, "mosaic_tpu")
    assert plan.bytes_copied == STEPS // EVERY * 1024 * 4
    assert "while they are copied" in str(plan)
    assert "multiple" not in str(plan)


@pytest.mark.parametrize("name", ["scan", "numba", "triton"])
def test_the_others_write_straight_to_what_is_returned(name):
    backend = dispatch.load(name)
    assert backend.copied(None) == (0, 0)  # pyright: ignore


@needs.mosaic_gpu
def test_a_copy_that_does_not_fit_is_refused_with_the_lanes_that_would(monkeypatch):
    limit = STEPS // EVERY * 1000 * 4 * 3 // 2  # the records fit, and not their copy
    monkeypatch.setattr(memory, "available", lambda: limit)
    C = np.full(1000, 135.0, np.float32)
    with (
        bk.testing.interpret(),
        pytest.raises(MemoryError, match="which a multiple of 128 lanes does not need"),
    ):
        bk.simulate(bk.JansenRit(C=C), STEPS, 0.1 * u.ms, every=EVERY, implementation="mosaic_gpu")


@needs.gpu_compiler
@pytest.mark.parametrize("lanes", [1000, 1024])
def test_as_the_compiler_counts_it(lanes):
    def run(C):
        return bk.simulate(
            bk.JansenRit(C=C), STEPS, 0.1 * u.ms, every=EVERY, implementation="mosaic_gpu"
        )["eeg"].mantissa  # fmt: skip

    compiled = bk.testing.compile_for("h200", run, jax.ShapeDtypeStruct((lanes,), jnp.float32))
    assert mosaic_gpu.Layout.choose(lanes, most=4).width == 128
    expected = planned(lanes, "mosaic_gpu").bytes_copied
    assert expected <= compiled.cost["temporary_bytes"] <= expected + 100_000
