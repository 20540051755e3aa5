"""Whether chains agree and how many independent draws they are worth, of arrays ``(chains, draws)``.

Vehtari, Gelman, Simpson, Carpenter and Bürkner 2021, Bayesian Analysis 16:667-718: split chains, ranks in place of
values, and the initial sequences of Geyer 1992, Statistical Science 7:473-483.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

#: The least draws of a chain that these say anything about.
LEAST_DRAWS = 4


def r_hat(draws) -> float:
    """How much wider all chains are than each: near 1 where they agree, and NaN where a chain has too few draws.

    The larger of two: of ranks, which sees chains in different places, and of the ranks of distances from the median,
    which sees chains of different widths.
    """
    draws = _halves(draws)
    if not _usable(draws):
        return math.nan
    folded = np.abs(draws - np.median(draws))
    return max(_scale_reduction(_normal_scores(draws)), _scale_reduction(_normal_scores(folded)))


def ess_bulk(draws) -> float:
    """Independent draws that locate the posterior as well: by ranks, so that means need not exist."""
    draws = _halves(draws)
    return _effective(_normal_scores(draws)) if _usable(draws) else math.nan


def ess_tail(draws) -> float:
    """Independent draws that give the quantiles 5% and 95% as well, the worse of both."""
    if not _usable(_halves(draws)):
        return math.nan
    return min(_effective(_halves(draws <= np.quantile(draws, q))) for q in (0.05, 0.95))


def ess_mean(draws) -> float:
    """Independent draws whose mean is as good."""
    draws = _halves(draws)
    return _effective(draws) if _usable(draws) else math.nan


def _halves(draws) -> np.ndarray:
    """Each chain as two, without a draw in the middle of an odd number: a chain that drifts is not two that agree."""
    draws = np.asarray(draws, float)
    if draws.ndim != 2:
        raise ValueError(f"'draws' got shape {draws.shape}, but takes (chains, draws)")
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, draws.shape[1] - half :]])


def _usable(halves: np.ndarray) -> bool:
    return halves.shape[1] * 2 >= LEAST_DRAWS and bool(np.isfinite(halves).all())


def _normal_scores(draws: np.ndarray) -> np.ndarray:
    """The normal quantiles of ranks; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(draws, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse.ravel()]
    quantile = NormalDist().inv_cdf
    distinct, back = np.unique((ranks - 3 / 8) / (draws.size + 1 / 4), return_inverse=True)
    return np.array([quantile(p) for p in distinct])[back.ravel()].reshape(draws.shape)


def _scale_reduction(draws: np.ndarray) -> float:
    """The root of the ratio of the variance of all draws to that within chains."""
    n = draws.shape[1]
    within = draws.var(1, ddof=1).mean()
    if within == 0:
        return math.nan
    return math.sqrt((n - 1) / n + draws.mean(1).var(ddof=1) / within)


def _effective(draws: np.ndarray) -> float:
    """The number of draws over the sum of autocorrelations, by pairs of lags that are positive and fall."""
    chains, n = draws.shape
    if np.ptp(draws) == 0:
        return float(draws.size)
    covariance = _autocovariance(draws)
    within = covariance[:, 0].mean() * n / (n - 1)
    total = within * (n - 1) / n + (draws.mean(1).var(ddof=1) if chains > 1 else 0.0)
    rho = 1 - (within - covariance.mean(0)) / total
    rho[0] = 1.0
    pairs = rho[: n - n % 2].reshape(-1, 2).sum(1)
    # The last lags are of too few products.
    last = (n - 3) // 2
    negative = np.flatnonzero(pairs[:last] < 0)
    end = int(negative[0]) if len(negative) else last
    kept = np.minimum.accumulate(pairs[:end])
    # Of the pair at which the sum is cut, the first counts where it is positive: it lowers the variance.
    rest = max(float(rho[2 * end]), 0.0)
    time = -1 + 2 * kept.sum() + rest
    size = draws.size
    # Chains that swing are worth more than their number, but not by more than an estimate can say.
    return float(size / max(time, 1 / math.log10(size)))


def _autocovariance(draws: np.ndarray) -> np.ndarray:
    """``(chains, lags)``, each divided by the length of the chain."""
    n = draws.shape[1]
    spectrum = np.fft.rfft(draws - draws.mean(1, keepdims=True), 2 * n)
    return np.fft.irfft(np.abs(spectrum) ** 2, 2 * n)[:, :n] / n
