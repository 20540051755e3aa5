"""Speed of `numba` on the CPU against C, hand-written scans and brainmass; ``python -m benchmarks.native``.

Everything compared is run in turn, A B A B, in one process; the ratio of medians is what counts, as machines are noisy.
Results must agree before any speed is printed. The C baseline, `jansen_rit.c`, is compiled when a compiler is there.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import time
from importlib import metadata

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk

from . import reference
from .cpu import RESULTS, close, fused, fused_loss, parameters, timed

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


def simulated_by_brainmass(args, steps: int):
    """brainmass's own Simulator on the same masses and steps."""
    import brainmass
    import brainstate

    Ae, be, C = args
    node = brainmass.JansenRitModel(in_size=Ae.shape[0], Ae=Ae * u.mV, be=be * u.Hz, C=C)
    simulator = brainmass.Simulator(node, dt=0.1 * u.ms)

    def run():
        with brainstate.environ.context(dt=0.1 * u.ms):
            return simulator.run(steps * 0.1 * u.ms, inputs=lambda *_: (0.0 * u.mV, 220.0 * u.Hz, 0.0 * u.mV))

    return run
