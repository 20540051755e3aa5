"""docs/models.md: its table is that of the library, its code runs, and its model gets everything a model gets."""

import pathlib
import re

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brainmass_kernels as bk
from brainmass_kernels import spectra

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "models.md").read_text()
NOISE = {"drive": 5.0 * u.Hz * u.second**0.5}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def test_the_table_is_that_of_the_library():
    (table,) = blocks("text")
    assert table == f"{bk.list_models()}\n"


@pytest.fixture(scope="module")
def Feedback():
    """The model of the page, made in a namespace of its own."""
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "docs/models.md", "exec"), namespace)
    assert namespace["result"]["eeg"].shape == (200, 3)
    source = next(block for block in blocks("python") if "class Feedback" in block)
    lines = [line for line in source[source.index("@bk.model") :].splitlines() if line.strip()]
    assert len(lines) <= 20
    return namespace["Feedback"]


def power(weight, Feedback, implementation):
    model = Feedback(weight=weight, b=jnp.asarray([40.0, 50.0, 60.0], weight.dtype) * u.Hz)
    arguments = {"inputs": {"drive": 210.0 * u.Hz}, "every": 4, "implementation": implementation}
    return jnp.mean((bk.simulate(model, 40, 0.5 * u.ms, **arguments)["eeg"] / u.mV) ** 2)


@pytest.mark.parametrize("implementation", ["scan", "numba", pytest.param("mosaic_tpu", marks=pytest.mark.slow)])
def test_every_implementation_and_its_gradient(Feedback, implementation):
    both = jax.value_and_grad(power)
    with jax.enable_x64(True):
        want = jax.jit(lambda weight: both(weight, Feedback, "scan"))(jnp.float64(35.0))
    with bk.testing.interpret():
        got = jax.jit(lambda weight: both(weight, Feedback, implementation))(jnp.float32(35.0))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_vmap_units_and_errors(Feedback):
    each = jax.vmap(lambda weight: bk.simulate(Feedback(weight=weight), 20, 0.5 * u.ms)["eeg"])
    weights = jnp.array([20.0, 40.0])
    np.testing.assert_allclose(
        each(weights).mantissa.T, bk.simulate(Feedback(weight=weights), 20, 0.5 * u.ms)["eeg"] / u.mV, rtol=1e-6
    )
    with pytest.raises(ValueError, match="'b' got mV, but takes Hz"):
        Feedback(b=50.0 * u.mV)
    with pytest.raises(TypeError, match="unknown parameter 'wait'; did you mean 'weight'"):
        Feedback(wait=3.0)
    with pytest.raises(ValueError, match="unknown input 'drives'; did you mean 'drive'"):
        bk.simulate(Feedback(), 20, 0.5 * u.ms, inputs={"drives": 200 * u.Hz})


@pytest.mark.slow
def test_a_fit_finds_the_rate_again(Feedback):
    lanes = Feedback(b=np.full(16, 65.0, np.float32) * u.Hz)
    record = bk.simulate(
        lanes, 5 * u.second, 1 * u.ms, noise=NOISE, key=jax.random.key(3), every=5, transient=1 * u.second
    )["eeg"]
    freqs, density = spectra.welch(record, 5 * u.ms, 400)
    target = spectra.Spectrum(freqs[1:], np.asarray(u.get_mantissa(density)).mean(-1)[1:], "simulated")
    fit = bk.fit(
        Feedback(), target, {"b": (30.0, 90.0)}, noise=NOISE, starts={"b": [50.0]}, steps=15, duration=4 * u.second,
        dt=1 * u.ms, every=5, realisations=4, background=False, record="eeg", optimiser=optax.adam(0.2),
    )  # fmt: skip
    assert fit.parameters["b"].to_decimal(u.Hz)[0] == pytest.approx(65.0, rel=0.05)
