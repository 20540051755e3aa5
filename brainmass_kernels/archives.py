"""Groups of quantities as one ``.npz``, with their units and a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import brainunit as u
import numpy as np

from . import files, units

# Numbers that are copied at once for a checksum.
_SLAB = 2**20


def pack(path: Path, groups: Sequence[Mapping[str, Any]], about: dict, form: str) -> None:
    """Write groups of quantities as one ``.npz``; ``form`` says what it is, ``about`` is ready for JSON."""
    arrays = {f"{n}_{g}": np.asarray(u.get_magnitude(x)) for g, group in enumerate(groups) for n, x in group.items()}
    names = [{n: str(units.unit_of(x)) for n, x in group.items()} for group in groups]
    header = {"format": form, "units": names, "about": about, files.CHECKSUM: digest_of(groups, about)}
    with open(path, "wb") as file:
        arrays["about"] = np.array(json.dumps(header))
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def unpack(path: Path, form: str) -> tuple[list[dict], dict, str | None]:
    """The groups, what they are about, and the checksum, which early files lack.

    Raises
    ------
    ValueError : the file is of another form
    """
    with open(path, "rb") as file, np.load(file) as archive:
        header = json.loads(str(archive["about"]))
        if header.get("format", form) != form:
            raise ValueError(f"it is a {header['format']}")
        groups = [
            {n: units.attach(archive[f"{n}_{g}"], units.parsed(unit)) for n, unit in group.items()}
            for g, group in enumerate(header["units"])
        ]
    return groups, header["about"], header.get(files.CHECKSUM)


def digest_of(groups: Sequence[Mapping[str, Any]], about: dict) -> str:
    """Of quantities by name, whatever the dtype that a format keeps them in."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for group in groups:
        for name, x in sorted(group.items()):
            array = np.ascontiguousarray(u.get_magnitude(x))
            digest.update(f"|{name}|{units.lasting(units.unit_of(x))}|{array.dtype.kind}{array.shape}|".encode())
            flat = array.reshape(-1)
            for first in range(0, flat.size, _SLAB):
                digest.update(_canonical(flat[first : first + _SLAB]).tobytes())
        digest.update(f"||{list(groups[0])}".encode())
    return digest.hexdigest()


def _canonical(array: np.ndarray) -> np.ndarray:
    """Numbers in one form, whatever the width and the order of bytes that a format gave them."""
    wide = {"f": "<f8", "c": "<c16", "b": "<i8", "i": "<i8", "u": "<u8"}.get(array.dtype.kind, array.dtype)
    array = array.astype(wide)
    # All NaN are equal.
    return np.where(np.isnan(array), np.nan, array) if array.dtype.kind in "fc" else array
