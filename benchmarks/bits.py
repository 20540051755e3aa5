"""Digests of a fixed set of runs, to show that a change leaves every bit as it was.

``python -m benchmarks.bits --out before.json`` writes one digest for each run that this machine and these versions can
make; ``--against before.json`` compares. Digests of two machines or of two versions of JAX need not agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
from contextlib import nullcontext

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk
from brainmass_kernels.schemes import SCHEMES

INTERPRETED = ("mosaic_tpu", "mosaic_gpu", "triton")
STATISTICS = {"eeg": "eeg", "mean": bk.Mean(), "peak": bk.Maximum(), "tr": bk.Average(20 * u.ms)}


def digest(tree) -> str:
    return hashlib.sha1(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()[:12]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.8, 1.2, shape).astype(np.float32)


class Runs:
    """What one implementation is asked for, with few enough lanes and steps for an interpreter."""

    def __init__(self, name: str):
        self.name = name
        self.small = name in INTERPRETED
        self.lanes, self.steps = (4, 23) if self.small else (40, 300)

    def square(self, C, be, sigma, wave, **arguments):
        """The records of noisy Jansen-Rit with an input that varies."""
        result = bk.simulate(
            bk.JansenRit(C=C, be=be * u.Hz), self.steps, 1 * u.ms, inputs={"E_inp": wave * u.Hz},
            noise={"E_inp": sigma * u.Hz * u.second**0.5}, key=jax.random.key(0), every=2, implementation=self.name,
            **arguments,
        )  # fmt: skip
        values = {name: u.get_magnitude(x) for name, x in result.records.items()}
        return sum(jnp.mean(x**2) for x in values.values()), (values, result.final)

    def of_masses(self, **arguments):
        values = (135 * draw(self.lanes), 100 * draw(self.lanes, seed=1), 2 * draw(self.lanes, seed=2))
        values += (220 * draw(self.steps, seed=3),)
        return jax.value_and_grad(self.square, (0, 1, 2, 3), has_aux=True)(*values, **arguments)

    def of_model(self, model):
        inputs = {name: 0.1 * unit_of(model, name) for name in list(model.inputs)[:1]}
        result = bk.simulate(model, self.steps, 0.1 * u.ms, inputs=inputs, every=3, implementation=self.name)
        return result.records, result.final

    def of_network(self, delays, networks=3):
        regions = 5 if self.small else 20

        def loss(weights, C):
            network = bk.Network(
                bk.JansenRit(C=C), weights, delays=delays, source="eeg", target="E_inp", k=0.1 * u.Hz / u.mV
            )
            result = bk.simulate(network, self.steps, 1 * u.ms, every=10, implementation=self.name)
            return jnp.sum((result["eeg"] / u.mV) ** 2), (result.records, result.final)

        C = 135 * draw(networks, regions)
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(draw(regions, regions), C)

    def all(self):
        """By name, few of them where an interpreter compiles each slowly."""
        yield "scheme strang", lambda: self.of_masses(scheme="strang")
        yield "statistics", lambda: self.of_masses(record=STATISTICS, scheme="exp_euler", precision="fast")
        if self.name != "mosaic_gpu":
            yield "network", lambda: self.of_network(4 * u.ms)
        if self.small:
            return
        for scheme in (name for name in SCHEMES if name != "given"):
            yield f"scheme {scheme}", lambda scheme=scheme: self.of_masses(scheme=scheme)
        yield "checkpoints", lambda: self.of_masses(checkpoint_every=3, transient=5)
        yield "network without delays", lambda: self.of_network(None)
        for model in (bk.Wendling(), bk.Hopf(), bk.Epileptor(), bk.WongWang(), bk.MontbrioPazoRoxin()):
            yield type(model).__name__, lambda model=model: self.of_model(model)


def unit_of(model, name: str):
    unit = getattr(model.inputs[name], "unit", u.UNITLESS)
    return 1.0 * unit


def reason_against(name: str) -> str | None:
    """Why an implementation cannot run here, interpreted or not."""
    why = bk.implementations()[name]
    if why == "runs here":
        return None
    if name not in INTERPRETED:
        return why
    try:
        with bk.testing.interpret():
            bk.simulate(bk.JansenRit(), 2, 1 * u.ms, implementation=name)
    except (bk.Unsupported, ImportError) as error:
        return str(error)
    return None


def digests(names) -> dict[str, str]:
    results: dict[str, str] = {}
    for name in names:
        if why := reason_against(name):
            print(f"{name}: left out, {why}", file=sys.stderr)
            continue
        with bk.testing.interpret() if name in INTERPRETED else nullcontext():
            for what, run in Runs(name).all():
                results[f"{name}, {what}"] = digest(run())
                print(f"{name}, {what}: {results[f'{name}, {what}']}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--against", type=pathlib.Path)
    parser.add_argument("--only", nargs="*", default=list(bk.implementations()))
    options = parser.parse_args()
    results = digests(options.only)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    if options.against:
        before = json.loads(options.against.read_text())
        changed = [name for name in results if before.get(name, results[name]) != results[name]]
        print(f"{len(results)} runs, {len(changed)} changed: {', '.join(changed) or 'none'}")
        sys.exit(bool(changed))


if __name__ == "__main__":
    main()
