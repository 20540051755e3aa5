"""Prints digests of programs and of runs as JSON: ``python same_bits.py THREADS [more]``; see test_same_bits."""

import hashlib
import json
import os
import sys

if sys.argv[1] == "1":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

import brainmass_kernels as bk
from brainmass_kernels.step import StepSpec, build

LANES, STEPS = 40, 300
rng = np.random.default_rng(0)


def digest(tree) -> str:
    return hashlib.sha1(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()[:12]


def programs(model) -> str:
    recorded = tuple(model.recordable())
    step = build(StepSpec(model, model.scheme, tuple(model.inputs), (), (), recorded, np.dtype("float32")))
    text = "".join(str(p.jaxpr) for p in (step.setup, step.advance, step.observe))
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def mean_square(C, be, sigma, wave, implementation):
    found = bk.simulate(
        bk.JansenRit(C=C, be=be * u.Hz), STEPS, 1 * u.ms, inputs={"E_inp": wave * u.Hz},
        noise={"E_inp": sigma * u.Hz * u.second**0.5}, key=jax.random.key(0), every=2, implementation=implementation,
    )  # fmt: skip
    eeg = found["eeg"] / u.mV
    return jnp.mean(eeg**2), eeg


def of_network(weights, implementation):
    a = jnp.asarray(np.linspace(-0.2, 0.2, 60).reshape(3, 20), jnp.float32)
    network = bk.Network(bk.Hopf(a=a), weights, delays=4 * u.ms, source="x", target="x_inp", k=0.1)
    initial = {"x": jnp.linspace(-0.5, 0.5, 20)}
    found = bk.simulate(network, 100, 1 * u.ms, initial=initial, every=10, record="x", implementation=implementation)
    return jnp.sum(found["x"] ** 2)


def fit() -> str:
    freqs = np.arange(2.0, 40.0, 0.5)
    power = 1 / freqs + np.exp(-((freqs - 10) ** 2) / 4)
    free = {"be": (60.0, 150.0), "noise.E_inp": (0.5, 40.0)}
    noise = {"E_inp": 2 * u.Hz * u.second**0.5}
    found = bk.fit(
        bk.JansenRit(), (freqs, power), free, starts=4, steps=4, screen=8, noise=noise, duration=3 * u.second,
        realisations=2,
    )  # fmt: skip
    found.save("fit.json")
    with open("fit.json") as file:
        held = json.load(file)
    held = {name: x for name, x in held.items() if name not in ("seconds", "checksum")}
    return hashlib.sha1(json.dumps(held).encode()).hexdigest()[:12]


told = {model.__name__: programs(model) for model in (bk.JansenRit, bk.WongWangExcInh)}
bounds = (60, 400), (40, 200), (0.3, 40)
arguments = [jnp.asarray(rng.uniform(*b, LANES), jnp.float32) for b in bounds]
arguments.append(jnp.asarray(220 + 20 * rng.normal(size=STEPS), jnp.float32))
weights = jnp.asarray(rng.uniform(0, 1, (20, 20)), jnp.float32)
gradient = jax.jit(jax.grad(mean_square, (0, 1, 2, 3), has_aux=True), static_argnums=4)
slope, eeg = gradient(*arguments, "numba")
told["numba, gradient"], told["numba"] = digest(slope), digest(eeg)
told["scan"] = digest(jax.jit(mean_square, static_argnums=4)(*arguments, "scan"))
network_gradient = jax.jit(jax.value_and_grad(of_network), static_argnums=1)
told["network on numba"] = digest(jax.jit(of_network, static_argnums=1)(weights, "numba"))
told["network on scan, gradient"] = digest(network_gradient(weights, "scan"))
if "more" in sys.argv:
    told["scan, gradient"] = digest(gradient(*arguments, "scan"))
    told["network on numba, gradient"] = digest(network_gradient(weights, "numba"))
    told["fit"] = fit()
print(json.dumps(told))
