"""Through the public interface, compiled for a TPU that is not there: how many kernels, and no step outside them."""

import importlib.util

import brainunit as u
import jax
import jax.numpy as jnp
import pytest

import brainmass_kernels as bk
from benchmarks.ledger import libtpu_lock

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
LANES = jax.ShapeDtypeStruct((256,), jnp.float32)


def power(C):
    model = bk.JansenRit(C=C)
    noise = {"E_inp": 2.0 * u.Hz * u.second**0.5}
    result = bk.simulate(
        model, 1000, 0.5 * u.ms, inputs={"E_inp": 220.0 * u.Hz}, noise=noise, key=jax.random.key(0), every=10,
        implementation="mosaic_tpu",
    )  # fmt: skip
    return jnp.mean((result["eeg"] / u.mV) ** 2, axis=0)


def kernels(fn, *shapes) -> int:
    """How many Pallas kernels the program compiled for v5e calls."""
    with libtpu_lock():
        compiled = bk.testing.compile_for("v5e", fn, *shapes)
    assert compiled.chip == "v5e"
    assert compiled.cost["output_bytes"] > 0
    return compiled.executable.as_text().count("tpu_custom_call")


@needs_libtpu
def test_a_simulation_is_one_kernel():
    assert kernels(power, LANES) == 1


@needs_libtpu
def test_vmap_folds_into_the_same_kernel():
    assert kernels(jax.vmap(jax.vmap(power)), jax.ShapeDtypeStruct((2, 3, 64), jnp.float32)) == 1


@needs_libtpu
def test_a_gradient_is_a_forward_and_an_adjoint_kernel():
    assert kernels(jax.grad(lambda C: power(C).sum()), LANES) == 2
    assert kernels(jax.vmap(jax.grad(lambda C: power(C).sum())), jax.ShapeDtypeStruct((3, 64), jnp.float32)) == 2


def test_an_unknown_chip_is_named():
    with pytest.raises(ValueError, match="'chip' got 'v9', but takes one of v4"):
        bk.testing.compile_for("v9", power, LANES)


def test_a_named_implementation_never_runs_as_another():
    with pytest.raises(bk.Unsupported, match=r"mosaic_tpu.*testing\.interpret"):
        power(jnp.full(4, 135.0))
    with pytest.raises(bk.Unsupported, match="'triton' is not part of this version"):
        bk.simulate(bk.JansenRit(), 10, 0.1 * u.ms, implementation="triton")
    assert bk.explain(bk.JansenRit(), 10, 0.1 * u.ms).implementation == "scan"
