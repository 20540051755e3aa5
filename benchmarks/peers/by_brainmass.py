"""brainmass: `JansenRitStep` by exponential Euler, its default; `Simulator.run`, or its step in a brainstate loop."""

from __future__ import annotations

import functools
import math
from typing import Any

import brainmass
import brainstate
import brainunit as u
import jax.numpy as jnp
import numpy as np
from brainstate.transform import checkpointed_for_loop, for_loop

from . import jaxed
from . import work as w
from .work import DRIVE, EVERY, Work

HOW = "JansenRitStep(method='exp_euler') in jax.jit: Simulator.run, for_loop, or checkpointed_for_loop"
PACKAGES = ("jax", "jaxlib", "brainmass", "brainstate", "braintools", "brainunit")
SCHEMES = dict.fromkeys(("forward", "gradient", "noise", "network", "fit"), "exp_euler")
REFUSED: dict[str, str] = {}
begin = jaxed.begin
STEP = w.DT * u.second
DRIVES = (0.0 * u.mV, DRIVE * u.Hz, 0.0 * u.mV)  # M_inp, E_inp, I_inp


def settings(work: Work) -> list[str]:
    if work.case in ("network", "noise"):
        return ["for_loop"]
    bases = {"forward": ["Simulator.run", "for_loop"]}
    return jaxed.both_ways(bases.get(work.case, ["for_loop", "checkpointed_for_loop"]), work)


def prepared(work: Work, setting: str):
    if work.case == "network":
        return jaxed.compiled(_network(work), work, setting)
    run = _masses(work, setting.split(",")[0])
    if work.case == "noise":
        # Its generator of random numbers is a state, which its own jit carries from call to call.
        compiled = brainstate.transform.jit(lambda *args: {"records": run(*args)})
        return functools.partial(compiled, *jaxed.parameters(work))
    return jaxed.compiled(run, work, setting)


def _masses(work: Work, how: str):
    def records(Ae, be, C):
        lanes, noise = C.shape[0], None
        if work.case == "noise":
            noise = brainmass.GaussianNoise(lanes, sigma=w.NOISE / math.sqrt(w.DT) * u.Hz)
        node = brainmass.JansenRitStep(lanes, Ae=Ae * u.mV, be=be * u.Hz, C=C, noise_E=noise, method="exp_euler")
        if how == "Simulator.run":
            # This transient makes it record the last of each ten steps, not the first.
            out = brainmass.Simulator(node, dt=STEP).run(
                work.steps * STEP, inputs=lambda *_: DRIVES, monitors=lambda node: node.eeg(), transient=EVERY - 1,
                sample_every=EVERY, jit=False,
            )  # fmt: skip
            return u.get_magnitude(out["output"])
        with brainstate.environ.context(dt=STEP):
            brainstate.nn.init_all_states(node)
            return looped(work, lambda: node.update(*DRIVES), node.eeg, how)

    return records


def looped(work: Work, step, record, how: str = "for_loop"):
    outer = {"for_loop": for_loop, "checkpointed_for_loop": checkpointed_for_loop}[how]

    def stride(_):
        for_loop(lambda _: step(), jnp.arange(EVERY))
        return record()

    return u.get_magnitude(outer(stride, jnp.arange(work.records)))


def _network(work: Work):
    """Its delays and its additive coupling under vmap; `brainmass.Network` couples the first input alone."""
    weights, delays = w.connectome(work)
    regions, none = len(weights), u.Quantity(0.0, unit=u.Hz)

    def one(strength):
        with brainstate.environ.context(dt=STEP):
            node = brainmass.JansenRitStep(regions, method="exp_euler")
            # In numpy, as delays must be known while the loop is traced; half a step less, for it rounds up.
            source = np.broadcast_to(np.arange(regions), (regions, regions))
            times = np.float32((delays - 0.5) * (w.DT * 1e3)) * u.ms
            late = node.prefetch_delay("E", (times, source), init=None)
            coupling = brainmass.AdditiveCoupling(late, jnp.asarray(weights), k=strength * u.Hz / u.mV, b=none)
            brainstate.nn.init_all_states(node)
            brainstate.nn.init_all_states(coupling)

            def step():
                # A call of it, for `update` alone leaves its delays as they are.
                node(DRIVES[0], DRIVES[1] + coupling(), DRIVES[2])

            return looped(work, step, node.eeg)

    batch: Any = brainstate.transform.vmap(one)
    return lambda k: jnp.swapaxes(batch(k), 0, 1)
