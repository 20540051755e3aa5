"""The suites compiled for the accelerator that is here; ``python -m benchmarks.device_check`` runs them first."""

import sys

import jax
import pytest
from backend_suite import BackendSuite, Case
from kernel_suite import KernelSuite
from network_suite import NetworkSuite

from brainmass_kernels import dispatch


def on_device(name: str):
    """The suites of an implementation, collected where it runs."""
    backend = dispatch.load(name)

    class OnDevice(BackendSuite):
        __test__ = not backend.unavailable(jax.default_backend())
        implementation = name
        runs = name
        float64 = name == "triton"
        accuracy = Case(steps=1000, every=10, lanes=8)
        bounded = None
        loop = "custom-call"

    class KernelsOnDevice(KernelSuite):
        __test__ = OnDevice.__test__
        contracted = name == "mosaic_gpu"

    class NetworksOnDevice(NetworkSuite):
        __test__ = OnDevice.__test__ and backend.networks
        implementation = name
        double = name == "triton"
        live = name == "triton"

    KernelsOnDevice.backend = backend
    return KernelsOnDevice, OnDevice, NetworksOnDevice


TestTPUKernels, TestTPU, TestTPUNetworks = on_device("mosaic_tpu")
TestGPUKernels, TestGPU, _ = on_device("mosaic_gpu")
TestTritonKernels, TestTriton, TestTritonNetworks = on_device("triton")


@pytest.mark.parametrize("suite", [TestTPUKernels, TestGPUKernels, TestTritonKernels])
def test_every_suite_can_shorten_its_kernels(suite, monkeypatch):
    """Wherever the suites themselves do not run."""
    root = type(suite.backend).__module__
    modules = [module for name, module in sys.modules.items() if f"{name}.".startswith(f"{root}.")]
    before = [(module, name, x) for module in modules for name, x in vars(module).items() if name.isupper()]
    suite().shorten(monkeypatch, 2)
    ((module, name, x),) = [each for each in before if getattr(each[0], each[1]) is not each[2]]
    assert 0 < getattr(module, name) < x


@pytest.mark.parametrize("name", ["mosaic_tpu", "mosaic_gpu", "triton"])
def test_what_does_not_run_says_why(name):
    """One line in place of its suites."""
    if why := dispatch.load(name).unavailable(jax.default_backend()):
        pytest.skip(why)
    assert {"mosaic_tpu": TestTPU, "mosaic_gpu": TestGPU, "triton": TestTriton}[name].__test__
