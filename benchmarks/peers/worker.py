"""The process of one peer, in an environment of its own: ``python -m benchmarks.peers.worker NAME``.

It reads a request a line, in JSON, and writes an answer a line: ``{"ok": true, ...}``, or ``{"ok": false, "error":
why}``. What libraries print goes to standard error.

- ``{"do": "hello"}``: how the peer runs, its scheme in each case, the cases that it refuses, versions.
- ``{"do": "settings", "work": [...]}``: the settings of a `Work` that are worth a try.
- ``{"do": "prepare", "work": [...], "setting": s, "out": file}``: the first call: its seconds, its result in a file.
- ``{"do": "run", "seconds": t}``: calls of what was prepared last, at least one and for about so long: seconds of one.
- ``{"do": "end"}``
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .work import Work


class Server:
    """What a worker does with requests, for a peer's module."""

    def __init__(self, peer):
        self.peer = peer
        self.call: Callable[[], dict[str, Any]] | None = None

    def answer(self, request: dict) -> dict:
        """Of one request; what a peer raises is its answer, for a peer that fails must not end the comparison."""
        try:
            handle = getattr(self, f"do_{request.get('do')}", None)
            if handle is None:
                raise ValueError(f"'do' got {request.get('do')!r}, but takes hello, settings, prepare, run or end")
            return {"ok": True, **handle(**{key: value for key, value in request.items() if key != "do"})}
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            return {"ok": False, "error": f"{type(error).__name__}: {said[0]}"[:400]}

    def do_hello(self) -> dict:
        begin = getattr(self.peer, "begin", None)
        if begin:
            begin()
        versions = {}
        for name in ("numpy", *self.peer.PACKAGES):
            versions[name] = metadata.version(name)
        return {
            "how": self.peer.HOW, "schemes": self.peer.SCHEMES, "refused": self.peer.REFUSED,
            "python": ".".join(map(str, sys.version_info[:3])), "versions": versions,
        }  # fmt: skip

    def do_settings(self, work: list) -> dict:
        return {"settings": self.peer.settings(Work(*work))}

    def do_prepare(self, work: list, setting: str, out: str) -> dict:
        self.call = None
        began = time.perf_counter()
        call = self.peer.prepared(Work(*work), setting)
        result = finished(call())
        first = time.perf_counter() - began
        self.call = call
        arrays: dict[str, Any] = {name: np.asarray(x) for name, x in result.items()}
        np.savez(out, **arrays)
        return {"first": first}

    def do_run(self, seconds: float) -> dict:
        if self.call is None:
            raise RuntimeError("nothing is prepared")
        finished(self.call())
        calls, began = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - began < seconds:
            finished(self.call())
            calls += 1
        return {"seconds": (time.perf_counter() - began) / calls, "calls": calls}

    def do_end(self) -> dict:
        return {}


def finished(result: dict[str, Any]) -> dict[str, Any]:
    """The same, once it is all there."""
    for x in result.values():
        if hasattr(x, "block_until_ready"):
            x.block_until_ready()
    return result


def serve(server: Server, requests, answers) -> None:
    """Until a request to end, or the end of requests."""
    for line in requests:
        request = json.loads(line)
        print(json.dumps(server.answer(request)), file=answers, flush=True)
        if request.get("do") == "end":
            return


def main() -> None:
    name = sys.argv[1]
    # Answers go where standard output went; all else that is printed, by Python or not, goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    if not (Path(__file__).parent / f"by_{name}.py").exists():
        raise SystemExit(f"there is no peer {name!r}")
    serve(Server(importlib.import_module(f"{__package__}.by_{name}")), sys.stdin, answers)


if __name__ == "__main__":
    main()
