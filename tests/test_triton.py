"""The Triton backend, in Triton's interpreter against float64 references, and compiled for GPUs that are not there."""

import functools
import importlib.util

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backend_suite import BackendSuite, Case
from kernel_suite import KernelSuite

import brainmass_kernels as bk
from brainmass_kernels.backends import triton

needs_interpreter = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("triton", "torch"))), reason="Triton's interpreter needs triton and torch"
)
needs_compiler = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


@needs_interpreter
class TestKernels(KernelSuite):
    backend = triton.Triton()
    interpret = "plain"

    @staticmethod
    def shorten(monkeypatch, steps):
        monkeypatch.setattr(triton, "KEPT", 2 * steps)


@needs_interpreter
class TestTriton(BackendSuite):
    implementation = "triton"
    runs = "triton"
    context = staticmethod(bk.testing.interpret)
    accuracy = Case(steps=1000, every=10, lanes=8)
    bounded = None
