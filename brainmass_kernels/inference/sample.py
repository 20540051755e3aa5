"""`sample`: draws from the posterior, by the samplers of BlackJAX, all chains in one run."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import files, identity
from ..errors import check_counts, check_name
from ..extras import needs
from ..fitting.result import Fit
from ..interrupts import interruptible
from ..noise import check_key
from ..notices import warn
from . import running, tempering
from .density import LogDensity, choices
from .log_density import log_density
from .posterior import Posterior
from .progress import SampleProgress, progress_bar
from .samplers import Chees, Draw, Mclmc, Nuts, Sampler
from .starting import begin_at
from .tempering import Tempered
from .warmup import schedule

METHODS: dict[str, type] = {kind.name: kind for kind in (Nuts, Chees, Mclmc, Tempered)}
#: Folded into the key, whose own noise is that of the model.
_CHAINS, _BEGIN, _STARTS = 2_000_003, 2_000_029, 2_000_039


@interruptible
@running.promoted
def sample(
    model,
    target: Any = None,
    free: Mapping[str, Any] | None = None,
    *,
    priors: Mapping[str, Any] | None = None,
    likelihood: Any = None,
    method: str = "nuts",
    chains: int = 8,
    draws: int = 500,
    warmup: int = 300,
    start: Fit | Mapping[str, Any] | None = None,
    screen: int = 256,
    key=None,
    target_acceptance: float | None = None,
    progress: bool | Callable[[SampleProgress], Any] = False,
    checkpoint: str | os.PathLike | None = None,
    **arguments,
) -> Posterior:
    """Draw from the posterior of parameters given data, all chains as lanes of one run.

    Parameters
    ----------
    model, target, free, priors, likelihood : as `log_density` takes them; or a `LogDensity` as ``model``, alone
    method : "nuts", which needs no tuning; "chees", HMC of one length for all chains, the fastest with many of these;
        "mclmc", which accepts every step and has a small bias; or "smc", particles that follow the prior to the
        posterior, for one of several modes: each chain is a population of ``draws`` particles
    chains : that run beside each other, at least 2
    draws : of each chain, after the warm-up
    warmup : iterations that adapt the step size and a metric, which all chains share; "smc" has none
    start : a `Fit` of the same free names, to begin at the best of its starts; or name to a value, or one for each
        chain, ``(chains, n)`` of n targets (others begin at the model's values); ``None``, at draws from the prior
    screen : of this many draws from the prior, begin at the likeliest; 0, at draws as they come, which lie further
        apart, so that R-hat sees more modes, and more chains may stay in poor ones
    key : of `jax.random`; fixes the draws, and the noise of the model, which needs one
    target_acceptance : of a step, by default 0.8 of "nuts" and "smc" and 0.651 of "chees"; nearer to 1, steps are
        shorter and divergences fewer. "mclmc" accepts all: of it the variance of the energy's error, 5e-4, for each
        dimension; smaller, steps are shorter
    progress : True for a bar on stderr, or a line in a notebook; or a function of `SampleProgress`, which stops the
        chains by returning True, with the draws so far ("smc" goes on, for it has none before its end)
    checkpoint : a file that is written while the chains run. The same call resumes from it, with the draws of an
        uninterrupted one; with more ``draws`` it goes on
    **arguments : of `log_density`: ``shared``, ``group``, ``inputs``, ``noise``, ``duration``, ``dt``, ...

    Returns
    -------
    `Posterior`

    Raises
    ------
    ValueError, TypeError
        naming the argument: an unknown method or name, too few chains or draws, a checkpoint of another run or
        damaged; and whatever `log_density` refuses
    FloatingPointError
        a density that is not finite where a chain begins, with the parameters
    ImportError
        without the packages of ``pip install 'brainmass-kernels[bayes]'``
    """
    check_name(method, METHODS, "method")
    check_counts(2, chains=chains)
    check_counts(1, draws=draws, warmup=warmup)
    check_counts(0, screen=screen)
    check_key(key)
    needs("blackjax", "bayes")
    sampler = _sampler(method, target_acceptance)
    checkpoint = None if checkpoint is None else files.absolute(checkpoint, "checkpoint")
    density = _density(model, target, free, priors, likelihood, key, arguments)
    sampler.check(density, chains)
    density = density.for_chains(chains * draws if method == Tempered.name else chains)
    key = jax.random.key(0) if key is None else key
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    if isinstance(sampler, Tempered):
        if start is not None:
            raise ValueError("'start' is of chains, but 'smc' begins at the prior: leave it out")
        with progress_bar(progress, 0) as show:
            return _told(_tempered(sampler, density, key, chains, draws, checkpoint, show))
    z = begin_at(density, start, chains, screen, jax.random.fold_in(key, _STARTS))
    job = _Job(sampler, density, z, key, warmup, draws, checkpoint)
    with progress_bar(progress, warmup + draws) as show:
        return _told(job.run(show))


def _told(posterior: Posterior) -> Posterior:
    """The posterior, with a warning for each thing that is wrong with its draws."""
    for note in posterior.summary().notes:
        warn(note, UserWarning)
    return posterior


def _tempered(sampler: Tempered, density: LogDensity, key, chains: int, draws: int, path, show) -> Posterior:
    began = time.perf_counter()
    prior = density.sample_prior(jax.random.fold_in(key, _STARTS), (chains, draws))
    z = jnp.asarray(density.to_vectors(prior, (chains, draws)))
    file = running.Checkpoint(path, _about(sampler, density, z, key) | {"draws": str(draws)}) if path else None
    chains_key = jax.random.fold_in(key, _CHAINS)
    state, draw, earlier = tempering.run(sampler, density, z, chains_key, file, show, choices())
    drawn = {n: np.moveaxis(x, 0, 1) for n, x in draw._asdict().items()}
    settings = {"method": sampler.name, "warmup": 0, "gradients": int(state.spent)}
    settings["log_evidence"] = np.asarray(state.evidence, float).tolist()
    return Posterior.of(density, drawn, settings, earlier + time.perf_counter() - began)


def _about(sampler, density: LogDensity, z, key) -> dict[str, str]:
    """What tells a run from others, by name."""
    settings = {
        "method": repr(sampler), "chains": str(len(z)), "start": identity.of_array(z),
        "key": str(np.asarray(jax.random.key_data(key)).tolist()),
    }  # fmt: skip
    return {**density.identity(len(z)), **settings}


def _sampler(method: str, target) -> Sampler | Tempered:
    if target is None:
        return METHODS[method]()
    if not (isinstance(target, (int, float)) and 0 < target < 1):
        raise ValueError(f"'target_acceptance' got {target!r}, but takes a number between 0 and 1")
    return METHODS[method](target=float(target))


def _density(model, target, free, priors, likelihood, key, arguments) -> LogDensity:
    if not isinstance(model, LogDensity):
        for name, value in (("target", target), ("free", free)):
            if value is None:
                raise TypeError(f"'{name}' is missing: a posterior is of a model, a target and free parameters")
        return log_density(model, target, free, priors=priors, likelihood=likelihood, key=key, **arguments)
    beside = {"target": target, "free": free, "priors": priors, "likelihood": likelihood, **arguments}
    for name, value in beside.items():
        if value is not None:
            raise TypeError(f"'{name}' got {value!r} beside a LogDensity, which has it: take one of them")
    return model


@dataclasses.dataclass
class _Job:
    """Chains of one call; ``kept`` are the draws so far, in chunks."""

    sampler: Sampler
    density: LogDensity
    z: np.ndarray
    key: Any
    warmup: int
    draws: int
    path: Any
    kept: list[Draw] = dataclasses.field(default_factory=list)

    @property
    def about(self) -> dict[str, str]:
        """Not the number of draws, which may grow."""
        return _about(self.sampler, self.density, self.z, self.key) | {"warmup": str(self.warmup)}

    def run(self, show) -> Posterior:
        began, chosen = time.perf_counter(), choices()
        key = jax.random.fold_in(self.key, _BEGIN)
        state = running.begin(self.sampler, self.density, jnp.asarray(self.z), key, chosen)
        file = None if self.path is None else running.Checkpoint(self.path, self.about)
        done, spent, earlier = 0, 0, 0.0
        if file and (found := file.read(state)):
            done, state, arrays = found
            spent, earlier = int(arrays.pop("spent")), float(arrays.pop("seconds"))
            self.kept = [Draw(**arrays)] if "z" in arrays else []
        stages, chains = schedule(self.warmup), jax.random.fold_in(self.key, _CHAINS)
        last, seconds, before = self.warmup + self.draws, 0.0, spent
        stepping = running.run(self.sampler, self.density, state, chains, stages, self.draws, done, chosen)
        for chunk, after in stepping:
            state = after
            done = chunk.first + len(chunk.draws.z)
            spent += int(chunk.draws.gradients.sum())
            seconds += chunk.seconds
            self.keep(chunk)
            if file:
                so_far = earlier + time.perf_counter() - began
                counts = {"spent": np.asarray(spent), "seconds": np.asarray(so_far)}
                file.write(done, state, self.arrays() | counts, last=done == last)
            if show and show(self.report(chunk, done, spent - before, seconds)):
                break
        if not self.kept:
            raise ValueError("'progress' stopped the chains in their warm-up, before any draw")
        return self.posterior(spent, earlier + time.perf_counter() - began)

    def keep(self, chunk: running.Chunk) -> None:
        skipped = max(self.warmup - chunk.first, 0)
        if skipped < len(chunk.draws.z):
            self.kept = [*self.kept, Draw(*(x[skipped:] for x in chunk.draws))]

    def arrays(self) -> dict[str, np.ndarray]:
        """The draws so far by name, ``(draws, chains, ...)``."""
        if not self.kept:
            return {}
        self.kept = [Draw(*(np.concatenate(x) for x in zip(*self.kept)))]
        return self.kept[0]._asdict()

    def report(self, chunk, done: int, spent: int, seconds: float) -> SampleProgress:
        divergences = sum(int(kept.divergent.sum()) for kept in self.kept)
        acceptance = chunk.draws.acceptance
        mean = float(np.nanmean(acceptance)) if np.isfinite(acceptance).any() else math.nan
        return SampleProgress(done, self.warmup + self.draws, self.warmup, mean, divergences, spent, seconds)

    def posterior(self, spent: int, seconds: float) -> Posterior:
        drawn = {n: np.moveaxis(x, 0, 1)[:, : self.draws] for n, x in self.arrays().items()}
        settings = {"method": self.sampler.name, "warmup": self.warmup, "gradients": spent}
        return Posterior.of(self.density, drawn, settings, seconds)
