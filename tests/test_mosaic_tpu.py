"""The TPU backend, in Pallas's interpreter against float64 scans, and compiled for chips that are not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from brainmass_kernels.backends import mosaic_tpu
from brainmass_kernels.backends.base import Loop, Pullbacks, Request, Schedule, Wanted
from brainmass_kernels.backends.mosaic_tpu import MosaicTPU, cut_time
from brainmass_kernels.noise import lane_seeds, normals
from brainmass_kernels.pointwise import Program, pullback
from brainmass_kernels.testing import TPU_TOPOLOGIES

BACKEND = MosaicTPU()


def advance(coefs, state, inputs, draws):
    """A driven nonlinear oscillator; with no inputs it is autonomous, with no draws noiseless."""
    (damping, gain), (x, v) = coefs, state
    push = inputs[0] * x + inputs[1] if inputs else 0.3
    kick = 0.05 * damping * draws[0] if draws else 0.0
    v = v + 0.1 * (gain * jnp.tanh(2.0 * x + push) - damping * v - x) + kick
    return x + 0.1 * v, v


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
    longest: int = mosaic_tpu.LONGEST

    @property
    def schedule(self):
        return Schedule(self.steps, self.lead, self.every)


def make_loop(case: Case, interpret: bool = True) -> Loop:
    n_inputs, n_normals = 2 * case.driven, int(case.noisy)
    avals = [jax.ShapeDtypeStruct((), "float32")] * (4 + n_inputs + n_normals)
    step = Program(lambda *a: advance(a[:2], a[2:4], a[4 : 4 + n_inputs], a[4 + n_inputs :]), avals)
    seen = Program(lambda *a: observe(a[:2], a[2:]), avals[:4], "observer")
    return Loop(step, seen, 2, 2, n_inputs, n_normals, case.schedule, interpret=interpret)


def make_data(case: Case):
    """A uniform and a per-lane coefficient, a uniform and a per-lane input."""
    rng = np.random.default_rng(case.steps)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    coefs = jnp.float32(0.7), draw(case.lanes)
    state = draw(case.lanes), draw(case.lanes)
    inputs = (draw(case.steps), draw(case.steps, case.lanes)) if case.driven else ()
    seeds = lane_seeds(jax.random.key(1), (case.lanes,)) if case.noisy else None
    count = case.schedule.count
    cts = (draw(count, case.lanes), draw(count, case.lanes)), (draw(case.lanes), draw(case.lanes))
    return coefs, state, inputs, seeds, cts


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
    "1000 lanes, one chunk": Case(14, 5, 3, 1000, 40),
    "two blocks": Case(9, 0, 2, 5000, 4, driven=False),
    "strides of several chunks": Case(29, 3, 11, 5, 4, longest=5),
}


def assert_close(got, want, rtol):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.max(np.abs(b), initial=0.1))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_and_adjoint_agree_with_a_float64_scan(case, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "LONGEST", case.longest)
    loop = make_loop(case)
    coefs, state, inputs, seeds, (ct_records, ct_final) = make_data(case)
    wanted = Wanted((True, True), (True,) * loop.n_inputs)
    flags = (*wanted.coefs, True, True)
    pullbacks = Pullbacks(
        pullback(loop.advance, (*flags, *wanted.inputs, *[False] * loop.n_normals)), pullback(loop.observe, flags)
    )

    @jax.jit
    def run(coefs, state, inputs, seeds, ct_records, ct_final):
        every = case.checkpoint_every
        kept = BACKEND.forward(loop, coefs, state, inputs, seeds, every)
        return kept, BACKEND.adjoint(
            loop, pullbacks, wanted, coefs, kept.saved, inputs, seeds, ct_records, ct_final, every
        )

    kept, back = run(coefs, state, inputs, seeds, ct_records, ct_final)
    draws = [normals(seeds, i, 1) for i in range(case.steps)] if case.noisy else []
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (coefs, state, inputs))
        draws = (jnp.asarray(np.asarray(draws)[:, 0], jnp.float64),) if draws else ()
        want, pull = jax.vjp(lambda *args: reference(case, *args, draws), *wide)
        ct_coefs, ct_state, ct_inputs = pull(
            jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (ct_records, ct_final))
        )
    assert_close((*kept.records, *kept.final), (*want[0], *want[1]), 2e-6)
    total = np.sum(np.asarray(back.coefs[0]), dtype=np.float64)
    assert_close((total, back.coefs[1], *back.state), (*ct_coefs, *ct_state), 2e-5)
    if inputs:
        assert_close((np.sum(np.asarray(back.inputs[0]), axis=1), back.inputs[1]), ct_inputs, 1e-5)


def test_checkpoints_change_no_number():
    case = CASES["127 lanes, long strides"]
    coefs, state, inputs, seeds, _ = make_data(case)
    plain = BACKEND.forward(make_loop(case), coefs, state, inputs, seeds)
    kept = BACKEND.forward(make_loop(case), coefs, state, inputs, seeds, case.checkpoint_every)
    assert plain.saved is None
    for a, b in zip((*plain.records, *plain.final), (*kept.records, *kept.final), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_wanted_cotangents_are_returned():
    case = Case(5, 0, 1, 2, 2)
    loop, (coefs, state, inputs, seeds, (ct_records, ct_final)) = make_loop(case), make_data(case)
    wanted = Wanted((False, False), (False, True))
    pullbacks = Pullbacks(
        pullback(loop.advance, (False, False, True, True, False, True)),
        pullback(loop.observe, (False, False, True, True)),
    )
    kept = BACKEND.forward(loop, coefs, state, inputs, seeds, 2)
    back = BACKEND.adjoint(loop, pullbacks, wanted, coefs, kept.saved, inputs, seeds, ct_records, ct_final, 2)
    assert (len(back.coefs), len(back.state), len(back.inputs)) == (0, 2, 1)
    assert back.inputs[0].shape == (5, 2)


# Time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unroll", [2, 20])
@pytest.mark.parametrize("wish", [None, 1, 4, 7, 50])
@pytest.mark.parametrize("most", [1, 3, 8, 64])
@pytest.mark.parametrize("schedule", [
    Schedule(*s) for s in
    [(1, 0, 1), (7, 0, 9), (23, 3, 2), (31, 5, 3), (50, 4, 20), (40, 0, 7), (60, 11, 17), (9, 12, 1), (12, 12, 5)]
])  # fmt: skip
def test_chunks_take_every_step_once_and_meet_the_records(schedule, most, wish, unroll):
    cut = cut_time(schedule, most, wish, unroll)
    steps = np.asarray(cut.spread(jnp.arange(schedule.steps)))
    assert steps.shape == (cut.chunks * cut.size,)
    np.testing.assert_array_equal(cut.gather(jnp.asarray(steps)), np.arange(schedule.steps))
    taken, records = [], {}
    for chunk in range(cut.chunks):
        start, first, last = (int(x) for x in cut.bounds(jnp.int32(chunk)))
        assert 0 <= first <= last <= cut.size
        np.testing.assert_array_equal(steps[chunk * cut.size :][first:last], start + np.arange(first, last))
        taken += range(start + first, start + last)
        if cut.records(jnp.int32(chunk)) and schedule.count:
            block = int(cut.record_block(jnp.int32(chunk)))
            for k in range(cut.strides):
                records[block * cut.strides + k] = start + (k + 1) * cut.stride
    assert taken == list(range(schedule.steps))
    for k in range(schedule.count):
        assert records[k] == schedule.lead + (k + 1) * schedule.every


# Requests -----------------------------------------------------------------------------------------------------------


def request(platform="cpu", dtype="float32", interpret=False, step=None):
    loop = make_loop(Case(5, 0, 1, 2, 2, driven=False), interpret)
    if step:
        avals = [jax.ShapeDtypeStruct((), "float32")] * 4
        loop = Loop(Program(step, avals), loop.observe, 2, 2, 0, 0, loop.schedule, interpret=interpret)
    return Request(loop, 2, jnp.dtype(dtype), platform)


def test_a_tpu_or_the_interpreter_is_supported():
    assert BACKEND.unsupported(request("tpu")) is None
    assert BACKEND.unsupported(request("cpu", interpret=True)) is None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (request("cpu"), "testing.interpret"),
        (request("tpu", "float64"), "float64"),
        (request("tpu", step=lambda a, b, x, v: (jnp.arctan(x), v)), "'atan'"),
    ],
)
def test_the_reason_is_named(asked, reason):
    assert reason in BACKEND.unsupported(asked)


# jax 0.11 has reduce_precision, 0.10 has not.
@pytest.mark.parametrize("name", sorted(mosaic_tpu.LACKING - {"reduce_precision"}))
def test_mosaic_lacks(name):
    def step(_, __, x, v):
        return getattr(lax, name)(x), v

    loop, coefs = request("tpu", step=step).loop, (jnp.float32(1.0), jnp.float32(1.0))
    traced = jax.jit(lambda *state: BACKEND.forward(loop, coefs, state, (), None).final).trace(jnp.ones(3), jnp.ones(3))
    with pytest.raises(NotImplementedError, match=name):
        traced.lower(lowering_platforms=("tpu",))


# Compiled -----------------------------------------------------------------------------------------------------------

COMPILE = """
import sys
sys.path.insert(0, {tests!r})
import test_mosaic_tpu
test_mosaic_tpu.compile_all({chip!r})
"""


def compile_all(chip: str) -> None:
    """Compile the forward and the adjoint kernel with every kind of argument; runs in a process of its own."""
    from brainmass_kernels.testing import compile_for

    case = Case(1000, 95, 10, 2500, 30, noisy=True)
    loop = make_loop(case, interpret=False)
    wanted = Wanted((True, True), (True, True))
    flags = (True,) * 4
    pullbacks = Pullbacks(pullback(loop.advance, (*flags, True, True, False)), pullback(loop.observe, flags))

    def gradient(coefs, state, inputs, seeds, ct_records, ct_final):
        kept = BACKEND.forward(loop, coefs, state, inputs, seeds, 30)
        return BACKEND.adjoint(loop, pullbacks, wanted, coefs, kept.saved, inputs, seeds, ct_records, ct_final, 30)

    coefs, state, inputs, seeds, cts = make_data(case)
    text = compile_for(chip, gradient, coefs, state, inputs, seeds, *cts).executable.as_text()
    for kernel in ("brainmass_kernels_tpu_forward", "brainmass_kernels_tpu_adjoint"):
        assert kernel in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chip", TPU_TOPOLOGIES)
def test_both_kernels_compile_for(chip):
    from benchmarks.ledger import TOGETHER, libtpu_lock

    here = Path(__file__).parent
    with libtpu_lock():
        done = subprocess.run(
            [sys.executable, "-c", COMPILE.format(tests=str(here), chip=chip)], cwd=here.parent, text=True,
            capture_output=True, env={**os.environ, "JAX_PLATFORMS": "cpu", **TOGETHER}, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
