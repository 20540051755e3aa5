"""The GPU backend, in Pallas's interpreter against float64 references, and compiled for chips that are not there."""

import importlib

import pytest
from backend_suite import BackendSuite, Case
from kernel_suite import KernelSuite

import brainmass_kernels as bk
from brainmass_kernels._jax import MOSAIC_GPU
from brainmass_kernels.backends import mosaic_gpu

pytestmark = pytest.mark.skipif(not MOSAIC_GPU, reason="Mosaic GPU needs jax 0.11 or newer")


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
        """Where it is replayed; tests/test_retreat.py holds the way back by inverse steps."""
        monkeypatch.setattr(importlib.import_module("brainmass_kernels.simulate"), "REACH", 0.0)
        super().test_replay_is_exact()
