"""A `lax.scan` written by hand, as a careful user of JAX would: records alone are stored, gradients checkpointed."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import reference

from . import jaxed
from . import work as w
from .work import DRIVE, EVERY, ONE, Work

HOW = "nested lax.scan in jax.jit, jax.checkpoint around segments in gradients; jax.random in the loop"
PACKAGES = ("jax", "jaxlib")
SCHEMES = dict.fromkeys(("forward", "gradient", "noise", "network", "fit"), "exp_euler")
REFUSED: dict[str, str] = {}
begin = jaxed.begin


def settings(work: Work) -> list[str]:
    bases = {
        "forward": ["steps in a loop", "steps unrolled", "steps in a loop, one array"],
        "noise": ["threefry", "rbg"],
        "network": ["gather of connections"],
    }
    segments = [f"segments of {n}" for n in segment_lengths(work)]
    segments += [f"{segments[-1]}, one array"]
    return jaxed.both_ways(bases.get(work.case, ["nothing computed again", *segments]), work)


def segment_lengths(work: Work) -> list[int]:
    """About the root of the steps, and a half of it, which divide a run."""
    root = max(1, math.isqrt(work.steps) // EVERY)
    of_records = {max(d for d in range(1, most + 1) if work.records % d == 0) for most in (root, max(1, root // 2))}
    return [EVERY * n for n in sorted(of_records)]


def prepared(work: Work, setting: str):
    if work.case == "network":
        return jaxed.compiled(network(work), work, setting)
    return jaxed.compiled(noisy(work, setting) if work.case == "noise" else quiet(work, setting), work, setting)


def quiet(work: Work, setting: str):
    """With "one array" the six states are one, which XLA computes in one loop."""
    unroll = EVERY if "unrolled" in setting else 1
    strides = int(setting.split()[2].strip(",")) // EVERY if setting.startswith("segments") else None
    stacked = jnp.stack if "one array" in setting else tuple

    def records(Ae, be, C):
        def step(state, _):
            return stacked(reference.step(tuple(state), Ae, be, C, DRIVE)), None

        def stride(state, _):
            state, _ = lax.scan(step, state, length=EVERY, unroll=unroll)
            return state, state[1] - state[2]

        start = stacked(reference.start(C.shape[0]))
        if strides is None:
            return lax.scan(stride, start, length=work.records)[1]

        @jax.checkpoint
        def segment(state, _):
            return lax.scan(stride, state, length=strides)

        return lax.scan(segment, start, length=work.records // strides)[1].reshape(work.records, -1)

    return records


def noisy(work: Work, setting: str):
    implementation = {"threefry": "threefry2x32", "rbg": "rbg"}[setting.split(",")[0]]
    width = w.NOISE / math.sqrt(w.DT)

    def records(Ae, be, C, seed):
        key = jax.random.key(seed[0], impl=implementation)

        def stride(state, n):
            drawn = jax.random.normal(jax.random.fold_in(key, n), (EVERY, C.shape[0]))

            def step(state, z):
                return reference.step(state, Ae, be, C, DRIVE + width * z), None

            state, _ = lax.scan(step, state, drawn)
            return state, state[1] - state[2]

        return lax.scan(stride, reference.start(C.shape[0]), jnp.arange(work.records))[1]

    return records


def network(work: Work):
    """A ring of what regions sent, and the sum over each region's connections, in order of regions."""
    weights, delays = w.connectome(work)
    into, source = map(jnp.asarray, np.nonzero(weights))
    late, strength = jnp.asarray(delays)[into, source], jnp.asarray(weights)[into, source]
    depth, regions = int(delays.max()), len(weights)

    def records(k):
        def one(carry, t):
            state, ring = carry
            sent = strength[:, None] * ring[(t - late) % depth, source]
            total = jax.ops.segment_sum(sent, into, regions, indices_are_sorted=True)
            ring = lax.dynamic_update_index_in_dim(ring, state[1], t % depth, 0)
            return (reference.step(state, ONE["Ae"], ONE["be"], ONE["C"], DRIVE + k * total), ring), None

        def stride(carry, t):
            carry, _ = lax.scan(one, carry, t + jnp.arange(EVERY))
            return carry, carry[0][1] - carry[0][2]

        rest = jnp.zeros((regions, k.shape[0]), jnp.float32)
        start = (rest,) * 6, jnp.zeros((depth, *rest.shape), jnp.float32)
        return lax.scan(stride, start, jnp.arange(0, work.steps, EVERY))[1].transpose(0, 2, 1)

    return records
