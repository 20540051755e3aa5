"""What the commands import first: their process starts without what no command needs.

Nothing is changed unless the process is the command line's own, which ends with its one command.
"""

from __future__ import annotations

import gc
import importlib
import sys

from . import _program

#: Objects made between two searches for garbage. The imports and the traces of one command make some hundred thousand
#: that stay, and Python's 700 would search all of them again and again.
_BETWEEN_COLLECTIONS = 100_000


def import_brainunit() -> None:
    """Import brainunit without its support of matplotlib, for which it imports matplotlib; what commands draw is plain.

    A name that is ``None`` among the modules is, by Python's rules, not installed.
    """
    if "matplotlib" not in sys.modules:
        sys.modules["matplotlib"] = None  # pyright: ignore[reportArgumentType]
        try:
            importlib.import_module("brainunit")
        finally:
            del sys.modules["matplotlib"]


if _program.OURS:
    gc.set_threshold(_BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])
    import_brainunit()
