"""The suites compiled for the accelerator that is here; ``python -m benchmarks.device_check`` runs them first."""

import sys

import jax
import numpy as np
import pytest
from backend_suite import BackendSuite, Case
from kernel_suite import KernelSuite
from test_network import DT, delays_of, loss, values_for

from brainmass_kernels import dispatch


def on_device(name: str):
    """The two suites of an implementation, collected where it runs."""
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

    KernelsOnDevice.backend = backend
    return KernelsOnDevice, OnDevice


TestTPUKernels, TestTPU = on_device("mosaic_tpu")
TestGPUKernels, TestGPU = on_device("mosaic_gpu")
TestTritonKernels, TestTriton = on_device("triton")


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


@pytest.mark.parametrize("kind", ["none", "different"])
@pytest.mark.parametrize("name", [n for n in ("mosaic_tpu", "triton") if dispatch.load(n).networks])
def test_networks(name, kind):
    """Records and the gradients in everything against `scan` on the same device."""
    backend = dispatch.load(name)
    if why := backend.unavailable(jax.default_backend()):
        pytest.skip(why)
    steps = delays_of(kind, 7)
    values = {n: x.astype("float32") for n, x in values_for(7, steps, 60, (3,)).items()}
    found, want = (
        jax.jit(jax.value_and_grad(lambda v, name=name: loss(v, name, "diffusive", steps * DT, 60)))(values)
        for name in (name, "scan")
    )
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
