"""What benchmarks share: timing in turns, comparing before, and writing results with what they depend on."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

RESULTS = pathlib.Path(__file__).parent / "results"


def options(about: str, name: str, quick: str, repeats: int) -> argparse.Namespace:
    """The command line of a benchmark: ``--repeats``, ``--quick`` (what that does in words), and ``--out``."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--quick", action="store_true", help=f"{quick}, to see that it runs; nothing is written")
    parser.add_argument("--out", default=str(RESULTS / f"{name}.json"))
    return parser.parse_args()


def timed(functions: dict[str, Callable], repeats: int, least: bool = False) -> dict[str, float]:
    """The seconds of each function, run in turn after a warm-up: the median, or with ``least`` the least.

    For the least they run in changing order: a shared machine is slower after a spell of work, and none should always
    come after the same other.
    """
    seconds = {name: [] for name in functions}
    for f in functions.values():
        jax.block_until_ready(f())
    order = list(functions.items())
    for _ in range(repeats):
        if least:
            random.shuffle(order)
        for name, f in order:
            began = time.perf_counter()
            jax.block_until_ready(f())
            seconds[name].append(time.perf_counter() - began)
    return {name: (min if least else statistics.median)(each) for name, each in seconds.items()}


def report(
    what: str, lanes: int, steps: int, seconds: dict[str, float], more: Callable[[str], tuple[dict[str, Any], str]]
) -> dict[str, Any]:
    """Print the rate of each, and return them as a result; ``more(name)`` gives more numbers and their text."""
    print(f"{what}, {lanes:,} masses x {steps:,} steps")
    rows = {}
    for name, each in seconds.items():
        numbers, text = more(name)
        rate = lanes * steps / each
        rows[name] = {"seconds": each, "mass_steps_per_s": rate, **numbers}
        print(f"  {name:<24} {rate / 1e6:8.1f} M mass-steps/s   {text}")
    return {"what": what, "lanes": lanes, "steps": steps, "rows": rows}


def close(a, b, tolerance: float) -> None:
    """End the program where results are not within a relative tolerance."""
    error = float(jnp.linalg.norm(jnp.ravel(a - b)) / jnp.linalg.norm(jnp.ravel(b)))
    if not error < tolerance:
        raise SystemExit(f"results disagree by {error:.2g}: no speed is reported")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    result = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            result[name] = metadata.version(name)
    return result


def save(path, packages: Iterable[str], **numbers) -> None:
    """Write numbers as JSON, with the command, the machine and the versions of packages that they depend on.

    The command is that of the module of the result's name.
    """
    path = pathlib.Path(path)
    about = {
        "command": f"python -m benchmarks.{path.stem}", "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(),
        **versions(packages), "backend": jax.default_backend(),
    }  # fmt: skip
    text = json.dumps({**about, **numbers}, indent=1)
    # A list of numbers alone is one line.
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    path.write_text(text + "\n")
    print(f"wrote {path.name}")
