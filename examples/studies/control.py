"""The least input that switches a bistable mass: ``python -m examples.studies control``.

Wilson and Cowan's populations rest at a low and at a high rate. An input to the excitatory one, a number for each step,
has to bring the rate up by a deadline, with the least energy. Its gradient is one fused run and one back; deadlines are
lanes. Needs optax and matplotlib: ``pip install 'brainmass-kernels[fit]'``.

Salfenmoser and Obermayer 2022, Frontiers in Computational Neuroscience 16:931121; 2023, Chaos 33:043135.
"""

from __future__ import annotations

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax

import brainmass_kernels as bk

MASS = bk.WilsonCowan(tau_E=10 * u.ms, tau_I=10 * u.ms)
DT, STEPS = 0.1, 2000
TIMES = DT * np.arange(1, STEPS + 1)  # ms, of the records
WEIGHT = 2000.0  # ms, of a squared rate that is missed


def rates(course):
    """Rates of the two populations, each ``(T, lanes)``, under an input ``(T, lanes)``, or a stimulus."""
    run = bk.simulate(MASS, STEPS, DT * u.ms, inputs={"rE_inp": course}, record=["rE", "rI"])
    return run["rE"], run["rI"]


def missed(rate, high, deadline):
    """The mean squared distance from the high rate, from the deadline on."""
    late = jnp.asarray(TIMES[:, None] >= deadline, rate.dtype)
    return jnp.sum(late * (rate - high) ** 2, 0) / late.sum(0)


def best_pulses(high, deadlines):
    """Width, amplitude and cost of the best rectangular pulse for each deadline: all pulses are one run."""
    width, amplitude = (x.ravel() for x in np.meshgrid(np.geomspace(2, 80, 40), np.geomspace(0.2, 10, 120)))
    rate, _ = rates(bk.Pulse(0 * u.ms, width * u.ms, amplitude))
    costs = [amplitude**2 * width + WEIGHT * np.asarray(missed(rate, high, deadline)) for deadline in deadlines]
    best = np.argmin(costs, axis=1)
    return width[best], amplitude[best], np.min(costs, axis=1)


def optimal(course, high, deadlines, steps):
    """The input of least cost for each deadline, from a first one, and those costs."""

    def costs(course):
        return DT * jnp.sum(course**2, 0) + WEIGHT * missed(rates(course)[0], high, deadlines)

    def cost(course):
        return jnp.sum(costs(course))

    optimiser = optax.lbfgs(memory_size=20)
    value_and_grad, state = optax.value_and_grad_from_state(cost), optimiser.init(course)

    @jax.jit
    def step(course, state):
        value, slope = value_and_grad(course, state=state)
        updates, state = optimiser.update(slope, state, course, value=value, grad=slope, value_fn=cost)
        return optax.apply_updates(course, updates), state

    for _ in range(steps):
        course, state = step(course, state)
    return course, np.asarray(costs(course))


def study(deadlines=(20.0, 40.0, 80.0, 160.0), steps=300) -> dict:
    points = bk.fixed_points(MASS)
    rest = np.stack([np.asarray(points.states[name]) for name in ("rE", "rI")], 1)  # low, saddle, high
    deadlines, high = np.asarray(deadlines), rest[-1, 0]
    width, amplitude, of_pulses = best_pulses(high, deadlines)
    pulses = jnp.asarray(amplitude * (TIMES[:, None] <= width), jnp.float32)
    course, of_courses = optimal(pulses, high, deadlines, steps)
    rE, rI = map(np.asarray, rates(course))
    near = np.hypot(rE - rest[1, 0], rI - rest[1, 1]).min(0)
    for at, pulse, best, distance in zip(deadlines, of_pulses, of_courses, near, strict=True):
        print(f"up by {at:4.0f} ms: cost {best:5.2f}, of the best pulse {pulse:5.2f}; {distance:.3f} from the saddle")
    return {"deadlines": deadlines, "rest": rest, "course": course, "pulses": of_pulses, "costs": of_courses,
            "rE": rE, "rI": rI, "near": near}  # fmt: skip
