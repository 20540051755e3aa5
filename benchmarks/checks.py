"""Kernels compiled for the device at hand against a float64 `lax.scan` on the CPU: what `benchmarks.device_check` runs.

A check is one program on the device, run twice: its records, final states and gradients are compared leaf by leaf, and
both runs must have the same bits. The memory that it gets was filled with NaN before.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk
from brainmass_kernels import units

from .cases import Check, NetworkCheck

# Lanes after which parameters, inputs and noise repeat; no divisor of a block, so that places in blocks see all.
PERIOD = 43
DT = 0.1 * u.ms
MODELS = {entry.name: entry.model for entry in bk.list_models()}
# Free parameters, of Jansen-Rit with a rate among them; of the others, the first three.
FREE = {"JansenRit": ("Ae", "be", "C")}
# Drives that keep a model from decaying towards zero, where a relative error means nothing.
DRIVES = {"JansenRit": {"M_inp": 0.5, "E_inp": 220.0}, "Hopf": {"x_inp": 0.5}}
NOISE = {"JansenRit": {"E_inp": 2.0 * u.Hz * u.second**0.5}}


def around(rng, value: float, *shape: int):
    """Within 5 % of a value, as float32 holds it."""
    return np.float32((value or 0.1) * rng.uniform(0.95, 1.05, shape)).astype(np.float64)


@functools.lru_cache
def drawn(check: Check) -> dict[str, dict[str, np.ndarray]]:
    """Parameters, inputs and initial states of one period of lanes, whose last axis they have."""
    cls, rng = MODELS[check.model], np.random.default_rng(0)
    default = cls.parameters()
    parameters = {n: around(rng, u.get_mantissa(default[n]), PERIOD) for n in FREE.get(check.model, list(default)[:3])}
    if "be" in parameters:
        parameters["be"] = np.float32(parameters["be"] * check.rates).astype(np.float64)
    defaults = {**{n: u.get_mantissa(x) for n, x in cls.inputs.items()}, **DRIVES.get(check.model, {})}
    inputs = {}
    for at, (name, value) in enumerate(defaults.items()):
        row, stream = check.driven and at == 0, check.driven and at == 1
        inputs[name] = around(rng, value, *((check.steps,) if row or stream else ()), *(() if row else (PERIOD,)))
        if row:
            inputs[name] = np.broadcast_to(inputs[name][:, None], (check.steps, PERIOD))
    initial = {n: around(rng, u.get_mantissa(cls.initial.get(n, 0.1)), PERIOD) for n in cls.states}
    return {"parameters": parameters, "inputs": inputs, "initial": initial}


def is_row(check: Check, path) -> bool:
    """Whether a leaf is the input that all lanes share."""
    return check.driven and path[0].key == "inputs" and path[1].key == next(iter(MODELS[check.model].inputs))


def spread(check: Check, lanes: int):
    """The period that each lane repeats, and everything of `drawn` for so many lanes."""
    index = np.arange(lanes) % PERIOD

    def one(path, x):
        return np.asarray(x[:, 0] if is_row(check, path) else x[..., index], check.dtype)

    return index, jax.tree_util.tree_map_with_path(one, drawn(plain(check)))


def plain(check: Check) -> Check:
    """What the reference of a check depends on."""
    return check._replace(name="", lanes=PERIOD, precision="exact", dtype="float64", bound=0.0)


def simulated(check: Check, index, implementation: str, theta):
    cls, more = MODELS[check.model], {}
    known = {"parameters": cls.parameter_units(), "initial": cls.states}
    known["inputs"] = {n: units.unit_of(x) for n, x in cls.inputs.items()}
    quantities = {kind: {n: units.attach(x, known[kind][n]) for n, x in some.items()} for kind, some in theta.items()}
    if check.noisy:
        more = {"noise": NOISE[check.model], "key": jax.random.split(jax.random.key(3), PERIOD)[index]}
    if check.statistic:
        more["record"] = {"mean": bk.Mean(), "variance": bk.Variance()}
    return bk.simulate(
        cls(**quantities["parameters"]), check.steps, DT, inputs=quantities["inputs"], initial=quantities["initial"],
        every=check.every, transient=check.transient or None, scheme=check.scheme, precision=check.precision,
        checkpoint_every=check.checkpoint_every, implementation=implementation, **more,
    )  # fmt: skip


def bare(quantities) -> dict:
    return {name: u.get_mantissa(x) for name, x in quantities.items()}


def weighed(values, index):
    """A weighed sum of all that a run returned, whose weights repeat with the lanes.

    Final states count a hundredth: velocities are that much larger than positions, and what a constant input does to
    them cancels over time, to rounding.
    """
    rng, total = np.random.default_rng(1), 0.0
    for name in sorted(values):
        x, share = values[name], 0.01 if name.startswith("final ") else 1.0
        weights = np.float32(share * rng.uniform(0.5, 1.5, (*x.shape[:-1], PERIOD)))[..., index]
        total += jnp.sum(x * jnp.asarray(weights, x.dtype)) / math.prod(x.shape[:-1])
    return total


def program(check: Check, index, implementation: str):
    """What is compiled: ``theta -> (records and final states, gradient)``, the latter empty in a forward check."""

    def run(theta):
        result = simulated(check, index, implementation, theta)
        return {**bare(result.records), **{f"final {n}": x for n, x in bare(result.final).items()}}

    def loss(theta):
        values = run(theta)
        return weighed(values, index), values

    if check.gradient:
        return jax.jit(lambda theta: jax.grad(loss, has_aux=True)(theta)[::-1])
    return jax.jit(lambda theta: (run(theta), {}))


@contextlib.contextmanager
def in_float64():
    """Whatever runs within runs on the CPU, with 64 bits."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@functools.lru_cache
def reference(check: Check):
    """What every lane of a period gives, by `scan` in float64; rows that lanes share are given to each."""
    with in_float64():
        return jax.tree.map(np.asarray, program(check, np.arange(PERIOD), "scan")(drawn(check)))


def wanted(check: Check, index):
    """The reference, for the lanes of a check."""
    values, gradient = reference(plain(check))
    count = np.bincount(index, minlength=PERIOD)

    def one(path, x):
        return x @ count if is_row(check, path) else x[..., index]

    return {n: x[..., index] for n, x in values.items()}, jax.tree_util.tree_map_with_path(one, gradient)


def poison() -> None:
    """Fill memory that is then free with NaN, so that what a kernel does not write is seen."""
    if jax.default_backend() != "cpu":
        jax.block_until_ready([jnp.full((64, 2**20), jnp.nan, jnp.float32) for _ in range(4)])


def distance(got, want) -> float:
    """Relative to the norm of what is wanted; infinite where shapes differ or a value is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return math.inf
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def compared(function, arguments, want, bound: float) -> dict[str, Any]:
    """Run twice, and hold every leaf against what is wanted: the worst of them, and whether it all holds."""
    poison()
    got, again = (jax.tree.map(np.asarray, function(arguments)) for _ in range(2))
    named, values = jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    distances = [(distance(x, y), path) for (path, x), y in zip(named, values, strict=True)]
    worst, path = max(distances, key=lambda pair: pair[0])
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again)))
    return {
        "ok": bool(worst <= bound and same), "off": worst if math.isfinite(worst) else None, "bound": bound,
        "worst": jax.tree_util.keystr(path), "same_bits_twice": same,
    }  # fmt: skip


@functools.lru_cache
def compiled(check: Check, implementation: str):
    return program(check, np.arange(check.lanes) % PERIOD, implementation)


def run(check: Check, implementation: str) -> dict[str, Any]:
    """One check: how far it is off, and whether that is within its bound.

    Raises
    ------
    Unsupported : the implementation cannot run it
    """
    # The rates of a check are data: where nothing else differs, the program is that of the check before.
    function = compiled(check._replace(name="", rates=1.0, bound=0.0), implementation)
    with jax.enable_x64(check.dtype == "float64"):
        index, theta = spread(check, check.lanes)
        return compared(function, theta, wanted(check, index), check.bound)


# Networks -----------------------------------------------------------------------------------------------------------


def network_values(check: NetworkCheck) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Delays in steps, and everything that a gradient is taken in."""
    rng, n, batch = np.random.default_rng(2), check.regions, (check.networks, check.regions)
    steps = rng.integers(0, check.longest + 1, (n, n))
    values = {
        "weights": rng.uniform(0.0, 2.0 / n, (n, n)) * (rng.uniform(size=(n, n)) < 0.7),
        "k": np.linspace(0.1, 0.3, check.networks)[:, None],
        "a": np.full(n, 0.1),
        "x": rng.uniform(-0.5, 0.5, batch),
        "y_inp": rng.uniform(-0.2, 0.2, (check.steps, *batch)),
    }
    if check.longest:
        values["history"] = rng.uniform(-0.5, 0.5, (steps.max(), *batch))
    return steps, {name: np.float32(x).astype(np.float64) for name, x in values.items()}


def network_program(check: NetworkCheck, steps, implementation: str):
    def loss(v):
        network = bk.Network(
            bk.Hopf(a=v["a"], w=0.3), v["weights"], delays=steps * DT, coupling="diffusive", source="x",
            target="x_inp", k=v["k"],
        )  # fmt: skip
        past = {"history": v["history"]} if "history" in v else {}
        run = bk.simulate(
            network, check.steps, DT, initial={"x": v["x"], "y": 0.1, **past}, inputs={"y_inp": v["y_inp"]},
            record=("x", "y"), every=3, transient=5, checkpoint_every=7, implementation=implementation,
        )  # fmt: skip
        values = {**bare(run.records), **{f"final {n}": x for n, x in bare(run.final).items()}}
        return sum(jnp.sum(jnp.sin((2.0 + i) * values[n])) for i, n in enumerate(sorted(values))), values

    return jax.jit(lambda v: jax.grad(loss, has_aux=True)(v)[::-1])


def run_network(check: NetworkCheck, implementation: str) -> dict[str, Any]:
    """As `run`, of a network."""
    steps, values = network_values(check)
    with in_float64():
        want = jax.tree.map(np.asarray, network_program(check, steps, "scan")(values))
    narrow = {name: x.astype(np.float32) for name, x in values.items()}
    return compared(network_program(check, steps, implementation), narrow, want, check.bound)


# What is large ------------------------------------------------------------------------------------------------------


def run_many_records(masses: int, steps: int, implementation: str, of: int = 64) -> dict[str, Any]:
    """Every step of many masses, that repeat after a few: each record of each is that of the few."""

    def recorded(C):
        run = bk.simulate(
            bk.JansenRit(C=C), steps, DT, inputs={"E_inp": 220.0 * u.Hz}, record=("E",), implementation=implementation
        )
        return run["E"].mantissa, run.final["E"].mantissa

    @jax.jit
    def off(C, few):
        """The largest distance of each record, and of the final state from the last."""
        records, final = recorded(C)
        apart = jnp.max(jnp.abs(records.reshape(steps, -1, of) - few[:, None]), axis=(1, 2))
        return apart, jnp.max(jnp.abs(final - records[-1]))

    C = jnp.linspace(130.0, 140.0, of, dtype=jnp.float32)
    few, _ = jax.jit(recorded)(C)
    apart, last = (np.asarray(x, np.float64) for x in off(jnp.tile(C, masses // of), few))
    size = float(jnp.max(jnp.abs(few)))
    worst = float(max(apart.max(), last) / size)
    ok = bool(np.isfinite(apart).all() and np.isfinite(few).all() and worst <= 1e-4)
    return {"ok": ok, "off": worst if math.isfinite(worst) else None, "bound": 1e-4, "records": masses * steps}


def run_many_steps(steps: int, implementation: str, bound: float = 1e-3) -> dict[str, Any]:
    """Noise and one value a step of the input, over many steps; weakly driven, so that no rounding error grows."""
    drive = 40.0 + 20.0 * np.sin(np.linspace(0.0, 50.0, steps))

    def program(name: str):
        def run(values):
            result = bk.simulate(
                bk.JansenRit(C=values["C"]), steps, DT, inputs={"E_inp": values["drive"] * u.Hz}, every=steps // 100,
                noise={"E_inp": 0.2 * u.Hz * u.second**0.5}, key=jax.random.key(5), implementation=name,
            )  # fmt: skip
            return result["eeg"].mantissa

        return jax.jit(run)

    values = {"C": np.float32([130.0, 135.0, 140.0]), "drive": np.float32(drive)}
    with in_float64():
        want = np.asarray(program("scan")({n: x.astype(np.float64) for n, x in values.items()}))
    return {**compared(program(implementation), values, want, bound), "steps": steps}
