"""A whole brain of Jansen-Rit masses on the 76 regions of The Virtual Brain: ``python examples/whole_brain.py``.

A sweep over conduction speed and coupling strength, the functional connectivity of the alpha band's amplitude, and a
fit of the strength and of each region's gain to a target connectivity by gradients. Needs ``tvb-data`` and ``optax``:
``pip install 'brainmass-kernels[fit,connectomes]'``.
"""

from __future__ import annotations

import argparse
import time

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax

import brainmass_kernels as bk
from brainmass_kernels import spectra

DT = 0.2 * u.ms
EVERY = 25  # steps from one record to the next, 5 ms
ALPHA = (8.0, 12.0)


def connectome(regions: int | None = None) -> bk.Connectome:
    """The first regions, the weights of each normalised to a sum of one, and no tract under 5 mm."""
    brain = bk.load_connectome(76).normalized("rows")
    brain = brain.subset(range(regions)) if regions else brain
    return bk.Connectome(brain.weights, np.maximum(brain.lengths.mantissa, 5.0) * u.mm, brain.labels)


def simulate(brain: bk.Connectome, strength, speed, duration, gain=3.25, seed: int = 0):
    """EEG of each region, ``(K, ..., N)`` in mV: rates of pyramidal cells excite those elsewhere.

    Parameters
    ----------
    strength : of the coupling, dimensionless, with a last axis for regions where it has any
    speed : of conduction, m/s
    gain : excitatory gain of each region, mV
    """
    network = bk.Network(
        bk.JansenRit(Ae=gain * u.mV), brain.weights, distances=brain.lengths, speed=speed * u.meter / u.second,
        coupling="sigmoidal_jansen_rit", target="E_inp", k=strength * 100.0 * u.Hz, cmax=5.0,
    )  # fmt: skip
    run = bk.simulate(
        network, duration, DT, inputs={"E_inp": 120 * u.Hz}, noise={"E_inp": 2.0 * u.Hz * u.second**0.5},
        key=jax.random.key(seed), transient=0.5 * u.second, every=EVERY,
    )  # fmt: skip
    return run["eeg"].mantissa


def connectivity(eeg):
    """Correlation of the amplitudes of the alpha band, ``(..., N, N)``."""
    return spectra.correlation(spectra.envelope(eeg, EVERY * DT, ALPHA))


def sweep(brain: bk.Connectome, strengths, speeds, duration):
    """Mean functional connectivity by speed and strength: one run for each speed, all strengths in it."""
    others = ~np.eye(brain.regions, dtype=bool)
    means = [
        connectivity(simulate(brain, jnp.asarray(strengths)[:, None], speed, duration))[:, others].mean(-1)
        for speed in speeds
    ]
    return np.array(means)


def fit(brain: bk.Connectome, target, speed, duration, steps: int, rate: float = 0.05):
    """Strength and gains whose connectivity is nearest to a target, and the loss before each step and at the end."""

    def loss(values):
        gain = 3.25 * jnp.exp(values["log gain"])
        eeg = simulate(brain, jnp.exp(values["log strength"]), speed, duration, gain)
        others = 1.0 - np.eye(brain.regions, dtype=np.float32)
        return jnp.sum(others * (connectivity(eeg) - target) ** 2) / others.sum()

    values = {"log strength": jnp.log(0.5), "log gain": jnp.zeros(brain.regions)}
    optimiser = optax.adam(rate)
    state, slope, losses = optimiser.init(values), jax.jit(jax.value_and_grad(loss)), []
    for _ in range(steps):
        value, gradient = slope(values)
        updates, state = optimiser.update(gradient, state)
        values, losses = optax.apply_updates(values, updates), [*losses, float(value)]
    return values, np.array([*losses, float(loss(values))])


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regions", type=int, default=None, help="how many, from the first on")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=20, help="steps of the fit")
    options = parser.parse_args(argv)
    brain, duration = connectome(options.regions), options.seconds * u.second
    print(brain)
    strengths, speeds = np.linspace(0.0, 1.0, 5), (3.0, 10.0)
    began = time.perf_counter()
    means = sweep(brain, strengths, speeds, duration)
    for speed, row in zip(speeds, means, strict=True):
        print(f"{speed:4.0f} m/s, mean connectivity at strengths 0 to 1: {', '.join(f'{x:.2f}' for x in row)}")
    print(f"the sweep took {time.perf_counter() - began:.1f} s")
    rng = np.random.default_rng(0)
    gains = 3.25 * np.exp(0.05 * rng.standard_normal(brain.regions)).astype(np.float32)
    target = connectivity(simulate(brain, 1.0, 5.0, duration, gains))
    values, losses = fit(brain, target, 5.0, duration, options.steps)
    print(f"fit: mean squared distance {losses[0]:.4f} before, {losses.min():.4f} after {options.steps} steps")
    print(f"strength {float(jnp.exp(values['log strength'])):.2f}, of the target 1")
    return {"means": means, "losses": losses, "values": values}


if __name__ == "__main__":
    main()
