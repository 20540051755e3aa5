"""How Triton's source writes each primitive, by functions of `runtime`."""

from __future__ import annotations

import dataclasses

import numpy as np

from ... import _jax
from ..._jax import Literal, eqn_source
from ...codegen.writer import SHARED, OpTable, Rule, Writer
from ...errors import Unsupported
from ..base import Loop

TYPES = {
    "float32": "tl.float32", "float64": "tl.float64", "bool": "tl.int1",
    **{f"{kind}{bits}": f"tl.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}  # fmt: skip


def _literal(value, dtype: np.dtype) -> str:
    if dtype.kind == "b":
        return str(bool(value))
    if dtype.kind != "f":
        return f"({int(value)})" if value < 0 else str(int(value))
    text = {"inf": "INF", "-inf": "-INF", "nan": "NAN"}.get(str(float(value)), repr(float(value)))
    # Triton takes a Python number as float32 where nothing wider is near.
    text = f"tl.full((), {text}, tl.float64)" if dtype == np.float64 else text
    return f"({text})" if text.startswith("-") else text


def _cast(x: str, old: np.dtype, new: np.dtype) -> str:
    return f"{x} != 0" if new.kind == "b" else f"{_tensor(x, old)}.to({TYPES[new.name]})"


def _tensor(x: str, dtype: np.dtype) -> str:
    """A value that has a type: a literal has none."""
    return x if x.isidentifier() else f"tl.full((), {x}, {TYPES[dtype.name]})"


def _bitcast(writer: Writer, eqn, x: str) -> str:
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if old.itemsize != new.itemsize:
        raise Unsupported(f"'triton' casts no bits from {old} to {new} ({eqn_source(eqn)})")
    return f"{_tensor(x, old)}.to({TYPES[new.name]}, bitcast=True)"


def _shift(symbol: str, unsigned: bool) -> Rule:
    def rule(writer: Writer, eqn, x: str, by: str) -> str:
        dtype = eqn.outvars[0].aval.dtype
        width, v, same = 8 * dtype.itemsize, eqn.invars[1], TYPES[dtype.name]
        left = f"{_tensor(x, dtype)}.to(tl.uint{width})" if unsigned else _tensor(x, dtype)
        if isinstance(v, Literal) and 0 <= int(v.val) < width:
            return f"({left} {symbol} {int(v.val)}).to({same})"
        inside = f"(({by} >= 0) & ({by} < {width}))"
        otherwise = str(width - 1) if symbol == ">>" and not unsigned else "0"
        shifted = f"({left} {symbol} tl.where({inside}, {by}, {otherwise})).to({same})"
        return shifted if otherwise != "0" else f"tl.where({inside}, {shifted}, 0)"

    return rule


def _div(writer: Writer, eqn, a: str, b: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    if dtype.kind != "f":
        return _by_zero(a, "//", b, "-1")
    return f"tl.div_rn({a}, {b})" if dtype == np.float32 else f"{a} / {b}"


def _rem(writer: Writer, eqn, a: str, b: str) -> str:
    return f"fmod({a}, {b})" if eqn.outvars[0].aval.dtype.kind == "f" else _by_zero(a, "%", b, a)


def _by_zero(a: str, symbol: str, b: str, otherwise: str) -> str:
    """Division of integers as XLA has it."""
    return f"tl.where({b} == 0, {otherwise}, {a} {symbol} tl.where({b} == 0, 1, {b}))"


def _fast_div(writer: Writer, eqn, a: str, b: str) -> str:
    return f"{a} / {b}" if eqn.outvars[0].aval.dtype.kind == "f" else _div(writer, eqn, a, b)


def _round(writer: Writer, eqn, x: str) -> str:
    return f"rint({x})" if int(eqn.params["rounding_method"]) == 1 else f"round({x})"


def _largest(a: str, b: str) -> str:
    return f"tl.maximum({a}, {b}, tl.PropagateNan.ALL)"


def _smallest(a: str, b: str) -> str:
    return f"tl.minimum({a}, {b}, tl.PropagateNan.ALL)"


_DEVICE = "sin cos tan asin acos atan sinh cosh asinh acosh atanh expm1 log1p erf erfc cbrt exp exp2 log tanh"

TRITON = OpTable(
    name="triton",
    operations={
        **SHARED,
        **{name: f"{name}({{0}})" for name in _DEVICE.split()},
        "div": _div,
        "rem": _rem,
        "abs": "tl.abs({0})",
        "sign": "tl.where({0} > 0, 1, tl.where({0} < 0, -1, {0}))",
        "max": _largest("{0}", "{1}"),
        "min": _smallest("{0}", "{1}"),
        "clamp": _smallest(_largest("{1}", "{0}"), "{2}"),
        "is_finite": "tl.abs({0}) < INF",
        "floor": "tl.floor({0})",
        "ceil": "tl.ceil({0})",
        "round": _round,
        "sqrt": "sqrt({0})",
        "rsqrt": "rsqrt({0})",
        "tanh_absolute": "tanh_absolute({0})",
        "logistic2": "logistic2({0})",
        "logistic": "logistic({0})",
        "pow": "pow({0}, {1})",
        "atan2": "atan2({0}, {1})",
        "nextafter": "nextafter({0}, {1})",
        "bitcast_convert_type": _bitcast,
        "not": "~{0}",
        "shift_left": _shift("<<", unsigned=False),
        "shift_right_arithmetic": _shift(">>", unsigned=False),
        "shift_right_logical": _shift(">>", unsigned=True),
    },
    types=TYPES,
    literal=_literal,
    cast=_cast,
    wrap=lambda x, dtype: x,
    select="tl.where({0}, {1}, {2})",
    fused="tl.fma({0}, {1}, {2})",
    bits="",
)
# The same with the hardware's own functions.
TRITON_FAST = dataclasses.replace(
    TRITON,
    operations={
        **TRITON.operations,
        "div": _fast_div,
        "tanh": "fast_tanh({0})", "tanh_absolute": "fast_tanh({0})", "exp": "tl.exp({0})", "log": "fast_log({0})",
        "sqrt": "tl.sqrt({0})", "logistic": "fast_logistic({0})",
    },
)  # fmt: skip
# AMD's GPUs have other assembly.
TRITON_AMD = dataclasses.replace(TRITON, operations={**TRITON.operations, "tanh_absolute": "tanh_absolute_amd({0})"})


def optable_of(loop: Loop) -> OpTable:
    if _jax.is_amd():
        return TRITON_AMD
    return TRITON_FAST if loop.precision == "fast" else TRITON
