"""vbjax: its own Jansen-Rit; make_ode by Euler, make_sde and make_sdde by Heun, which is the one scheme they have."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import vbjax as vb
from jax import lax

from . import jaxed
from . import work as w
from .work import DRIVE, EVERY, ONE, SHARED, Work

HOW = "make_ode(method='euler'), make_sde and make_sdde (Heun), their loops as they are or their steps in a nested scan"
PACKAGES = ("jax", "jaxlib", "vbjax")
SCHEMES = {"forward": "euler", "gradient": "euler", "noise": "heun", "network": "heun", "fit": "euler"}
REFUSED: dict[str, str] = {}
begin = jaxed.begin
STEP = w.DT * 1e3  # ms, as all of its times; rates are in kHz


def settings(work: Work) -> list[str]:
    bases = {
        "noise": ["its loop", "its step in a scan", "its loop, rbg", "its step in a scan, rbg"],
        "network": ["its loop"],
        "forward": ["its loop", "its step in a scan"],
    }
    return jaxed.both_ways(bases.get(work.case, ["its loop", "its step in checkpointed segments"]), work)


def prepared(work: Work, setting: str):
    make = {"noise": _noisy, "network": _network}.get(work.case, _quiet)
    return jaxed.compiled(make(work, setting), work, setting)


def theta(Ae, be, C):
    return vb.JRTheta(
        A=Ae, B=SHARED["Ai"], a=be * 1e-3, b=SHARED["bi"] * 1e-3, v0=SHARED["v0"], nu_max=SHARED["s_max"] * 0.5e-3,
        r=SHARED["r"], J=C, a_1=SHARED["a1"], a_2=SHARED["a2"], a_3=SHARED["a3"], a_4=SHARED["a4"], mu=DRIVE * 1e-3,
        I=0.0,
    )  # fmt: skip


def dfun(x, p):
    return vb.jr_dfun(x, 0.0, p)


def _recorded(xs):
    """Every 10th step of a loop that returns them all."""
    return (xs[:, 1] - xs[:, 2])[EVERY - 1 :: EVERY]


def _quiet(work: Work, setting: str):
    step, loop = vb.make_ode(STEP, dfun, method="euler")
    each = max(d for d in range(1, math.isqrt(work.steps) // EVERY + 1) if work.records % d == 0)

    def records(Ae, be, C):
        p, start = theta(Ae, be, C), jnp.zeros((6, *C.shape), jnp.float32)
        if "loop" in setting:
            return _recorded(loop(start, jnp.arange(work.steps), p))

        def stride(x, t):
            x, _ = lax.scan(lambda x, t: (step(x, t, p), None), x, length=EVERY)
            return x, x[1] - x[2]

        if "segments" not in setting:
            return lax.scan(stride, start, length=work.records)[1]
        segment = jax.checkpoint(lambda x, t: lax.scan(stride, x, length=each))
        return lax.scan(segment, start, length=work.records // each)[1].reshape(work.records, -1)

    return records


def _noisy(work: Work, setting: str):
    def gfun(x, p):
        """Into the fifth state alone: of one normal number a mass."""
        width = p.A * p.a * (w.NOISE * 1e-3 * math.sqrt(1e3))
        return jnp.zeros_like(x).at[4].set(width)

    step, loop = vb.make_sde(STEP, dfun, gfun)
    implementation = "rbg" if "rbg" in setting else "threefry2x32"

    def records(Ae, be, C, seed):
        p, start = theta(Ae, be, C), jnp.zeros((6, *C.shape), jnp.float32)
        key = jax.random.key(seed[0], impl=implementation)
        if "loop" in setting:
            return _recorded(loop(start, vb.randn(work.steps, *C.shape, key=key), p))

        def stride(x, n):
            drawn = vb.randn(EVERY, *C.shape, key=jax.random.fold_in(key, n))
            x, _ = lax.scan(lambda x, z: (step(x, z, p), None), x, drawn)
            return x, x[1] - x[2]

        return lax.scan(stride, start, jnp.arange(work.records))[1]

    return records


def _network(work: Work, setting: str):
    weights, delays = w.connectome(work)
    # It takes weights from column to row; delays have half a step more, for it rounds down.
    helper = vb.make_delay_helper(jnp.asarray(weights.T), jnp.asarray(delays) + 0.5, dt=1.0, v_c=1.0)
    depth = int(helper.max_lag)

    def network(buffer, x, t, given):
        p, k = given
        # What is sent is the second state, the one kept of each region's past.
        sent = vb.delay_apply(helper, t, buffer[:, 1:2])[0]
        return vb.jr_dfun(x, k * sent, p)

    _, loop = vb.make_sdde(STEP, depth, network, 0.0)

    def one(strength):
        p = theta(ONE["Ae"], ONE["be"] * 1.0, ONE["C"])
        buffer = jnp.zeros((depth + 1 + work.steps, 6, len(weights)), jnp.float32)
        _, xs = loop(buffer, (p, strength * 1e-3))
        return _recorded(xs)

    return jax.vmap(one, out_axes=1)
