"""The GPU backend, in Pallas's interpreter against float64 references, and compiled for chips that are not there."""

import importlib

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_suite import BackendSuite, Case
from kernel_suite import KernelSuite

import brainmass_kernels as bk
from brainmass_kernels._jax import MOSAIC_GPU
from brainmass_kernels.backends import mosaic_gpu

if not MOSAIC_GPU:
    pytest.skip("Mosaic GPU needs jax 0.11 or newer", allow_module_level=True)


class TestKernels(KernelSuite):
    backend = mosaic_gpu.MosaicGPU()
    interpret = "races"

    @pytest.fixture(autouse=True)
    def _no_race(self):
        from brainmass_kernels._jax import gpu_races_found

        yield
        assert not gpu_races_found()


class TestMosaicGPU(BackendSuite):
    implementation = "mosaic_gpu"
    runs = "mosaic_gpu"
    float64 = False
    context = staticmethod(bk.testing.interpret)
    accuracy = Case(steps=1000, every=10, lanes=8)
    batches = (1, 127, 129, 257)
    bounded = None

    @pytest.mark.slow
    def test_replay_is_exact(self, monkeypatch):
        """Where it is replayed; tests/test_inverse_steps.py holds the way back by inverse steps."""
        monkeypatch.setattr(importlib.import_module("brainmass_kernels.run"), "MAX_INVERSE_GROWTH", 0.0)
        super().test_replay_is_exact()


@pytest.mark.parametrize("reach", [pytest.param(0.0, id="by replay"), pytest.param(None, id="by inverse steps")])
@pytest.mark.parametrize(
    ("unroll", "steps", "every", "transient"),
    [(4, 50, 3, 5), (6, 61, 10, 1), (5, 40, 2, 0)],
)
def test_bodies_of_several_steps(monkeypatch, unroll, steps, every, transient, reach):
    """As on a chip, where the interpreter takes one: noise in pairs, inputs a body ahead, and what is left over."""
    rng = np.random.default_rng(0)
    values = {
        "C": np.linspace(100.0, 150.0, 3, dtype=np.float32), "row": np.float32(rng.normal(200.0, 20.0, steps)),
        "lanes": np.float32(rng.normal(0.0, 1.0, (steps, 3))),
    }  # fmt: skip

    def loss(values, implementation):
        run = bk.simulate(
            bk.JansenRit(C=values["C"]), steps, 0.1 * u.ms, every=every, transient=transient, scheme="strang",
            inputs={"E_inp": values["row"] * u.Hz, "M_inp": values["lanes"] * u.mV},
            noise={"E_inp": 2.0 * u.Hz * u.second**0.5}, key=jax.random.key(1), checkpoint_every=14,
            implementation=implementation,
        )  # fmt: skip
        seen = run["eeg"].mantissa
        return jnp.sum(jnp.sin(jnp.arange(seen.size).reshape(seen.shape)) * seen) + jnp.sum(run.final["E"].mantissa)

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want = both(values, "scan")
    monkeypatch.setattr(mosaic_gpu, "unrolled", lambda *_, **__: unroll)
    if reach is not None:
        monkeypatch.setattr(importlib.import_module("brainmass_kernels.run"), "MAX_INVERSE_GROWTH", reach)
    bk.clear_caches()
    with bk.testing.interpret():
        got = both(values, "mosaic_gpu")
    bk.clear_caches()
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.max(np.abs(b))))
