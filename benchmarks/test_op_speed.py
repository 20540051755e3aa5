"""Each function of one step against the same in plain jnp; ``pytest benchmarks/test_op_speed.py``.

Results are compared before anything is timed, and each function and size is a group of its own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk

from .cases import OP_SIZES

A, RATE, VMAX, V0, R, DT = 3.25, 100.0, 5.0, 6.0, 0.56, 5e-4
HERE = [name for name, why in bk.implementations().items() if why == "runs here"]


def plain_sigmoid(x, v, potential):
    return VMAX / (1.0 + jnp.exp(R * (V0 - potential)))


def plain_sys2nd(x, v, drive):
    return A * RATE * drive - 2.0 * RATE * v - RATE**2 * x


def plain_step(x, v, potential):
    """The closed form of critical damping around the rest point of a drive that is held."""
    rest = A * plain_sigmoid(x, v, potential) / RATE
    away, decay = x - rest, jnp.exp(-RATE * DT)
    pull = v + RATE * away
    return rest + decay * (away + pull * DT), decay * (v - RATE * DT * pull)


def step(x, v, potential, implementation: str | None = None):
    return bk.sigmoid_sys2nd(
        x, v, potential, A=A, a=RATE, vmax=VMAX, v0=V0, r=R, dt=DT, implementation=implementation
    )  # fmt: skip


# By function: the plain one first, then what is compared with it.
CONTENDERS = {
    "sigmoid": {"plain jnp": plain_sigmoid, "sigmoid": lambda x, v, potential: bk.sigmoid(potential, VMAX, V0, R)},
    "sys2nd": {"plain jnp": plain_sys2nd, "sys2nd": lambda x, v, drive: bk.sys2nd(A, RATE, drive, x, v)},
    "sigmoid_sys2nd": {
        "plain jnp": plain_step,
        "chosen": step,
        **{name: functools.partial(step, implementation=name) for name in HERE},
    },
}


def arguments(size: int):
    spread = jnp.linspace(0.0, 1.0, size, dtype=jnp.float32)
    return 0.2 * spread, 20.0 * spread - 10.0, 12.0 * spread


@pytest.mark.parametrize("size", OP_SIZES)
@pytest.mark.parametrize(
    ("op", "contender"), [(op, name) for op, contenders in CONTENDERS.items() for name in contenders]
)
def test_op(benchmark, op, contender, size):
    args = arguments(size)
    run = jax.jit(CONTENDERS[op][contender])
    for got, want in zip(*map(jax.tree.leaves, (run(*args), CONTENDERS[op]["plain jnp"](*args))), strict=True):
        # Accelerations and velocities are differences of large terms.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(want))))
    benchmark.group = f"{op}, {size:,} elements"
    benchmark(lambda: jax.block_until_ready(run(*args)))
