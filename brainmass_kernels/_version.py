"""The version of this package, which programs and files name."""

__version__ = "0.1.0"
