"""What is told of an installation, for a report of an error; and a page that shows a fit or a sweep."""

from __future__ import annotations

import collections
import os
import platform
import re
import textwrap
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import jax

from . import dispatch, options, testing
from ._version import __version__
from .backends.numba import layout
from .codegen import kernel_cache

#: Packages that every installation has, then those of extras; another version of them may be why something fails.
_PACKAGES = ("jax", "jaxlib", "brainunit", "numpy", "llvmlite")
_OPTIONAL = (
    "brainmass", "brainstate", "braintools", "h5py", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "jinja2",
    "libtpu", "matplotlib", "mne", "optax", "pandas", "rich", "scipy", "triton", "tvb-data", "xarray", "zarr",
)  # fmt: skip
#: Variables that change what is computed, where, or how fast.
_VARIABLES = re.compile(r"JAX_|XLA_|LIBTPU_|CUDA_VISIBLE_DEVICES$|NUMBA_NUM_THREADS$|BRAINMASS_KERNELS_")
_NONE = "none"
#: Columns of a terminal.
_WIDTH = 80


# The installation ---------------------------------------------------------------------------------------------------


def installation() -> dict[str, Any]:
    """Versions, devices, processors, implementations and the cache, ready for JSON; ``~`` is the user's home."""
    about = {
        "brainmass-kernels": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": _versions(_PACKAGES),
        "optional": _versions(_OPTIONAL),
        "devices": (devices := _devices()),
        "processors": _processors(),
        "cache": _cache(),
        "environment": {name: x for name, x in sorted(os.environ.items()) if _VARIABLES.match(name)},
        "implementations": _implementations(devices),
    }
    return _mapped(_tilde, about)


def _versions(packages) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _devices() -> list[str]:
    """The kinds of device that JAX computes on, or what it says where it finds none."""
    try:
        devices = jax.devices()
    except Exception as error:
        # Plugins raise what they like, and a report is to tell it.
        return [f"{_NONE}: {' '.join((str(error) or repr(error)).split())}"]
    counts = collections.Counter(device.device_kind for device in devices)
    made_by = "" if devices[0].platform == "cpu" else f" ({' '.join(devices[0].client.platform_version.split())})"
    return [f"{count} x {kind} on {devices[0].platform}{made_by}" for kind, count in counts.items()]


def _processors() -> dict[str, Any]:
    about: dict[str, Any] = {"count": os.cpu_count(), "threads": layout.threads()}
    if find_spec("llvmlite"):
        from llvmlite.binding import get_host_cpu_name

        about["kind"] = get_host_cpu_name()
    return about


def _cache() -> dict[str, Any]:
    """Where compiled kernels and programs are kept, and how much lies there."""
    try:
        folder = kernel_cache.usual()
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    except OSError as error:
        return {"folder": None, "reason": str(error)}
    return {"folder": str(folder), "files": len(sizes), "bytes": sum(sizes)}


def _implementations(devices: list[str]) -> dict[str, dict[str, Any]]:
    """For each implementation whether it runs here, the chips that it is compiled for here, and the reasons if not."""
    if devices[0].startswith(_NONE):
        here = dict.fromkeys(options.catalogue()["implementations"], "JAX finds no device")
    else:
        here = dispatch.implementations()
    compilers = testing.compilers()
    about = {}
    for name, reason in here.items():
        chips = {chip: compilers[chip] for chip in testing.CHIPS.get(name, ())}
        able = [chip for chip, what in chips.items() if what == "compiles here"]
        unable = {chip: what for chip, what in chips.items() if chip not in able}
        about[name] = {"here": reason, "compiles_for": able, "does_not_compile_for": unable}
    return about


def _mapped(change, value) -> Any:
    """A document with every text of it changed."""
    if isinstance(value, dict):
        return {name: _mapped(change, x) for name, x in value.items()}
    if isinstance(value, list):
        return [_mapped(change, x) for x in value]
    return change(value) if isinstance(value, str) else value


def _tilde(text: str) -> str:
    """A text with ``~`` for the user's home."""
    home = os.path.expanduser("~")
    for folder in {home, os.path.realpath(home)}:
        if folder.strip(os.sep):
            text = re.sub(rf"(?<![\w./-]){re.escape(folder)}(?![\w.-])", "~", text)
    return text


def installation_text(about: dict[str, Any]) -> str:
    """What `installation` tells, as lines that fit a terminal."""
    cache, processors = about["cache"], about["processors"]
    kept = f"{cache['files']:,} files, {cache['bytes'] / 1e6:.1f} MB" if cache["folder"] else cache["reason"]
    kind = f" ({processors['kind']})" if "kind" in processors else ""
    rows = {
        "Python": f"{about['python']} on {about['system']}",
        "packages": _joined(about["packages"], " "),
        "optional": _joined(about["optional"], " ") or "none",
        "devices": "; ".join(about["devices"]),
        "processors": f"{processors['count']}{kind}, of which a run takes {processors['threads']}",
        "cache": ": ".join([*([cache["folder"]] if cache["folder"] else []), kept]),
        "environment": _joined(about["environment"], "=") or "nothing set",
    }
    lines = [f"brainmass-kernels {about['brainmass-kernels']}", *_table(rows), "", "implementations"]
    return "\n".join([*lines, *_table({name: _told(x) for name, x in about["implementations"].items()})])


def _joined(values: dict[str, str], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def _told(about: dict[str, Any]) -> str:
    """One implementation in a sentence."""
    here = about["here"]
    parts = [here if here == "runs here" else f"not here: {here}"]
    if about["compiles_for"]:
        parts.append(f"compiles for {', '.join(about['compiles_for'])}")
    chips = collections.defaultdict(list)
    for chip, reason in about["does_not_compile_for"].items():
        if reason != here:
            chips[reason].append(chip)
    parts += [f"no compiler for {', '.join(names)}: {reason}" for reason, names in chips.items()]
    return "; ".join(parts)


def _table(rows: dict[str, str]) -> list[str]:
    """Two columns, of which the second is wrapped."""
    width = max(map(len, rows)) + 4
    lines = []
    for name, text in rows.items():
        lines += textwrap.wrap(
            text, _WIDTH - 1, initial_indent=f"  {name:<{width - 2}}", subsequent_indent=" " * width,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return lines
