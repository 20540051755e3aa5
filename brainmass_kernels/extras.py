"""Packages that only some of this one needs, imported when they are."""

from __future__ import annotations

import importlib


def needs(package: str, extra: str = "fit"):
    """Import a package of an extra.

    Raises
    ------
    ImportError : it is not installed; the message names the extra that installs it
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this needs {package}, which is not installed: pip install 'brainmass-kernels[{extra}]'"
        ) from error
