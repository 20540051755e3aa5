"""How long the first day's waits are, each in a new process: ``python -m benchmarks.first_day``.

First calls are compared with those of the same run written by hand with `lax.scan`, in the same process and after JAX
has started. Cold means an empty cache of kernels, warm the cache that the cold process filled. Rounds take turns, and
the least time of each is kept: what else a machine does only ever adds. The load before each round stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from .timing import RESULTS, save

CALLS = """
import json, sys, time
import brainunit as u, jax, jax.numpy as jnp
import brainmass_kernels as bk
from benchmarks import reference

C = jnp.linspace(100.0, 160.0, 64)
Ae, be = jnp.full_like(C, 3.25), jnp.full_like(C, 100.0)
jax.block_until_ready(jax.jit(lambda x: x * 2)(C))
bk.simulate, u.mV
times = {}


def timed(name, fun):
    began = time.perf_counter()
    jax.block_until_ready(fun())
    times[name] = time.perf_counter() - began


def run(C, steps=1000):
    model = bk.JansenRit(C=C)
    inputs = {"E_inp": 220 * u.Hz}
    result = bk.simulate(model, steps, 0.1 * u.ms, inputs=inputs, every=10, scheme="exp_euler", implementation="numba")
    return result["eeg"].mantissa


timed("simulate", lambda: run(C))
timed("simulate, another duration", lambda: run(C, 2000))
timed("simulate, again", lambda: run(C))
timed("gradient", lambda: jax.grad(lambda C: jnp.mean(run(C) ** 2))(C))
timed("scan", lambda: jax.jit(lambda C: reference.forward(Ae, be, C, 220.0, 1000, 10))(C))
timed("scan, gradient", lambda: jax.jit(jax.grad(lambda C: reference.plain_loss(Ae, be, C, 220.0, 1000, 10)))(C))
print(json.dumps(times))
"""
FUSE = """
import json, time
import brainmass, brainstate, brainunit as u, jax
import brainmass_kernels as bk

node, times = brainmass.JansenRitStep(64), {}
for name in ("fuse and run", "fuse and run, again"):
    began = time.perf_counter()
    jax.block_until_ready(bk.fuse(node, 0.1 * u.ms).run(100 * u.ms, monitors=["M"])["M"].mantissa)
    times[name] = time.perf_counter() - began
compiled = brainstate.transform.jit(lambda: bk.fuse(node, 0.1 * u.ms).run(100 * u.ms, monitors=["M"])["M"].mantissa)
jax.block_until_ready(compiled())
began = time.perf_counter()
jax.block_until_ready(compiled())
times["fuse and run in a jit, again"] = time.perf_counter() - began
print(json.dumps(times))
"""
IMPORTS = """
import json, time
began = time.perf_counter()
import brainunit, jax
between = time.perf_counter()
import brainmass_kernels as bk
alone = time.perf_counter()
[getattr(bk, name) for name in bk.__all__]
end = time.perf_counter()
times = {"brainunit and jax": between - began, "brainmass_kernels": alone - between, "every name": end - alone}
print(json.dumps(times))
"""
#: Goals in seconds, or in first calls of the scan.
GOALS = {
    "simulate, cold": "6 scans", "gradient, cold": "3 scans", "simulate, warm": "2 scans", "gradient, warm": "2 scans",
    "simulate, another duration": "0.05 s", "fuse and run, again": "0.005 s",
    "fuse and run in a jit, again": "0.005 s", "fit, first": "12 s", "fit, second": "6 s",
    "first line": "2 s", "--version": "0.5 s", "refused": "0.5 s", "every name": "0.3 s",
}  # fmt: skip


def in_process(program: str, cache: str) -> dict[str, float]:
    env = {**os.environ, "BRAINMASS_KERNELS_CACHE": cache, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def command(arguments: list[str], cache: str, folder: str) -> tuple[float, float]:
    """Seconds of a command line, and until its first line."""
    program = str(pathlib.Path(sys.executable).with_name("brainmass-kernels"))
    env = {**os.environ, "BRAINMASS_KERNELS_CACHE": cache, "JAX_PLATFORMS": "cpu"}
    began, first = time.perf_counter(), None
    with subprocess.Popen(
        [program, *arguments], env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for _ in process.stdout:
            first = first or time.perf_counter() - began
    return time.perf_counter() - began, first or 0.0


def measured(fits: bool) -> dict[str, float]:
    """One round."""
    with tempfile.TemporaryDirectory() as folder:
        cache = os.path.join(folder, "cache")
        cold, warm = in_process(CALLS, cache), in_process(CALLS, cache)
        times = {"simulate, cold": cold["simulate"], "gradient, cold": cold["gradient"]}
        times |= {"simulate, warm": warm["simulate"], "gradient, warm": warm["gradient"]}
        times |= {"scan": min(cold["scan"], warm["scan"])}
        times |= {"scan, gradient": min(cold["scan, gradient"], warm["scan, gradient"])}
        times |= {name: warm[name] for name in ("simulate, another duration", "simulate, again")}
        times |= in_process(IMPORTS, cache) | in_process(FUSE, cache)
        times["--version"] = command(["--version"], cache, folder)[0]
        times["refused"] = command(["sweep", "--over", "C=1:2"], cache, folder)[0]
        if fits:
            fresh = os.path.join(folder, "fresh")
            times["fit, first"], times["first line"] = command(["fit"], fresh, folder)
            times["fit, second"] = command(["fit"], fresh, folder)[0]
    return times


def shown(times: dict[str, float]) -> str:
    lines = []
    for name, goal in GOALS.items():
        if name in times:
            scan = times["scan, gradient" if "gradient" in name else "scan"]
            ratio = f"{times[name] / scan:6.2f} scans" if "scans" in goal else ""
            lines.append(f"{name:<28} {times[name]:8.3f} s {ratio:<14} goal {goal}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-fits", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "first_day.json")
    arguments = parser.parse_args(argv)
    rounds, loads = [], []
    for _ in range(arguments.rounds):
        loads.append(round(os.getloadavg()[0], 2))
        rounds.append(measured(not arguments.no_fits))
    least = {name: min(times[name] for times in rounds) for name in rounds[0]}
    print(shown(least))
    save(
        arguments.out,
        ("jax", "brainunit", "llvmlite", "brainmass"),
        least=least,
        rounds=rounds,
        loads=loads,
        goals=GOALS,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
