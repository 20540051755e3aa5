"""Which primitives Mosaic has on TPUs."""

from __future__ import annotations

from ...pointwise import ELEMENTWISE, RULES, Program
from ..pallas import lacks as lacks_of

# Elementwise primitives that Mosaic has no rule for (tests/test_mosaic_tpu.py holds this against the compiler).
LACKING = frozenset(
    ["acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "cosh", "erfc", "expm1", "reduce_precision", "sinh"]
)
SUPPORTED = (ELEMENTWISE - LACKING) | RULES.keys()


def lacks(program: Program) -> str | None:
    """Why Mosaic cannot hold a program on TPUs, or ``None``."""
    return lacks_of(program, SUPPORTED, "TPUs")
