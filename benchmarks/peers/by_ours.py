"""This package: `simulate`, with the scheme of most peers; nothing else is asked for."""

from __future__ import annotations

import brainunit as u
import jax
import numpy as np

import brainmass_kernels as bk

from . import jaxed
from . import work as w
from .work import Work

HOW = "bk.simulate in jax.jit and jax.grad, scheme='exp_euler'"
PACKAGES = ("jax", "jaxlib", "llvmlite", "brainunit")
SCHEMES = dict.fromkeys(("forward", "gradient", "noise", "network", "fit"), "exp_euler")
REFUSED: dict[str, str] = {}
begin = jaxed.begin


def settings(work: Work) -> list[str]:
    return [next(n for n, why in bk.implementations().items() if why == "runs here")]


def prepared(work: Work, setting: str):
    run = _network(work) if work.case == "network" else _masses(work)
    return jaxed.compiled(run, work, setting)


def _masses(work: Work):
    def records(Ae, be, C, seed=None):
        noisy = {} if seed is None else {"noise": {"E_inp": w.NOISE * u.Hz * u.second**0.5}, "key": jax.random.key(0)}
        model = bk.JansenRit(Ae=Ae * u.mV, be=be * u.Hz, C=C)
        run = bk.simulate(
            model, work.steps, w.DT * u.second, inputs={"E_inp": w.DRIVE * u.Hz}, every=w.EVERY, scheme="exp_euler",
            record="eeg", **noisy,
        )  # fmt: skip
        return run["eeg"].mantissa

    return records


def _network(work: Work):
    weights, delays = w.connectome(work)

    def records(k):
        network = bk.Network(
            bk.JansenRit(), weights, delays=delays * (w.DT * 1e3) * u.ms, source="E", target="E_inp",
            k=k[:, None] * u.Hz / u.mV,
        )  # fmt: skip
        run = bk.simulate(
            network, work.steps, w.DT * u.second, inputs={"E_inp": w.DRIVE * u.Hz},
            initial={"history": np.float32(0.0) * u.mV}, every=w.EVERY, scheme="exp_euler", record="eeg",
        )  # fmt: skip
        return run["eeg"].mantissa

    return records
