"""What is timed on each kind of device."""

from __future__ import annotations

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
    batches = CPU_BATCHES if platform == "cpu" else BATCHES
    big, mid = batches[-1], batches[2]
    precision = "exact" if platform == "cpu" else "fast"
    first = [Case(big, 10_000, precision=precision), Case(big, 10_000, gradient=True, precision=precision)]
    first += [Case(mid, 10_000, precision=precision), Case(mid, 10_000, gradient=True, precision=precision)]
    if precision == "fast":
        first += [Case(big, 10_000), Case(big, 10_000, gradient=True)]
    rest = [
        Case(lanes, steps, gradient, noisy, precision=precision)
        for noisy in (False, True)
        for steps in (10_000, 1_000)
        for gradient in (False, True)
        for lanes in reversed(batches)
    ]
    first.append(Case(big, 10_000, scheme="exp_euler", precision=precision))
    return list(dict.fromkeys([*first, *rest]))


def crossover_cases(platform: str) -> list[Case]:
    """Sizes of forward runs between which the fastest implementation changes, from a few mass-steps on."""
    if platform == "cpu":
        grid = [(lanes, steps) for lanes in (1, 4, 16, 64, 1024, 4096) for steps in (10, 100, 1_000, 10_000)]
        return [Case(lanes, steps) for lanes, steps in grid if lanes * steps <= 1024 * 10_000]
    return [Case(lanes, steps) for lanes in BATCHES for steps in (10, 100, 1_000, 10_000)]
