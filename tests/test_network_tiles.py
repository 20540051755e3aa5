"""Networks on the CPU at the edges of tiles: delays and steps of a tile, of a long one, and one more and less."""

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk
from brainmass_kernels.backends.numba.network_runtime import LONG, TILE

EDGES = [1, TILE - 1, TILE, TILE + 1, 2 * TILE, LONG - 1, LONG, LONG + 1, 2 * LONG + 3]


def of(implementation: str, regions: int, steps: int):
    """Records of a run, and with them its gradient in strengths, weights and inputs; two quantities are sent."""
    made = np.random.default_rng(regions)
    weights = made.normal(size=(2, regions, regions)) / regions
    delays = made.choice(EDGES, (2, regions, regions)) * 0.1 * u.ms
    signal = made.normal(size=(steps, regions))

    def records(k, weights, signal):
        couplings = [
            bk.Coupling(weights[0], name="one", source="x", target="x_inp", delays=delays[0], k=k[0]),
            bk.Coupling(weights[1], name="two", source="y", target="y_inp", kind="diffusive", delays=delays[1], k=k[1]),
        ]
        net = bk.Network(bk.Hopf(), couplings=couplings)
        return bk.simulate(net, steps, 0.1 * u.ms, inputs={"x_inp": signal}, record="x", implementation=implementation)[
            "x"
        ]

    def total(*args):
        out = records(*args)
        return jnp.sum(out**2), out

    args = jnp.asarray([0.3, 0.2]), jnp.asarray(weights), jnp.asarray(signal)
    gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*args)
    alone = [jax.jit(records)(*args)] if implementation == "numba" else [out]
    return [*alone, out, *gradients]


@pytest.mark.parametrize("shape", [(3, LONG), (TILE, 2 * LONG + TILE + 1), (2 * TILE + 5, LONG + TILE - 1)])
def test_sums_at_the_edges_of_tiles(x64, shape):
    for found, expected in zip(of("numba", *shape), of("scan", *shape), strict=True):
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
