"""tvboptim: its own Jansen-Rit and Euler; masses are its uncoupled nodes, networks a batch by vmap."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from tvboptim.experimental import network_dynamics as nd
from tvboptim.experimental.network_dynamics.coupling import DelayedLinearCoupling
from tvboptim.experimental.network_dynamics.dynamics.tvb import JansenRit
from tvboptim.experimental.network_dynamics.graph import SparseDelayGraph
from tvboptim.experimental.network_dynamics.noise import AdditiveNoise
from tvboptim.experimental.network_dynamics.solvers import Euler

from . import jaxed
from . import work as w
from .work import DRIVE, EVERY, ONE, SHARED, Work

HOW = "prepare(JansenRit, Euler) in jax.jit; block_size and reduce where faster; SparseDelayGraph, 'circular'"
PACKAGES = ("jax", "jaxlib", "tvboptim")
SCHEMES = dict.fromkeys(("forward", "gradient", "noise", "network", "fit"), "euler")
REFUSED: dict[str, str] = {}
begin = jaxed.begin
STEP = w.DT * 1e3  # ms, as all of its times; rates are in kHz


def settings(work: Work) -> list[str]:
    blocks = sorted({block(work, most) for most in (50, 100)})
    bases = [f"blocks of {n}, folded" for n in blocks]
    if work.case in ("gradient", "fit"):
        bases += [f"blocks of {n}" for n in blocks]
    elif work.case != "network":
        bases += ["all steps kept"]
    return jaxed.both_ways(bases, work)


def block(work: Work, most: int) -> int:
    """The largest number of steps up to ``most`` that divides a run, in whole records."""
    return EVERY * max(n for n in range(1, most // EVERY + 1) if work.records % n == 0)


def prepared(work: Work, setting: str):
    first = setting.split(",")[0].split()
    size = int(first[2]) if first[0] == "blocks" else None
    make = functools.partial(_network if work.case == "network" else _masses, work, size, "folded" in setting)
    return jaxed.compiled(make(), work, setting)


def eeg(states):
    """Of every 10th step, of the two states that are kept: ``(records, nodes)``."""
    return (states[:, 0] - states[:, 1])[EVERY - 1 :: EVERY]


def folding(work: Work):
    """What it makes of each block, in place of keeping every step: the records."""

    def none(template, steps):
        return jnp.zeros((work.records, template.shape[-1]), template.dtype), 0

    def more(so_far, block):
        records, at = so_far
        return lax.dynamic_update_slice(records, eeg(block), (at, 0)), at + block.shape[0] // EVERY

    return none, more, lambda so_far: so_far[0]


def model():
    shared = {"B": SHARED["Ai"], "b": SHARED["bi"] * 1e-3, "v0": SHARED["v0"], "nu_max": SHARED["s_max"] * 0.5e-3}
    return JansenRit(mu=DRIVE * 1e-3, VARIABLES_OF_INTEREST=("y1", "y2"), **shared)


def _masses(work: Work, size: int | None, folds: bool):
    def records(Ae, be, C, seed=None):
        a, noise = be * 1e-3, None
        if seed is not None:
            sigma = (Ae * a)[None] * (w.NOISE * 1e-3 * math.sqrt(1e3))
            noise = AdditiveNoise(apply_to="y4", sigma=sigma, key=jax.random.key(seed[0]))
        solve, config = nd.prepare(
            model(), Euler(block_size=size), t0=0.0, t1=work.steps * STEP, dt=STEP, n_nodes=C.shape[0], noise=noise,
            reduce=folding(work) if folds else None,
        )  # fmt: skip
        config.dynamics.A, config.dynamics.a, config.dynamics.J = Ae, a, C
        config.initial_state = jax.tree.map(jnp.zeros_like, config.initial_state)
        return solve(config) if folds else eeg(solve(config).ys)

    return records


def _network(work: Work, size: int | None, folds: bool):
    weights, delays = w.connectome(work)
    coupling = DelayedLinearCoupling(incoming_states="y1", G=0.0, buffer_strategy="circular")
    dynamics = model()
    for name, value in {"A": ONE["Ae"], "a": ONE["be"] * 1e-3, "J": ONE["C"]}.items():
        dynamics.params[name] = value
    graph = SparseDelayGraph(jnp.float32(weights), jnp.float32(delays * STEP))
    network = nd.Network(dynamics, {"delayed": coupling}, graph)
    solve, config = nd.prepare(
        network, Euler(block_size=size), t0=0.0, t1=work.steps * STEP, dt=STEP, reduce=folding(work) if folds else None
    )
    zero = jax.tree.map(jnp.zeros_like, config.initial_state)

    def one(strength):
        other = jax.tree.map(lambda x: x, config)
        other.coupling.delayed.G = strength * 1e-3
        other.initial_state = zero
        return solve(other) if folds else eeg(solve(other).ys)

    return jax.vmap(one, out_axes=1)
