"""Tempered sequential Monte Carlo, for posteriors of several modes: particles follow the prior to the posterior.

The likelihood is raised to a power that grows from 0 to 1, by as much as leaves half of the particles effective. After
each growth they are resampled by their weights and moved by Hamiltonian Monte Carlo. A chain is a population of its
own, so that R-hat compares independent runs; all particles of all populations are lanes of one run.

Del Moral, Doucet and Jasra 2006, Journal of the Royal Statistical Society B 68:411-436.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..extras import needs
from .density import LogDensity
from .progress import SampleProgress
from .running import Checkpoint
from .samplers import Draw, flat

_EXTRA = "bayes"
#: Stages of resampling and moves at the posterior itself.
_LAST = 3


class Population(NamedTuple):
    """Populations ``(chains,)`` of particles ``(draws,)`` and what their last stage was.

    Attributes
    ----------
    z : ``(chains, draws, d)``
    weights : ``(chains, draws)``, that sum to 1
    temperature : ``(chains,)``, the power of the likelihood
    step : ``(chains,)``, a step of HMC, relative to the spread of the particles
    evidence : ``(chains,)``, the logarithm of the mean likelihood under the prior, so far
    acceptance, divergent, gradients : ``(chains, draws)``, of the last moves
    settled : stages since all temperatures were 1
    spent : gradients so far
    """

    z: Any
    weights: Any
    temperature: Any
    step: Any
    evidence: Any
    acceptance: Any
    divergent: Any
    gradients: Any
    settled: Any
    spent: Any


@dataclasses.dataclass(frozen=True)
class Tempered:
    """The kernel of a stage: BlackJAX's adaptive tempering, with moves of HMC."""

    target: float = 0.8
    #: Part of the particles that a growth leaves effective, moves of a stage, and most steps of one.
    effective: float = 0.5
    moves: int = 5
    most_steps: int = 16

    name: ClassVar[str] = "smc"

    def check(self, density: LogDensity, chains: int) -> None:
        return

    def begin(self, z) -> Population:
        """At draws from the prior ``(chains, draws, d)``."""
        (chains, draws, d), dtype = z.shape, z.dtype
        one, none = jnp.ones(chains, dtype), jnp.zeros((chains, draws), dtype)
        step, count = 0.7 * d**-0.25 * one, jnp.zeros((), int)
        empty = none.astype(bool), none.astype(int)
        return Population(z, none + 1 / draws, 0 * one, step, 0 * one, none, *empty, count, count)

    def stage(self, density: LogDensity, state: Population, key) -> Population:
        """Resample, move, and raise the power, of all populations."""
        tempered = needs("blackjax.smc.tempered", _EXTRA).TemperedSMCState
        chains, draws = state.z.shape[:2]
        covariance = jax.vmap(_covariance)(state.z, state.weights)
        length = jax.random.uniform(jax.random.fold_in(key, 1), (), minval=0.5, maxval=1.0) * jnp.pi / 2
        steps = jnp.clip(jnp.ceil(length / state.step), 1, self.most_steps).astype(int)
        kernel = self._kernel(density)

        def one(key, z, weights, temperature, **parameters):
            # BlackJAX shares what has a first axis of 1 between all particles.
            shared = {name: x[None] for name, x in parameters.items()}
            return kernel(key, tempered(z, weights, temperature), self.moves, shared)

        moved, info = jax.vmap(one)(
            jax.random.split(key, chains), state.z, state.weights, state.temperature,
            step_size=state.step, inverse_mass_matrix=covariance, num_integration_steps=steps,
        )  # fmt: skip
        update = info.update_info
        acceptance = jnp.nan_to_num(jnp.mean(update.acceptance_rate.reshape(chains, draws, -1), -1))
        gradients = jnp.broadcast_to((steps * self.moves)[:, None], (chains, draws))
        settled = jnp.all(state.temperature >= 1)
        return Population(
            moved.particles, moved.weights, moved.tempering_param,
            jnp.clip(state.step * jnp.exp(jnp.mean(acceptance, 1) - self.target), 1e-3, 1.5),
            state.evidence + info.log_likelihood_increment, acceptance,
            jnp.any(update.is_divergent.reshape(chains, draws, -1), -1), gradients,
            state.settled + settled, state.spent + jnp.sum(gradients),
        )  # fmt: skip

    def _kernel(self, density: LogDensity):
        """Of one population."""
        blackjax = needs("blackjax", _EXTRA)
        adaptive, resampling = (needs(f"blackjax.smc.{x}", _EXTRA) for x in ("adaptive_tempered", "resampling"))
        hmc = blackjax.hmc.build_kernel()

        def jittered(key, state, log_density, step_size, **parameters):
            # Steps of one size would turn all particles by the same angle.
            key, own = jax.random.split(key)
            return hmc(
                key, state, log_density, step_size * jax.random.uniform(own, minval=0.8, maxval=1.2), **parameters
            )

        def of(function):
            return lambda v: function(density.of_vectors(v))

        def likelihood(v):
            # A particle whose run is not finite has no weight, whatever the power, 0 included.
            return jnp.maximum(of(density.log_likelihood)(v), -1e30)

        return adaptive.build_kernel(
            of(density.log_prior), likelihood, jittered, blackjax.hmc.init, resampling.systematic, self.effective
        )


def _covariance(z, weights):
    """Of weighted particles ``(draws, d)``."""
    centred = z - jnp.sum(weights[:, None] * z, 0)[None]
    covariance = centred.T @ (weights[:, None] * centred)
    return covariance + jnp.diag(1e-5 * jnp.diagonal(covariance) + 1e-12)


@functools.partial(jax.jit, static_argnames=("sampler", "where"))
def _stage(sampler: Tempered, density: LogDensity, state: Population, key, number, where) -> Population:
    return sampler.stage(density, state, jax.random.fold_in(key, number))


@functools.partial(jax.jit, static_argnames=("where",))
def _log_densities(density: LogDensity, z, where):
    return jax.vmap(jax.vmap(flat(density)))(z)


def run(
    sampler: Tempered, density: LogDensity, z, key, file: Checkpoint | None, show, where
) -> tuple[Population, Draw, float]:
    """The particles at the posterior, these as draws ``(draws, chains, ...)``, and the seconds of an interrupted call.

    Raises
    ------
    FloatingPointError : the power of the likelihood does not grow
    """
    state, number, seconds, spent, earlier = sampler.begin(jnp.asarray(z)), 0, 0.0, 0, 0.0
    if file and (found := file.read(state)):
        number, state, arrays = found
        spent, earlier = int(state.spent), float(arrays["seconds"])
    while int(state.settled) < _LAST:
        began, before = time.perf_counter(), state
        state = jax.block_until_ready(_stage(sampler, density, state, key, number, where))
        number += 1
        seconds += time.perf_counter() - began
        coldest = float(np.min(state.temperature))
        if coldest < 1 and not np.any(np.asarray(state.temperature) > np.asarray(before.temperature)):
            raise FloatingPointError(
                f"the power of the likelihood stays at {coldest:.3g}: no step of it leaves half of the particles "
                "effective. Take more draws, priors nearer to the data, or a likelihood that is wider"
            )
        if file:
            counts = {"seconds": np.asarray(earlier + seconds)}
            file.write(number, state, counts, last=int(state.settled) >= _LAST)
        if show:
            mean, lost = float(np.mean(state.acceptance)), int(np.sum(state.divergent))
            show(SampleProgress(number, 0, 0, mean, lost, int(state.spent) - spent, seconds, coldest))
    values = _log_densities(density, state.z, where)
    draw = Draw(state.z, values, state.acceptance, state.divergent, state.gradients)
    return state, Draw(*(np.moveaxis(np.asarray(x), 1, 0) for x in draw)), earlier
