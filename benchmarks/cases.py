"""What is timed on each kind of device."""

from __future__ import annotations

from typing import NamedTuple

from brainmass_kernels.bench import Case

BATCHES = (1, 128, 4096, 65_536, 1_048_576)
# Fewer on the CPU, where the largest would take minutes.
CPU_BATCHES = (1, 128, 4096)


# Of `test_op_speed`: elements of each argument.
OP_SIZES = (1, 1024, 1_048_576)
# Of `test_simulate_speed`, in brainmass's own scheme.
SIMULATE_CASES = [
    Case(lanes, 1000, gradient, scheme="exp_euler") for gradient in (False, True) for lanes in (1, 64, 1024)
]


# Networks of `benchmarks.networks` on an accelerator: regions, share of connections, networks, steps, of a gradient.
NETWORKS = (
    (76, 0.27, 64, 2_000, False),
    (76, 0.27, 64, 2_000, True),
    (76, 0.27, 1024, 1_000, False),
    (192, 0.1, 128, 1_000, False),
)


def device_cases(platform: str) -> list[Case]:
    """In order of what is most worth knowing, as time may run out."""
    if platform == "cpu":
        return _device_cases(CPU_BATCHES, "exact")
    return _device_cases(BATCHES, "fast")


def _device_cases(batches: tuple[int, ...], precision: str) -> list[Case]:
    big, mid = batches[-1], batches[2]
    plain = [Case(big, 10_000, gradient, precision=precision) for gradient in (False, True)]
    plain += [Case(lanes, 10_000, precision=precision) for lanes in (mid, *batches)]
    plain += [Case(mid, 10_000, gradient=True, precision=precision)]
    rest = [Case(big, 10_000), Case(big, 10_000, noisy=True, precision=precision)]
    rest += [Case(big, 10_000, scheme="exp_euler", precision=precision), Case(big, 10_000, gradient=True)]
    rest += [Case(lanes, 1_000, precision=precision) for lanes in reversed(batches)]
    rest += [Case(lanes, 10_000, gradient=True, precision=precision) for lanes in reversed(batches)]
    rest += [Case(mid, 10_000), Case(big, 10_000, gradient=True, noisy=True, precision=precision)]
    return list(dict.fromkeys([*plain, *rest]))


def second_cases(platform: str) -> list[Case]:
    """Of an implementation that is not the first choice of a device: what dispatch chooses by, and two gradients."""
    plain = [case for case in device_cases(platform) if case.scheme == "strang" and not case.noisy]
    return [c for c in plain if not c.gradient or (c.lanes >= BATCHES[2] and c.precision == "fast")]


# Correctness on a device --------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """A run of every lane of which a float64 scan tells what it should be.

    Attributes
    ----------
    lanes : parameters repeat after `checks.PERIOD` of them, so that one reference serves every number
    driven : one value a step of the first input, and one a step and lane of the second
    gradient : of a weighed sum of records and final states, in parameters, rows of inputs and the initial state
    rates : what the parameter ``be`` is multiplied with: a gradient walks back by inverse steps where rates are slow,
        and replays where they are fast, as the program finds when it runs
    bound : the largest distance, relative to the norm
    """

    name: str
    lanes: int
    gradient: bool = False
    bound: float = 1e-5
    steps: int = 240
    every: int = 10
    transient: int = 0
    noisy: bool = False
    driven: bool = False
    statistic: bool = False
    scheme: str | None = None
    precision: str = "exact"
    checkpoint_every: int | None = None
    model: str = "JansenRit"
    dtype: str = "float32"
    rates: float = 1.0


# Wide enough for two and for four masses a thread on every GPU with 132 to 148 multiprocessors.
WIDE = 160_003, 320_003
SEVERAL = 129
ALL_INPUTS = {"driven": True, "noisy": True, "every": 7, "transient": 12}

FORWARD_CHECKS = [
    # A final state alone, near a zero of it, is a harder measure than a run.
    Check("129 masses", SEVERAL, steps=1000, bound=3e-5),
    Check("one mass", 1, steps=1000, bound=3e-5),
    Check("fast", SEVERAL, bound=2e-2, precision="fast"),
    Check("noise and inputs of both kinds", SEVERAL, **ALL_INPUTS),
    Check("four masses a thread", WIDE[1]),
    Check("two masses a thread", WIDE[0]),
    Check("exp_euler", SEVERAL, scheme="exp_euler"),
    Check("a statistic of a noisy run", SEVERAL, noisy=True, statistic=True),
    Check("noise, four masses a thread", WIDE[1], noisy=True),
]
# The same program by inverse steps, then by replay: rates are data.
SLOW_AND_FAST = (("by inverse steps", 1.0), ("by replay", 15.0))


def both_ways(check: Check) -> list[Check]:
    return [check._replace(name=f"{check.name}, {way}", rates=rates) for way, rates in SLOW_AND_FAST]


GRADIENT_CHECKS = [
    *both_ways(Check("129 masses", SEVERAL, True, 1e-4)),
    *both_ways(Check("1,000 masses, noise and inputs of both kinds", 1000, True, 1e-4, **ALL_INPUTS)),
    Check("segments of 200 steps", SEVERAL, True, 1e-4, steps=450, every=30, checkpoint_every=200, rates=2.0),
    # As long as a user's: segments of many parts, which were wrong on an H200 while all checks above held.
    Check("4,000 steps by inverse steps", SEVERAL, True, 1e-3, steps=4000),
    Check("4,000 steps by replay of parts", SEVERAL, True, 1e-3, steps=4000, scheme="exp_euler"),
    Check("exp_euler", SEVERAL, True, 1e-4, scheme="exp_euler"),
    *both_ways(Check("fast", SEVERAL, True, 2e-2, precision="fast")),
    Check("float64", SEVERAL, True, 1e-9, dtype="float64", **ALL_INPUTS),
]
# float32 itself is 3.7e-4 from float64 here, on `scan` and `numba` of a CPU as on GPUs: `lfp` is a small difference.
ILL_CONDITIONED = {"Epileptor": 1e-3}
MODEL_CHECKS = [
    Check(name, SEVERAL, bound=ILL_CONDITIONED.get(name, 1e-4), steps=200, every=25, model=name)
    for name in ("Hopf", "MontbrioPazoRoxin", "Epileptor", "CoombesByrne", "Wendling", "HORN", "LarterBreakspear")
]


class NetworkCheck(NamedTuple):
    """A network whose records and gradients a float64 scan tells: Hopf masses, diffusive coupling.

    Attributes
    ----------
    longest : delays are from 0 to these steps
    """

    name: str
    regions: int
    longest: int
    networks: int = 3
    steps: int = 60
    bound: float = 1e-4


NETWORK_CHECKS = [
    NetworkCheck("7 regions without delays", 7, 0),
    NetworkCheck("7 regions, each connection with its delay", 7, 48),
    NetworkCheck("76 regions, each connection with its delay", 76, 30),
]

# Masses and steps of which the records are more than 32 bits count, and a run of many steps.
MANY_RECORDS, MANY_STEPS = (2**20, 4200), 1_000_000
PROFILED = [Case(lanes, 1000, True, precision="fast") for lanes in (1_048_576, 65_536, 128)]
PROFILED_NETWORKS = ((76, 0.27, 1024, 200, False), (76, 0.27, 64, 200, False), (76, 0.27, 64, 200, True))


def crossover_cases(platform: str) -> list[Case]:
    """Sizes of forward runs between which the fastest implementation changes, from a few mass-steps on."""
    if platform == "cpu":
        grid = [(lanes, steps) for lanes in (1, 4, 16, 64, 1024, 4096) for steps in (10, 100, 1_000, 10_000)]
        return [Case(lanes, steps) for lanes, steps in grid if lanes * steps <= 1024 * 10_000]
    return [Case(lanes, steps) for lanes in BATCHES for steps in (10, 100, 1_000, 10_000)]
