"""What a fused run cannot be differentiated by is refused in one sentence, however JAX comes to ask for it."""

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brainmass_kernels as bk


def simulated(mu, record: Any = "x"):
    return bk.simulate(bk.VanDerPol(mu=mu), 6, 0.5 * u.ms, record=record, implementation="numba")


def losses():
    weights = np.ones((2, 2), np.float32)

    def network(mu):
        of = bk.Network(bk.VanDerPol(mu=mu), weights, k=0.1)
        return jnp.sum(bk.simulate(of, 6, 0.5 * u.ms, record="x", implementation="numba")["x"])

    def sensitivity(mu):
        _, by = bk.sensitivities(bk.VanDerPol(mu=mu), 6, 0.5 * u.ms, "mu", record="x", implementation="numba")
        return jnp.sum(by["mu"]["x"])

    return {
        "run": lambda mu: jnp.sum(simulated(mu)["x"]),
        "statistic": lambda mu: simulated(mu, record=bk.Mean())["x_mean"],
        "network": network,
        "sensitivity": sensitivity,
        "checkpointed": lambda mu: jnp.sum(jax.checkpoint(lambda mu: simulated(mu)["x"])(mu)),
        "scanned": lambda mu: jax.lax.scan(lambda c, _: (c + 1e-3 * jnp.sum(simulated(c)["x"]), None), mu, None, 2)[0],
    }


LOSSES = losses()
TWO = jnp.ones(2)
ASKED = {
    "jvp": lambda f: jax.jvp(f, (1.0,), (1.0,)),
    "jacfwd": lambda f: jax.jacfwd(f)(1.0),
    "linearize": lambda f: jax.linearize(f, 1.0)[1](1.0),
    "hessian": lambda f: jax.hessian(f)(1.0),
    "grad of grad": lambda f: jax.grad(jax.grad(f))(1.0),
    "grad of grad, compiled": lambda f: jax.jit(jax.grad(jax.grad(f)))(1.0),
    "grad of compiled grad": lambda f: jax.grad(jax.jit(jax.grad(f)))(1.0),
    "compiled jvp": lambda f: jax.jit(lambda mu: jax.jvp(f, (mu,), (1.0,)))(1.0),
    "jvp of compiled": lambda f: jax.jvp(jax.jit(f), (1.0,), (1.0,)),
    "jvp of vmap": lambda f: jax.jvp(jax.vmap(f), (TWO,), (TWO,)),
    "vmap of jvp": lambda f: jax.vmap(lambda mu, t: jax.jvp(f, (mu,), (t,)))(TWO, TWO),
    "vmap of grad of grad": lambda f: jax.vmap(jax.grad(jax.grad(f)))(TWO),
    "grad by the cotangent": lambda f: jax.grad(lambda c: jax.vjp(f, 1.0)[1](c)[0])(1.0),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("loss", LOSSES)
def test_refused_with_what_to_ask_for(loss, asked):
    with pytest.raises(TypeError, match=r'implementation="scan"'):
        ASKED[asked](LOSSES[loss])


def test_linearize_is_refused_before_it_is_applied():
    with pytest.raises(TypeError, match=r"linearize, hessian\) of simulate\(\) on 'numba'"):
        jax.linearize(LOSSES["run"], 1.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_reverse_mode_works_as_before(loss):
    f = LOSSES[loss]
    value = jax.grad(f)(1.0)
    assert np.isfinite(value)
    assert value != 0.0
    for other in (
        jax.jit(jax.grad(f))(1.0), jax.vmap(jax.grad(f))(TWO)[0], jax.grad(lambda mu: jnp.sum(jax.vmap(f)(mu)))(TWO)[1],
        jax.vjp(f, 1.0)[1](1.0)[0], jax.jacrev(f)(1.0),
    ):  # fmt: skip
        np.testing.assert_allclose(other, value, rtol=1e-5)


def test_scan_is_differentiated_twice():
    def f(mu):
        return jnp.sum(bk.simulate(bk.VanDerPol(mu=mu), 6, 0.5 * u.ms, record="x", implementation="scan")["x"])

    np.testing.assert_allclose(jax.hessian(f)(1.0), jax.grad(jax.grad(f))(1.0), rtol=1e-4)
    np.testing.assert_allclose(jax.jvp(f, (1.0,), (1.0,))[1], jax.grad(LOSSES["run"])(1.0), rtol=1e-4)
