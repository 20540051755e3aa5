"""R-hat and effective numbers of draws: against ArviZ, and against processes whose values are known."""

import math

import numpy as np
import pytest

from brainmass_kernels.inference import diagnostics

CASES = {
    "independent": (0.0, 4, 200), "slow": (0.95, 4, 400), "swinging": (-0.6, 4, 150), "odd": (0.3, 3, 99),
    "short": (0.0, 4, 20), "four": (0.2, 2, 4), "uneven": (0.5, 8, 301),
}  # fmt: skip


def process(rho: float, chains: int, draws: int, seed: int = 0) -> np.ndarray:
    """A stationary autoregressive process of variance 1, ``(chains, draws)``."""
    noise = np.random.default_rng(seed).normal(size=(chains, draws))
    for t in range(1, draws):
        noise[:, t] = rho * noise[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return noise


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", ["plain", "heavy", "rounded", "apart"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_is_that_of_arviz(name, shape):
    arviz = pytest.importorskip("arviz", reason="arviz is not installed")
    draws = process(*CASES[name])
    draws = {
        "plain": draws, "heavy": np.exp(3 * draws), "rounded": np.round(2 * draws),
        "apart": draws + np.arange(len(draws))[:, None],
    }[shape]  # fmt: skip
    assert diagnostics.r_hat(draws) == pytest.approx(float(arviz.rhat(draws)), rel=1e-9)
    for method, ours in (
        ("bulk", diagnostics.ess_bulk),
        ("tail", diagnostics.ess_tail),
        ("mean", diagnostics.ess_mean),
    ):
        more = {"prob": (0.05, 0.95)} if method == "tail" else {}
        assert ours(draws) == pytest.approx(float(arviz.ess(draws, method=method, **more)), rel=1e-9), method


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_effective_draws_of_a_known_process(rho):
    """The variance of a mean of an autoregressive process is (1 + rho) / (1 - rho) times that of as many draws."""
    draws = process(rho, 8, 4000, 1)
    assert diagnostics.ess_mean(draws) == pytest.approx(draws.size * (1 - rho) / (1 + rho), rel=0.1)
    assert diagnostics.ess_bulk(draws) == pytest.approx(draws.size * (1 - rho) / (1 + rho), rel=0.1)


def test_chains_that_do_not_agree_have_a_large_r_hat():
    draws = process(0.0, 4, 500, 2)
    assert diagnostics.r_hat(draws) < 1.01
    assert diagnostics.r_hat(draws + np.array([[0.0], [0.0], [0.0], [1.0]])) > 1.1
    # One that is as wide as three others, at the same place, and one that drifts.
    assert diagnostics.r_hat(draws * np.array([[1.0], [1.0], [1.0], [3.0]])) > 1.05
    assert diagnostics.r_hat(draws + np.linspace(0, 2, 500)) > 1.05


def test_what_says_nothing():
    assert math.isnan(diagnostics.r_hat(np.zeros((4, 3))))
    assert math.isnan(diagnostics.ess_bulk(np.full((4, 100), np.nan)))
    assert math.isnan(diagnostics.ess_tail(np.full((4, 2), 1.0)))
    assert math.isnan(diagnostics.r_hat(np.ones((4, 100))))
    assert diagnostics.ess_bulk(np.ones((4, 100))) == 400
    with pytest.raises(ValueError, match=r"'draws' got shape \(3,\), but takes \(chains, draws\)"):
        diagnostics.r_hat(np.zeros(3))
