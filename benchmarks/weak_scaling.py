"""Weak scaling: as many times the lanes on as many devices, ``python -m benchmarks.weak_scaling``.

Fake devices of the CPU, in a process for each number of them: it has as many processors as devices, where there are so
many, so that one device has one. The time of a run is then that of one share of it, if nothing is communicated; beyond
the processors of the machine it is a multiple. Rounds take turns, and the least time of each is kept.

The bytes that a run of masses communicates and leaves to be gathered are counted too, for chips that are not here.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

from .timing import RESULTS, save

DEVICES = (1, 2, 4, 8)
#: Lanes of one device, steps of a run, steps from record to record.
LANES, STEPS, EVERY = 2048, 1000, 10
IMPLEMENTATIONS = ("numba", "scan")
DIRECTIONS = ("forward", "gradient")
#: Chips on paper: their number, with as many masses in all.
ON_PAPER, MASSES = {"H100": 8, "v5e": 256}, 2**20
#: The run on paper: records of 10,000 steps, frequencies of a spectrum, states of Jansen-Rit; a number has 4 bytes.
RECORDS, FREQUENCIES, STATES, BYTES = 1000, 40, 6, 4

PROGRAM = """
import json, os, re, sys

count, lanes, steps, every, repeats = map(int, sys.argv[1:])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
import brainunit as u, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import brainmass_kernels as bk
from benchmarks.timing import timed

jax.config.update("jax_compilation_cache_dir", os.environ["BRAINMASS_KERNELS_CACHE"] + "/xla")
mesh = jax.make_mesh((count,), ("lanes",))
place = NamedSharding(mesh, PartitionSpec("lanes"))
C = jax.device_put(jnp.linspace(100.0, 160.0, count * lanes), place)


def forward(implementation):
    def run(C):
        result = bk.simulate(
            bk.JansenRit(C=C), steps, 0.1 * u.ms, inputs={"E_inp": 220 * u.Hz}, every=every,
            implementation=implementation,
        )
        return result["eeg"].mantissa

    return run


def gradient(implementation):
    run = forward(implementation)
    return jax.grad(lambda C: jnp.sum(run(C) ** 2))


functions, communicated = {}, {}
with jax.set_mesh(mesh):
    for implementation in IMPLEMENTATIONS:
        for direction in (forward, gradient):
            name = f"{implementation}, {direction.__name__}"
            compiled = jax.jit(direction(implementation)).lower(C).compile()
            functions[name] = lambda compiled=compiled: compiled(C)
            kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
            communicated[name] = re.findall(rf"({kinds})(?:-start)?\\(", compiled.as_text())
print(json.dumps({"seconds": timed(functions, repeats, least=True), "communicated": communicated}))
"""


def measured(count: int, lanes: int, steps: int, repeats: int, cache: str) -> dict[str, dict]:
    """A process with so many devices: the least time of each run, and what its program communicates."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "BRAINMASS_KERNELS_CACHE": cache}
    program = PROGRAM.replace("IMPLEMENTATIONS", repr(IMPLEMENTATIONS))
    numbers = map(str, (count, lanes, steps, EVERY, repeats))
    done = subprocess.run(
        [sys.executable, "-c", program, *numbers], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def on_paper(chips: int) -> dict[str, int]:
    """Bytes of a run of `MASSES` on so many chips: what they tell each other in it, and what each has at its end."""
    share = -(-MASSES // chips) * BYTES
    return {
        "chips": chips, "masses": MASSES, "communicated in a run": 0,
        "records of each": RECORDS * share, "spectra of each": FREQUENCIES * share,
        "final state of each": STATES * share,
        "gradient by a parameter of each mass": share, "gradient by one parameter of all": BYTES,
    }  # fmt: skip


def table(seconds: dict[int, dict[str, float]]) -> str:
    """The time of each run over that on one device."""
    counts = sorted(seconds)
    lines = [f"{'devices':<18}" + "".join(f"{count:>8}" for count in counts)]
    for name, one in seconds[counts[0]].items():
        lines.append(f"{name:<18}" + "".join(f"{seconds[count][name] / one:>8.2f}" for count in counts))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Weak scaling on fake devices.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="times that each run is measured in a round")
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--lanes", type=int, default=LANES, help="of one device")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "weak_scaling.json")
    arguments = parser.parse_args(argv)
    rounds, loads, communicated = [], [], {}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(arguments.rounds):
            loads.append(round(os.getloadavg()[0], 2))
            rounds.append({})
            for count in random.sample(arguments.devices, len(arguments.devices)):
                found = measured(count, arguments.lanes, arguments.steps, arguments.repeats, cache)
                rounds[-1][count], communicated[count] = found["seconds"], found["communicated"]
    names = [f"{implementation}, {direction}" for implementation in IMPLEMENTATIONS for direction in DIRECTIONS]
    least = {
        count: {name: min(seconds[count][name] for seconds in rounds) for name in names} for count in arguments.devices
    }
    print(table(least))
    save(
        arguments.out, ("jax", "jaxlib", "brainunit", "llvmlite"), lanes_of_a_device=arguments.lanes,
        steps=arguments.steps, every=EVERY, least=least,
        times_one_device={count: {n: round(x / least[min(least)][n], 3) for n, x in least[count].items()}
                          for count in least},
        communicated={count: sorted({kind for kinds in each.values() for kind in kinds})
                      for count, each in sorted(communicated.items())},
        on_paper={chip: on_paper(count) for chip, count in ON_PAPER.items()}, rounds=rounds, loads=loads,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
