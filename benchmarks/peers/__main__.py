"""This package beside its peers, the same work: ``python -m benchmarks.peers``.

tvboptim, vbjax, diffrax, brainmass, and numba, C and `lax.scan` by hand, each in an environment of its own, which
``--make`` makes. What each computes is compared with float64 before it is timed. Each is tried in all of its settings
and timed in the fastest, in rounds of changing order with one peer at work at a time; a ratio is the median over
rounds. Writes ``results/peers.json``; ``--table`` prints its markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from . import rounds, table
from . import work as w
from .environments import PEERS, make
from .rounds import Plan

RESULT = Path(__file__).parents[1] / "results" / "peers.json"
SPEED = 6.0  # mm/ms


def connectome(folder: str) -> str:
    """A file of the connectome of tvb-data's 76 regions: weights, and delays of whole steps, at least one.

    Raises
    ------
    ImportError : tvb-data or h5py is not installed
    """
    import brainunit as u

    import brainmass_kernels as bk

    read = bk.load_connectome(w.REGIONS).normalized()
    weights = np.asarray(read.weights, np.float32) * (1.0 - np.eye(w.REGIONS, dtype=np.float32))
    steps = np.round(np.asarray(u.get_magnitude(read.lengths)) / SPEED / (w.DT * 1e3))
    path = Path(folder) / "connectome.npz"
    np.savez(path, weights=weights, delays=np.where(weights != 0.0, np.maximum(steps, 1), 1).astype(np.int32))
    return str(path)


def chosen(text: str | None, all_of, option: str) -> list[str]:
    """The names of a list with commas, or all."""
    names = [name.strip() for name in text.split(",")] if text else list(all_of)
    unknown = [name for name in names if name not in all_of]
    if unknown:
        raise SystemExit(f"{option} got {', '.join(unknown)}, but takes {', '.join(all_of)}")
    return names


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--make", action="store_true", help="make the environments under .peers/, and stop")
    parser.add_argument("--table", action="store_true", help="print the markdown of the result, and stop")
    parser.add_argument("--only", help=f"cases: {', '.join(w.ABOUT)}")
    parser.add_argument("--peers", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=9, help="how often each is timed (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="for how long each time (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="little work, first settings; nothing is written")
    parser.add_argument("--out", default=str(RESULT))
    return parser.parse_args()


def works(asked: argparse.Namespace, folder: str) -> list[w.Work]:
    sizes, found = w.QUICK if asked.quick else w.FULL, []
    for case in chosen(asked.only, w.ABOUT, "--only"):
        work = sizes[case]
        if case == "network":
            try:
                work = work._replace(connectome=connectome(folder))
            except ImportError as error:
                print(f"network: left out, {error}")
                continue
        found.append(work)
    return found


def main() -> None:
    asked = options()
    if asked.rounds < 1:
        raise SystemExit(f"--rounds got {asked.rounds}, but takes 1 or more")
    names = chosen(asked.peers, PEERS, "--peers")
    if asked.make:
        raise SystemExit(1 if len(make(names)) == len(names) else 0)
    if asked.table:
        if not Path(asked.out).exists():
            raise SystemExit(f"{Path(asked.out).name} is not there yet: python -m benchmarks.peers writes it")
        numbers = json.loads(Path(asked.out).read_text())
        print("\n".join([table.markdown(numbers), *table.goals(numbers)]))
        return
    began = os.getloadavg()[0]
    plan = Plan(2, 0.02, False) if asked.quick else Plan(asked.rounds, asked.seconds, True)
    with tempfile.TemporaryDirectory() as folder:
        numbers = rounds.compared(names, works(asked, folder), plan, lambda text: print(text, flush=True))
    print("\n".join(["", table.markdown(numbers), *table.goals(numbers)]))
    if not asked.quick:
        from ..timing import save

        load = [round(x, 1) for x in (began, os.getloadavg()[0])]
        save(asked.out, ("jax", "brainmass_kernels"), load_before_and_after=load, rounds=plan.rounds, **numbers)


if __name__ == "__main__":
    main()
