"""Through the public interface, compiled for a TPU that is not there: how many kernels, and no step outside them."""

import functools

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import pytest

import brainmass_kernels as bk
from benchmarks.ledger import libtpu_lock

LANES = jax.ShapeDtypeStruct((256,), jnp.float32)


def power(C, implementation="mosaic_tpu", precision="exact"):
    model = bk.JansenRit(C=C)
    noise = {"E_inp": 2.0 * u.Hz * u.second**0.5}
    result = bk.simulate(
        model, 1000, 0.5 * u.ms, inputs={"E_inp": 220.0 * u.Hz}, noise=noise, key=jax.random.key(0), every=10,
        implementation=implementation, precision=precision,
    )  # fmt: skip
    return jnp.mean((result["eeg"] / u.mV) ** 2, axis=0)


def kernels(fn, *shapes) -> int:
    """How many Pallas kernels the program compiled for v5e calls."""
    with libtpu_lock():
        compiled = bk.testing.compile_for("v5e", fn, *shapes)
    assert compiled.chip == "v5e"
    assert compiled.cost["output_bytes"] > 0
    return compiled.executable.as_text().count("tpu_custom_call")


@needs.libtpu
def test_a_simulation_is_one_kernel():
    assert kernels(power, LANES) == 1


@needs.libtpu
def test_vmap_folds_into_the_same_kernel():
    assert kernels(jax.vmap(jax.vmap(power)), jax.ShapeDtypeStruct((2, 3, 64), jnp.float32)) == 1


@needs.libtpu
def test_a_gradient_is_a_forward_and_an_adjoint_kernel():
    assert kernels(jax.grad(lambda C: power(C).sum()), LANES) == 2
    assert kernels(jax.vmap(jax.grad(lambda C: power(C).sum())), jax.ShapeDtypeStruct((3, 64), jnp.float32)) == 2


@needs.gpu_compiler
def test_a_simulation_on_a_gpu_is_one_kernel_without_spills():
    compiled = bk.testing.compile_for("h200", functools.partial(power, implementation="mosaic_gpu"), LANES)
    assert list(compiled.kernels) == ["brainmass_kernels_gpu_forward"]
    assert compiled.cost["spill_bytes"] == 0
    assert 20 < compiled.cost["registers"] <= 255
    assert compiled.executable.as_text().count('custom_call_target="mosaic_gpu') == 1


@needs.gpu_compiler
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_gradient_on_a_gpu_is_two_kernels_without_spills(precision):
    fun = functools.partial(power, implementation="mosaic_gpu", precision=precision)
    compiled = bk.testing.compile_for("h200", jax.grad(lambda C: fun(C).sum()), LANES)
    assert sorted(compiled.kernels) == ["brainmass_kernels_gpu_adjoint", "brainmass_kernels_gpu_forward"]
    assert compiled.cost["spill_bytes"] == 0
    fast = sum(loop.instructions["MUFU.TANH"] for k in compiled.kernels.values() for loop in k.loops)
    assert (fast > 0) == (precision == "fast")


@needs.gpu_compiler
def test_one_gpu_a_process():
    bk.testing.compile_for("h200", functools.partial(power, implementation="mosaic_gpu"), LANES)
    with pytest.raises(bk.Unsupported, match="in another"):
        bk.testing.compile_for("b200", functools.partial(power, implementation="mosaic_gpu"), LANES)


def test_an_unknown_chip_is_named():
    with pytest.raises(ValueError, match="'chip' got 'v9', but takes one of v4"):
        bk.testing.compile_for("v9", power, LANES)


def test_a_named_implementation_never_runs_as_another():
    with pytest.raises(bk.Unsupported, match=r"mosaic_tpu.*testing\.interpret"):
        power(jnp.full(4, 135.0))
    with pytest.raises(ValueError, match="implementation got 'cuda', but takes None or one of mosaic_tpu"):
        bk.simulate(bk.JansenRit(), 10, 0.1 * u.ms, implementation="cuda")
    assert bk.explain(bk.JansenRit(), 10, 0.1 * u.ms).implementation == "scan"
