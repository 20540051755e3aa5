"""Errors of this package that are not Python's own."""


class Unsupported(NotImplementedError):
    """A named implementation cannot run this request; the message says why and what would serve."""
