"""Kernels of the Triton backend as they are compiled for Hopper: `ptx_machine` runs their PTX."""

import dataclasses
from types import SimpleNamespace

import jax
import needs
import numpy as np
import pytest
from kernel_suite import CASES, KernelSuite, in_place_of_the_interpreter
from network_suite import NetworkSuite, loops_but
from ptx_machine import Program

import brainmass_kernels as bk
from brainmass_kernels import testing
from brainmass_kernels.backends import triton
from brainmass_kernels.backends.triton import versions

pytestmark = needs.triton


def launch(function, arrays, shapes, *, grid, num_warps, constants, **_):
    """In place of `_jax.triton_call`; two last parameters are for scratch memory, of which our kernels have none."""
    layout = SimpleNamespace(width=constants["BLOCK"], warps=num_warps)
    program = Program(testing._assembled("sm_90", function, (*arrays, *shapes), layout).ptx)
    n, m = len(arrays), len(shapes)
    order = [*range(n), *range(n + 1, n + 1 + m), n, n]

    def run(*given):
        return program.run([*map(np.asarray, given), np.empty(0, "f4")], shapes, grid[0], order=order)

    return jax.pure_callback(run, shapes, *arrays)


@pytest.fixture(autouse=True)
def on_the_machine(monkeypatch):
    """Runs on `triton` in the context of the interpreter are the machine's instead."""
    monkeypatch.setattr("brainmass_kernels._jax.triton_call", launch)
    monkeypatch.setattr(versions, "newest_ptx", lambda: None)
    # What Triton's interpreter would need is not asked for.
    unsupported = triton.Triton.unsupported
    monkeypatch.setattr(
        triton.Triton, "unsupported",
        lambda self, request: unsupported(self, request._replace(loop=dataclasses.replace(request.loop, interpret=""))),
    )  # fmt: skip
    with in_place_of_the_interpreter(monkeypatch, triton.Triton):
        yield


QUICK = ("noise that goes on from an odd step", "1000 lanes, one chunk", "strides of several chunks")


class TestKernels(KernelSuite):
    backend = triton.Triton()
    long = tuple(f"test_forward_and_adjoint_agree_with_a_float64_scan[{name}]" for name in CASES if name not in QUICK)


class TestNetworks(NetworkSuite):
    """Against the loop: the machine has float32 only, and takes long for many regions."""

    implementation = "triton"
    context = staticmethod(bk.testing.interpret)
    double = False
    most = 14
    held_elsewhere = (
        *(name for name in dir(NetworkSuite) if name.startswith("test_") and name != "test_the_loop"),
        # Minutes each; of several couplings those without delays and those of groups are held here.
        *(f"test_the_loop[{name}]" for name in ("every kind", "three couplings")),
    )
    long = loops_but("one region that waits", "a batch of weights without delays")
