"""What is observed and what drives, within the loop and around it: ``python -m benchmarks.observation``.

Functional connectivity of 76 Jansen-Rit regions as `bk.Correlation`, beside records that are stored and given to
``np.corrcoef``; a train of pulses beside the same values as an array, one a step and one a step and lane; and the
seconds a step of a joint fit of functional connectivity and its dynamics to ten minutes of BOLD of 76 regions. Times
are the least of rounds in turn, and only the ratios hold; peaks of memory are each of a process of its own, beyond
what it takes without a run.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk
from brainmass_kernels import bench

from .timing import close, options, save, timed

VERSIONS = ("jax", "llvmlite")
DT = 0.5 * u.ms


# Functional connectivity ----------------------------------------------------------------------------------------------


def network(k=0.1, model=None, **coupling):
    connectome = bk.load_connectome(76).normalized()
    weights = np.asarray(connectome.weights, np.float32)
    where = {"source": "eeg", "target": "E_inp"} | coupling
    return bk.Network(model or bk.JansenRit(), weights, coupling="diffusive", k=k, **where)


def recorded(record, steps: int):
    return bk.simulate(
        network(0.1 * u.Hz / u.mV), steps, DT, inputs={"E_inp": 120 * u.Hz}, key=jax.random.key(0),
        noise={"E_inp": 2 * u.Hz * u.second**0.5}, record=record, transient=steps // 10,
    )  # fmt: skip


def in_the_loop(steps: int):
    return next(iter(recorded(bk.Correlation(of="eeg"), steps).values()))


def of_stored(steps: int):
    return np.corrcoef(np.asarray(recorded("eeg", steps)["eeg"].mantissa).T)


def nothing(steps: int):
    return recorded(bk.Correlation(of="eeg"), 100)["eeg_correlation"]


CONNECTIVITY = {"Correlation": in_the_loop, "stored, np.corrcoef": of_stored}


def peaks(steps: int) -> dict[str, int]:
    """Bytes of each beyond a process that runs next to nothing."""
    found = {}
    for name in ("nothing", *CONNECTIVITY):
        command = [sys.executable, "-m", "benchmarks.observation", "--peak", name, str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return {name: found[name] - found["nothing"] for name in CONNECTIVITY}


def connectivity(steps: int, repeats: int) -> dict:
    close(in_the_loop(2000), of_stored(2000), 1e-3)
    seconds = timed({name: functools.partial(f, steps) for name, f in CONNECTIVITY.items()}, repeats, least=True)
    rows = {name: {"seconds": seconds[name], "peak_bytes": peak} for name, peak in peaks(steps).items()}
    for name, row in rows.items():
        print(f"76 regions x {steps:,} records, {name}: {row['seconds']:.2f} s, {row['peak_bytes'] / 2**20:.0f} MiB")
    return {"regions": 76, "records": steps - steps // 10, "rows": rows}


# Stimuli --------------------------------------------------------------------------------------------------------------


def driven(drive, steps: int, amplitude):
    lanes = {"C": jnp.linspace(120.0, 150.0, len(amplitude), dtype=jnp.float32)}
    found = bk.simulate(bk.JansenRit(**lanes), steps, DT, inputs={"E_inp": drive}, record="eeg", every=10)
    return found["eeg"].mantissa


def train(amplitude=1.0):
    return bk.PulseTrain(100 * u.ms, 20 * u.ms, 125 * u.ms, amplitude * u.Hz, edge=2 * u.ms)


def stimuli(lanes: int, steps: int, repeats: int) -> list[dict]:
    # The default scheme takes a stimulus in the middle of a step.
    times = (np.arange(steps) + 0.5) * DT.to_decimal(u.ms) * u.ms
    at = np.asarray(train().values(times).to_decimal(u.Hz), np.float32)
    amplitude = jnp.linspace(50.0, 250.0, lanes, dtype=jnp.float32)
    drives = {
        "PulseTrain": lambda a: 90 * u.Hz + train(a),
        "an array, one a step": lambda a: (90 + jnp.asarray(at) * a[0]) * u.Hz,
        "an array, one a step and lane": lambda a: (90 + jnp.asarray(at)[:, None] * a) * u.Hz,
    }

    def run(drive, a, records=None):
        return driven(drive(a), steps, a)[:records]

    def gradient(drive, a):
        return jax.grad(lambda a: jnp.mean(driven(drive(a), steps, a) ** 2))(a)

    # Later the masses amplify rounding.
    close(*(run(drives[name], amplitude, 100) for name in ("PulseTrain", "an array, one a step and lane")), 1e-2)
    results = []
    for what, of in (("forward", run), ("gradient in amplitudes", gradient)):
        calls = {name: jax.jit(functools.partial(of, drive)) for name, drive in drives.items()}
        seconds = timed({name: functools.partial(call, amplitude) for name, call in calls.items()}, repeats, least=True)
        for name, each in seconds.items():
            ratio = each / seconds["PulseTrain"]
            print(f"{lanes:,} masses x {steps:,} steps, {what}, {name}: {ratio:.2f} times a PulseTrain")
            results.append({"what": what, "drive": name, "lanes": lanes, "steps": steps, "seconds": each,
                            "ratio": round(ratio, 3)})  # fmt: skip
    return results


# A joint fit ----------------------------------------------------------------------------------------------------------


def joint_fit(minutes: float, steps: int) -> dict:
    """Seconds a step of a fit to BOLD's functional connectivity and its dynamics, from 4 starts."""
    tr, dt = 2.0 * u.second, 1 * u.ms
    model = bk.with_bold(bk.Hopf(a=-0.02, w=0.06), "x")

    def of(k):
        return network(k, model, source="x", target="x_inp")

    window, step = (min(60.0, 20.0 * minutes) * u.second, min(20.0, 5.0 * minutes) * u.second)
    run = {
        "duration": minutes * 60 * u.second, "dt": dt, "every": 2000, "transient": 10 * u.second,
        "noise": {"x_inp": 0.02 * u.ms**0.5}, "key": jax.random.key(0),
    }  # fmt: skip
    seen = bk.simulate(of(0.02), record=[bk.Correlation(of="bold"), bk.FCD(window, step, of="bold")], **run)
    target = bk.Joint({
        "fc": bk.Connectivity(np.asarray(seen["bold_correlation"])),
        "fcd": bk.ConnectivityDynamics(np.asarray(seen["bold_fcd"]), window, step),
    })  # fmt: skip
    times: list[float] = []

    def tick(_):
        times.append(time.perf_counter())

    fit = bk.fit(
        of(0.01), target, {"coupling.k": (0.002, 0.05), "a": (-0.05, 0.0)}, record="bold", starts=4, realisations=1,
        steps=steps, progress=tick, gradient_horizon=2 * u.second, **run,
    )  # fmt: skip
    each = float(np.median(np.diff(times)))
    print(f"76 regions, {minutes:g} min of BOLD every {tr}, 4 starts: {each:.2f} s a step, peak of the process "
          f"{bench.peak_memory() / 2**30:.2f} GiB")  # fmt: skip
    return {"minutes": minutes, "starts": 4, "network_steps": round(minutes * 60_000), "seconds_a_step": each,
            "peak_bytes": bench.peak_memory(), "errors": [float(x) for x in np.min(fit.losses[:, 0], 1)]}  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        name, steps = sys.argv[2:]
        jax.block_until_ready(({"nothing": nothing} | CONNECTIVITY)[name](int(steps)))
        print(bench.peak_memory())
        return
    asked = options(__doc__, "observation", "few steps", 5)
    if asked.quick:
        connectivity(2000, 1)
        stimuli(64, 1000, 1)
        joint_fit(2.0, 2)
        return
    numbers = {"joint_fit": joint_fit(10.0, 5)}
    numbers |= {"connectivity": connectivity(2_000_000, asked.repeats), "stimuli": stimuli(1024, 20_000, asked.repeats)}
    save(asked.out, VERSIONS, **numbers)


if __name__ == "__main__":
    main()
