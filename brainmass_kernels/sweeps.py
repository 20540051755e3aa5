"""Grids over parameters, run chunk by chunk in bounded memory; an interrupted sweep resumes, and workers share it."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import dispatch, files, grids, identity, report, routing, signals, sweep_files, sweep_parts, units
from ._version import __version__
from .arguments import entries_of, per_lane, prepare
from .grids import Grid, Tiles
from .groups import Groups
from .interrupts import interruptible
from .models.base import Model
from .network import Network, parts_of
from .noise import check_key
from .notices import warn
from .recording import Maximum, Mean, Minimum, PeakFrequency, Reduction
from .run import Run
from .simulation import explain, simulate, times
from .sweep_files import OK
from .sweep_parts import Chunk, InMemory, Parts, Regions
from .sweep_results import Sweep, SweepPart

#: Masses of one chunk: enough to fill the device, few enough that a chunk fits in memory and soon ends.
CHUNK = {"cpu": 65_536}
CHUNK_ELSEWHERE = 1_048_576
#: Frequencies among which the default statistics look for the peak of power, in Hz.
PEAKS = np.arange(1.0, 40.5, 0.5)


@interruptible
def sweep(
    model: Model | Network,
    over: Mapping[str, Any],
    duration,
    dt,
    *,
    record=None,
    out: str | os.PathLike | None = None,
    chunk: int | None = None,
    key=None,
    progress: bool | Callable[[str], None] = False,
    part: tuple[int, int] | None = None,
    client=None,
    **arguments,
) -> Sweep | SweepPart:
    """Run a model or a network at every point of a grid, in chunks; an interrupted sweep resumes.

    Parameters
    ----------
    model : its parameters are numbers; or a `Network`, whose regions may differ
    over : for each parameter, input, noise intensity (``"noise.E_inp"``), or constant of a network's coupling
        (``"coupling.k"``), its values ``(n,)`` with their unit
    duration, dt : as in `simulate`
    record : as in `simulate`, without trajectories where the grid is large; ``None``, of the model's first observable
        the mean, the minimum, the maximum and the frequency of most power
    out : a file, ``.npz``, ``.nc`` or ``.zarr``. Finished chunks lie in the folder ``<out>.parts`` until the file has
        been written and read back; a later sweep with the same programs and arguments reads them, or the file, instead
        of running them again. Into a ``.zarr`` the chunks are written one by one, so that the grid may be larger than
        memory
    chunk : points run together, masses or networks; by device, regions and parts if not given, or as an earlier run
        began
    key : a JAX random key; the noise of a point depends on the key and its place in the grid, not on the chunk
    progress : print a line a chunk, or a function that takes it
    part : ``(i, n)``, run only the chunks i, i + n, i + 2 n, ... for one of n workers, counted from 0, that share
        ``out``; whoever finishes the last chunk writes ``out``
    client : a ``dask.distributed.Client``, whose workers run the chunks; with ``out``, a path that they share
    **arguments : of `simulate`: ``inputs``, ``noise``, ``initial``, ``every``, ``transient``, ``scheme``, ...

    Returns
    -------
    Sweep, or a `SweepPart`, which says how many chunks are there, while other parts are missing

    Raises
    ------
    ValueError, TypeError : an argument's name, unit, shape or value, or a record's name that ``out`` cannot hold;
        chunks on disk that are damaged, of another sweep, or being written by another run
    """
    began = time.perf_counter()
    grid = Grid.of(model, over, arguments.get("inputs"))
    record = [Mean(), Minimum(), Maximum(), PeakFrequency(PEAKS)] if record is None else record
    check_names(grid, dict(entries_of(parts_of(model)[1], record)), "'record' and 'over' take")
    arguments = {"duration": duration, "dt": dt, "record": record, **arguments}
    found = at_points(
        model, grid, arguments, out=out, chunk=chunk, key=key, progress=progress, part=part, client=client
    )
    return _ended(found, began) if isinstance(found, Sweep) else found


def check_names(grid: Grid, records, takes: str) -> None:
    """Raise ValueError if a record, an axis or a parameter has the name of something that is always in a file.

    Parameters
    ----------
    takes : the arguments that the names are of, for the message
    """
    for name, what in (
        (OK, "which points stayed finite"),
        *(((sweep_files.REGION, "the regions"),) * bool(grid.regions)),
    ):
        if name in {*records, *grid.axes, *grid.names}:
            raise ValueError(f"{takes} other names than {name!r}, which tells {what}")


def at_points(
    model: Model | Network,
    grid: Grid,
    arguments: Mapping[str, Any],
    *,
    out,
    chunk,
    key,
    progress,
    part,
    client,
    replace: bool = True,
) -> Sweep | SweepPart:
    """Run a model at every point of a grid, in chunks: what `sweep` is made of.

    Parameters
    ----------
    grid : the points
    arguments : of `simulate`, but for those that the grid and the key decide
    out, chunk, key, progress, part, client : as of `sweep`
    replace : whether a file that holds another sweep is replaced; else it is refused
    """
    check_key(key)
    part = _checked_part(part, out, client)
    out = None if out is None else sweep_files.place(out, "out")
    if out is not None and isinstance(parts_of(model)[1], Groups) and sweep_files.kind_of(out, "out") != ".npz":
        raise ValueError(f"'out' got {out.name}, but takes an .npz: records of groups have regions of their own")
    chunk = _checked_chunk(chunk) or (out and sweep_parts.chunk_in(out)) or _default_chunk(grid, part, client)
    size = min(grid.points, chunk)
    split = out is not None and sweep_files.kind_of(out, "out") == ".zarr"
    tiles = Tiles.rectangles(grid.shape, size) if split else Tiles((grid.points,), (size,))
    job = _Job(model, grid, tiles, size, key, dict(arguments))
    say = print if progress is True else progress or (lambda _: None)
    plan = job.plan() if client is None else client.submit(_Job.plan, job, pure=False).result()
    job = dataclasses.replace(job, implementation=plan.implementation)
    if out is None:
        chunks = InMemory()
        _run(job, chunks, range(tiles.count), plan, say, client)
        return _joined(job, chunks, plan.about)
    if not replace:
        _refuse_another(out, plan.about)
    _rehearse(out, plan.point)
    return _written(job, out, plan, part, say, client)


def _refuse_another(out: Path, about: Mapping[str, Any]) -> None:
    """Raise ValueError if a file is there that holds something else."""
    there = sweep_files.about_in(out)
    if there is None:
        if out.exists():
            raise ValueError(f"'out' got {out.name}, which is there and can't be read as a bank: give another name")
    elif there.get("digest") != about["digest"]:
        unlike = [n for n in about if n not in ("digest", "implementation", "reason") and there.get(n) != about[n]]
        raise ValueError(
            f"'out' got {out.name}, which holds the runs of other arguments: delete it, or give 'out' another name. "
            f"What differs: {', '.join(unlike) or 'values or programs'}"
        )


def _written(job: _Job, out: Path, plan: _Plan, part, say: Callable, client) -> Sweep | SweepPart:
    """Run what is missing of a sweep or of a part of it, and write the result if all is there."""
    numbers = range(job.tiles.count)
    with sweep_parts.locked(out, plan.identity, part) as folder:
        chunks = _chunks_in(folder, files.checksum(plan.identity), out, job, plan.about)
        if found := _finished(out, plan, chunks, numbers):
            say(f"{out.name} holds this sweep: nothing is run")
            chunks.remove()
            return found
        try:
            _run(job, chunks, numbers[part[0] :: part[1]] if part else numbers, plan, say, client)
            done = sum(map(chunks.has, numbers))
            if done == len(numbers):
                return _result(job, chunks, out, plan.about)
        except (FileNotFoundError, ValueError):
            # Another worker may have joined the chunks meanwhile, and taken away what was being read.
            if found := _finished(out, plan, chunks, numbers):
                return found
            raise
        return _finished(out, plan, chunks, numbers) or SweepPart(out, part or (0, 1), done, len(numbers))


def _chunks_in(folder: Path, sweep: str, out: Path, job: _Job, about: dict[str, Any]) -> Parts:
    if sweep_files.kind_of(out, "out") == ".zarr":
        return Regions(folder, sweep, job.grid, job.tiles, about)
    return Parts(folder, sweep)


def _result(job: _Job, chunks: Parts, out: Path, about: dict[str, Any]) -> Sweep:
    """Make one file of all chunks, and remove these."""
    if isinstance(chunks, Regions):
        Sweep.load(chunks.store)
        files.move(chunks.store, Path(os.path.realpath(out)))
        result = Sweep.load(out)
    else:
        result = _joined(job, chunks, about)
        result.save(out)
        if Sweep.load(out)._contents().checksum() != result._contents().checksum():
            raise OSError(f"{out} is not what was written to it; its chunks are kept in {chunks.folder}")
    chunks.remove()
    return result


def _finished(out: Path, plan: _Plan, chunks: Parts, numbers: Sequence[int]) -> Sweep | None:
    """The sweep in a file, if it is this one and whole; any other file is to be replaced.

    The chunks are removed only after the file has been written and read back: while one is there, it is not finished.
    """
    if any(map(chunks.has, numbers)) or sweep_files.digest_in(out) != plan.about["digest"]:
        return None
    try:
        return Sweep.load(out)
    except (FileNotFoundError, ValueError) as error:
        warn(f"{error}: now it is written again")
        return None


def _ended(sweep: Sweep, began: float) -> Sweep:
    """The sweep with the seconds that it took, and a warning if points of it did not stay finite."""
    ok = np.asarray(sweep.ok)
    if not ok.all():
        warn(
            f"{(~ok).sum():,} of the {ok.size:,} points of this sweep did not stay finite (sweep.ok says which), and "
            "their statistics are NaN: take a shorter dt, another scheme, or values within the model's range"
        )
    return dataclasses.replace(sweep, seconds=time.perf_counter() - began)


# Arguments ----------------------------------------------------------------------------------------------------------


def _checked_part(part, out, client) -> tuple[int, int] | None:
    if client is not None:
        if not all(hasattr(client, n) for n in ("map", "submit", "cancel", "nthreads")):
            raise TypeError(f"'client' got {type(client).__name__}, but takes a dask.distributed.Client")
        if getattr(client, "asynchronous", False):
            raise TypeError("'client' got an asynchronous Client, but takes one that waits for its results")
        if part is not None:
            raise ValueError(
                f"'part' got {part!r} beside 'client', which shares the chunks by itself: give one of them"
            )
    if part is None:
        return None
    whole = isinstance(part, Sequence) and len(part) == 2 and all(isinstance(x, (int, np.integer)) for x in part)
    if not whole or not 0 <= part[0] < part[1]:
        raise ValueError(f"'part' got {part!r}, but takes (i, n) with 0 <= i < n: the parts are counted from 0")
    if out is None:
        raise ValueError(f"'part' got {part!r} without 'out', but takes a file that the workers share")
    return int(part[0]), int(part[1])


def _checked_chunk(chunk) -> int | None:
    if chunk is None:
        return None
    if isinstance(chunk, bool) or not isinstance(chunk, (int, np.integer)) or chunk < 1:
        raise ValueError(f"'chunk' got {chunk!r}, but takes a number of masses, at least 1")
    return int(chunk)


def _default_chunk(grid: Grid, part, client) -> int:
    """What fills a device and fits its memory, and gives each worker a chunk."""
    workers = part[1] if part else max(1, len(client.nthreads())) if client is not None else 1
    lanes = CHUNK.get(dispatch.platform(), CHUNK_ELSEWHERE)
    return max(1, min(lanes // math.prod(grid.regions), -(-grid.points // workers)))


# Running ------------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What is known of a sweep before it runs, where it runs.

    Attributes
    ----------
    implementation : that runs it
    identity : what tells it from other sweeps, by name
    about : as of `Sweep`
    point : a sweep of one point, with zeros for records
    """

    implementation: str
    identity: dict[str, str]
    about: dict[str, Any]
    point: Sweep


def _digest(identity: Mapping[str, str]) -> str:
    """Of what decides the result, whatever the chunks."""
    return files.checksum({n: x for n, x in identity.items() if n != "chunk"})[:16]


@dataclasses.dataclass(frozen=True)
class _Job:
    """A sweep to be run.

    Attributes
    ----------
    tiles : the chunks: of the flattened grid, or rectangles of it
    size : most points of a chunk
    arguments : of `simulate`, but for those that the grid and the key decide
    implementation : that runs it, once that is known
    """

    model: Model | Network
    grid: Grid
    tiles: Tiles
    size: int
    key: Any
    arguments: dict[str, Any]
    implementation: str = ""

    def call(self, number: int) -> dict[str, Any]:
        """The arguments of `simulate` for one chunk; all have as many lanes, of which the devices get equal shares."""
        devices, arguments = grids.devices_of_a_chunk(), dict(self.arguments)
        places = grids.padded(self.tiles.places(number), -(-self.tiles.size // len(devices)) * len(devices))
        values = grids.split(self.grid.at(places), devices)
        inputs, noise = arguments.pop("inputs", None) or {}, arguments.pop("noise", None) or {}
        model, inputs, noise = routing.put(self.model, inputs, noise, values)
        inputs = per_lane(inputs, values)
        keys = None if self.key is None else grids.split(self.grid.keys(self.key, places), devices)
        return {**arguments, "model": model, "inputs": inputs, "noise": noise, "key": keys}

    def run(self, number: int) -> Chunk:
        result = simulate(**self.call(number))
        # Waiting here can be interrupted; copying what is not ready cannot.
        jax.block_until_ready(result.records)
        places = self.tiles.places(number)
        inside, axes = slice(len(places)), result.axes
        heads = {n: (slice(None),) * (n in axes) for n in result.records}
        records: dict[str, Any] = {n: _on_host(x, (*heads[n], inside)) for n, x in result.records.items()}
        finite = _on_host(result._finite(), (inside,))
        records |= {n: _on_host(x) for n, x in self.grid.beside(places).items()}
        records[OK] = np.asarray(finite).all(tuple(range(1, finite.ndim)))
        return Chunk(records, {n: _on_host(x) for n, x in axes.items()})

    def plan(self) -> _Plan:
        run, _ = prepare(**self.call(0))
        identity = dataclasses.replace(self, implementation=run.implementation).identity()
        about = {**self._about(), "digest": _digest(identity)}
        return _Plan(run.implementation, identity, about, _one_point(self.model, self.grid, run))

    def _about(self) -> dict[str, Any]:
        plan, given = explain(**self.call(0)), self.arguments
        network, mass = parts_of(self.model)
        more = {name: str(given[name]) for name in ("transient", "every", "scheme") if given.get(name) is not None}
        of = {"network": repr(network), "networks": self.grid.points} if network else {}
        return {
            "model": type(mass).__name__,
            **of,
            "duration": str(given["duration"]),
            "dt": str(given["dt"]),
            **more,
            "masses": self.grid.points * (network.regions if network else 1),
            "values": report.values_of(
                self.model, given.get("inputs") or {}, given.get("noise") or {}, self.grid.names
            ),
            **self.grid.about(),
            "implementation": plan.implementation,
            "reason": plan.reason,
            "versions": {"brainmass_kernels": __version__, "jax": metadata.version("jax")},
        }

    def identity(self) -> dict[str, str]:
        """What tells this sweep from others, by name; apart from ``chunk`` it depends on no number of lanes."""
        one = dataclasses.replace(self, tiles=Tiles((self.grid.points,), (1,)), implementation="")
        run, data = prepare(**{**one.call(0), "implementation": self.implementation})
        steps, swept = run.schedule, {n.replace(".", " ") for n in self.grid.names}
        values = {n: x for n, x in identity.of_data(run, data).items() if n not in swept}
        digests = {**identity.versions(), **identity.of_run(run), **values}
        digests |= {
            "model": type(parts_of(self.model)[1]).__qualname__,
            "implementation": run.implementation,
            "precision": run.precision,
            "duration": str(steps.steps),
            "transient": str(steps.lead),
            "every": str(steps.every),
            "chunk": str(self.size),
            **self.grid.identity(),
        }
        for k, term in enumerate(data.connections):
            # The edges of a matrix are those of its weights.
            names = ("weights", "steps", "edges") if term.are_edges else ("weights", "steps")
            digests |= {f"{n}{k or ''}": identity.of_array(getattr(term, n)) for n in names}
        histories = {f"history{k or ''}": x for k, x in enumerate(data.history) if x is not None}
        digests |= {name: identity.of_array(x) for name, x in histories.items()}
        if run.spec.noisy:
            typed = jnp.issubdtype(self.key.dtype, jax.dtypes.prng_key)
            words = jax.random.key_data(self.key) if typed else self.key
            digests["key"] = f"{self.key.dtype} {identity.of_array(words)}"
        return digests


def _run(job: _Job, chunks: Parts | InMemory, numbers: Sequence[int], plan: _Plan, say: Callable, client) -> None:
    """Run the chunks of these numbers that are missing, here or by Dask's workers."""
    missing, count = [k for k in numbers if not chunks.has(k)], job.tiles.count
    if done := len(numbers) - len(missing):
        say(f"resuming after {done} of {len(numbers)} chunks")
    began, points = time.perf_counter(), "networks" if job.grid.regions else "masses"
    ended = _run_here(job, chunks, missing) if client is None else _run_by(client, job, chunks, missing, plan.identity)
    for ran, number in enumerate(ended, 1):
        left = (time.perf_counter() - began) / ran * (len(missing) - ran)
        say(f"chunk {number + 1} of {count}: {job.tiles.size:,} {points}, about {left:.0f} s left")


def _run_here(job: _Job, chunks: Parts | InMemory, missing: list[int]) -> Iterator[int]:
    for number in missing:
        chunks.write(number, job.run(number))
        yield number


def _run_by(client, job: _Job, chunks: Parts | InMemory, missing: list[int], identity: dict) -> Iterator[int]:
    """By the workers of a Dask client, which write to a folder that they share, or send what they record."""
    shared = None if isinstance(chunks, InMemory) else chunks
    futures = client.map(functools.partial(_run_there, job, shared, identity), missing, pure=False)
    try:
        for number, future in zip(missing, futures, strict=True):
            chunk = future.result()
            if chunk is not None:
                chunks.write(number, chunk)
                future.release()
            yield number
    except BaseException:
        client.cancel(futures)
        raise


def _run_there(job: _Job, chunks: Parts | None, expected: dict[str, str], number: int) -> Chunk | None:
    """Run a chunk on a worker, which must compute what the others do."""
    if difference := identity.difference(expected, job.identity()):
        raise ValueError(f"this worker would run another sweep than the first. What differs: {difference}")
    chunk = job.run(number)
    if chunks is None:
        return chunk
    if not chunks.folder.is_dir():
        raise ValueError(f"'out' got a path that this worker does not share: it finds no folder {chunks.folder}")
    chunks.write(number, chunk)
    return None


def _on_host(x, index: Any = ...):
    return units.attach(np.asarray(u.get_magnitude(x))[index], units.unit_of(x))


def _joined(job: _Job, chunks: Parts | InMemory, about: dict[str, Any]) -> Sweep:
    """The whole grid, from its chunks."""
    pieces = [chunks.read(number) for number in range(job.tiles.count)]
    records = {}
    for name in pieces[0].records:
        at = int(name in pieces[-1].record_axes)
        whole = np.concatenate([u.get_magnitude(c.records[name]) for c in pieces], axis=at)
        # A record of a group of regions has those alone, one of sensors has these, and one of pairs has two axes.
        head, regions = whole.shape[:at], whole.shape[at + 1 :]
        whole = whole.reshape(*head, *job.grid.shape, *regions)
        records[name] = units.attach(whole, units.unit_of(pieces[0].records[name]))
    ok = records.pop(OK, None)
    return Sweep(job.grid.axes, records, pieces[-1].record_axes, about, ok)


# The file, before anything is run -----------------------------------------------------------------------------------


def _one_point(model: Model | Network, grid: Grid, run: Run) -> Sweep:
    """A sweep of one point, with the names, units and axes of the records and zeros for numbers."""
    mass = parts_of(model)[1]
    known = mass.recordable()
    ts, records, record_axes = times(run, 1.0 * mass.time_unit), {}, {}
    for name, what in run.entries:
        axis, tail = ts, grid.regions
        if not isinstance(what, str):
            assert run.sampling is not None
            axis, chain = signals.axis_of(what, ts, run.sampling), signals.chain_of(what, run.sampling)
            if chain.regional:
                tail = (1, 1) if isinstance(what, Reduction) and what.across else (chain.sampling.channels,)
        unit = signals.unit_of(what, known)
        shape = (*(() if axis is None else (1,)), *(1 for _ in grid.axes), *tail)
        records[name] = units.attach(np.zeros(shape, run.spec.dtype), unit)
        if axis is not None:
            record_axes[name] = _on_host(axis, slice(1))
    records |= {n: _on_host(x) for n, x in grid.beside(np.zeros(1, int)).items()}
    return Sweep(
        {n: x[:1] for n, x in grid.axes.items()}, records, record_axes, {}, np.ones([1] * len(grid.axes), bool)
    )


def _rehearse(out: Path, point: Sweep) -> None:
    """Write and read one point, so that a file that cannot be written is known before anything is run."""
    sweep_files.check_names(point.axes, point.records, point.record_axes)
    trial = files.beside(out)
    try:
        point.save(trial)
        if Sweep.load(trial)._contents().checksum() != point._contents().checksum():
            raise ValueError("it reads otherwise than it was written")
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"'record' got {', '.join(point.records)}, which {out.name} cannot hold: {error}") from error
    finally:
        files.remove(trial)
