"""Inhibition that learns to keep rates at a set point: ``python -m examples.studies balance``.

Masses of excitation and feedback inhibition on the 76 regions of The Virtual Brain: the more tracts reach a region, the
faster it fires. Then the weight of inhibition becomes a slow state, by the rule of Vogels et al.: it grows where
inhibition meets a rate above the set point. The weights that it finds are those of feedback inhibition control, which
are known in closed form. Needs ``pip install 'brainmass-kernels[fit,connectomes]'``.

Vogels, Sprekeler, Zenke, Clopath and Gerstner 2011, Science 334:1569-1573. Deco, Ponce-Alvarez, Hagmann, Romani,
Mantini and Corbetta 2014, Journal of Neuroscience 34:7886-7898. Hellyer, Jachs, Clopath and Leech 2016, NeuroImage
124:85-95.
"""

from __future__ import annotations

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq

import brainmass_kernels as bk

SET_POINT = 3.0  # Hz


def rate(x, d):
    """``x / (1 - exp(-d x))``, which is 0 / 0 at 0: beside it, its value next to it."""
    x = jnp.where(jnp.abs(d * x) < 1e-4, 1e-4 / d, x)
    return x / (1 - jnp.exp(-d * x))


@bk.model
class Balanced(bk.Model):
    """Deco et al. 2014 with the weight of inhibition ``J`` as a state, and the rate of the last 100 ms as another."""

    G: Any = 1.0
    eta: Any = 0.02 * u.second
    target: Any = SET_POINT * u.Hz

    states = {"S_e": u.UNITLESS, "S_i": u.UNITLESS, "J": u.UNITLESS, "r": u.Hz}
    inputs = {"coupling": 0.0}
    initial = {"S_e": 0.16, "S_i": 0.04, "J": 1.0, "r": SET_POINT * u.Hz}

    @staticmethod
    def drift(s, p, i):
        r_e = rate(310 * (0.382 + 0.15 * (1.4 * s.S_e + p.G * i.coupling) - s.J * s.S_i) - 125, 0.16)
        r_i = rate(615 * (0.7 * 0.382 + 0.15 * s.S_e - s.S_i) - 177, 0.087)
        return {
            "S_e": 0.641 * (1 - s.S_e) * r_e - s.S_e / 0.1,
            "S_i": r_i - s.S_i / 0.01,
            "r": (r_e - s.r) / 0.1,
            "J": p.eta * (s.S_i / 0.01) * (s.r - p.target),
        }


def in_closed_form(G, strength):
    """The weight of inhibition with which a region rests at the set point, if all others do: a line in its strength."""
    S_e = 1 / (1 + 1 / (0.0641 * SET_POINT))
    x_e = (125 + brentq(lambda x: rate(x, 0.16) - SET_POINT, -100, 50)) / 310
    S_i = brentq(lambda S_i: 0.01 * rate(615 * (0.2674 + 0.15 * S_e - S_i) - 177, 0.087) - S_i, 0, 1)
    return (0.382 + 0.15 * S_e * (1.4 + G * strength) - x_e) / S_i


def study(regions=76, couplings=tuple(k / 10 for k in range(1, 15)), seconds=60) -> dict:
    weights = np.array(bk.load_connectome(76).subset(range(regions)).weights)
    np.fill_diagonal(weights, 0.0)
    weights /= weights.sum(1).mean()
    G, strength = np.asarray(couplings)[:, None], weights.sum(1)

    def run(eta, duration, key, **start):
        network = bk.Network(Balanced(G=G, eta=eta * u.second), weights, source="S_e", target="coupling", k=1.0)
        return bk.simulate(network, duration * u.second, 1 * u.ms, noise={"S_e": 0.01 / u.second**0.5},
                           key=jax.random.key(key), record=["r", "J"], every=50, **start)  # fmt: skip

    fixed = run(0.0, 10, 0)
    plastic = run(0.02, seconds, 1, initial=fixed.final)
    course = np.concatenate([np.asarray(part["r"] / u.Hz) for part in (fixed, plastic)])
    before, after = course[100:200].mean(0), course[-400:].mean(0)
    found, known = np.asarray(plastic["J"])[-400:].mean(0), in_closed_form(G, strength)
    for k, g in enumerate(G[:, 0]):
        print(f"coupling {g:.1f}: {before[k].min():.2f} to {before[k].max():6.2f} Hz before, {after[k].min():.2f} to "
              f"{after[k].max():.2f} Hz after; weights off by {np.abs(found - known)[k].max():.3f}")  # fmt: skip
    return {"G": G[:, 0], "strength": strength, "course": course, "before": before, "after": after, "J": found,
            "known": known}  # fmt: skip
