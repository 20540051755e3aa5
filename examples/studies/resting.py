"""Coupling and noise of BOLD at rest, from FC and FCD together: ``python -m examples.studies resting``.

Each of the 76 regions of The Virtual Brain is a normal form of a Hopf bifurcation at the frequencies of BOLD (Deco et
al.). Sixteen subjects, made with known values, are fitted jointly: the correlations between regions (FC), and how these
change from window to window (FCD). Needs ``pip install 'brainmass-kernels[fit,connectomes]'``.

Deco, Kringelbach, Jirsa and Ritter 2017, Scientific Reports 7:3095. Hansen, Battaglia, Spiegler, Deco and Jirsa 2015,
NeuroImage 105:525-535.
"""

from __future__ import annotations

import brainunit as u
import jax
import numpy as np
import optax

import brainmass_kernels as bk
from brainmass_kernels import spectra

WINDOWS = 60 * u.second, 20 * u.second  # length and step
LEVELS = np.linspace(0.0, 1.0, 101)
TRUTH, WRONG = {"coupling.k": 1.2, "noise.x_inp": 0.06}, 0.6


@bk.model
class SlowHopf(bk.Hopf):
    """Hopf's normal form with time in seconds."""

    time_unit = u.second


class Brain:
    """Some regions of the connectome, scanned for some minutes every 2 s."""

    def __init__(self, regions: int, minutes: float):
        self.weights = np.array(bk.load_connectome(76).subset(range(regions)).weights, np.float32)
        np.fill_diagonal(self.weights, 0.0)
        self.weights /= self.weights.sum(1).mean()
        self.w = 2 * np.pi * np.random.default_rng(0).uniform(0.04, 0.07, regions)
        self.times = {"duration": (minutes + 1) * u.minute, "dt": 0.2 * u.second, "every": 10,
                      "transient": 1 * u.minute}  # fmt: skip

    def network(self, k):
        model = SlowHopf(a=0.02, w=self.w)
        return bk.Network(model, self.weights, coupling="diffusive", source="x", target="x_inp", k=k)

    def scan(self, pairs, runs: int, seed: int):
        """FC ``(pairs, runs, N, N)`` and FCD ``(pairs, runs, W, W)`` of pairs of coupling and noise."""
        lanes = np.broadcast_to(np.asarray(pairs)[:, None, None], (len(pairs), runs, 1, 2))
        record = {"fc": bk.Correlation(of="x"), "fcd": bk.FCD(*WINDOWS, of="x")}
        noise = {"x_inp": lanes[..., 1] * u.second**0.5}
        network, key = self.network(lanes[..., 0]), jax.random.key(seed)
        run = bk.simulate(network, noise=noise, key=key, record=record, **self.times)
        return np.asarray(run["fc"]), np.asarray(run["fcd"])


def summary(fc, fcd):
    """Correlations, and quantiles of FCD, each the mean over runs."""
    quantiles = np.quantile(np.asarray(spectra.pairs(fcd)), LEVELS, axis=-1)
    return np.asarray(spectra.pairs(fc)).mean(1), np.moveaxis(quantiles.mean(-1), 0, -1)


def distances(scans, seen):
    """Root mean squares from what was seen, of FC and of FCD, by pair of values."""
    return [np.sqrt(np.mean((x - y) ** 2, -1)) for x, y in zip(summary(*scans), summary(*seen), strict=True)]


def fit(brain, seen, steps: int, realisations: int):
    """One coupling and one noise for all subjects, from the corners of the landscape."""
    target = bk.Joint({"fc": bk.Connectivity(seen[0][0]), "fcd": bk.ConnectivityDynamics(seen[1][0], *WINDOWS)})
    starts = {"coupling.k": np.array([0.6, 0.6, 2.4, 2.4]), "noise.x_inp": np.array([0.03, 0.12, 0.03, 0.12])}
    return bk.fit(
        brain.network(WRONG), target, {"coupling.k": (0.2, 4.0), "noise.x_inp": (0.005, 0.3)}, shared=tuple(TRUTH),
        noise={"x_inp": 0.03 * u.second**0.5}, record="x", starts=starts, key=jax.random.key(2), steps=steps,
        realisations=realisations, optimiser=optax.adam(optax.cosine_decay_schedule(0.2, steps)), **brain.times,
    )  # fmt: skip


def study(regions=76, minutes=20, subjects=16, steps=30, realisations=4, grid=(12, 9)) -> dict:
    brain, truth = Brain(regions, minutes), list(TRUTH.values())
    seen = brain.scan([truth], subjects, seed=1)
    fitted = fit(brain, seen, steps, realisations)
    found = [float(u.get_magnitude(fitted.parameters[name])[0]) for name in TRUTH]
    places = [u.get_magnitude(fitted.places()[name])[0] for name in TRUTH]
    print(", ".join(f"{name} {value:.3f}, in truth {true}" for (name, true), value in zip(TRUTH.items(), found)))
    unseen = brain.scan([(WRONG, truth[1]), found, truth], subjects, seed=3)
    away = distances(unseen, seen)
    for name, fc, fcd in zip(("wrong coupling", "fit", "truth"), *away, strict=True):
        print(f"{name}, on other noise: FC {fc:.3f} off, FCD {fcd:.3f}")
    axes = np.geomspace(0.4, 3.0, grid[0]), np.geomspace(0.02, 0.16, grid[1])
    landscape = distances(brain.scan(np.stack(np.meshgrid(*axes), -1).reshape(-1, 2), 4, seed=4), seen)
    return {"found": found, "places": places, "seen": seen, "unseen": unseen, "away": np.array(away), "axes": axes,
            "landscape": np.reshape(landscape, (2, *grid[::-1]))}  # fmt: skip
