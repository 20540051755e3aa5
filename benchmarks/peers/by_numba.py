"""numba by hand: masses in blocks that stay in the first cache, a polynomial exponential, blocks shared by prange.

The adjoint is written by hand too, with checkpoints; numba differentiates nothing.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import njit, prange

from . import work as w
from .work import DRIVE, DT, EVERY, ONE, SHARED, Work

HOW = "njit(parallel, fastmath), blocks of 64 masses, polynomial exp, adjoint by hand with checkpoints"
PACKAGES = ("numba", "llvmlite")
SCHEMES = dict.fromkeys(("forward", "gradient", "noise", "network"), "exp_euler")
REFUSED = {"fit": "the derivative of a spectrum is not written by hand"}
BLOCK = 64
f32 = np.float32
STEP = f32(DT)
AI, BI, S_MAX, V0, R = (f32(SHARED[name]) for name in ("Ai", "bi", "s_max", "v0", "r"))
INPUT, WIDTH = f32(DRIVE), f32(w.NOISE / math.sqrt(DT))
# Of the inhibitory block, which all masses share: v' = KEEP_I v + PUSH_I C rate - PULL_I x.
_SHARE_I = -math.expm1(-2.0 * SHARED["bi"] * DT) / (2.0 * SHARED["bi"])
KEEP_I = f32(1.0 - 2.0 * SHARED["bi"] * _SHARE_I)
PULL_I = f32(_SHARE_I * SHARED["bi"] ** 2)
PUSH_I = f32(_SHARE_I * SHARED["Ai"] * SHARED["bi"] * 0.25 * SHARED["s_max"])
THE_AE, THE_BE, THE_C = (f32(ONE[name]) for name in ("Ae", "be", "C"))
LOG2E, LN2 = f32(1.4426950408889634), f32(0.6931471805599453)
C0, C1, C2, C3 = f32(0.5), f32(0.16666512), f32(0.04166619), f32(0.0083696)
C4 = f32(0.00139517)
ONE_, QUARTER, LOW, HIGH = f32(1.0), f32(0.25), f32(-87.0), f32(88.0)
#: Rows of a block's numbers: states, sigmoids, scratch, coefficients.
M, E, I, MV, EV, IV, SM, SE, SI, REST, KEEP, PULL, PUSH_M, PUSH_E, IN_E, C = range(16)
ROWS = 16


@njit(fastmath=True, inline="always")
def sigmoid(x, row, v, bits, power):
    """Of `v` of each mass of a block, into a row: in three loops, each of which becomes SIMD."""
    for i in range(BLOCK):
        t = min(max(-R * (v[i] - V0), LOW), HIGH)
        n = np.rint(t * LOG2E)
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
        x[REST, i] = t - n * LN2
    for i in range(BLOCK):
        r = x[REST, i]
        p = C0 + r * (C1 + r * (C2 + r * (C3 + r * C4)))
        x[row, i] = ONE_ / (ONE_ + power[i] * (ONE_ + r * (ONE_ + r * p)))


@njit(fastmath=True, inline="always")
def coefficients(x, Ae, be, Cs, first):
    for i in range(BLOCK):
        a, b, c = Ae[first + i], be[first + i], Cs[first + i]
        share = f32(-math.expm1(-f32(2.0) * b * STEP)) / (f32(2.0) * b)
        x[KEEP, i] = ONE_ - f32(2.0) * b * share
        x[PULL, i] = share * b * b
        x[PUSH_M, i] = share * a * b * S_MAX
        x[PUSH_E, i] = share * a * b * f32(0.8) * c * S_MAX
        x[IN_E, i] = share * a * b
        x[C, i] = c


@njit(fastmath=True, inline="always")
def rates(x, v, bits, power):
    for i in range(BLOCK):
        v[i] = x[E, i] - x[I, i]
    sigmoid(x, SM, v, bits, power)
    for i in range(BLOCK):
        v[i] = x[C, i] * x[M, i]
    sigmoid(x, SE, v, bits, power)
    for i in range(BLOCK):
        v[i] = QUARTER * x[C, i] * x[M, i]
    sigmoid(x, SI, v, bits, power)


@njit(fastmath=True, inline="always")
def step(x, drive, v, bits, power):
    """One of a block; `drive` in Hz of each mass."""
    rates(x, v, bits, power)
    for i in range(BLOCK):
        mv, ev, iv = x[MV, i], x[EV, i], x[IV, i]
        x[MV, i] = x[KEEP, i] * mv + x[PUSH_M, i] * x[SM, i] - x[PULL, i] * x[M, i]
        x[EV, i] = x[KEEP, i] * ev + x[IN_E, i] * drive[i] + x[PUSH_E, i] * x[SE, i] - x[PULL, i] * x[E, i]
        x[IV, i] = KEEP_I * iv + PUSH_I * x[C, i] * x[SI, i] - PULL_I * x[I, i]
        x[M, i] += STEP * mv
        x[E, i] += STEP * ev
        x[I, i] += STEP * iv


@njit(parallel=True, fastmath=True)
def forward(Ae, be, Cs, eeg):
    for block in prange(Cs.size // BLOCK):
        first = block * BLOCK
        x = np.zeros((ROWS, BLOCK), np.float32)
        v, drive = np.empty(BLOCK, np.float32), np.full(BLOCK, INPUT)
        bits = np.empty(BLOCK, np.int32)
        power = bits.view(np.float32)
        coefficients(x, Ae, be, Cs, first)
        for k in range(eeg.shape[0]):
            for _ in range(EVERY):
                step(x, drive, v, bits, power)
            for i in range(BLOCK):
                eeg[k, first + i] = x[E, i] - x[I, i]


@njit(parallel=True, fastmath=True)
def noisy(Ae, be, Cs, eeg):
    """numba keeps a generator of random numbers for each thread."""
    for block in prange(Cs.size // BLOCK):
        first = block * BLOCK
        x = np.zeros((ROWS, BLOCK), np.float32)
        v, drive = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        bits = np.empty(BLOCK, np.int32)
        power = bits.view(np.float32)
        coefficients(x, Ae, be, Cs, first)
        for k in range(eeg.shape[0]):
            for _ in range(EVERY):
                for i in range(BLOCK):
                    drive[i] = INPUT + WIDTH * f32(np.random.standard_normal())
                step(x, drive, v, bits, power)
            for i in range(BLOCK):
                eeg[k, first + i] = x[E, i] - x[I, i]


@njit(fastmath=True, inline="always")
def back(a, kept, x, d):
    """Adjoints `a` of the six states one step back, and what C gains: directly in d[0], by two pushes in d[1], d[2]."""
    for i in range(BLOCK):
        m, sm, se, si = kept[0, i], kept[1, i], kept[2, i], kept[3, i]
        am, ae, ai, amv, aev, aiv = a[M, i], a[E, i], a[I, i], a[MV, i], a[EV, i], a[IV, i]
        by_m = R * amv * x[PUSH_M, i] * sm * (ONE_ - sm)
        by_e = R * aev * x[PUSH_E, i] * se * (ONE_ - se)
        by_i = QUARTER * R * aiv * PUSH_I * x[C, i] * si * (ONE_ - si)
        d[0, i] += (by_e + by_i) * m
        d[1, i] += aev * se
        d[2, i] += aiv * si
        a[M, i] = am + (by_e + by_i) * x[C, i] - x[PULL, i] * amv
        a[E, i] = ae + by_m - x[PULL, i] * aev
        a[I, i] = ai - by_m - PULL_I * aiv
        a[MV, i] = STEP * am + x[KEEP, i] * amv
        a[EV, i] = STEP * ae + x[KEEP, i] * aev
        a[IV, i] = STEP * ai + KEEP_I * aiv


@njit(parallel=True, fastmath=True)
def gradient(Ae, be, Cs, slopes, records, strides, scale):
    """Of scale/2 times the sum of eeg^2 in C: segments of so many records are run again, then walked back."""
    length, segments = strides * EVERY, records // strides
    for block in prange(Cs.size // BLOCK):
        first = block * BLOCK
        x, a = np.zeros((ROWS, BLOCK), np.float32), np.zeros((6, BLOCK), np.float32)
        d, kept = np.zeros((3, BLOCK), np.float32), np.empty((length, 4, BLOCK), np.float32)
        checkpoints, eeg = np.empty((segments, 6, BLOCK), np.float32), np.empty((strides, BLOCK), np.float32)
        v, drive = np.empty(BLOCK, np.float32), np.full(BLOCK, INPUT)
        bits = np.empty(BLOCK, np.int32)
        power = bits.view(np.float32)
        coefficients(x, Ae, be, Cs, first)
        for g in range(segments):
            checkpoints[g] = x[:6]
            if g < segments - 1:
                for _ in range(length):
                    step(x, drive, v, bits, power)
        for g in range(segments - 1, -1, -1):
            x[:6] = checkpoints[g]
            for n in range(length):
                for i in range(BLOCK):
                    kept[n, 0, i] = x[M, i]
                step(x, drive, v, bits, power)
                for i in range(BLOCK):
                    kept[n, 1, i] = x[SM, i]
                    kept[n, 2, i] = x[SE, i]
                    kept[n, 3, i] = x[SI, i]
                if (n + 1) % EVERY == 0:
                    for i in range(BLOCK):
                        eeg[n // EVERY, i] = x[E, i] - x[I, i]
            for n in range(length - 1, -1, -1):
                if (n + 1) % EVERY == 0:
                    for i in range(BLOCK):
                        a[E, i] += scale * eeg[n // EVERY, i]
                        a[I, i] -= scale * eeg[n // EVERY, i]
                back(a, kept[n], x, d)
        for i in range(BLOCK):
            push = x[PUSH_E, i] / x[C, i]
            slopes[0, first + i] = d[0, i] + push * d[1, i] + PUSH_I * d[2, i]


@njit(parallel=True, fastmath=True)
def network(k, starts, sources, late, strength, depth, eeg):
    """A network for each thread: a ring of what its regions sent, and each region's connections in turn."""
    regions = starts.size - 1
    share = f32(-math.expm1(-f32(2.0) * THE_BE * STEP)) / (f32(2.0) * THE_BE)
    keep, pull = ONE_ - f32(2.0) * THE_BE * share, share * THE_BE * THE_BE
    push, c = share * THE_AE * THE_BE, THE_C
    for j in prange(k.size):
        x = np.zeros((6, regions), np.float32)
        ring, total = np.zeros((depth, regions), np.float32), np.empty(regions, np.float32)
        at = 0
        for n in range(eeg.shape[0] * EVERY):
            for r in range(regions):
                received = f32(0.0)
                for edge in range(starts[r], starts[r + 1]):
                    when = at - late[edge]
                    if when < 0:
                        when += depth
                    received += strength[edge] * ring[when, sources[edge]]
                total[r] = INPUT + k[j] * received
            for r in range(regions):
                ring[at, r] = x[E, r]
                m, e, i, mv, ev, iv = x[M, r], x[E, r], x[I, r], x[MV, r], x[EV, r], x[IV, r]
                sm = S_MAX / (ONE_ + math.exp(R * (V0 - (e - i))))
                se = S_MAX / (ONE_ + math.exp(R * (V0 - c * m)))
                si = ONE_ / (ONE_ + math.exp(R * (V0 - QUARTER * c * m)))
                x[M, r], x[E, r], x[I, r] = m + STEP * mv, e + STEP * ev, i + STEP * iv
                x[MV, r] = keep * mv + push * sm - pull * m
                x[EV, r] = keep * ev + push * (total[r] + f32(0.8) * c * se) - pull * e
                x[IV, r] = KEEP_I * iv + PUSH_I * c * si - PULL_I * i
            at += 1
            if at == depth:
                at = 0
            if (n + 1) % EVERY == 0:
                for r in range(regions):
                    eeg[n // EVERY, j, r] = x[E, r] - x[I, r]


def settings(work: Work) -> list[str]:
    if work.case == "gradient":
        # About the root of the steps.
        root = max(1, math.isqrt(work.steps) // EVERY)
        return [f"segments of {EVERY * max(d for d in range(1, root + 1) if work.records % d == 0)}"]
    return [f"{numba.get_num_threads()} threads"]


def prepared(work: Work, setting: str):
    if work.case == "network":
        return _network(work)
    if work.lanes % BLOCK:
        raise ValueError(f"{work.lanes} masses got, but blocks are of {BLOCK}")
    Ae, be, Cs = (np.ascontiguousarray(x, np.float32) for x in w.parameters(work.lanes))
    if work.case == "gradient":
        slopes, strides = np.empty((1, work.lanes), np.float32), int(setting.split()[2]) // EVERY
        scale = f32(2.0 / (work.lanes * work.records))

        def call():
            gradient(Ae, be, Cs, slopes, work.records, strides, scale)
            return {"slopes": slopes}

        return call
    run, eeg = noisy if work.case == "noise" else forward, np.empty((work.records, work.lanes), np.float32)

    def records():
        run(Ae, be, Cs, eeg)
        return {"records": eeg}

    return records


def _network(work: Work):
    weights, delays = w.connectome(work)
    into, sources = np.nonzero(weights)
    starts = np.searchsorted(into, np.arange(len(weights) + 1)).astype(np.int64)
    late, strength = delays[into, sources].astype(np.int64), weights[into, sources].astype(np.float32)
    k, eeg = w.strengths(work.lanes), np.empty((work.records, work.lanes, len(weights)), np.float32)
    depth = int(delays.max()) + 1

    def records():
        network(k, starts, sources.astype(np.int64), late, strength, depth, eeg)
        return {"records": eeg}

    return records
