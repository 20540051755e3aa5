"""A network with delays beside tvboptim's, the same work: ``python -m benchmarks.networks_peers``.

Jansen-Rit by Euler steps of 0.1 ms, float32: the 76 regions of tvb-data's connectome, additive coupling of the
excitatory potential with delays of whole steps, a batch of 64 strengths, the eeg of every 10th step. A gradient is of
mean eeg^2 in the strength of each network. tvboptim first runs fewer steps by each of its settings; the fastest is then
timed in turn with ours. Records and gradients of those fewer steps must agree first. The machine may be shared: only
the ratios hold, of the least of the rounds. tvboptim needs an environment of its own, the extra `peers`.
"""

from __future__ import annotations

import functools
import itertools
import os
from importlib.util import find_spec
from typing import NamedTuple

# Where tvboptim shares a batch among devices, each core is one.
DEVICES = 2
if f"device_count={DEVICES}" not in os.environ.get("XLA_FLAGS", ""):
    count = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()

import brainunit as u  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

import brainmass_kernels as bk  # noqa: E402

from .networks import first_that_runs  # noqa: E402
from .timing import close, options, save, timed  # noqa: E402

REGIONS, BATCH, DT, EVERY, SPEED = 76, 64, 0.1, 10, 6.0
STEPS, FEW, BLOCK, GOAL = 10_000, 1000, 100, 15.0
VERSIONS = ("jax", "jaxlib", "llvmlite", "tvboptim", "tvb-data")
MISSING = "tvboptim is not installed: pip install 'brainmass-kernels[peers]' in an environment of its own"


class Setting(NamedTuple):
    """How tvboptim runs.

    Attributes
    ----------
    graph : "dense" or "sparse"
    buffer : its `buffer_strategy` of delays
    devices : that the batch is shared among, by pmap around vmap
    block : its `block_size`, steps that a gradient computes again; ``None``, all that a gradient needs is kept
    folds : whether what is asked for is made of each block, by its `reduce`, in place of keeping each step
    """

    graph: str
    buffer: str
    devices: int = 1
    block: int | None = None
    folds: bool = False

    def __str__(self) -> str:
        block = f", blocks of {self.block}" * bool(self.block) + ", folded" * self.folds
        return f"{self.graph}, {self.buffer}{block}{f', {self.devices} devices' * (self.devices > 1)}"


DEFAULT = Setting("dense", "roll")
_PRODUCT = itertools.product(("circular", "preallocated"), (1, DEVICES))
FORWARD = [
    DEFAULT,
    Setting("dense", "circular"),
    Setting("dense", "preallocated"),
    Setting("sparse", "roll"),
    *(Setting("sparse", *each) for each in _PRODUCT),
    *(Setting("sparse", "circular", devices, BLOCK, True) for devices in (1, DEVICES)),
]
# Those that fit in memory over all steps.
GRADIENT = [
    Setting("dense", "roll", 1, BLOCK),
    Setting("dense", "circular", 1, BLOCK),
    *(Setting("sparse", "circular", *each) for each in itertools.product((1, DEVICES), (BLOCK,), (False, True))),
]


@functools.cache
def connectome() -> tuple[np.ndarray, np.ndarray]:
    """Weights, and delays in ms of whole steps, which both read alike: we round up, tvboptim to the nearest."""
    read = bk.load_connectome(REGIONS).normalized()
    weights = np.asarray(read.weights, np.float32) * (1.0 - np.eye(REGIONS, dtype=np.float32))
    delays = np.round(np.asarray(u.get_magnitude(read.lengths)) / SPEED / DT) * DT
    return weights, np.where(weights != 0.0, delays, 0.0)


def strengths():
    return jnp.linspace(0.0, 0.02, BATCH, dtype=jnp.float32)


def ours(steps: int, k, implementation: str | None = None):
    """With tvboptim's defaults of the model, and its initial state: ``(records, batch, regions)`` in mV."""
    weights, delays = connectome()
    network = bk.Network(
        bk.JansenRit(v0=5.52 * u.mV), weights, delays=delays * u.ms, source="E", target="E_inp",
        k=k[:, None] * u.kHz / u.mV,
    )  # fmt: skip
    return bk.simulate(
        network, steps, DT * u.ms, inputs={"E_inp": 0.22 * u.kHz}, initial={"E": 5.0 * u.mV, "I": 5.0 * u.mV},
        every=EVERY, record="eeg", scheme="euler", implementation=implementation,
    )["eeg"].mantissa  # fmt: skip


def prepared(steps: int, setting: Setting, reduce=None):
    """tvboptim's function of one strength: ``(steps, 2, regions)``, or what it reduces these to."""
    from tvboptim.experimental import network_dynamics as nd
    from tvboptim.experimental.network_dynamics.coupling import DelayedLinearCoupling
    from tvboptim.experimental.network_dynamics.dynamics.tvb import JansenRit
    from tvboptim.experimental.network_dynamics.graph import DenseDelayGraph, SparseDelayGraph
    from tvboptim.experimental.network_dynamics.solvers import Euler

    graph = {"dense": DenseDelayGraph, "sparse": SparseDelayGraph}[setting.graph]
    coupling = DelayedLinearCoupling(incoming_states="y1", G=0.0, buffer_strategy=setting.buffer)
    model = JansenRit(VARIABLES_OF_INTEREST=("y1", "y2"))
    network = nd.Network(model, {"delayed": coupling}, graph(*map(jnp.float32, connectome())))
    solve, config = nd.prepare(network, Euler(block_size=setting.block), t0=0.0, t1=steps * DT, dt=DT, reduce=reduce)

    def one(strength):
        other = jax.tree.map(lambda x: x, config)
        other.coupling.delayed.G = strength
        return solve(other) if reduce else solve(other).ys

    return one


def eeg(states):
    """Of every 10th step, ``(records, regions)``."""
    return (states[:, 0] - states[:, 1])[EVERY - 1 :: EVERY]


# What tvboptim makes of each block, where it folds: records, or the sum of their squares.


def _no_records(template, steps: int):
    return jnp.zeros((steps // EVERY, REGIONS), template.dtype), 0


def _more_records(so_far, block):
    records, at = so_far
    return lax.dynamic_update_slice(records, eeg(block), (at, 0)), at + block.shape[0] // EVERY


RECORDS = _no_records, _more_records, lambda so_far: so_far[0]
SQUARES = (
    lambda template, steps: jnp.zeros((), template.dtype),
    lambda total, block: total + jnp.sum(eeg(block) ** 2),
    lambda total: total,
)


def shared(function, devices: int):
    """A function of one strength, of a batch of them in vmap, which devices share; compiled."""
    if devices == 1:
        return jax.jit(jax.vmap(function))
    each = jax.pmap(jax.vmap(function))
    return lambda k: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each(k.reshape(devices, -1)))


@functools.cache
def theirs(steps: int, setting: Setting):
    """``(batch, records, regions)``."""
    run = prepared(steps, setting, RECORDS if setting.folds else None)
    return shared(run if setting.folds else lambda strength: eeg(run(strength)), setting.devices)


@functools.cache
def their_gradient(steps: int, setting: Setting):
    run = prepared(steps, setting, SQUARES if setting.folds else None)

    def power(strength):
        out = run(strength)
        return out / (steps // EVERY * REGIONS) if setting.folds else jnp.mean(eeg(out) ** 2)

    return shared(jax.grad(power), setting.devices)


def our_run(steps: int, implementation: str | None = None):
    return jax.jit(functools.partial(ours, steps, implementation=implementation))


def our_gradient(steps: int, implementation: str | None = None):
    """Each network's own, as tvboptim's: the mean is over a network."""
    return jax.jit(jax.grad(lambda k: jnp.mean(ours(steps, k, implementation) ** 2) * BATCH))


def fastest(other, settings: list[Setting], steps: int, repeats: int) -> tuple[Setting, dict[str, float]]:
    """Of tvboptim's settings, and how many mass-steps a second each makes."""
    seconds = timed({str(s): functools.partial(other(steps, s), strengths()) for s in settings}, repeats, least=True)
    speeds = {name: REGIONS * BATCH * steps / each for name, each in seconds.items()}
    return max(settings, key=lambda s: speeds[str(s)]), speeds


def compared(what: str, mine, other, settings: list[Setting], steps: int, few: int, repeats: int) -> dict:
    k = strengths()
    setting, speeds = fastest(other, settings, few, repeats)
    fused, peer = mine(steps, first_that_runs()), other(steps, setting)
    found, expected = mine(few, first_that_runs())(k), other(few, setting)(k)
    found = jnp.swapaxes(found, 0, 1) if found.ndim > 1 else found
    close(found, expected, 1e-4)
    error = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    seconds = timed({"fused": lambda: fused(k), "tvboptim": lambda: peer(k)}, repeats, least=True)
    ratio, work = seconds["tvboptim"] / seconds["fused"], REGIONS * BATCH * steps
    print(f"{what}: {ratio:.1f} times as fast as tvboptim ({setting}), which agrees to {error:.1e}", flush=True)
    return {
        "what": what, "implementation": first_that_runs(), "regions": REGIONS,
        "connections": int(np.count_nonzero(connectome()[0])), "batch": BATCH, "steps": steps,
        "relative_difference": float(f"{error:.2g}"), "steps_compared": few, "setting_of_tvboptim": str(setting),
        "mass_steps_per_second": {name: float(f"{work / each:.4g}") for name, each in seconds.items()},
        "ratio": round(ratio, 2), "goal": GOAL,
        "mass_steps_per_second_by_setting": {name: float(f"{rate:.3g}") for name, rate in speeds.items()},
    }  # fmt: skip


def main() -> None:
    asked = options(__doc__, "networks_peers", "few steps of the default settings", 7)
    if not find_spec("tvboptim"):
        print(f"skipped: {MISSING}")
        return
    runs = {
        "forward": (our_run, theirs, [DEFAULT] if asked.quick else FORWARD),
        "gradient in k": (our_gradient, their_gradient, [GRADIENT[-1]] if asked.quick else GRADIENT),
    }
    if asked.quick:
        for what, run in runs.items():
            compared(what, *run, 200, 100, 1)
        return
    began = os.getloadavg()[0]
    results = [compared(what, *run, STEPS, FEW, asked.repeats) for what, run in runs.items()]
    load = [round(x, 1) for x in (began, os.getloadavg()[0])]
    save(asked.out, VERSIONS, load_before_and_after=load, rounds=asked.repeats, results=results)


if __name__ == "__main__":
    main()
