"""Networks with delays against brainmass and against a scan written by hand: ``python -m benchmarks.networks``.

Diffusive coupling, exponential Euler at 0.1 ms, every connection with a delay of its own, a batch of coupling strengths
on one connectome. Results must agree before any speed is printed. What is slow runs fewer
steps: all speeds are per step. Then `networks_peers` runs beside tvboptim, where that is installed.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from importlib.util import find_spec

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import brainmass_kernels as bk
from brainmass_kernels import dispatch

from . import reference
from .timing import close, options, save, timed

DT, SPEED, DRIVE, EVERY = 0.1 * u.ms, 5.0, 120.0, 10
VERSIONS = ("jax", "llvmlite", "brainmass", "brainstate")


def connectome(regions: int, share: float):
    """Weights, of which a share is not zero, and lengths in mm; delays are 1 to 36 ms."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.0, 2.0 / (share * regions), (regions, regions))
    weights *= rng.uniform(size=weights.shape) < share
    np.fill_diagonal(weights, 0.0)
    lengths = rng.uniform(5.0, 180.0, weights.shape)
    np.fill_diagonal(lengths, 0.0)
    return weights.astype(np.float32), lengths.astype(np.float32)


def strengths(batch: int):
    return jnp.linspace(0.0, 0.05, batch, dtype=jnp.float32)


def fused(weights, lengths, steps: int, k, implementation: str | None = None):
    """Jansen-Rit masses, coupled from M to M_inp."""
    network = bk.Network(
        bk.JansenRit(), weights, distances=lengths, speed=SPEED, source="M", target="M_inp", k=k[:, None],
        coupling="diffusive",
    )  # fmt: skip
    return bk.simulate(
        network, steps, DT, inputs={"E_inp": DRIVE * u.Hz}, initial={"history": 0.0 * u.mV}, every=EVERY,
        scheme="exp_euler", implementation=implementation,
    )["eeg"].mantissa  # fmt: skip


def fused_hopf(weights, lengths, steps: int, k, implementation: str | None = None):
    """Hopf masses: of Jansen-Rit's states brainmass's network loses the unit."""
    network = bk.Network(
        bk.Hopf(a=0.1), weights, distances=lengths, speed=SPEED, source="x", k=k[:, None], coupling="diffusive"
    )
    return bk.simulate(
        network, steps, DT, initial={"x": 0.3, "y": 0.1}, every=EVERY, record="x", scheme="exp_euler",
        implementation=implementation,
    )["x"]  # fmt: skip


def by_hand(weights, lengths, steps: int, k):
    """A ring of the last states that are sent, and a gather: ``(regions, batch)`` throughout."""
    n = len(weights)
    delays = np.ceil(lengths / SPEED / 0.1 - 1e-5).astype(np.int32)
    depth, sources, weights = int(delays.max()), jnp.arange(n), jnp.asarray(weights)

    def one(carry, t):
        state, ring = carry
        late = jnp.where(jnp.asarray(delays)[..., None] == 0, state[0][None], ring[(t - delays) % depth, sources])
        total = k * jnp.sum(weights[..., None] * (late - state[0][:, None]), axis=1)
        ring = lax.dynamic_update_index_in_dim(ring, state[0], t % depth, 0)
        return (reference.step(state, 3.25, 100.0, 135.0, DRIVE, M_inp=total), ring), None

    def stride(carry, t):
        carry, _ = lax.scan(one, carry, t + jnp.arange(EVERY))
        return carry, carry[0][1] - carry[0][2]

    start = (jnp.zeros((n, len(k)), jnp.float32),) * 6, jnp.zeros((depth, n, len(k)), jnp.float32)
    return lax.scan(stride, start, jnp.arange(0, steps, EVERY))[1].transpose(0, 2, 1)


def by_brainmass(weights, lengths, steps: int, k):
    """Hopf masses in a `brainmass.Network`, in a `brainstate` loop under vmap: only records are stored."""
    import brainmass
    import brainstate
    from braintools import init

    for_loop = brainstate.transform.for_loop

    def one(k):
        with brainstate.environ.context(dt=DT):
            node = brainmass.HopfStep(
                len(weights), a=0.1, init_x=init.Constant(0.3), init_y=init.Constant(0.1), method="exp_euler"
            )
            network = brainmass.Network(
                node, conn=weights, distance=lengths, speed=SPEED, coupling="diffusive", coupled_var="x", k=k,
                delay_init=init.Constant(0.3),
            )  # fmt: skip
            brainstate.nn.init_all_states(network)

            def stride(_):
                for_loop(lambda _: network.update(), jnp.arange(EVERY))
                return node.x.value

            return for_loop(stride, jnp.arange(steps // EVERY))

    return jnp.swapaxes(brainstate.transform.vmap(one)(k), 0, 1)


def gradient(run, weights, lengths, steps: int, k):
    """Of mean eeg^2, in the strength of each network."""
    return jax.grad(lambda k: jnp.mean(run(weights, lengths, steps, k) ** 2))(k)


def rivals(model: str) -> dict:
    both = {"Jansen-Rit": (fused, "by hand", by_hand), "Hopf": (fused_hopf, "brainmass", by_brainmass)}
    ours, name, other = both[model]
    return {
        "fused": functools.partial(ours, implementation=first_that_runs()),
        "scan": functools.partial(ours, implementation="scan"),
        name: other,
    }


def _compiled(run, weights, lengths, steps: int):
    return jax.jit(functools.partial(run, weights, lengths, steps))


def compared(
    regions: int, share: float, batch: int, steps: int, slow: int, repeats: int, model: str = "Jansen-Rit", of=None
) -> dict:
    """``slow`` steps for what is slower than the fused run of ``steps``."""
    weights, lengths = connectome(regions, share)
    runs = rivals(model)
    if of:
        runs = {name: functools.partial(of, run) for name, run in runs.items()}
    k, few = strengths(batch), min(slow, 500)
    # Each is compiled once for each length: where the slow ones run no more steps than are compared, once in all.
    compiled = functools.cache(lambda name, count: _compiled(runs[name], weights, lengths, count))
    for name in runs:
        close(compiled(name, few)(k), compiled("scan", few)(k), 1e-3)
    lengths_of = {name: steps if name == "fused" else slow for name in runs}
    calls = {name: compiled(name, count) for name, count in lengths_of.items()}
    seconds = timed({name: functools.partial(run, k) for name, run in calls.items()}, repeats)
    rates = {name: regions * batch * lengths_of[name] / taken for name, taken in seconds.items()}
    ratios = {name: rates["fused"] / rate for name, rate in rates.items() if name != "fused"}
    what = f"{model}, {'gradient in k' if of else 'forward'}"
    said = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in ratios.items())
    connections = int(np.count_nonzero(weights))
    print(
        f"{what}, {regions:>5} regions, {connections:>7,} connections, {batch:>4} networks: "
        f"{rates['fused'] / 1e6:6.0f} M mass-steps/s, {said}",
        flush=True,
    )
    return {
        "what": what, "implementation": first_that_runs(),
        "regions": regions, "connections": connections, "batch": batch, "steps": steps,
        "steps_of_the_others": slow, "mass_steps_per_second": {n: float(f"{r:.4g}") for n, r in rates.items()},
        "ratios": {n: round(r, 2) for n, r in ratios.items()},
    }  # fmt: skip


def first_that_runs() -> str:
    """What a fused run takes here: the first implementation of networks, in order of preference."""
    return next(
        name for name, why in bk.implementations().items() if why == "runs here" and dispatch.load(name).networks
    )


def main() -> None:
    asked = options(__doc__, "networks", "two small rows", 3)
    if asked.quick:
        compared(20, 1.0, 4, 500, 100, 1)
        compared(20, 1.0, 4, 500, 100, 1, of=gradient)
        if find_spec("brainmass"):
            compared(20, 1.0, 4, 500, 100, 1, "Hopf")
        beside_peers("--quick")
        return
    results = [
        compared(76, 0.27, 64, 10_000, 1000, asked.repeats),
        compared(76, 1.0, 64, 10_000, 1000, asked.repeats),
        compared(76, 0.27, 64, 10_000, 500, asked.repeats, of=gradient),
        compared(76, 1.0, 64, 10_000, 500, asked.repeats, of=gradient),
    ]
    if find_spec("brainmass"):
        results.append(compared(76, 0.27, 64, 10_000, 500, asked.repeats, "Hopf"))
    for regions, share, batches in ((68, 0.27, (1, 16, 256, 1024)), (192, 0.27, (1, 16, 64)), (1000, 0.1, (1, 4))):
        for batch in batches:
            work = regions**2 * share * batch
            steps = max(500, min(10_000, int(3e9 / work) // 100 * 100))
            results.append(compared(regions, share, batch, steps, max(20, steps // 50 // 10 * 10), asked.repeats))
    save(asked.out, VERSIONS, results=results)
    beside_peers()


def beside_peers(*arguments: str) -> None:
    """In a process of its own, for it sets the number of devices."""
    subprocess.run([sys.executable, "-m", "benchmarks.networks_peers", *arguments], check=True)


if __name__ == "__main__":
    main()
