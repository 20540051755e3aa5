"""What peers of JAX share: the results asked for, made of their records, and lanes shared among devices.

On a CPU each core can be a device. A loop of small operations gains from it, so each of these peers is tried both ways.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import work as w
from .work import Work


def begin() -> None:
    """JAX has started before anything is timed."""
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.zeros(8)))


def cores() -> int:
    """That work is shared among: those of this process, if JAX was started with as many devices."""
    return min(len(os.sched_getaffinity(0)), jax.device_count())


def both_ways(settings: list[str], work: Work) -> list[str]:
    """Each setting on one device, and with lanes shared among as many as there are cores."""
    if cores() == 1 or work.lanes % cores():
        return settings
    return [*settings, *(f"{setting}, {cores()} devices" for setting in settings)]


def results(records: Callable, work: Work) -> Callable:
    """``(*arguments) -> dict`` of what a case asks for, of ``(*arguments) -> records``."""

    def recorded(*arguments):
        return {"records": records(*arguments)}

    def slopes(Ae, be, C):
        def power(C):
            return jnp.sum(records(Ae, be, C) ** 2) / (work.records * work.lanes)

        return {"slopes": jax.grad(power)(C)[None]}

    def step_of_a_fit(Ae, be, C):
        def loss(*values):
            return w.spectral_loss(records(*values), work, jnp)

        value, each = jax.value_and_grad(loss, argnums=(0, 1, 2))(Ae, be, C)
        return {"value": value, "slopes": jnp.stack(each)}

    return {"gradient": slopes, "fit": step_of_a_fit}.get(work.case, recorded)


def parameters(work: Work) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.asarray, w.parameters(work.lanes)))


def arguments(work: Work, shares: int) -> tuple[jax.Array, ...]:
    """Of a case: parameters, or strengths; with noise, a seed for each share of the lanes."""
    if work.case == "network":
        return (jnp.asarray(w.strengths(work.lanes)),)
    seeds = (jnp.arange(shares, dtype=jnp.uint32),) if work.case == "noise" else ()
    return (*parameters(work), *seeds)


def compiled(records: Callable, work: Work, setting: str, by_xla: bool = False) -> Callable[[], dict]:
    """A call of a case, compiled at its first; with ", N devices" in its setting, lanes are shared among them.

    Sharing is by `jax.shard_map`, or ``by_xla``, which finds out itself from where the arguments are.
    """
    function, shares = results(records, work), cores() if setting.endswith(" devices") else 1
    given = arguments(work, shares)
    if shares == 1:
        return partial(jax.jit(function), *given)
    mesh = Mesh(np.array(jax.devices()[:shares]), ("lanes",))
    first, second, whole = PartitionSpec("lanes"), PartitionSpec(None, "lanes"), PartitionSpec()
    if by_xla:
        # The one seed is everybody's.
        placed = [
            jax.device_put(x, NamedSharding(mesh, first if len(x) == work.lanes else whole)) for x in arguments(work, 1)
        ]
        return partial(jax.jit(function), *placed)
    placed = [jax.device_put(x, NamedSharding(mesh, first)) for x in given]
    specs = {"gradient": {"slopes": second}, "fit": {"value": first, "slopes": second}}

    def share(*arguments):
        result = function(*arguments)
        # Each device has a part of the sum.
        return {name: x[None] if name == "value" else x for name, x in result.items()}

    divided = jax.shard_map(
        share, mesh=mesh, in_specs=(first,) * len(placed), out_specs=specs.get(work.case, {"records": second}),
        check_vma=False,
    )  # fmt: skip
    return partial(jax.jit(divided), *placed)
