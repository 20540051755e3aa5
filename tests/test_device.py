"""The suites compiled for the accelerator that is here; ``python -m benchmarks.device_check`` runs them first."""

import jax
import pytest
from backend_suite import BackendSuite, Case
from kernel_suite import KernelSuite

from brainmass_kernels import dispatch

HERE = next((n for n in ("mosaic_tpu", "mosaic_gpu") if not dispatch.load(n).unavailable(jax.default_backend())), None)
pytestmark = pytest.mark.skipif(HERE is None, reason=f"no accelerator here, only {jax.default_backend()}")


class TestKernelsOnDevice(KernelSuite):
    backend = dispatch.load(HERE or "scan")


class TestOnDevice(BackendSuite):
    implementation = HERE
    runs = HERE or ""
    float64 = False
    accuracy = Case(steps=1000, every=10, lanes=8)
    bounded = None
