"""The CPU backend: emitted source, compiled by numba, called by XLA."""

import pytest
from backend_suite import BackendSuite
from kernel_suite import KernelSuite

pytest.importorskip("numba")

from brainmass_kernels.backends.numba import Numba


class TestKernels(KernelSuite):
    backend = Numba()

    @staticmethod
    def shorten(monkeypatch, steps):
        """Nothing: a segment is kept whole, and only its block is made narrower."""


class TestNumba(BackendSuite):
    implementation = "numba"
    runs = "numba"
    loop = "custom-call"
