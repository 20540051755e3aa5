"""What every model of the library keeps, on every implementation; a new model is found by itself."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels import dispatch, units
from brainmass_kernels.backends.base import Loop, Request
from brainmass_kernels.backends.mosaic_gpu import SUPPORTED
from brainmass_kernels.backends.mosaic_tpu.optable import LACKING
from brainmass_kernels.pointwise import ELEMENTWISE, RULES, pullback
from brainmass_kernels.schedule import Schedule
from brainmass_kernels.schemes import SCHEMES
from brainmass_kernels.step import StepSpec, build

MODELS = {entry.name: entry.model for entry in bk.list_models()}
LANES, EVERY = 3, 25


class Run(NamedTuple):
    """How float32 is held against float64: a step in ms, how many, inputs beyond the default, and the largest error.

    A drive keeps a model from decaying towards zero, where a relative error means nothing. The contract is 1e-5 for the
    states, and ten times that for the gradient.
    """

    dt: float = 0.1
    steps: int = 1000
    drive: Mapping[str, float] = MappingProxyType({})
    error: float = 1e-5


RUNS = {
    # At rest, after 20 ms, the time constants no longer matter.
    **{n: Run(steps=200, drive={"rE_inp": 1.2}) for n in MODELS if n.startswith("WilsonCowan")},
    "CanonicalMicrocircuit": Run(drive={"ss_inp": 300.0}),
    # The cortical drive is a small difference of large ones.
    "Robinson": Run(error=1e-4),
    # Spikes and chaos multiply a rounding error.
    "Epileptor": Run(error=1e-4),
    "LarterBreakspear": Run(steps=500),
    "Lorenz": Run(dt=0.01, steps=200),
}
# Those without delays inside a mass, whose tests are their own: one step is not all of them.
ALONE = {name: cls for name, cls in MODELS.items() if not cls.delayed}
# The first model of each file is tested in full each time, the others when slow tests are.
FIRST = {cls.__module__: name for name, cls in sorted(MODELS.items(), reverse=True)}
SECOND = MODELS.keys() - FIRST.values()
# Rewriting and compiling these takes ten seconds each.
LARGE = {"CanonicalMicrocircuit", "DavidFriston", "Epileptor", "LarterBreakspear", "Wendling"}
# On numba, one of each kind of equations each time.
COMPILED = {"JansenRit", "HORN", "WilsonCowan", "Hopf"}
IMPLEMENTATIONS = [n for n in ("scan", "numba") if dispatch.load(n).unavailable("cpu") is None]


each = pytest.mark.parametrize("name", sorted(MODELS))


def drawn(name: str) -> dict:
    """Parameters, inputs and initial states around the defaults, different in each lane, as float32 holds them."""
    cls, rng = MODELS[name], np.random.default_rng(zlib.crc32(name.encode()))

    def near(value):
        size = u.get_mantissa(value) or 0.1
        return np.float32(size * rng.uniform(0.95, 1.05, LANES)).astype(np.float64)

    return {
        "parameters": {n: near(x) for n, x in cls.parameters().items()},
        "inputs": {n: near(x) for n, x in {**cls.inputs, **RUNS.get(name, Run()).drive}.items()},
        "initial": {n: near(cls.initial.get(n, 0.1)) for n in cls.states},
    }


def simulated(name: str, theta, implementation: str):
    cls, run = MODELS[name], RUNS.get(name, Run())
    known = {"parameters": cls.parameter_units(), "initial": cls.states}
    known["inputs"] = {n: units.unit_of(x) for n, x in cls.inputs.items()}
    given = {kind: {n: units.attach(x, known[kind][n]) for n, x in some.items()} for kind, some in theta.items()}
    return bk.simulate(
        cls(**given["parameters"]), run.steps, run.dt * u.ms, inputs=given["inputs"], initial=given["initial"],
        record=tuple(cls.recordable()), every=EVERY, implementation=implementation,
    )  # fmt: skip


def weighed(name: str, records, final):
    """A loss of everything that a run returns, with weights that float32 holds."""
    rng = np.random.default_rng(7)
    total = 0.0
    for x in (*(records[n] for n in sorted(records)), *(final[n] for n in sorted(final))):
        weights = rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        total += jnp.sum(x * jnp.asarray(weights, x.dtype)) / (x.size // LANES)
    return total


def ours(name: str, implementation: str):
    """Records, final states and the gradient of a loss in float32, without units."""

    def loss(theta):
        run = simulated(name, theta, implementation)
        seen, last = ({n: u.get_mantissa(x) for n, x in some.items()} for some in (run.records, run.final))
        return weighed(name, seen, last), (seen, last)

    theta = jax.tree.map(lambda x: np.asarray(x, np.float32), drawn(name))
    gradient, seen = jax.jit(jax.grad(loss, has_aux=True))(theta)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves((gradient, seen)))
    return *seen, gradient


@functools.lru_cache
def oracle(name: str):
    """The same in float64, by a plain scan of the scheme with nothing rewritten, which JAX differentiates itself."""
    cls, run = MODELS[name], RUNS.get(name, Run())
    scheme, h = SCHEMES[cls.scheme], units.strip(run.dt * u.ms, cls.time_unit, "dt")

    def loss(theta):
        p, i = SimpleNamespace(**theta["parameters"]), SimpleNamespace(**theta["inputs"])

        def body(state, _):
            state = scheme.step(cls, state, p, i, h)
            return state, state

        last, seen = jax.lax.scan(body, scheme.enter(cls, theta["initial"], p, h), length=run.steps)
        seen = scheme.exit(cls, {n: x[EVERY - 1 :: EVERY] for n, x in seen.items()}, p, h)
        seen = {**seen, **cls.observe(SimpleNamespace(**seen), p)}
        last = scheme.exit(cls, last, p, h)
        return weighed(name, seen, last), (seen, last)

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        gradient, seen = jax.jit(jax.grad(loss, has_aux=True))(drawn(name))
        return jax.tree.map(np.asarray, (*seen, gradient))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(n, i, marks=[pytest.mark.slow] * (n in SECOND | LARGE or (i == "numba" and n not in COMPILED)))
        for n in sorted(ALONE)
        for i in IMPLEMENTATIONS
    ],
)
def test_float32_agrees_with_float64(name, implementation):
    """The contract: states over the run to 1e-5, gradients in logarithms to 1e-4 (a hundredth of all at least)."""
    error = RUNS.get(name, Run()).error
    seen, last, gradient = ours(name, implementation)
    want_seen, want_last, wanted = oracle(name)
    assert set(seen) == set(want_seen)
    for n, want in want_seen.items():
        size = np.linalg.norm(want)
        assert np.linalg.norm(seen[n] - want) < error * size, n
        if n in want_last:  # which may pass through zero
            assert np.linalg.norm(last[n] - want_last[n]) < error * size / len(want) ** 0.5, n
    got, want = (jax.tree.map(np.multiply, g, drawn(name)) for g in (gradient, wanted))
    least = 1e-2 * np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(want)])
    errors = jax.tree.map(lambda g, w: np.linalg.norm(g - w) / max(np.linalg.norm(w), least), got, want)
    missed = [
        (jax.tree_util.keystr(k), e) for k, e in jax.tree_util.tree_leaves_with_path(errors) if not e < 10 * error
    ]
    assert not missed


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param(n, s, marks=[pytest.mark.slow] * (s == "exp_euler" and n in SECOND | LARGE))
        for n in sorted(ALONE)
        for s in (MODELS[n].scheme, "exp_euler")
    ],
)
def test_every_backend_knows_the_primitives(name, scheme):
    """Of the step and of its adjoint; a program that a chip's backend would refuse is seen here, without the chip."""
    cls = MODELS[name]
    spec = StepSpec(cls, scheme, tuple(cls.inputs), (), (), tuple(cls.recordable()), np.dtype(np.float32))
    step = build(spec)
    loop = Loop(
        step.advance, step.observe, len(step.setup.out_avals), len(cls.states), 0, 0, Schedule(100, 0, 10)
    )  # fmt: skip
    for backend in ("scan", "numba", "mosaic_tpu", "triton"):
        request = Request(loop, 1024, np.dtype(np.float32), backend.removeprefix("mosaic_"))
        assert dispatch.load(backend).unsupported(request) is None
    programs = [step.advance, step.observe]
    programs += [pullback(p, [True] * len(p.in_avals)) for p in programs]
    used = {eqn.primitive.name for p in programs for eqn in p.jaxpr.jaxpr.eqns}
    assert used <= SUPPORTED
    assert not used & (LACKING - RULES.keys())
    assert used <= ELEMENTWISE | RULES.keys()


@each
def test_a_second_of_the_defaults_is_finite(name):
    cls = MODELS[name]
    dt = RUNS.get(name, Run()).dt
    run = bk.simulate(
        cls(), round(1000 / dt), dt * u.ms, every=round(100 / dt), record=tuple(cls.recordable()), implementation="scan"
    )
    assert run.ok
    assert all(np.isfinite(u.get_mantissa(x)).all() for x in run.records.values())


@each
def test_names_units_and_docstring(name):
    cls = MODELS[name]
    assert getattr(bk, name) is cls
    model = cls()
    assert set(cls.initial) <= set(cls.states)
    assert cls.scheme in SCHEMES
    for position, velocity in cls.pairs:
        rate = cls.states[position] / cls.time_unit
        plain = cls.states[velocity].is_unitless and cls.states[position].is_unitless
        assert plain or u.have_same_dim(1.0 * rate, 1.0 * cls.states[velocity]), (position, velocity)
    changed = dataclasses.replace(model, **{next(iter(cls.parameters())): next(iter(cls.parameters().values()))})
    assert isinstance(changed, cls)
    # Every parameter is named in the docstring, or in that of the model that it refers to.
    text = cls.__doc__ + "".join(other.__doc__ for n, other in MODELS.items() if f"`{n}`" in cls.__doc__)
    spans = re.findall(r"``([a-z]+)(\d)`` \.\. ``\1(\d)``", text)
    named = {f"{stem}{k}" for stem, low, high in spans for k in range(int(low), int(high) + 1)}
    assert {*cls.parameters(), *cls.inputs} <= named | set(re.findall(r"\w+", text))


def test_the_table_of_models():
    models = bk.list_models()
    text = str(models)
    lines = text.splitlines()
    assert max(map(len, lines)) < 150
    assert lines[0].split() == ["model", "states", "inputs", "observables", "scheme", "paper"]
    for entry in models:
        (line,) = [line for line in lines if line.split()[0] == entry.name]
        assert entry.scheme in line
        assert re.search(r"\d{4}", entry.paper), entry
        assert entry.paper in line
    assert [entry.name for entry in models] == sorted(MODELS, key=str.lower)
    jansen_rit = next(entry for entry in models if entry.name == "JansenRit")
    assert jansen_rit.states == ("M", "E", "I", "Mv", "Ev", "Iv")
    assert jansen_rit.paper == "Jansen and Rit 1995"
