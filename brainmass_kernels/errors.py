"""Errors of this package that are not Python's own, and how unknown names and wrong counts are refused."""

import difflib
from numbers import Integral


class Unsupported(NotImplementedError):
    """A named implementation cannot run this request; the message says why and what would serve."""


def check_name(name: str, known, what: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error``, with the closest known name, unless ``name`` is one of ``known``."""
    if name not in known:
        raise error(f"unknown {what} '{name}'{meant(name, known)} Known: {', '.join(known)}")


def meant(name: str, known) -> str:
    """The end of a sentence on an unknown name: the closest known one, if one is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
    return f"; did you mean '{close[0]}'?" if close else "."


def check_implementation(name: str | None, known) -> None:
    """Raise ``ValueError`` unless ``name`` is one of the ``known`` implementations, or ``None``."""
    if name is not None and name not in known:
        raise ValueError(f"implementation got '{name}', but takes None or one of {', '.join(known)}")


def check_counts(least: int, **counts) -> None:
    """Raise unless each of the counts, by the argument's name, is a whole number of at least ``least``."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"'{name}' got {value!r}, but takes a whole number")
        if value < least:
            raise ValueError(f"'{name}' got {value}, but takes at least {least}")
