"""How the source of CPU kernels writes each primitive, by functions of `runtime`."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..._jax import Literal
from ...codegen.writer import SHARED, OpTable, Rule, Writer

TYPES = {
    "float32": "f32", "float64": "f64", "bool": "bool",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64",
}  # fmt: skip


def _literal(value, dtype: np.dtype) -> str:
    if dtype.kind == "b":
        return str(bool(value))
    text = repr(float(value)) if dtype.kind == "f" else str(int(value))
    return f"{TYPES[dtype.name]}({text})"


def _wrap(x: str, dtype: np.dtype) -> str:
    return f"{TYPES[dtype.name]}({x})"


def _cast(x: str, old: np.dtype, new: np.dtype) -> str:
    return f"{x} != {_literal(0, old)}" if new.kind == "b" else _wrap(x, new)


def _div(writer: Writer, eqn, a: str, b: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    return f"{a} / {b}" if dtype.kind == "f" else _wrap(f"quotient({a}, {b})", dtype)


def _rem(writer: Writer, eqn, a: str, b: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    if dtype.kind == "f":
        return _wrap(f"np.fmod({a}, {b})", dtype)
    return _wrap(f"{a} - quotient({a}, {b}) * {b}", dtype)


def _sign(writer: Writer, eqn, x: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    zero, one = _literal(0, dtype), _literal(1, dtype)
    if dtype.kind == "u":
        return f"{one} if {x} > {zero} else {zero}"
    return f"{one} if {x} > {zero} else ({_literal(-1, dtype)} if {x} < {zero} else {x})"


def _round(writer: Writer, eqn, x: str) -> str:
    return f"round_even({x})" if int(eqn.params["rounding_method"]) == 1 else f"round_away({x})"


def _shift(symbol: str, unsigned: bool) -> Rule:
    """A shift by as many bits as there are, or more, leaves nothing but the sign."""

    def rule(writer: Writer, eqn, x: str, by: str) -> str:
        dtype = eqn.outvars[0].aval.dtype
        width, v = 8 * dtype.itemsize, eqn.invars[1]
        left = f"u{width}({x})" if unsigned else x
        if isinstance(v, Literal) and 0 <= int(v.val) < width:
            return _wrap(f"{left} {symbol} {int(v.val)}", dtype)
        inside = f"u{width}({by}) < u{width}({width})"
        if symbol == ">>" and not unsigned:
            return _wrap(f"{x} >> ({by} if {inside} else {_literal(width - 1, dtype)})", dtype)
        shifted = _wrap(f"{left} {symbol} ({by} if {inside} else {_literal(0, dtype)})", dtype)
        return f"{shifted} if {inside} else {_literal(0, dtype)}"

    return rule


def _not(writer: Writer, eqn, x: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    return f"not {x}" if dtype.kind == "b" else _wrap(f"~{x}", dtype)


def _abs(writer: Writer, eqn, x: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    if dtype.kind == "f":
        return f"absolute({x})"
    return _wrap(f"{x} if {x} >= {_literal(0, dtype)} else -{x}", dtype)


_LIBM = "sin cos tan asin acos atan sinh cosh asinh acosh atanh expm1 log1p erf erfc".split()


def _libm(name: str) -> str:
    return f"{{type}}(math.{name}({{0}}))"


NUMBA = OpTable(
    name="numba",
    operations={
        **SHARED,
        "div": _div,
        "rem": _rem,
        "abs": _abs,
        "sign": _sign,
        "max": "maximum({0}, {1})",
        "min": "minimum({0}, {1})",
        "clamp": "clamped({1}, {0}, {2})",
        "is_finite": "absolute({0}) < {type}(inf)",
        "floor": "floor({0})",
        "ceil": "ceil({0})",
        "round": _round,
        "sqrt": "sqrt({0})",
        "rsqrt": "{type}(1.0) / sqrt({0})",
        "cbrt": "{type}(np.cbrt({0}))",
        "exp": "exp{bits}({0})",
        "exp2": "{type}(np.exp2({0}))",
        "log": "log{bits}({0})",
        "tanh": "tanh{bits}({0})",
        "tanh_absolute": "tanh_absolute{bits}({0})",
        "logistic": "logistic{bits}({0})",
        "logistic2": "logistic2_{bits}({0})",
        "pow": "{type}(math.pow({0}, {1}))",
        "atan2": "{type}(math.atan2({0}, {1}))",
        "nextafter": "{type}(np.nextafter({0}, {1}))",
        **{name: _libm(name) for name in _LIBM},
        "not": _not,
        "shift_left": _shift("<<", unsigned=False),
        "shift_right_arithmetic": _shift(">>", unsigned=False),
        "shift_right_logical": _shift(">>", unsigned=True),
    },
    types=TYPES,
    literal=_literal,
    cast=_cast,
    wrap=_wrap,
    select="{1} if {0} else {2}",
    fused="fma({0}, {1}, {2})",
    bits="bits({0})",
    slow=frozenset(["tanh", "tanh_absolute", "exp", "exp2", "log", "logistic", "logistic2", "cbrt", *_LIBM]),
)
# The same with approximate functions.
_FAST_TANH = dict.fromkeys(["tanh", "tanh_absolute"], "fast_tanh{bits}({0})")
NUMBA_FAST = dataclasses.replace(NUMBA, operations={**NUMBA.operations, **_FAST_TANH})


def has_simd(function: str) -> bool:
    """Whether LLVM makes SIMD of a function, a format of its argument: of all but calls of C's library."""
    return not any(name in function for name in ("math.", "np.", "log64"))


def of_uniform(optable: OpTable) -> OpTable:
    """A table for making normals of uniform numbers, whose logarithms have no special cases."""
    return dataclasses.replace(optable, operations={**optable.operations, "log": "log_of_uniform{bits}({0})"})
