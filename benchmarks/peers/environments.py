"""The environment of each peer: a virtual environment under `.peers/`, with pinned versions."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".peers"
JAX = ("jax==0.10.2", "jaxlib==0.10.2", "numpy==2.4.6")


class Environment(NamedTuple):
    """What a peer is installed from, and what it imports.

    Attributes
    ----------
    title : as tables name it
    packages : for pip
    imports : modules that the interpreter at hand must have to serve instead
    """

    title: str
    packages: tuple[str, ...]
    imports: tuple[str, ...]


PEERS = {
    "ours": Environment("brainmass_kernels", (*JAX, "llvmlite==0.50.0", "-e", str(ROOT)), ("jax", "llvmlite")),
    "scan": Environment("lax.scan by hand", JAX, ("jax",)),
    "c": Environment("C by hand", ("numpy==2.4.6",), ()),
    "numba": Environment("numba by hand", ("numba==0.68.1", "numpy==2.4.6"), ("numba",)),
    "tvboptim": Environment("tvboptim", (*JAX, "tvboptim==0.4.0"), ("tvboptim",)),
    "vbjax": Environment("vbjax", (*JAX, "vbjax==0.0.19", "tqdm==4.70.1"), ("vbjax",)),
    "diffrax": Environment("diffrax", (*JAX, "diffrax==0.7.2"), ("diffrax",)),
    "brainmass": Environment("brainmass", (*JAX, "brainmass==0.1.1"), ("brainmass",)),
}


def make(names) -> dict[str, str]:
    """The environments, each made anew where it is not whole; why not, of those that cannot be made."""
    failed = {}
    for name in names:
        python = FOLDER / name / "bin" / "python"
        print(f"{name}: {' '.join(PEERS[name].packages).replace(str(ROOT), '.')}", flush=True)
        reason = _run([sys.executable, "-m", "venv", str(FOLDER / name)]) or _run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEERS[name].packages]
        )
        note = FOLDER / name / "failed"
        note.unlink(missing_ok=True)
        if reason:
            failed[name] = reason
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(reason + "\n")
            print(f"  not made: {reason}", flush=True)
    return failed


def _run(command: list[str]) -> str | None:
    """Why it failed, in a line."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in said if line.lower().startswith("error")] or said
    return errors[0].replace(str(ROOT), ".")[:300] if errors else f"exit status {done.returncode}"


def interpreter(name: str) -> tuple[str | None, str]:
    """The Python of a peer, or ``None``; and which that is, or why there is none."""
    python, note = FOLDER / name / "bin" / "python", FOLDER / name / "failed"
    if note.exists():
        return None, note.read_text().strip()
    if python.exists():
        return str(python), "its own"
    missing = [module for module in PEERS[name].imports if find_spec(module) is None]
    if missing:
        return None, f"{' and '.join(missing)} not installed: python -m benchmarks.peers --make"
    return sys.executable, "the one at hand"


def variables(name: str, scratch: str) -> dict[str, str]:
    """What a worker's process is started with; ``scratch`` holds kernels, so that a first call compiles."""
    cores = len(os.sched_getaffinity(0))
    mine = {"JAX_PLATFORMS": "cpu", "BRAINMASS_KERNELS_CACHE": scratch, "NUMBA_CACHE_DIR": scratch}
    if name != "ours":
        # A device a core, for those that share lanes among devices.
        mine["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={cores}"
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    return {**kept, **mine, "PYTHONPATH": str(ROOT)}
