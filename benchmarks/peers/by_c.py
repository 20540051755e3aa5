"""C by hand, `jansen_rit.c`: blocks of masses in the first cache, SIMD, a thread a core, a hand-written adjoint."""

from __future__ import annotations

import ctypes
import math
import os
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np

from . import work as w
from .work import EVERY, Work

HOW = "jansen_rit.c: gcc -O3 -march=native -ffast-math, polynomial exp, a thread a core, adjoint by hand"
PACKAGES: tuple[str, ...] = ()
SCHEMES = {"forward": "exp_euler", "gradient": "exp_euler"}
REFUSED = {
    "noise": "no noise is written by hand in C",
    "network": "no network is written by hand in C",
    "fit": "the derivative of a spectrum is not written by hand",
}
SOURCE = pathlib.Path(__file__).parents[1] / "jansen_rit.c"
BLOCK = 64


def library() -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("no C compiler is here: install gcc")
    out = pathlib.Path(tempfile.mkdtemp()) / "jansen_rit.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-pthread", "-DSLOPES_IN_C_ALONE"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(out), "-lm"], check=True)
    return ctypes.CDLL(str(out))


def settings(work: Work) -> list[str]:
    most = len(os.sched_getaffinity(0))
    return [f"{max(t for t in range(1, most + 1) if work.lanes % (BLOCK * t) == 0)} threads"]


def prepared(work: Work, setting: str):
    run, threads, gradient = library().run, int(setting.split()[0]), work.case == "gradient"
    inputs = [np.ascontiguousarray(x, np.float32) for x in w.parameters(work.lanes)]
    eeg = np.empty((work.records, work.lanes), np.float32)
    slopes = [np.empty(work.lanes, np.float32) for _ in range(3)]
    pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (*inputs, eeg, *slopes)]

    def call():
        run(*pointers, work.lanes, work.steps, EVERY, max(1, math.isqrt(work.steps)), int(gradient), threads)
        return {"slopes": slopes[2][None]} if gradient else {"records": eeg}

    return call
