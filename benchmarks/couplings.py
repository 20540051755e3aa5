"""What more couplings, live delays and groups cost, beside one coupling: ``python -m benchmarks.couplings``.

Jansen-Rit, exponential Euler at 0.1 ms, float32, the 76 regions of tvb-data's connectome, a batch of 64 strengths,
every 10th step recorded. Groups are half Jansen-Rit, half Wendling. A gradient is of mean eeg^2 in the strength of each
network. All run in turn, and the least of the rounds is kept: only the ratios hold.
"""

from __future__ import annotations

import functools

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk

from .networks import first_that_runs
from .timing import close, options, save, timed

BATCH, DT, EVERY = 64, 0.1 * u.ms, 10
VERSIONS = ("jax", "llvmlite")
# What is compared, and the most times as long that it may take as what it is compared with.
GOALS = {
    "two couplings": ("one coupling", 1.9),
    "two couplings of two sources": ("one coupling", 1.9),
    "interpolated delays": ("one coupling", 2.1),
    "live delays": ("one coupling", None),
    "two groups": ("the dearer model alone", 1.2),
}


def networks(regions: int | None = None) -> dict:
    """By name, ``k -> network``."""
    connectome = bk.load_connectome(76).normalized()
    keep = slice(regions)
    weights = np.asarray(connectome.weights, np.float32)[keep, keep]
    lengths = connectome.lengths[keep, keep]
    order = np.random.default_rng(0).permutation(len(weights))
    others, n = weights[order][:, order], len(weights)
    one = {
        "kind": "diffusive",
        "source": "eeg",
        "target": "E_inp",
        "distances": lengths,
        "speed": 6 * u.meter / u.second,
    }
    second = {"k": 0.1 * u.Hz / u.mV, "name": "second"}
    both = {"source": {"front": "eeg", "back": "eeg"}, "target": {"front": "E_inp", "back": "E_inp"}}

    def of(*couplings, model=bk.JansenRit):
        return bk.Network(model(), couplings=couplings)

    def groups(k):
        parts = {"front": (bk.JansenRit(), n // 2), "back": (bk.Wendling(), n - n // 2)}
        return bk.Network(parts, couplings=[bk.Coupling(weights, k=k, **(one | both))])

    return {
        "one coupling": lambda k: of(bk.Coupling(weights, k=k, **one)),
        "two couplings": lambda k: of(bk.Coupling(weights, k=k, **one), bk.Coupling(others, **one, **second)),
        "two couplings of two sources": lambda k: of(
            bk.Coupling(weights, k=k, **one), bk.Coupling(others, **(one | {"source": "E"}), **second)
        ),
        "interpolated delays": lambda k: of(bk.Coupling(weights, k=k, interpolate=True, **one)),
        "live delays": lambda k: of(bk.Coupling(weights, k=k, max_delay=60 * u.ms, **one)),
        "the dearer model alone": lambda k: of(bk.Coupling(weights, k=k, **one), model=bk.Wendling),
        "two groups": groups,
    }


def run(network, steps: int, k, implementation: str | None = None):
    net = network(k[:, None] * u.Hz / u.mV)
    names = ["front.eeg", "back.eeg"] if hasattr(net.model, "groups") else ["eeg"]
    drives = [name.replace("eeg", "E_inp") for name in names]
    found = bk.simulate(
        net, steps, DT, inputs=dict.fromkeys(drives, 120 * u.Hz), every=EVERY, record=names, scheme="exp_euler",
        implementation=implementation,
    )  # fmt: skip
    return jnp.concatenate([found[name].mantissa for name in names], axis=-1)


def gradient(network, steps: int, k, implementation: str | None = None):
    return jax.grad(lambda k: jnp.mean(run(network, steps, k, implementation) ** 2))(k)


def compared(steps: int, repeats: int, regions: int | None = None) -> list[dict]:
    every, k, name = networks(regions), jnp.linspace(0.0, 0.4, BATCH, dtype=jnp.float32), first_that_runs()
    results = []
    for what, of in (("forward", run), ("gradient in k", gradient)):
        for network in every.values():
            close(of(network, 200, k, name), of(network, 200, k, "scan"), 1e-3)
        calls = {n: jax.jit(functools.partial(of, network, steps, implementation=name)) for n, network in every.items()}
        seconds = timed({n: functools.partial(call, k) for n, call in calls.items()}, repeats, least=True)
        for n, (base, goal) in GOALS.items():
            ratio = seconds[n] / seconds[base]
            print(f"{what}, {n}: {ratio:.2f} times {base}" + (f", goal {goal}" if goal else ""), flush=True)
            results.append({"what": what, "network": n, "beside": base, "ratio": round(ratio, 3), "goal": goal,
                            "seconds": float(f"{seconds[n]:.4g}")})  # fmt: skip
    return results


def main() -> None:
    asked = options(__doc__, "couplings", "few steps", 5)
    if asked.quick:
        compared(200, 1, 12)
        return
    save(asked.out, VERSIONS, implementation=first_that_runs(), batch=BATCH, results=compared(10_000, asked.repeats))


if __name__ == "__main__":
    main()
