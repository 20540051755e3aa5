"""Errors of this package that are not Python's own, and how an unknown name is refused."""

import difflib


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
