"""The suites compiled for the accelerator that is here; ``python -m benchmarks.device_check`` runs them first."""

import jax
import pytest
from backend_suite import BackendSuite, Case
from kernel_suite import KernelSuite

from brainmass_kernels import dispatch


def on_device(name: str):
    """The two suites of an implementation, skipped where it does not run."""
    backend = dispatch.load(name)
    why = backend.unavailable(jax.default_backend())
    mark = pytest.mark.skipif(bool(why), reason=str(why))

    class OnDevice(BackendSuite):
        implementation = name
        runs = name
        float64 = name == "triton"
        accuracy = Case(steps=1000, every=10, lanes=8)
        bounded = None
        loop = "custom-call"

    class KernelsOnDevice(KernelSuite):
        pass

    KernelsOnDevice.backend = backend
    return mark(KernelsOnDevice), mark(OnDevice)


TestTPUKernels, TestTPU = on_device("mosaic_tpu")
TestGPUKernels, TestGPU = on_device("mosaic_gpu")
TestTritonKernels, TestTriton = on_device("triton")
