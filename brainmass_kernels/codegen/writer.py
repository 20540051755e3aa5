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

from .._jax import Literal, eqn_source
from ..errors import Unsupported
from ..pointwise import Program, by_squaring

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
    select : format of ``{1}`` where ``{0}`` is true and ``{2}`` elsewhere
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
    select: str
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

    def lines(self, results: Sequence[str], known: Collection[str] = ()) -> list[str]:
        """The source that these results need, where some names are known."""
        needed, lines = words(results), []
        for name, expression in reversed(self._lines):
            if name in needed and name not in known:
                needed |= words([expression])
                lines.append(f"{name} = {expression}")
        return lines[::-1]

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

    def multiply(a: str, b: str) -> str:
        return writer.define("square" if a == b else "power", writer.optable.wrap(f"{a} * {b}", dtype))

    one, result = writer.literal(1, dtype), by_squaring(x, abs(power), multiply)
    return f"{one} / {result}" if power < 0 else result or one


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


def _reduce_precision(writer: Writer, eqn, x: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    info = np.finfo(dtype)
    if (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) != (info.nexp, info.nmant):
        raise Unsupported(f"'{writer.optable.name}' rounds to no other precision than {dtype} ({eqn_source(eqn)})")
    return x


def _select(writer: Writer, eqn, which: str, *cases: str) -> str:
    select = writer.optable.select
    if eqn.invars[0].aval.dtype.kind == "b":
        return select.format(which, cases[1], cases[0]) if len(cases) == 2 else cases[0]
    text = cases[-1]
    for k in range(len(cases) - 2, -1, -1):
        text = f"({select.format(f'{which} <= {k}', cases[k], text)})"
    return text


def _infix(symbol: str) -> str:
    return f"{{0}} {symbol} {{1}}"


SHARED: dict[str, str | Rule] = {
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "mul": _infix("*"),
    "neg": "-{0}",
    "square": "{0} * {0}",
    "one_minus_square": _one_minus_square,
    "integer_pow": _integer_pow,
    "copy": "{0}",
    "stop_gradient": "{0}",
    "convert_element_type": _convert,
    "bitcast_convert_type": _bitcast,
    "reduce_precision": _reduce_precision,
    "select_n": _select,
    "and": _infix("&"),
    "or": _infix("|"),
    "xor": _infix("^"),
    "eq": _infix("=="),
    "ne": _infix("!="),
    "lt": _infix("<"),
    "le": _infix("<="),
    "gt": _infix(">"),
    "ge": _infix(">="),
}
