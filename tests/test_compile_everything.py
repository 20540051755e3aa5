"""For an H200 that is not here: every model, scheme, precision and statistic, with noise and with a gradient.

A few of all that run each time; the rest is slow.
"""

import brainunit as u
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from test_refusals import Gaussian

import brainmass_kernels as bk
from brainmass_kernels.schemes import SCHEMES

pytestmark = needs.gpu_compiler
# The kernel of this chip has no delays inside a mass.
MODELS = {entry.name: entry.model for entry in bk.list_models() if not entry.model.delayed}
JANSEN_RIT = [s for s, scheme in SCHEMES.items() if not scheme.needs or getattr(bk.JansenRit, scheme.needs, ())]
STATISTICS = {
    "mean": (bk.Mean(), bk.Variance()), "extremes": (bk.Minimum(), bk.Maximum()), "average": bk.Average(10 * u.ms),
    "spectrum": bk.Spectrum(np.arange(2.0, 40.0, 4.0) * u.Hz), "crossings": bk.Crossings(1.0 * u.mV),
}  # fmt: skip


def kernels(model, gradient=True, steps=400, **options) -> list[str]:
    """The kernels of a loss of all that is recorded, and of its gradient by the first parameter of each lane."""
    first, unit = next(iter(model.parameter_units().items()))
    default = u.get_mantissa(model.parameters()[first])
    name = next(iter(model.inputs), None)
    if options.pop("noisy", True) and name:
        intensity = 0.1 * u.get_unit(model.inputs[name]) * u.get_unit(1.0 * model.time_unit) ** 0.5
        options |= {"noise": {name: intensity}, "key": jax.random.key(0)}

    def loss(scale):
        changed = {first: scale * default * unit if unit is not None else scale * default}
        result = bk.simulate(
            model(**changed), steps, 0.1 * u.ms, every=4, implementation="mosaic_gpu", **options
        )  # fmt: skip
        return sum(jnp.sum(u.get_magnitude(x) ** 2) for x in result.records.values())

    shape = jax.ShapeDtypeStruct((256,), jnp.float32)
    compiled = bk.testing.compile_for("h200", jax.grad(loss) if gradient else loss, shape)
    assert compiled.cost["registers"] <= 255
    # Mosaic's shared memory is of no bytes to LLVM, which then reads it before it was written.
    assert compiled.cost["shared_bytes"] == 0
    return sorted(compiled.kernels)


BOTH = ["brainmass_kernels_gpu_adjoint", "brainmass_kernels_gpu_forward"]


def test_noise_and_derivatives_in_the_step_compile():
    """Under the mesh that stands for the chip, what is traced must not hold one."""
    assert kernels(bk.JansenRit, scheme="exp_euler", record=["eeg", bk.Mean()]) == BOTH


def test_the_error_function_and_its_derivative_compile():
    assert kernels(Gaussian, scheme="heun") == BOTH


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("scheme", JANSEN_RIT)
def test_every_scheme(scheme, precision):
    assert kernels(bk.JansenRit, scheme=scheme, precision=precision) == BOTH


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model(name):
    model = MODELS[name]
    assert kernels(model, record=tuple(model.recordable())) == BOTH


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_by_exponential_euler(name):
    assert kernels(MODELS[name], scheme="exp_euler", precision="fast", noisy=False) == BOTH


@pytest.mark.slow
@pytest.mark.parametrize("name", STATISTICS)
def test_every_statistic(name):
    what = STATISTICS[name]
    record = list(what) if isinstance(what, tuple) else [what]
    gradient = name not in ("crossings",)
    assert BOTH[-1] in kernels(bk.JansenRit, gradient=gradient, steps=2000, record=record)
