"""Speed and memory of `scan` on the CPU against hand-written scans; ``python -m benchmarks.cpu``.

Everything compared is run in turn, A B A B, in one process; the ratio of medians is what counts, as machines are noisy.
Results must agree before any speed is printed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import brainunit as u
import jax
import jax.numpy as jnp

import brainmass_kernels as bk

from . import reference, timing
from .timing import RESULTS, close, save, timed


def parameters(lanes: int):
    spread = jnp.linspace(0.0, 1.0, lanes, dtype=jnp.float32)
    return 3.0 + 0.5 * spread, 95.0 + 10.0 * spread, 130.0 + 10.0 * spread


def run(Ae, be, C, steps: int, every: int, scheme: str = "exp_euler"):
    model = bk.JansenRit(Ae=Ae * u.mV, be=be * u.Hz, C=C)
    return bk.simulate(model, steps, 0.1 * u.ms, inputs={"E_inp": 220.0 * u.Hz}, every=every, scheme=scheme)


def fused(Ae, be, C, steps: int, every: int, scheme: str = "exp_euler"):
    return u.get_magnitude(run(Ae, be, C, steps, every, scheme)["eeg"])


def fused_loss(Ae, be, C, steps: int, every: int, scheme: str = "exp_euler"):
    return jnp.mean(fused(Ae, be, C, steps, every, scheme) ** 2)


def by_hand(Ae, be, C, steps: int, every: int):
    return reference.forward(Ae, be, C, 220.0, steps, every)


def forward(lanes: int, steps: int, repeats: int) -> dict:
    args = parameters(lanes)
    close(fused(*args, 1000, 10), jax.jit(by_hand, static_argnums=(3, 4))(*args, 1000, 10), 1e-4)
    hand = jax.jit(lambda *a: by_hand(*a, steps, 10))
    ours = {s: jax.jit(lambda *a, s=s: fused(*a, steps, 10, s)) for s in ("exp_euler", "strang")}
    seconds = timed({"hand": lambda: hand(*args), **{s: (lambda f=f: f(*args)) for s, f in ours.items()}}, repeats)
    return report("forward", lanes, steps, seconds, {"hand": hand, **ours}, args)


def gradient(lanes: int, steps: int, repeats: int) -> dict:
    args = parameters(lanes)
    losses = {
        "plain": lambda *a: reference.plain_loss(*a, 220.0, steps, 10),
        "checkpointed": lambda *a: reference.checkpointed_loss(*a, 220.0, steps, 10),
        "exp_euler": lambda *a: fused_loss(*a, steps, 10),
        "strang": lambda *a: fused_loss(*a, steps, 10, "strang"),
    }
    grads = {name: jax.jit(jax.grad(f, argnums=(0, 1, 2))) for name, f in losses.items()}
    short = [
        jax.grad(f, argnums=(0, 1, 2))(*args)
        for f in (lambda *a: fused_loss(*a, 1000, 10), lambda *a: reference.plain_loss(*a, 220.0, 1000, 10))
    ]
    for ours, theirs in zip(*short):
        close(ours, theirs, 1e-3)
    seconds = timed({name: (lambda f=f: f(*args)) for name, f in grads.items()}, repeats)
    return report("gradient of mean eeg^2 in Ae, be, C", lanes, steps, seconds, grads, args)


def report(what: str, lanes: int, steps: int, seconds: dict, functions: dict, args) -> dict:
    def memory(name: str):
        size = functions[name].lower(*args).compile().memory_analysis().temp_size_in_bytes
        return {"temporary_bytes": size}, f"{size / 2**20:9.1f} MiB"

    return timing.report(what, lanes, steps, seconds, memory)


def peak_of(name: str, lanes: int, steps: int) -> int:
    """Peak resident bytes of a process that takes one gradient: of a plain scan, or ours on `scan` or `numba`."""
    without = "c.bk.testing.without('numba')" if name != "numba" else "contextlib.nullcontext()"
    program = (
        "import contextlib, jax, benchmarks.cpu as c, benchmarks.reference as r\n"
        f"args = c.parameters({lanes})\n"
        f"loss = dict(plain=lambda *a: r.plain_loss(*a, 220.0, {steps}, 10),"
        f"none=lambda *a: a[0].sum()).get({name!r}, lambda *a: c.fused_loss(*a, {steps}, 10))\n"
        f"with {without}:\n"
        f" jax.block_until_ready(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args))\n"
        "from brainmass_kernels import bench\n"
        "print(bench.peak_memory())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def peaks(lanes: int, steps: int) -> dict:
    idle = peak_of("none", lanes, steps)
    beyond_idle = {name: peak_of(name, lanes, steps) - idle for name in ("plain", "exp_euler", "numba")}
    print(f"process's peak of a gradient beyond an idle one, {lanes:,} x {steps:,}: {beyond_idle}")
    return {"lanes": lanes, "steps": steps, **beyond_idle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the work, to see that it runs; nothing is written"
    )
    quick = parser.parse_args().quick
    with bk.testing.without("numba"):
        measure(quick)


def measure(quick: bool) -> None:
    steps, repeats = (1000, 2) if quick else (10_000, 5)
    results = [forward(n, steps, repeats) for n in (1, 64, 1024, 16_384)]
    results += [gradient(1024, steps, repeats)]
    memory = [peaks(lanes, steps) for lanes in (1024, 4096, 8192)]
    if not quick:
        save(RESULTS / "cpu.json", ("jax", "numpy", "brainmass_kernels"), results=results, peak_bytes=memory)


if __name__ == "__main__":
    main()
