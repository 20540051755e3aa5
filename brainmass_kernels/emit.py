"""A pointwise program as straight-line Python source, for compilers that take source.

What differs from one compiler to the next is a `OpTable`: how it writes each primitive, a literal, a cast. A product
that is added to something is written as one fused operation, by a rule that looks at nothing but the sum itself: the
same equations get the same bits wherever they are written, in a run, in its replay, and in any block of lanes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ._jax import Literal, eqn_source
from .errors import Unsupported
from .pointwise import Program

#: ``(writer, equation, *operands) -> expression``
Rule = Callable[..., str]


@dataclasses.dataclass(frozen=True)
class OpTable:
    """How one compiler writes the operations of a pointwise program.

    Attributes
    ----------
    name : of the implementation, for error messages
    operations : for each primitive a format of its operands, which may use ``{bits}`` and ``{type}`` of the first
        one, or a `Rule`
    types : the compiler's name of each dtype
    literal : ``(value, dtype) -> expression``
    cast : ``(expression, from dtype, to dtype) -> expression``
    wrap : ``(expression, dtype) -> expression``, of integer arithmetic, which some compilers widen
    fused : format of ``{0} * {1} + {2}``, rounded once
    bits : format of the number of the other kind, integer or float, with the same bits
    slow : primitives of one operand that a loop of their own may suit better
    """

    name: str
    operations: Mapping[str, str | Rule]
    types: Mapping[str, str]
    literal: Callable[[Any, np.dtype], str]
    cast: Callable[[str, np.dtype, np.dtype], str]
    wrap: Callable[[str, np.dtype], str]
    fused: str
    bits: str
    slow: frozenset[str] = frozenset()

    def lacks(self, program: Program) -> str | None:
        """Why a program cannot be written, or ``None``."""
        try:
            Writer(self).write(program, [f"a{i}" for i in range(len(program.in_avals))])
        except Unsupported as reason:
            return str(reason)
        return None


class Writer:
    """Straight-line source under construction; equal expressions are written once.

    Parameters
    ----------
    optable : OpTable
    """

    def __init__(self, optable: OpTable):
        self.optable = optable
        self._lines: list[tuple[str, str]] = []
        self._names: dict[str, str] = {}
        self._products: dict[str, tuple[str, str]] = {}
        self._calls: dict[str, tuple[str, str]] = {}

    def write(self, program: Program, arguments: Sequence[str]) -> list[str]:
        """Write a program of arguments of these names; the expressions of its outputs."""
        jaxpr = program.jaxpr.jaxpr
        names: dict[Any, str] = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, value in zip(jaxpr.constvars, program.jaxpr.consts):
            names[var] = self.literal(value, np.asarray(value).dtype)

        def read(v) -> str:
            return self.literal(v.val, v.aval.dtype) if isinstance(v, Literal) else names[v]  # pyright: ignore

        for eqn in jaxpr.eqns:
            names[eqn.outvars[0]] = self.equation(eqn, [read(v) for v in eqn.invars])
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn, operands: Sequence[str]) -> str:
        """Write one equation; the name of its result."""
        rule = self.optable.operations.get(eqn.primitive.name)
        if rule is None:
            raise Unsupported(
                f"'{self.optable.name}' has no '{eqn.primitive.name}' ({eqn_source(eqn)}); "
                'implementation="scan" has every primitive'
            )
        if callable(rule):
            return self.define(eqn.primitive.name, rule(self, eqn, *operands))
        dtype = eqn.invars[0].aval.dtype
        text = rule.format(*operands, bits=8 * dtype.itemsize, type=self.optable.types.get(dtype.name, dtype.name))
        result = eqn.outvars[0].aval.dtype
        if result.kind in "iu":
            text = self.optable.wrap(text, result)
        name = self.define(eqn.primitive.name, text)
        if eqn.primitive.name == "mul" and dtype.kind == "f":
            self._products[name] = (operands[0], operands[1])
        if eqn.primitive.name in self.optable.slow:
            self._calls[name] = (text.replace(operands[0], "{}"), operands[0])
        return name

    def define(self, stem: str, expression: str) -> str:
        """Name an expression, unless it has a name or is one."""
        if re.fullmatch(r"\w+", expression):
            return expression
        if expression not in self._names:
            self._names[expression] = f"{stem}_{len(self._names)}"
            self._lines.append((self._names[expression], expression))
        return self._names[expression]

    def sum(self, a: str, b: str, sign: int = 1) -> str:
        """``a + sign * b`` of floats, fused where one of them is a product."""
        fused = self.optable.fused
        if b in self._products:
            x, y = self._products[b]
            return fused.format(x if sign > 0 else f"-{x}", y, a)
        if a in self._products:
            x, y = self._products[a]
            return fused.format(x, y, b if sign > 0 else f"-{b}")
        return f"{a} + {b}" if sign > 0 else f"{a} - {b}"

    def literal(self, value, dtype) -> str:
        return self.optable.literal(np.asarray(value, dtype)[()], np.dtype(dtype))

    def lines(self, results: Sequence[str], given: Collection[str] = ()) -> list[str]:
        """The source that these results need, where some names are given."""
        needed, kept = words(results), []
        for name, expression in reversed(self._lines):
            if name in needed and name not in given:
                needed |= words([expression])
                kept.append(f"{name} = {expression}")
        return kept[::-1]

    def stages(self, results: Sequence[str]) -> list[dict[str, list[tuple[str, str]]]]:
        """The slow calls that these results need, by what they wait for: first those that wait for none.

        Returns
        -------
        for each stage, and each function as a format of its argument, the calls' names and arguments
        """
        needed = words(self.lines(results)) | words(results)
        level: dict[str, int] = {}
        stages: list[dict[str, list[tuple[str, str]]]] = []
        for name, expression in self._lines:
            level[name] = max((level.get(word, 0) for word in words([expression])), default=0)
            if name in self._calls and name in needed:
                function, argument = self._calls[name]
                if level[name] == len(stages):
                    stages.append({})
                stages[level[name]].setdefault(function, []).append((name, argument))
                level[name] += 1
        return stages


def words(texts: Iterable[str]) -> set[str]:
    """The names in pieces of source."""
    return set(re.findall(r"[A-Za-z_]\w*", " ".join(texts)))


# Rules that every optable shares ------------------------------------------------------------------------------------


def _add(writer: Writer, eqn, a: str, b: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    return writer.sum(a, b) if dtype.kind == "f" else writer.optable.wrap(f"{a} + {b}", dtype)


def _sub(writer: Writer, eqn, a: str, b: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    return writer.sum(a, b, -1) if dtype.kind == "f" else writer.optable.wrap(f"{a} - {b}", dtype)


def _one_minus_square(writer: Writer, eqn, x: str) -> str:
    return writer.optable.fused.format(f"-{x}", x, writer.literal(1, eqn.outvars[0].aval.dtype))


def _integer_pow(writer: Writer, eqn, x: str) -> str:
    dtype, power = eqn.outvars[0].aval.dtype, eqn.params["y"]
    one, result, square = writer.literal(1, dtype), None, x
    for bit in reversed(f"{abs(power):b}" if power else ""):
        if bit == "1":
            result = (
                square if result is None else writer.define("power", writer.optable.wrap(f"{result} * {square}", dtype))
            )
        square = writer.define("square", writer.optable.wrap(f"{square} * {square}", dtype))
    result = one if result is None else result
    return f"{one} / {result}" if power < 0 else result


def _convert(writer: Writer, eqn, x: str) -> str:
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return x if old == new else writer.optable.cast(x, old, new)


def _bitcast(writer: Writer, eqn, x: str) -> str:
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if old.kind == new.kind == "f" or old.itemsize != new.itemsize:
        raise Unsupported(f"'{writer.optable.name}' casts no bits from {old} to {new} ({eqn_source(eqn)})")
    if "f" in (old.kind, new.kind):
        x = writer.optable.bits.format(x)
    return writer.optable.wrap(x, new) if new.kind in "iu" else x


def _comparison(symbol: str) -> str:
    return f"{{0}} {symbol} {{1}}"


SHARED: dict[str, str | Rule] = {
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "square": "{0} * {0}",
    "one_minus_square": _one_minus_square,
    "integer_pow": _integer_pow,
    "copy": "{0}",
    "stop_gradient": "{0}",
    "convert_element_type": _convert,
    "bitcast_convert_type": _bitcast,
    "eq": _comparison("=="),
    "ne": _comparison("!="),
    "lt": _comparison("<"),
    "le": _comparison("<="),
    "gt": _comparison(">"),
    "ge": _comparison(">="),
}


# numba --------------------------------------------------------------------------------------------------------------

_NUMBA_TYPES = {
    "float32": "f32", "float64": "f64", "bool": "bool",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64",
}  # fmt: skip


def _numba_literal(value, dtype: np.dtype) -> str:
    if dtype.kind == "b":
        return str(bool(value))
    text = repr(float(value)) if dtype.kind == "f" else str(int(value))
    return f"{_NUMBA_TYPES[dtype.name]}({text})"


def _numba_cast(x: str, old: np.dtype, new: np.dtype) -> str:
    if new.kind == "b":
        return f"{x} != {_numba_literal(0, old)}"
    return f"{_NUMBA_TYPES[new.name]}({x})"


def _numba_wrap(x: str, dtype: np.dtype) -> str:
    return f"{_NUMBA_TYPES[dtype.name]}({x})"


def _numba_div(writer: Writer, eqn, a: str, b: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    return f"{a} / {b}" if dtype.kind == "f" else _numba_wrap(f"quotient({a}, {b})", dtype)


def _numba_rem(writer: Writer, eqn, a: str, b: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    if dtype.kind == "f":
        return _numba_wrap(f"np.fmod({a}, {b})", dtype)
    return _numba_wrap(f"{a} - quotient({a}, {b}) * {b}", dtype)


def _numba_sign(writer: Writer, eqn, x: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    zero, one = _numba_literal(0, dtype), _numba_literal(1, dtype)
    if dtype.kind == "u":
        return f"{one} if {x} > {zero} else {zero}"
    return f"{one} if {x} > {zero} else ({_numba_literal(-1, dtype)} if {x} < {zero} else {x})"


def _numba_select(writer: Writer, eqn, which: str, *cases: str) -> str:
    if eqn.invars[0].aval.dtype.kind == "b":
        return f"{cases[1]} if {which} else {cases[0]}" if len(cases) == 2 else cases[0]
    text = cases[-1]
    for k in range(len(cases) - 2, -1, -1):
        text = f"({cases[k]} if {which} <= {k} else {text})"
    return text


def _numba_clamp(writer: Writer, eqn, low: str, x: str, high: str) -> str:
    return f"clamped({x}, {low}, {high})"


def _numba_round(writer: Writer, eqn, x: str) -> str:
    return f"round_even({x})" if int(eqn.params["rounding_method"]) == 1 else f"round_away({x})"


def _numba_shift(symbol: str, unsigned: bool) -> Rule:
    """A shift by as many bits as there are, or more, leaves nothing but the sign."""

    def rule(writer: Writer, eqn, x: str, by: str) -> str:
        dtype = eqn.outvars[0].aval.dtype
        width, v = 8 * dtype.itemsize, eqn.invars[1]
        left = f"u{width}({x})" if unsigned else x
        if isinstance(v, Literal) and 0 <= int(v.val) < width:
            return _numba_wrap(f"{left} {symbol} {int(v.val)}", dtype)
        inside = f"u{width}({by}) < u{width}({width})"
        if symbol == ">>" and not unsigned:
            return _numba_wrap(f"{x} >> ({by} if {inside} else {_numba_literal(width - 1, dtype)})", dtype)
        shifted = _numba_wrap(f"{left} {symbol} ({by} if {inside} else {_numba_literal(0, dtype)})", dtype)
        return f"{shifted} if {inside} else {_numba_literal(0, dtype)}"

    return rule


def _numba_not(writer: Writer, eqn, x: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    return f"not {x}" if dtype.kind == "b" else _numba_wrap(f"~{x}", dtype)


def _numba_abs(writer: Writer, eqn, x: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    if dtype.kind == "f":
        return f"absolute({x})"
    return _numba_wrap(f"{x} if {x} >= {_numba_literal(0, dtype)} else -{x}", dtype)


def _numba_reduce_precision(writer: Writer, eqn, x: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    info = np.finfo(dtype)
    if (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) != (info.nexp, info.nmant):
        raise Unsupported(f"'numba' rounds to no other precision than {dtype} ({eqn_source(eqn)})")
    return x


_LIBM = "sin cos tan asin acos atan sinh cosh asinh acosh atanh expm1 log1p erf erfc".split()


def _libm(name: str) -> str:
    return f"{{type}}(math.{name}({{0}}))"


NUMBA = OpTable(
    name="numba",
    operations={
        **SHARED,
        "div": _numba_div,
        "rem": _numba_rem,
        "abs": _numba_abs,
        "sign": _numba_sign,
        "max": "maximum({0}, {1})",
        "min": "minimum({0}, {1})",
        "clamp": _numba_clamp,
        "select_n": _numba_select,
        "is_finite": "absolute({0}) < {type}(inf)",
        "floor": "floor({0})",
        "ceil": "ceil({0})",
        "round": _numba_round,
        "sqrt": "sqrt({0})",
        "rsqrt": "{type}(1.0) / sqrt({0})",
        "cbrt": "{type}(np.cbrt({0}))",
        "exp": "exp{bits}({0})",
        "exp2": "{type}(np.exp2({0}))",
        "log": "log{bits}({0})",
        "tanh": "tanh{bits}({0})",
        "tanh_absolute": "tanh_absolute{bits}({0})",
        "logistic": "logistic{bits}({0})",
        "pow": "{type}(math.pow({0}, {1}))",
        "atan2": "{type}(math.atan2({0}, {1}))",
        "nextafter": "{type}(np.nextafter({0}, {1}))",
        "reduce_precision": _numba_reduce_precision,
        **{name: _libm(name) for name in _LIBM},
        "and": "{0} & {1}",
        "or": "{0} | {1}",
        "xor": "{0} ^ {1}",
        "not": _numba_not,
        "shift_left": _numba_shift("<<", unsigned=False),
        "shift_right_arithmetic": _numba_shift(">>", unsigned=False),
        "shift_right_logical": _numba_shift(">>", unsigned=True),
    },
    types=_NUMBA_TYPES,
    literal=_numba_literal,
    cast=_numba_cast,
    wrap=_numba_wrap,
    fused="fma({0}, {1}, {2})",
    bits="bits({0})",
    slow=frozenset(["tanh", "tanh_absolute", "exp", "exp2", "log", "logistic", "cbrt", *_LIBM]),
)
# The same with approximate functions.
_FAST_TANH = dict.fromkeys(["tanh", "tanh_absolute"], "fast_tanh{bits}({0})")
NUMBA_FAST = dataclasses.replace(NUMBA, operations={**NUMBA.operations, **_FAST_TANH})


# Triton -------------------------------------------------------------------------------------------------------------

_TRITON_TYPES = {
    "float32": "tl.float32", "float64": "tl.float64", "bool": "tl.int1",
    **{f"{kind}{bits}": f"tl.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}  # fmt: skip


def _triton_literal(value, dtype: np.dtype) -> str:
    if dtype.kind == "b":
        return str(bool(value))
    if dtype.kind != "f":
        return f"({int(value)})" if value < 0 else str(int(value))
    text = {"inf": "INF", "-inf": "-INF", "nan": "NAN"}.get(str(float(value)), repr(float(value)))
    # Triton takes a Python number as float32 where nothing wider is near.
    text = f"tl.full((), {text}, tl.float64)" if dtype == np.float64 else text
    return f"({text})" if text.startswith("-") else text


def _triton_cast(x: str, old: np.dtype, new: np.dtype) -> str:
    return f"{x} != 0" if new.kind == "b" else f"{_tensor(x, old)}.to({_TRITON_TYPES[new.name]})"


def _tensor(x: str, dtype: np.dtype) -> str:
    """A value that has a type: a literal has none."""
    return x if x.isidentifier() else f"tl.full((), {x}, {_TRITON_TYPES[dtype.name]})"


def _triton_bitcast(writer: Writer, eqn, x: str) -> str:
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if old.itemsize != new.itemsize:
        raise Unsupported(f"'triton' casts no bits from {old} to {new} ({eqn_source(eqn)})")
    return f"{_tensor(x, old)}.to({_TRITON_TYPES[new.name]}, bitcast=True)"


def _triton_select(writer: Writer, eqn, which: str, *cases: str) -> str:
    if eqn.invars[0].aval.dtype.kind == "b":
        return f"tl.where({which}, {cases[1]}, {cases[0]})" if len(cases) == 2 else cases[0]
    text = cases[-1]
    for k in range(len(cases) - 2, -1, -1):
        text = f"tl.where({which} <= {k}, {cases[k]}, {text})"
    return text


def _triton_shift(symbol: str, unsigned: bool) -> Rule:
    def rule(writer: Writer, eqn, x: str, by: str) -> str:
        dtype = eqn.outvars[0].aval.dtype
        width, v, same = 8 * dtype.itemsize, eqn.invars[1], _TRITON_TYPES[dtype.name]
        left = f"{_tensor(x, dtype)}.to(tl.uint{width})" if unsigned else _tensor(x, dtype)
        if isinstance(v, Literal) and 0 <= int(v.val) < width:
            return f"({left} {symbol} {int(v.val)}).to({same})"
        inside = f"(({by} >= 0) & ({by} < {width}))"
        otherwise = str(width - 1) if symbol == ">>" and not unsigned else "0"
        shifted = f"({left} {symbol} tl.where({inside}, {by}, {otherwise})).to({same})"
        return shifted if otherwise != "0" else f"tl.where({inside}, {shifted}, 0)"

    return rule


def _triton_div(writer: Writer, eqn, a: str, b: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    if dtype.kind != "f":
        return _by_zero(a, "//", b, "-1")
    return f"tl.div_rn({a}, {b})" if dtype == np.float32 else f"{a} / {b}"


def _triton_rem(writer: Writer, eqn, a: str, b: str) -> str:
    return f"fmod({a}, {b})" if eqn.outvars[0].aval.dtype.kind == "f" else _by_zero(a, "%", b, a)


def _by_zero(a: str, symbol: str, b: str, otherwise: str) -> str:
    """Division of integers as XLA has it."""
    return f"tl.where({b} == 0, {otherwise}, {a} {symbol} tl.where({b} == 0, 1, {b}))"


def _triton_fast_div(writer: Writer, eqn, a: str, b: str) -> str:
    return f"{a} / {b}" if eqn.outvars[0].aval.dtype.kind == "f" else _triton_div(writer, eqn, a, b)


def _triton_reduce_precision(writer: Writer, eqn, x: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    info = np.finfo(dtype)
    if (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) != (info.nexp, info.nmant):
        raise Unsupported(f"'triton' rounds to no other precision than {dtype} ({eqn_source(eqn)})")
    return x


def _triton_round(writer: Writer, eqn, x: str) -> str:
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
        "div": _triton_div,
        "rem": _triton_rem,
        "abs": "tl.abs({0})",
        "sign": "tl.where({0} > 0, 1, tl.where({0} < 0, -1, {0}))",
        "max": _largest("{0}", "{1}"),
        "min": _smallest("{0}", "{1}"),
        "clamp": _smallest(_largest("{1}", "{0}"), "{2}"),
        "select_n": _triton_select,
        "is_finite": "tl.abs({0}) < INF",
        "floor": "tl.floor({0})",
        "ceil": "tl.ceil({0})",
        "round": _triton_round,
        "sqrt": "sqrt({0})",
        "rsqrt": "rsqrt({0})",
        "tanh_absolute": "tanh_absolute({0})",
        "logistic2": "logistic2({0})",
        "logistic": "logistic({0})",
        "pow": "pow({0}, {1})",
        "atan2": "atan2({0}, {1})",
        "nextafter": "nextafter({0}, {1})",
        "reduce_precision": _triton_reduce_precision,
        "bitcast_convert_type": _triton_bitcast,
        "and": "{0} & {1}",
        "or": "{0} | {1}",
        "xor": "{0} ^ {1}",
        "not": "~{0}",
        "shift_left": _triton_shift("<<", unsigned=False),
        "shift_right_arithmetic": _triton_shift(">>", unsigned=False),
        "shift_right_logical": _triton_shift(">>", unsigned=True),
    },
    types=_TRITON_TYPES,
    literal=_triton_literal,
    cast=_triton_cast,
    wrap=lambda x, dtype: x,
    fused="tl.fma({0}, {1}, {2})",
    bits="",
)
# The same with the hardware's own functions.
TRITON_FAST = dataclasses.replace(
    TRITON,
    operations={
        **TRITON.operations,
        "div": _triton_fast_div,
        "tanh": "fast_tanh({0})", "tanh_absolute": "fast_tanh({0})", "exp": "tl.exp({0})", "log": "fast_log({0})",
        "sqrt": "tl.sqrt({0})", "logistic": "fast_logistic({0})",
    },
)  # fmt: skip
# AMD's GPUs have other assembly.
TRITON_AMD = dataclasses.replace(TRITON, operations={**TRITON.operations, "tanh_absolute": "tanh_absolute_amd({0})"})
