"""diffrax: Euler with constant steps; time is counted in steps, so that rounding splits none."""

from __future__ import annotations

import math

import diffrax
import jax
import jax.numpy as jnp
import lineax

from . import jaxed
from . import work as w
from .work import DRIVE, DT, EVERY, SHARED, Work

HOW = "diffeqsolve with Euler, ConstantStepSize, SaveAt(steps=10, fn=eeg); UnsafeBrownianPath; gradients checkpointed"
PACKAGES = ("jax", "jaxlib", "diffrax", "equinox")
SCHEMES = dict.fromkeys(("forward", "gradient", "noise", "fit"), "euler")
REFUSED = {"network": "diffrax has no delays"}
begin = jaxed.begin


def settings(work: Work) -> list[str]:
    if work.case in ("gradient", "fit"):
        return jaxed.both_ways(["its own checkpoints", f"{4 * math.isqrt(work.steps)} checkpoints"], work)
    bases = ["ForwardMode"] if work.case == "noise" else ["RecursiveCheckpointAdjoint", "ForwardMode"]
    return jaxed.both_ways(bases, work)


def adjoint(setting: str):
    first = setting.split(",")[0]
    if first == "ForwardMode":
        return diffrax.ForwardMode()
    count = first.split()[0]
    return diffrax.RecursiveCheckpointAdjoint(checkpoints=int(count) if count.isdigit() else None)


def prepared(work: Work, setting: str):
    def records(Ae, be, C, seed=None):
        terms = diffrax.ODETerm(drift)
        if seed is not None:
            path = diffrax.UnsafeBrownianPath((C.shape[0],), jax.random.key(seed[0]))
            terms = diffrax.MultiTerm(terms, diffrax.ControlTerm(diffusion, path))
        run = diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, float(work.steps), 1.0, (jnp.zeros_like(C),) * 6, args=(Ae, be, C),
            saveat=diffrax.SaveAt(steps=EVERY, fn=lambda t, y, args: y[1] - y[2]), max_steps=work.steps,
            stepsize_controller=diffrax.ConstantStepSize(), adjoint=adjoint(setting), throw=False,
        )  # fmt: skip
        return run.ys[: work.records]

    return jaxed.compiled(records, work, setting, by_xla=True)


def drift(t, y, args):
    """A step's worth of it."""
    M, E, I, Mv, Ev, Iv = y
    Ae, be, C = args
    Ai, bi = SHARED["Ai"], SHARED["bi"]

    def rate(v):
        return SHARED["s_max"] * jax.nn.sigmoid(SHARED["r"] * (v - SHARED["v0"]))

    slopes = (
        Mv, Ev, Iv,
        Ae * be * rate(E - I) - 2.0 * be * Mv - be**2 * M,
        Ae * be * (DRIVE + SHARED["a2"] * C * rate(C * M)) - 2.0 * be * Ev - be**2 * E,
        Ai * bi * (SHARED["a4"] * C * rate(SHARED["a3"] * C * M)) - 2.0 * bi * Iv - bi**2 * I,
    )  # fmt: skip
    return jax.tree.map(lambda x: DT * x, slopes)


def diffusion(t, y, args):
    """Of one normal number a lane and step, which goes into the fifth state."""
    Ae, be, _ = args
    width = Ae * be * (w.NOISE * math.sqrt(DT))
    none = jnp.zeros_like(width)
    like = jax.ShapeDtypeStruct(width.shape, width.dtype)
    return lineax.FunctionLinearOperator(lambda z: (none, none, none, none, width * z, none), like)
