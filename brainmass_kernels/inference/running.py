"""Chains that run in chunks of iterations: what is compiled, how it is told, and the file from which they resume.

An iteration has a random key of its own, by its number, and all iterations are those of one compiled program, whatever
the chunks. So draws do not depend on the chunks, nor on interrupts, nor on how many draws follow.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import files, identity
from ..archives import digest_of, pack, unpack
from .density import LogDensity
from .samplers import Draw, Sampler
from .warmup import DRAW

#: Most iterations of a chunk, and the seconds that one should take.
CHUNK, _SECONDS = 64, 0.5
#: Seconds between two checkpoints for each that one takes to write.
_APART = 10.0
_FORM, _WHAT = "brainmass_kernels chains under way", "a checkpoint of chains"
_REMEDY = "delete it, and the chains begin anew"


def promoted(function: Callable) -> Callable:
    """A function in which types and ranks are promoted as BlackJAX expects, whatever the user's settings."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapper


@functools.partial(jax.jit, static_argnames=("sampler", "where"))
def begin(sampler: Sampler, density: LogDensity, z, key, where):
    """The state of chains at positions ``(chains, d)``."""
    return sampler.begin(density, z, key)


@functools.partial(jax.jit, static_argnames=("sampler", "where"))
def advance(sampler: Sampler, density: LogDensity, state, key, first, stages, count, where):
    """``count`` iterations from number ``first`` on; the rest of the buffers ``(CHUNK, chains, ...)`` is 0."""
    chains, d, dtype = len(sampler.density_of(state)), density.size, jnp.result_type(float)
    empty = jnp.zeros((CHUNK, chains), dtype)
    buffers = Draw(jnp.zeros((CHUNK, chains, d), dtype), empty, empty, empty.astype(bool), empty.astype(int))

    def iteration(k, carried):
        state, buffers = carried
        state, draw = sampler.step(density, state, jax.random.fold_in(key, first + k), stages[k])
        return state, jax.tree.map(lambda buffer, x: buffer.at[k].set(x.astype(buffer.dtype)), buffers, draw)

    return jax.lax.fori_loop(0, count, iteration, (state, buffers))


class Chunk(NamedTuple):
    """The iterations of a chunk, ``(count, chains, ...)``, and the seconds that they took."""

    first: int
    draws: Draw
    seconds: float


def run(
    sampler: Sampler, density: LogDensity, state, key, stages: np.ndarray, draws: int, first: int, where
) -> Iterator:
    """Yield each chunk and the state after it, from iteration ``first`` to the last draw."""
    total, count = len(stages) + draws, 1
    stages = np.concatenate([stages, np.full(draws + CHUNK, DRAW)])
    while first < total:
        count = min(count, CHUNK, total - first)
        began = time.perf_counter()
        window = jnp.asarray(stages[first : first + CHUNK], int)
        state, buffers = advance(sampler, density, state, key, first, window, count, where)
        # Waiting here can be interrupted.
        buffers = jax.tree.map(lambda x: np.asarray(x)[:count], jax.block_until_ready(buffers))  # noqa: B023
        seconds = time.perf_counter() - began
        yield Chunk(first, Draw(*buffers), seconds), state
        first += count
        count = max(1, round(count * min(4.0, _SECONDS / max(seconds, 1e-3))))


# Checkpoints --------------------------------------------------------------------------------------------------------


class Checkpoint:
    """The file of running chains, from which the same call resumes.

    Parameters
    ----------
    path : of the file
    about : what tells this run from others, by name
    """

    def __init__(self, path: Path, about: Mapping[str, str]):
        self.path, self.about = path, dict(about)
        self._written, self._seconds = 0.0, 0.0

    def write(self, done: int, state, arrays: Mapping[str, np.ndarray], last: bool = False) -> None:
        """Write what is done, in at most a tenth of the time; ``last``, in any case."""
        if not last and time.perf_counter() - self._written < _APART * self._seconds:
            return
        began = time.perf_counter()
        groups = [{str(k): np.asarray(x) for k, x in enumerate(jax.tree.leaves(state))}, dict(arrays)]
        with files.replacing(self.path) as aside:
            pack(aside, groups, {"done": done, "run": self.about}, _FORM)
        self._written = time.perf_counter()
        self._seconds = self._written - began

    def read(self, like) -> tuple[int, Any, dict[str, np.ndarray]] | None:
        """Iterations done, the state, shaped as ``like``, and the arrays; ``None`` if there is no file.

        Raises
        ------
        ValueError : a damaged file, or one of another run, with what differs
        """
        if not os.path.exists(self.path):
            return None
        with files.damaged(self.path, _WHAT, _REMEDY):
            groups, about, checksum = unpack(self.path, _FORM)
            if checksum != digest_of(groups, about):
                raise ValueError("its checksum is that of other contents")
            theirs, done = dict(about["run"]), int(about["done"])
        if theirs != self.about:
            raise ValueError(
                f"'checkpoint' got {self.path.name}, which is of another run. What differs: "
                f"{identity.difference(theirs, self.about)}. Give another name, or delete it"
            )
        leaves, structure = jax.tree.flatten(like)
        state = [jnp.asarray(groups[0][str(k)], x.dtype) for k, x in enumerate(leaves)]
        return done, structure.unflatten(state), {n: np.asarray(x) for n, x in groups[1].items()}
