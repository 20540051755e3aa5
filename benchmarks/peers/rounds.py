"""Peers in turn: each in a process that stays, one at work at a time, in rounds of changing order."""

from __future__ import annotations

import contextlib
import json
import queue
import random
import statistics
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import oracle
from .environments import PEERS, ROOT, interpreter, variables
from .work import Work

#: Seconds that one answer may take.
PATIENCE = 900.0
OURS = "ours"


class WorkerFailed(RuntimeError):
    """A request that was not carried out, with its reason."""


class Worker:
    """A peer's process.

    Parameters
    ----------
    name : of `PEERS`
    command : that starts it; by default its interpreter with `worker`
    """

    def __init__(self, name: str, scratch: str, command: list[str] | None = None):
        python, self.environment = interpreter(name)
        if command is None:
            if python is None:
                raise WorkerFailed(self.environment)
            command = [python, "-m", f"{__package__}.worker", name]
        self.log = Path(scratch) / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables(name, scratch), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True,
            )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, patience: float = PATIENCE, **request) -> dict[str, Any]:
        """The answer to one request.

        Raises
        ------
        WorkerFailed : the peer raised, its process ended, or no answer came in time; then the process is ended
        """
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=patience)
        except queue.Empty:
            self.end()
            raise WorkerFailed(f"no answer within {patience:g} s") from None
        except BrokenPipeError:
            line = None
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10.0)
            self.end()
            said = self.log.read_text().strip().splitlines() or ["it printed nothing"]
            raise WorkerFailed(f"its process ended with {self.process.returncode}: {said[-1][:200]}")
        answer = json.loads(line)
        if not answer.pop("ok"):
            raise WorkerFailed(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """The process and what it is read by."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Peers:
    """The workers of a comparison; one that has ended is started again when it is next needed."""

    def __init__(self, names, scratch: str):
        self.scratch, self.workers, self.about = scratch, {}, {}
        for name in names:
            self.start(name)

    def start(self, name: str) -> None:
        try:
            worker = Worker(name, self.scratch)
            self.about[name] = {"environment": worker.environment, **worker.ask(do="hello")}
            self.workers[name] = worker
        except WorkerFailed as failure:
            self.about[name] = {"skipped": str(failure)}

    def of(self, name: str) -> Worker:
        if "skipped" in self.about[name]:
            raise WorkerFailed(self.about[name]["skipped"])
        if not self.workers[name].alive:
            self.start(name)
        return self.workers[name]

    def end(self) -> None:
        for worker in self.workers.values():
            worker.end()


class Plan(NamedTuple):
    """How a comparison is made.

    Attributes
    ----------
    rounds, seconds : how often each is timed, and for how long each time
    thorough : whether every setting of a peer is tried, or its first alone
    """

    rounds: int
    seconds: float
    thorough: bool


def chosen(worker: Worker, work: Work, scheme: str, plan: Plan, scratch: str) -> dict[str, Any]:
    """The fastest of a peer's settings that computes what it should, made ready; and what each took.

    Raises
    ------
    WorkerFailed : none of them does
    """
    settings, tried, right = worker.ask(do="settings", work=list(work))["settings"], {}, {}
    out = str(Path(scratch) / "result.npz")
    for setting in settings if plan.thorough else settings[:1]:
        try:
            first = worker.ask(do="prepare", work=list(work), setting=setting, out=out)["first"]
            with np.load(out) as got:
                error = oracle.compared(work, scheme, dict(got))
            if "wrong" in error:
                raise WorkerFailed(f"wrong: {error['wrong']}")
            taken = worker.ask(do="run", seconds=plan.seconds)["seconds"]
            tried[setting], right[setting] = float(f"{taken:.4g}"), (taken, first, error)
        except WorkerFailed as failure:
            tried[setting] = str(failure)
            if not worker.alive:
                break
    if not right or not worker.alive:
        raise WorkerFailed("; ".join(f"{setting}: {why}" for setting, why in tried.items()))
    best = min(right, key=lambda setting: right[setting][0])
    if len(tried) > 1:
        worker.ask(do="prepare", work=list(work), setting=best, out=out)
    _, first, error = right[best]
    numbers = {key: float(f"{value:.3g}") for key, value in error.items()}
    return {"setting": best, "scheme": scheme, "first": round(first, 3), **numbers, "settings": tried}


def case(peers: Peers, work: Work, plan: Plan, say=print) -> dict[str, Any]:
    """One case by all peers: what each computes is compared first, then all that are right are timed."""
    rows: dict[str, dict[str, Any]] = {}
    for name, about in peers.about.items():
        if work.case in about.get("refused", {}):
            rows[name] = {"refused": about["refused"][work.case]}
            continue
        try:
            rows[name] = chosen(peers.of(name), work, about.get("schemes", {}).get(work.case), plan, peers.scratch)
        except WorkerFailed as failure:
            rows[name] = {"skipped": str(failure)}
        say(f"  {PEERS[name].title}: {rows[name].get('setting') or rows[name]['skipped']}")
    seconds: dict[str, list[float]] = {name: [] for name, row in rows.items() if "setting" in row}
    for _ in range(plan.rounds):
        for name in random.sample(list(seconds), len(seconds)):
            try:
                seconds[name].append(peers.of(name).ask(do="run", seconds=plan.seconds)["seconds"])
            except WorkerFailed as failure:
                rows[name] = {"skipped": str(failure)}
                del seconds[name]
    for name, each in seconds.items():
        rows[name].update(timing(each, seconds.get(OURS), work))
    return {"case": work.case, "masses": work.masses, "steps": work.steps, "peers": rows}


def timing(mine: list[float], ours: list[float] | None, work: Work) -> dict[str, Any]:
    """The median time and rate, and the median of the rounds' ratios: how many times as long as ours."""
    median = statistics.median(mine)
    numbers: dict[str, Any] = {
        "seconds": float(f"{median:.4g}"),
        "mass_steps_per_s": float(f"{work.masses * work.steps / median:.4g}"),
    }
    if ours:
        ratios = [a / b for a, b in zip(mine, ours, strict=True)]
        numbers["ratio"] = round(statistics.median(ratios), 3)
        numbers["ratios"] = [round(each, 3) for each in ratios]
    return numbers


def compared(names, works: list[Work], plan: Plan, say=print) -> dict[str, Any]:
    """All cases, and what the peers said of themselves."""
    with tempfile.TemporaryDirectory() as scratch:
        peers = Peers(names, scratch)
        try:
            results = []
            for work in works:
                say(f"{work.case}, {work.masses:,} masses x {work.steps:,} steps")
                results.append(case(peers, work, plan, say))
        finally:
            peers.end()
        return {"peers": peers.about, "results": results}
