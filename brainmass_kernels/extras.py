"""Packages that only some of this one needs, imported when they are."""

from __future__ import annotations

import importlib
from importlib.util import find_spec


def check_installed(package: str, extra: str = "fit") -> None:
    """As `needs`, without the import."""
    if find_spec(package) is None:
        raise ImportError(_missing(package, extra))


def needs(package: str, extra: str = "fit"):
    """Import a package of an extra.

    Raises
    ------
    ImportError : it is not installed; the message names the extra that installs it
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(_missing(package, extra)) from error


def _missing(package: str, extra: str) -> str:
    return f"this needs {package}, which is not installed: pip install 'brainmass-kernels[{extra}]'"
