"""The warm-up of samplers: a step size and a metric that all chains share and adapt together.

Chains are lanes of one run, and lanes that take steps of the same size need about as many. A window's covariance is
that within all chains, so a window is as good as one that is `chains` times as long. The windows are Stan's (Stan
Reference Manual, "HMC algorithm parameters"): fast ones adapt the step size alone, slow ones also collect draws for a
metric.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..extras import needs

#: What an iteration is for: the step size, also the metric, also the end of its window, or a draw that counts.
FAST, SLOW, END, DRAW = range(4)
#: Draws for which a metric counts its correlations, at first guessed to be 0, as not known.
_DOUBT = 5.0
#: Most of a step in a metric that is the posterior's covariance.
_LONGEST = 1.0


def schedule(warmup: int) -> np.ndarray:
    """The stage of each iteration of a warm-up."""
    windows = needs("blackjax.adaptation.window_adaptation", "bayes")
    stages = np.asarray(windows.build_schedule(warmup), int).reshape(-1, 2)
    return np.where(stages[:, 1] == 1, END, np.where(stages[:, 0] == 1, SLOW, FAST))


class Window(NamedTuple):
    """The moments of the positions of a window.

    Those of each chain are about its own mean: a chain in another mode does not widen the metric of all.

    Attributes
    ----------
    count : of positions of each chain
    mean : ``(chains, d)``
    scatter : ``(d, d)``, the sum of the products of what is beside the means
    """

    count: Any
    mean: Any
    scatter: Any

    @classmethod
    def empty(cls, z) -> Window:
        """Of no positions of chains ``(chains, d)``."""
        return cls(jnp.zeros((), z.dtype), jnp.zeros_like(z), jnp.zeros((z.shape[1], z.shape[1]), z.dtype))

    def with_positions(self, z) -> Window:
        """With one more of each chain: Welford 1962, Technometrics 4:419-420."""
        count, before = self.count + 1, z - self.mean
        mean = self.mean + before / count
        return Window(count, mean, self.scatter + before.T @ (z - mean))

    def covariance(self):
        """The covariance, with correlations that are smaller the fewer the positions are."""
        known = len(self.mean) * jnp.maximum(self.count - 1, 1)
        covariance = (self.scatter + self.scatter.T) / (2 * known)
        variances = jnp.maximum(jnp.diagonal(covariance), 1e-12)
        trust = known / (known + _DOUBT)
        # A little more variance in every direction keeps the rounded matrix positive.
        return trust * covariance + jnp.diag((1 - trust + 1e-5) * variances)


class Metric(NamedTuple):
    """A Gaussian that resembles the posterior: the inverse of a mass matrix, and where it is.

    Attributes
    ----------
    centre : ``(d,)``
    covariance : ``(d, d)``
    root : its Cholesky factor
    """

    centre: Any
    covariance: Any
    root: Any

    @classmethod
    def unit(cls, d: int) -> Metric:
        eye = jnp.eye(d, dtype=jnp.result_type(float))
        return cls(jnp.zeros(d, eye.dtype), eye, eye)

    @classmethod
    def of(cls, window: Window) -> Metric:
        covariance = window.covariance()
        return cls(jnp.mean(window.mean, 0), covariance, jnp.linalg.cholesky(covariance))

    def whitened(self, z):
        """Positions ``(chains, d)`` relative to the Gaussian."""
        return jnp.linalg.solve(self.root, (z - self.centre[None]).T).T

    def stretch(self, former: Metric):
        """What a step that was as long as the former metric allowed is to be multiplied with.

        That was ruled by the direction in which the posterior is narrowest in the former metric, where the standard
        deviation is 1 in this one.
        """
        seen = jnp.linalg.solve(former.root, jnp.linalg.solve(former.root, self.covariance).T)
        return 1 / jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh((seen + seen.T) / 2)[0], 1e-12))


def longest(step, stretch):
    """A step size in a new metric."""
    return jnp.minimum(step * stretch, _LONGEST)
