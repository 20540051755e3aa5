"""Which versions of jax-triton, of Triton and of the CUDA that JAX assembles with go together.

jax-triton has Triton write PTX, and JAX's own ptxas assembles it, which takes no newer PTX than its own. Triton writes
for the ptxas of its wheel, unless it is told a version: jax-triton can tell it since 0.4. Everything is read from
packages' metadata and from the tools; nothing is imported to find out.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

from ... import _jax
from ...assembly import tool

INSTALL = "pip install 'brainmass-kernels[triton]'"
# The oldest of each that is tested, and from which on the two belong together.
_OLDEST, _OPTIONS = (0, 3, 1), (0, 4)
_TRITON_OF_OLDEST, _TRITON_OF_OPTIONS = (3, 6), (3, 7)
# From this Triton on, the newer ptxas of its wheel is that of Hopper too, and not of Blackwell alone.
_NEWER_FOR_HOPPER = (3, 9)


@functools.lru_cache
def version_of(package: str) -> str | None:
    """The version of an installed package, or ``None``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """3.7.0+git1a2b -> (3, 7, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+\-]|rc|dev", version)[0]))


def unfit(capability: float | None = None) -> str | None:
    """Why the installed versions cannot run kernels, and what to install, or ``None``.

    Parameters
    ----------
    capability : compute capability of the GPU, ``None`` or 0 where it is not NVIDIA's or not known
    """
    ours, theirs = version_of("jax-triton"), version_of("triton")
    if ours is None:
        return f"jax-triton is not installed: {INSTALL}"
    if _numbers(ours) < _OLDEST:
        return f"it needs jax-triton 0.3.1 or newer, and this is {ours}: {INSTALL}"
    if theirs is None:
        # As a build for another GPU, whose package has another name.
        return None
    pair = f"jax-triton {ours} with triton {theirs}"
    if _numbers(theirs) < _TRITON_OF_OLDEST:
        return f"{pair} is older than what is tested: pip install 'triton>=3.6'"
    if _numbers(ours) >= _OPTIONS:
        if _numbers(theirs) < _TRITON_OF_OPTIONS:
            return (
                f"{pair} cannot be lowered: pip install 'jax-triton==0.3.1', which takes triton 3.6, "
                f"or pip install 'triton>=3.7'"
            )
        return None
    writes, takes = _written(_numbers(theirs), capability), newest_ptx()
    if writes is not None and takes is not None and writes > takes:
        return (
            f"{pair} writes PTX {_release(writes)} for this GPU, and the CUDA that JAX assembles with takes "
            f"{_release(takes)} at most: pip install 'jax-triton>=0.4' (from Python 3.12 and jax 0.11 on), or "
            f"pip install 'triton==3.6.0'"
        )
    return None


def _written(triton: tuple[int, ...], capability: float | None) -> int | None:
    """The PTX that Triton writes by itself for a GPU, or ``None`` where every CUDA that JAX may have takes it."""
    if not capability or capability < (9.0 if triton >= _NEWER_FOR_HOPPER else 10.0):
        return None
    path = tool("ptxas-blackwell")
    return ptx_of(_cuda_of(path)) if path else None


@functools.lru_cache
def newest_ptx() -> int | None:
    """The newest PTX that JAX's ptxas takes, such as 90 for 9.0; ``None`` where there is no CUDA."""
    known = [_jax.cuda_version(), *([_cuda_of(path)] if (path := _ptxas_of_jax()) else [])]
    newest = [ptx_of(cuda) for cuda in known if cuda is not None]
    return min(newest, default=None)


def ptx_of(cuda: tuple[int, int]) -> int:
    """The newest PTX of a CUDA version, (13, 0) -> 90; 12.0 is the oldest that JAX takes."""
    major, minor = cuda
    if major > 12:
        return 10 * (major - 4) + minor
    # 12.5 and 12.6 have one PTX.
    return 80 + (minor - (minor > 5) if major == 12 else 0)


def _release(ptx: int) -> str:
    return f"{ptx // 10}.{ptx % 10}"


def _ptxas_of_jax() -> str | None:
    """The ptxas that XLA would call: of CUDA's packages, else of the machine."""
    packaged = _jax.cuda_folder()
    places = ([str(Path(packaged, "bin"))] if packaged else []) + [None, "/usr/local/cuda/bin"]
    return next(filter(None, (shutil.which("ptxas", path=place) for place in places)), None)


@functools.lru_cache
def _cuda_of(ptxas: str) -> tuple[int, int]:
    """The CUDA release of a ptxas."""
    text = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if not release:
        raise RuntimeError(f"{ptxas} --version names no release: {text.strip()}")
    return int(release.group(1)), int(release.group(2))
