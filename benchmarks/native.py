"""Speed of `numba` on the CPU against C, hand-written scans and brainmass; ``python -m benchmarks.native``.

Everything compared is run in turn, in changing order, in one process, and the least time of each is kept: what else a
machine does only ever adds. The ratio within one run is what counts.
Results must agree before any speed is printed. The C baseline, `jansen_rit.c`, is compiled when a compiler is there.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk
from brainmass_kernels import bench

from . import reference, timing
from .cpu import fused, fused_loss, parameters
from .timing import RESULTS, close, save, timed

HERE = pathlib.Path(__file__).parent
EVERY = 10


def compiled_c():
    """The baseline in C as ``(Ae, be, C, steps, gradient) -> eeg or the gradient``; ``None`` without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = pathlib.Path(tempfile.mkdtemp()) / "jansen_rit.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(HERE / "jansen_rit.c"), "-o", str(library), "-lm"], check=True)
    run = ctypes.CDLL(str(library)).run

    def call(Ae, be, C, steps: int, gradient: bool):
        inputs = [np.ascontiguousarray(x, np.float32) for x in (Ae, be, C)]
        lanes = inputs[0].size
        eeg = np.empty((steps // EVERY, lanes), np.float32)
        slopes = [np.empty(lanes, np.float32) for _ in range(3)]
        pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (*inputs, eeg, *slopes)]
        threads = len(os.sched_getaffinity(0))
        threads = max(t for t in range(1, threads + 1) if lanes % (64 * t) == 0)
        run(*pointers, lanes, steps, EVERY, max(1, int(steps**0.5)), int(gradient), threads)
        return tuple(slopes) if gradient else eeg

    return call


def ours(steps: int, scheme: str = "exp_euler", precision: str = "exact", implementation: str = "numba"):
    """``(Ae, be, C) -> eeg`` and its gradient's function, compiled."""

    def run(Ae, be, C):
        model = bk.JansenRit(Ae=Ae * u.mV, be=be * u.Hz, C=C)
        result = bk.simulate(
            model, steps, 0.1 * u.ms, inputs={"E_inp": 220.0 * u.Hz}, every=EVERY, scheme=scheme, precision=precision,
            implementation=implementation,
        )  # fmt: skip
        return u.get_magnitude(result["eeg"])

    return jax.jit(run), jax.jit(jax.grad(lambda *args: jnp.mean(run(*args) ** 2), argnums=(0, 1, 2)))


def agreed(args, c) -> None:
    """Everything compared computes the same, or no speed is reported."""
    steps = 1000
    run, slope = ours(steps)
    wanted = jax.jit(lambda *a: reference.forward(*a, 220.0, steps, EVERY))(*args)
    slopes = jax.jit(jax.grad(lambda *a: reference.plain_loss(*a, 220.0, steps, EVERY), argnums=(0, 1, 2)))(*args)
    close(run(*args), wanted, 1e-4)
    for mine, theirs in zip(slope(*args), slopes):
        close(mine, theirs, 1e-3)
    if c is not None:
        close(jnp.asarray(c(*args, steps, False)), wanted, 1e-4)
        for mine, theirs in zip(c(*args, steps, True), slopes):
            close(jnp.asarray(mine), theirs, 1e-3)
    if importlib.util.find_spec("brainmass"):
        close(bench.simulated_by_brainmass(steps, jit=True)(*args), wanted, 1e-3)


def compared(lanes: int, steps: int, repeats: int, c) -> list[dict]:
    """Forward against everything; the gradient against C and `jax.grad` of plain and of checkpointed scans."""
    args = parameters(lanes)
    run, slope = ours(steps)
    fast_run, fast_slope = ours(steps, precision="fast")
    strang_run, strang_slope = ours(steps, scheme="strang")
    hand = jax.jit(lambda *a: reference.forward(*a, 220.0, steps, EVERY))
    forward = {
        "numba": lambda: run(*args), "numba, fast": lambda: fast_run(*args), "numba, strang": lambda: strang_run(*args),
        "hand-written scan": lambda: hand(*args),
    }  # fmt: skip
    gradient = {
        "numba": lambda: slope(*args), "numba, fast": lambda: fast_slope(*args),
        "numba, strang": lambda: strang_slope(*args),
    }  # fmt: skip
    checkpointed = jax.jit(jax.grad(lambda *a: reference.checkpointed_loss(*a, 220.0, steps, EVERY), argnums=(0, 1, 2)))
    gradient["hand-checkpointed scan"] = lambda: checkpointed(*args)
    if c is not None:
        forward["C"] = lambda: c(*args, steps, False)
        gradient["C"] = lambda: c(*args, steps, True)
    if importlib.util.find_spec("brainmass"):
        # Each call compiles anew, as Simulator.run does unasked.
        simulated = bench.simulated_by_brainmass(steps, jit=True)
        forward["brainmass.Simulator"] = lambda: simulated(*args)
    # A plain scan keeps the whole trajectory.
    if lanes * steps <= PLAIN:
        plain = jax.jit(jax.grad(lambda *a: reference.plain_loss(*a, 220.0, steps, EVERY), argnums=(0, 1, 2)))
        gradient["plain scan"] = lambda: plain(*args)
    return [
        reported("forward", lanes, steps, timed(forward, repeats, least=True)),
        reported("gradient of mean eeg^2 in Ae, be, C", lanes, steps, timed(gradient, repeats, least=True)),
    ]


PLAIN = 1024 * 10_000


def reported(what: str, lanes: int, steps: int, seconds: dict) -> dict:
    def ratio(name: str):
        faster = seconds[name] / seconds["numba"]
        return {"numba_is_faster": faster}, f"numba {faster:5.2f}x"

    return timing.report(what, lanes, steps, seconds, ratio)


def small(lanes: int, steps: int, repeats: int) -> list[dict]:
    """A few masses, against `scan` as it is chosen without numba."""
    args, rows = parameters(lanes), []
    run, slope = ours(steps)
    with bk.testing.without("numba"):
        scan_run = jax.jit(lambda *a: fused(*a, steps, EVERY))
        scan_slope = jax.jit(jax.grad(lambda *a: fused_loss(*a, steps, EVERY), argnums=(0, 1, 2)))
        jax.block_until_ready((scan_run(*args), scan_slope(*args)))
    for what, pair in {"forward": (run, scan_run), "gradient": (slope, scan_slope)}.items():
        functions = {"numba": lambda f=pair[0]: f(*args), "scan": lambda f=pair[1]: f(*args)}
        rows.append(reported(what, lanes, steps, timed(functions, repeats, least=True)))
    return rows


COMPILE = """
import time, jax, numpy as np
began = time.perf_counter()
from brainmass_kernels.backends.numba.machine import machine
machine()
print(time.perf_counter() - began)
from benchmarks.ledger import jansen_rit_loop
from brainmass_kernels.backends.base import Carry, Operands
from brainmass_kernels.backends.numba import ForwardKernel, Uncoupled, call
loop, per_mass = jansen_rit_loop("exp_euler")
coefs = [jax.ShapeDtypeStruct((16384,) if m else (), np.dtype("float32")) for m in per_mass]
state = [jax.ShapeDtypeStruct((16384,), np.dtype("float32"))] * loop.n_state
began = time.perf_counter()
call.register(ForwardKernel(Uncoupled, loop, Operands(coefs), Carry(state), None))
print(time.perf_counter() - began)
"""


def compile_seconds() -> dict[str, float]:
    """Of the forward kernel: compiled first, and then loaded by another process; beside them, LLVM's own start."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "BRAINMASS_KERNELS_CACHE": cache, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", COMPILE]
        (_, first), (start, again) = [
            map(float, subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split())
            for _ in range(2)
        ]
    print(f"compiled in {first:.2f} s, reloaded in {again:.2f} s, after LLVM's own start of {start:.2f} s")
    return {"compiled": first, "reloaded": again, "llvm_start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the work, to see that it runs; nothing is written"
    )
    quick = parser.parse_args().quick
    steps, repeats = (1000, 2) if quick else (10_000, 7)
    c = compiled_c()
    agreed(parameters(1024), c)
    results = compared(16_384, steps, repeats, c) + compared(1024, steps, repeats, c)
    for lanes in (1, 64):
        results += small(lanes, steps, 4 * repeats)
    compiling = compile_seconds()
    if not quick:
        save(
            RESULTS / "native.json", ("jax", "numpy", "llvmlite", "brainmass_kernels"),
            cores=len(os.sched_getaffinity(0)), load=os.getloadavg()[0], compile_seconds=compiling, results=results,
        )  # fmt: skip


if __name__ == "__main__":
    main()
