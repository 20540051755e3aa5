"""A simulation and its gradient on each implementation that runs here, against `lax.scan` and brainmass.

``pytest benchmarks/test_simulate_speed.py``: results are compared before anything is timed, and each case is a group of
its own. brainmass runs within `jax.jit`, compiled once.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

import brainmass_kernels as bk
from brainmass_kernels import bench

from .cases import SIMULATE_CASES

HERE = [name for name, why in bk.implementations().items() if why == "runs here"]
BRAINMASS = {"brainmass.Simulator": bench.simulated_by_brainmass, "brainstate for_loop": bench.looped_by_brainstate}


def function_of(contender: str, case: bench.Case) -> Callable:
    if contender in HERE:
        return bench.fused(case, contender)
    if contender == "lax.scan":
        return bench.reference(case)
    pytest.importorskip("brainmass")
    eeg = BRAINMASS[contender](case.steps)
    return bench.differentiated(eeg) if case.gradient else eeg


@pytest.mark.parametrize("case", SIMULATE_CASES, ids=str)
@pytest.mark.parametrize("contender", ["lax.scan", *HERE, *BRAINMASS])
def test_simulate(benchmark, contender, case):
    args = bench.arguments(case.lanes)
    run = jax.jit(function_of(contender, case))
    pairs = zip(*map(jax.tree.leaves, (run(*args), jax.jit(bench.reference(case))(*args))), strict=True)
    for got, want in pairs:
        assert got.shape == want.shape
        assert jnp.linalg.norm(got - want) <= bench.AGREES[case.precision] * jnp.linalg.norm(want)
    benchmark.group = str(case)
    benchmark.extra_info["mass_steps"] = case.mass_steps
    benchmark(lambda: jax.block_until_ready(run(*args)))
