"""What every peer should compute, in numpy and float64, written apart from all of them.

Two answers to each case: by RK4 with half of the step, which is exact for this purpose, and by the scheme that a peer
says it runs, which its records must equal to the rounding of float32. Of many masses eight are computed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from . import work as w
from .work import DRIVE, DT, EVERY, NOISE, ONE, REGIONS, SHARED, Work

FEW = 8
#: Largest relative distance of float32 records and slopes from float64 by the same scheme.
AGREES = {"forward": 1e-3, "gradient": 5e-3, "network": 1e-3, "fit": 2e-2}
#: Of noisy runs: the mean over masses, in shares of the spread, and the spread, relative.
AGREES_IN_MEAN, AGREES_IN_SPREAD = 0.1, 0.1


class Answer(NamedTuple):
    """Of some lanes of a case.

    Attributes
    ----------
    records : (records, lanes), or (records, networks, regions), in mV
    value, slopes : of a loss, and of each lane; slopes are (1, lanes) in C, or (3, lanes) in Ae, be and C
    """

    records: np.ndarray | None = None
    value: float | None = None
    slopes: np.ndarray | None = None


def picked(lanes: int) -> np.ndarray:
    """The lanes that are compared."""
    return np.unique(np.linspace(0, lanes - 1, min(FEW, lanes)).round().astype(int))


# The equations --------------------------------------------------------------------------------------------------------


def forcing(x, p, drive):
    """What is pushed into the three velocities: (3, lanes)."""
    M, E, I = x[:3]

    def rate(v):
        return p["s_max"] / (1.0 + np.exp(p["r"] * (p["v0"] - v)))

    return np.stack([
        p["Ae"] * p["be"] * rate(E - I),
        p["Ae"] * p["be"] * (drive + p["C"] * p["a2"] * rate(p["C"] * p["a1"] * M)),
        p["Ai"] * p["bi"] * p["C"] * p["a4"] * rate(p["C"] * p["a3"] * M),
    ])  # fmt: skip


def rates(p):
    ones = np.ones(np.shape(p["C"]))
    return np.stack([p["be"] * ones, p["be"] * ones, p["bi"] * ones])


def drift(x, p, drive):
    rate = rates(p)
    return np.concatenate([x[3:], forcing(x, p, drive) - 2.0 * rate * x[3:] - rate**2 * x[:3]])


def euler(x, p, drive, h):
    return x + h * drift(x, p, drive(0.0))


def exp_euler(x, p, drive, h):
    """Velocities relax exactly, with all else held at the old state; potentials go by Euler."""
    rate = rates(p)
    share = -np.expm1(-2.0 * rate * h) / (2.0 * rate)
    pushed = forcing(x, p, drive(0.0)) - rate**2 * x[:3] - 2.0 * rate * x[3:]
    return np.concatenate([x[:3] + h * x[3:], x[3:] + share * pushed])


def heun(x, p, drive, h):
    first = drift(x, p, drive(0.0))
    return x + 0.5 * h * (first + drift(x + h * first, p, drive(1.0)))


def rk4(x, p, drive, h):
    a = drift(x, p, drive(0.0))
    b = drift(x + 0.5 * h * a, p, drive(0.5))
    c = drift(x + 0.5 * h * b, p, drive(0.5))
    return x + h / 6.0 * (a + 2.0 * b + 2.0 * c + drift(x + h * c, p, drive(1.0)))


SCHEMES = {"euler": euler, "exp_euler": exp_euler, "heun": heun, "rk4": rk4}
#: Steps of a scheme in one of the work's.
FINER = {"rk4": 2}


def simulated(steps: int, p: dict, scheme: str, noise=None) -> np.ndarray:
    """The eeg of every 10th step, (records, lanes); ``noise`` draws one value a lane for each step, in Hz."""
    step, finer = SCHEMES[scheme], FINER.get(scheme, 1)
    x, records = np.zeros((6, *p["C"].shape)), []
    for n in range(steps * finer):
        late = DRIVE if noise is None else DRIVE + noise()
        x = step(x, p, lambda share: late, DT / finer)  # noqa: B023
        if (n + 1) % (EVERY * finer) == 0:
            records.append(x[1] - x[2])
    return np.stack(records)


def _of_lanes(Ae, be, C) -> dict:
    return {**SHARED, "Ae": np.asarray(Ae, float), "be": np.asarray(be, float), "C": np.asarray(C, float)}


# The cases ------------------------------------------------------------------------------------------------------------


@functools.lru_cache
def answer(work: Work, scheme: str) -> Answer:
    """Of the lanes `picked`, by a scheme in float64."""
    if work.case == "network":
        return Answer(network(work, scheme))
    Ae, be, C = (x[picked(work.lanes)].astype(float) for x in w.parameters(work.lanes))
    if work.case == "forward":
        return Answer(simulated(work.steps, _of_lanes(Ae, be, C), scheme))
    if work.case == "gradient":
        return Answer(slopes=differences(work, (Ae, be, C), scheme, (2,), mean_square)[1])
    value, slopes = differences(work, (Ae, be, C), scheme, (0, 1, 2), each_spectrum)
    return Answer(value=value, slopes=slopes)


def mean_square(eeg, work: Work) -> np.ndarray:
    """What each lane adds to mean eeg^2 over all lanes."""
    return np.mean(eeg**2, 0) / work.lanes


def each_spectrum(eeg, work: Work) -> np.ndarray:
    return np.array([w.spectral_loss(eeg[:, i : i + 1], work) for i in range(eeg.shape[1])])


def differences(work: Work, values, scheme: str, which, loss) -> tuple[float, np.ndarray]:
    """The loss of these lanes, and central differences of it in some parameters: all runs as lanes of one."""
    by, lanes = 1e-5, len(values[0])
    runs = [values]
    for i in which:
        runs += [[x * (1.0 + s * by * (i == j)) for j, x in enumerate(values)] for s in (1.0, -1.0)]
    eeg = simulated(work.steps, _of_lanes(*(np.concatenate(each) for each in zip(*runs))), scheme)
    losses = loss(eeg, work).reshape(-1, lanes)
    slopes = [(losses[1 + 2 * n] - losses[2 + 2 * n]) / (2.0 * by * values[i]) for n, i in enumerate(which)]
    return float(losses[0].sum()), np.stack(slopes)


def network(work: Work, scheme: str) -> np.ndarray:
    """``(records, networks, regions)``; between its steps the past of RK4 is a straight line."""
    weights, delays = w.connectome(work)
    step, finer = SCHEMES[scheme], FINER.get(scheme, 1)
    k = w.strengths(work.lanes)[picked(work.lanes)].astype(float)[:, None]
    p = _of_lanes(*(np.full((len(k), REGIONS), ONE[name]) for name in ("Ae", "be", "C")))
    rows, columns = np.nonzero(weights)
    late, strength = delays[rows, columns] * finer, weights[rows, columns].astype(float)
    x = np.zeros((6, len(k), REGIONS))
    past, records = np.zeros((work.steps * finer + 1, len(k), REGIONS)), []
    into = np.zeros((len(rows), REGIONS))
    into[np.arange(len(rows)), rows] = strength
    for n in range(work.steps * finer):
        past[n] = x[1]

        @functools.cache
        def received(share, n=n):
            def at(step):
                return np.where((step >= 0)[:, None], past[np.maximum(step, 0), :, columns], 0.0)

            at_step = n - late
            sent = at(at_step) if share == 0.0 else (1.0 - share) * at(at_step) + share * at(at_step + 1)
            return DRIVE + k * (sent.T @ into)

        x = step(x, p, received, DT / finer)
        if (n + 1) % (EVERY * finer) == 0:
            records.append(x[1] - x[2])
    return np.stack(records)


@functools.lru_cache
def noisy_answer(work: Work) -> tuple[np.ndarray, float]:
    """The mean over masses in time, and the spread, of RK4 with a normal number held over each half step."""
    lanes = min(work.lanes, 1024)
    rng, width = np.random.default_rng(0), NOISE / np.sqrt(DT / FINER["rk4"])
    eeg = simulated(
        work.steps, _of_lanes(*w.parameters(lanes)), "rk4", lambda: width * rng.standard_normal(lanes)
    )  # fmt: skip
    return eeg.mean(1), spread(eeg)


def spread(eeg) -> float:
    """The standard deviation between masses whose parameters are next to the same, in the second half of the run."""
    late = np.asarray(eeg, float)[len(eeg) // 2 :]
    return float(np.sqrt(np.mean(np.diff(late, axis=1) ** 2) / 2.0))


# The comparison -------------------------------------------------------------------------------------------------------


def compared(work: Work, scheme: str, got: dict) -> dict:
    """How far a peer's result is from both answers; ``{"wrong": why, ...}`` where it is too far.

    Parameters
    ----------
    got : ``records``, or ``value`` and ``slopes``, as arrays of all lanes
    """
    if not all(np.isfinite(x).all() for x in got.values()):
        return {"wrong": "not all numbers are finite"}
    if work.case == "noise":
        return _noisy(work, got["records"])
    lanes = picked(work.lanes)
    same, exact = answer(work, scheme), answer(work, "rk4")
    found: dict = {}
    if same.records is not None:
        mine = got["records"][:, lanes]
        found["rms_mV"] = _rms(mine, exact.records)
        found["from_scheme"] = _distance(mine, same.records)
    else:
        mine = got["slopes"][:, lanes]
        found["slopes_from_rk4"] = _distance(mine, exact.slopes)
        found["from_scheme"] = _distance(mine, same.slopes)
    if not found["from_scheme"] <= AGREES[work.case]:
        found["wrong"] = f"{found['from_scheme']:.2g} from {scheme} in float64, where {AGREES[work.case]:g} is allowed"
    return found


def _noisy(work: Work, eeg) -> dict:
    mean, width = noisy_answer(work)
    found: dict = {"rms_mV": _rms(eeg.mean(1), mean), "spread_mV": spread(eeg), "spread_of_rk4_mV": width}
    if abs(found["spread_mV"] / width - 1.0) > AGREES_IN_SPREAD:
        found["wrong"] = f"a spread of {found['spread_mV']:.3g} mV, where {width:.3g} mV is right"
    elif np.sqrt(np.mean((eeg.mean(1) - mean) ** 2)) > AGREES_IN_MEAN * np.std(mean) + 0.1 * width:
        found["wrong"] = f"the mean over masses is {found['rms_mV']:.3g} mV from RK4's"
    return found


def _rms(a, b) -> float:
    return float(np.sqrt(np.mean((np.asarray(a, float) - b) ** 2)))


def _distance(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a, float) - b) / np.linalg.norm(b))
