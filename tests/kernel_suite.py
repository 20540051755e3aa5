"""Kernels called directly, through the protocol: the suite of every backend that is not plain jnp.

The step is a small nonlinear oscillator that needs every kind of argument; the reference is a float64 scan of the same
lines, and its gradient JAX's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import brainmass_kernels as bk
from brainmass_kernels.assembly import Kernel
from brainmass_kernels.backends.base import Backend, Carry, Cotangents, Loop, Operands, Pullbacks, Wanted
from brainmass_kernels.noise import StepNumber, lane_seeds, normals, numbered
from brainmass_kernels.pointwise import Program, pullback, pullback_after
from brainmass_kernels.schedule import Schedule


def advance(coefs, state, inputs, draws):
    """A driven nonlinear oscillator; with no inputs it is autonomous, with no draws noiseless."""
    (damping, gain), (x, v) = coefs, state
    push = inputs[0] * x + inputs[1] if inputs else 0.3
    kick = 0.05 * damping * draws[0] if draws else 0.0
    v = v + 0.1 * (gain * jnp.tanh(2.0 * x + push) - damping * v - x) + kick
    return x + 0.1 * v, v


def inverse(coefs, state, inputs, draws):
    """The state before a step of `advance` from that after it."""
    (damping, gain), (x, v) = coefs, state
    x = x - 0.1 * v
    push = inputs[0] * x + inputs[1] if inputs else 0.3
    kick = 0.05 * damping * draws[0] if draws else 0.0
    return x, (v - kick - 0.1 * (gain * jnp.tanh(2.0 * x + push) - x)) / (1.0 - 0.1 * damping)


def observe(coefs, state):
    return state[0] * coefs[0] - jnp.sin(state[1]), state[1]


class Case(NamedTuple):
    steps: int
    lead: int
    every: int
    lanes: int
    checkpoint_every: int
    noisy: bool = False
    driven: bool = True
    longest: int | None = None
    first: int | None = None  # the number of the first step, which comes with the seeds; two words if it is large

    @property
    def schedule(self):
        return Schedule(self.steps, self.lead, self.every)


def make_loop(case: Case, interpret: str = "plain", with_inverse: bool = False) -> Loop:
    n_inputs, n_normals = 2 * case.driven, int(case.noisy)
    avals = [jax.ShapeDtypeStruct((), "float32")] * (4 + n_inputs + n_normals)

    def program(move):
        return Program(lambda *a: move(a[:2], a[2:4], a[4 : 4 + n_inputs], a[4 + n_inputs :]), avals)

    step, back = program(advance), program(inverse) if with_inverse else None
    seen = Program(lambda *a: observe(a[:2], a[2:]), avals[:4], "observer")
    return Loop(step, seen, 2, 2, n_inputs, n_normals, case.schedule, interpret=interpret, inverse=back)


def make_data(case: Case):
    """A uniform and a per-lane coefficient, a uniform and a per-lane input."""
    rng = np.random.default_rng(case.steps)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    coefs = jnp.float32(0.7), draw(case.lanes)
    state = draw(case.lanes), draw(case.lanes)
    inputs = (draw(case.steps), draw(case.steps, case.lanes)) if case.driven else ()
    seeds = jax.jit(lane_seeds, static_argnums=1)(jax.random.key(1), (case.lanes,)) if case.noisy else None
    if case.first is not None:
        seeds = numbered(seeds, StepNumber.of(case.first), wide=case.first + case.steps >= 2**31)
    count = case.schedule.count
    cts = (draw(count, case.lanes), draw(count, case.lanes)), (draw(case.lanes), draw(case.lanes))
    return Operands(coefs, inputs, seeds), Carry(state), Cotangents(cts[0], Carry(cts[1]))


def reference(case: Case, coefs, state, inputs, draws):
    """Records and final state by `lax.scan` of every step."""

    def step(state, given):
        state = advance(coefs, state, *given)
        return state, observe(coefs, state)

    final, seen = lax.scan(step, state, (inputs, draws), length=case.steps)
    taken = case.lead + (np.arange(case.schedule.count) + 1) * case.every - 1
    return tuple(x[taken] for x in seen), final


CASES = {
    "one lane, no records": Case(7, 0, 9, 1, 3),
    "transient beyond the end": Case(6, 8, 1, 3, 4, driven=False),
    "127 lanes, long strides": Case(31, 4, 9, 127, 10),
    "129 lanes, noise": Case(7, 1, 2, 129, 4, noisy=True),
    "noise that goes on from an odd step": Case(9, 1, 2, 3, 4, noisy=True, first=7),
    "noise across step 2^31": Case(9, 1, 2, 3, 4, noisy=True, first=2**31 - 4),
    "noise across step 2^32": Case(9, 1, 2, 3, 4, noisy=True, first=2**32 - 5),
    "noise far on": Case(9, 1, 2, 3, 4, noisy=True, first=2**53 - 9),
    "1000 lanes, one chunk": Case(14, 5, 3, 1000, 40),
    "two blocks": Case(9, 0, 2, 5000, 4, driven=False),
    "strides of several chunks": Case(29, 3, 11, 5, 4, longest=5),
    "segments of several chunks": Case(37, 2, 5, 3, 15, noisy=True, longest=3),
    "segments and strides of several chunks": Case(41, 4, 17, 3, 9, longest=4),
}


@functools.lru_cache
def expected(case: Case):
    """Records and final state, and the cotangents of coefficients, initial state and inputs, all in float64."""
    (coefs, inputs, seeds, _), initial, cotangents = make_data(case)
    draws = jax.jit(jax.vmap(lambda n: normals(seeds, n, 1)))(jnp.arange(case.steps)) if case.noisy else ()

    def both(wide, draws, cotangents):
        found, pull = jax.vjp(lambda *args: reference(case, *args, draws), *wide)
        return found, pull(cotangents)

    with jax.enable_x64(True):
        given = (coefs, initial.state, inputs), draws, (cotangents.records, cotangents.final.state)
        return jax.tree.map(np.asarray, jax.jit(both)(*jax.tree.map(lambda x: np.asarray(x, np.float64), given)))


@contextlib.contextmanager
def in_place_of_the_interpreter(monkeypatch, backend: type):
    """Runs of a backend in the context of its interpreter are made as compiled ones, for `ptx_machine` to execute."""
    # Nobody looks at the instructions that ptxas makes.
    monkeypatch.setattr("brainmass_kernels.assembly.assemble", lambda ptx, _: Kernel(0, 0, 0, (), ptx))
    for name in ("forward", "adjoint"):
        method = getattr(backend, name)

        def compiled(self, loop, *args, method=method):
            return method(self, dataclasses.replace(loop, interpret=""), *args)

        monkeypatch.setattr(backend, name, compiled)
    bk.clear_caches()
    with bk.testing.interpret():
        yield
    bk.clear_caches()


# What bounds the steps that a backend takes or keeps at a time, and its value for so many.
SHORTENED = {
    "mosaic_tpu": ("layout.LONGEST", lambda steps: steps),
    "mosaic_gpu": ("KEPT", lambda steps: steps * 3),
    "triton": ("source.KEPT", lambda steps: 2 * steps),
    # The block becomes as narrow as it may.
    "numba": ("layout.REPLAY", lambda steps: steps),
}


def assert_close(got, want, rtol):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.max(np.abs(b), initial=0.1))


class KernelSuite:
    """What a kernel keeps.

    Attributes
    ----------
    backend : Backend
    interpret : as in `Loop`
    contracted : whether a compiler fuses products with sums by what is around them, which the sine of the suite's step
        and its branches part
    """

    backend: Backend
    interpret = ""
    contracted = False

    def shorten(self, monkeypatch, steps: int) -> None:
        """Have the backend take or keep no more steps than these at a time."""
        name, value = SHORTENED[self.backend.name]
        monkeypatch.setattr(f"{type(self.backend).__module__}.{name}", value(steps))

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_forward_and_adjoint_agree_with_a_float64_scan(self, case, monkeypatch):
        if case.longest:
            self.shorten(monkeypatch, case.longest)
        self.check(case, make_loop(case, self.interpret), with_inverse=False)

    @pytest.mark.where(lambda suite: suite.backend.inverse_steps)
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_an_adjoint_may_walk_back_by_inverse_steps(self, case):
        self.check(case, make_loop(case, self.interpret, with_inverse=True), with_inverse=True)

    @pytest.mark.where(lambda suite: suite.backend.inverse_steps)
    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.longest])
    def test_an_adjoint_reruns_a_loop_that_has_an_inverse(self, name):
        self.check(CASES[name], make_loop(CASES[name], self.interpret, with_inverse=True), with_inverse=False)

    def check(self, case: Case, loop: Loop, with_inverse: bool):
        operands, initial, cotangents = make_data(case)
        wanted = Wanted((True, True), (True,) * loop.n_inputs)
        flags = (*wanted.coefs, True, True)
        advance = pullback(loop.advance, (*flags, *wanted.inputs, *[False] * loop.n_normals))
        inverse = pullback_after(loop.inverse, advance, slice(2, 4)) if loop.inverse and with_inverse else None
        pullbacks = Pullbacks(advance, pullback(loop.observe, flags), inverse)

        @jax.jit
        def run(operands, initial, cotangents):
            kept = self.backend.forward(loop, operands, initial, case.checkpoint_every)
            walk = loop, pullbacks, wanted, operands, kept.saved, cotangents, case.checkpoint_every
            return kept, self.backend.adjoint(*walk)

        kept, back = run(operands, initial, cotangents)
        want, (ct_coefs, ct_state, ct_inputs) = expected(case)
        assert_close((*kept.records, *kept.final.state), (*want[0], *want[1]), 2e-6)
        total = np.sum(np.asarray(back.coefs[0]), dtype=np.float64)
        assert_close((total, back.coefs[1], *back.initial.state), (*ct_coefs, *ct_state), 2e-5)
        if case.driven:
            assert_close((np.sum(np.asarray(back.inputs[0]), axis=1), back.inputs[1]), ct_inputs, 1e-5)

    def test_checkpoints_change_no_number(self):
        case = CASES["127 lanes, long strides"]
        operands, initial, _ = make_data(case)
        forward = jax.jit(functools.partial(self.backend.forward, make_loop(case, self.interpret)), static_argnums=2)
        plain, kept = forward(operands, initial), forward(operands, initial, case.checkpoint_every)
        assert plain.saved is None
        for a, b in zip((*plain.records, *plain.final.state), (*kept.records, *kept.final.state), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2.0**-22 if self.contracted else 0.0)

    def test_only_wanted_cotangents_are_returned(self):
        case = Case(5, 0, 1, 2, 2)
        loop, (operands, initial, cotangents) = make_loop(case, self.interpret), make_data(case)
        wanted = Wanted((False, False), (False, True))
        pullbacks = Pullbacks(
            pullback(loop.advance, (False, False, True, True, False, True)),
            pullback(loop.observe, (False, False, True, True)),
        )

        @jax.jit
        def run(operands, initial, cotangents):
            kept = self.backend.forward(loop, operands, initial, 2)
            return self.backend.adjoint(loop, pullbacks, wanted, operands, kept.saved, cotangents, 2)

        back = run(operands, initial, cotangents)
        assert (len(back.coefs), len(back.initial.state), len(back.inputs)) == (0, 2, 1)
        assert back.inputs[0].shape == (5, 2)
