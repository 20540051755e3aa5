"""The language of CPU kernels, a subset of Python, and its compiler to LLVM's assembly.

Python parses a function, and this compiler walks its tree once: a type for each value, a line of assembly for each
operation. Numbers have the types of NumPy (`f32`, `i64`, ...); a literal is an `i64` or `f64`, as in ``x + 1``. Names
that are assigned once are values, the others places on the stack, which LLVM turns into registers. A function is
compiled for the types of its arguments, and may be a closure over types, numbers and functions. There are ``if``,
``while``, ``for`` over a ``range``, assignments, arithmetic, comparisons, conditional expressions whose two sides are
both computed, and calls of functions of the language, of `Intrinsic` and of the C library's mathematics.

Nothing is reordered unless a function asks for it (`reordering`), and a product and a sum are one operation only where
it says `fma`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import struct
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

f32, f64, i8, i16, i32, i64 = np.float32, np.float64, np.int8, np.int16, np.int32, np.int64
u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64

#: Numbers of a `Pack`.
PACK = 16

_LLVM = {"f32": "float", "f64": "double", "bool": "i1"} | {f"{s}{n}": f"i{n}" for s in "iu" for n in (8, 16, 32, 64)}
_NUMPY = {
    "f32": f32, "f64": f64, "i8": i8, "i16": i16, "i32": i32, "i64": i64, "u8": u8, "u16": u16, "u32": u32, "u64": u64,
    "bool": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(kind): name for name, kind in _NUMPY.items()}


class Value(NamedTuple):
    """A value of the assembly: its type, and its text, a register or a constant.

    Types are "f32", "i64" and so on, "bool", "cells:f32", numbers at an address, "pack:f32", `PACK` of them, and
    "f32x4", as many numbers as it says, with which functions of numbers compute.
    """

    type: str
    text: str

    @property
    def is_float(self) -> bool:
        return element(self.type) in ("f32", "f64")

    @property
    def is_constant(self) -> bool:
        return not self.text.startswith("%")


def llvm_type(kind: str) -> str:
    """LLVM's name of a type."""
    if kind.startswith("cells:"):
        return "ptr"
    if kind.startswith("pack:"):
        return f"<{PACK} x {_LLVM[kind[5:]]}>"
    return f"<{count} x {_LLVM[element(kind)]}>" if (count := several(kind)) else _LLVM[kind]


def element(kind: str) -> str:
    """The type of one of several numbers."""
    return kind.partition("x")[0]


def several(kind: str) -> int:
    """How many numbers a type is of, 0 where it is one."""
    return int(kind.partition("x")[2] or 0)


def like(kind: str, other: str) -> str:
    """As many numbers of one type as another is of."""
    return f"{kind}x{several(other)}" if several(other) else kind


class Intrinsic:
    """A function that writes its own assembly: ``emit(scope, *values) -> value``."""

    def __init__(self, emit: Callable[..., Value | None]):
        self.emit = emit

    def __call__(self, *_):
        raise TypeError("a function of the kernels' language is called in a kernel only")


def reordering(*flags: str) -> Callable:
    """Let LLVM change a function's arithmetic: "reassoc" its sums, "contract" its products with sums."""

    def mark(function):
        function.reordering = " ".join(flags)
        return function

    return mark


def out_of_line(function):
    """Compile a function once, and call it: LLVM copies it to no call, and so has less to compile."""
    function.out_of_line = True
    return function


class Source(NamedTuple):
    """A function as Python parsed it.

    Attributes
    ----------
    name : of the function
    tree : its definition
    outside : what the names that are not its own mean
    flags : as `reordering` takes them
    out_of_line : as the mark of this name says
    """

    name: str
    tree: ast.FunctionDef
    outside: Mapping[str, Any]
    flags: str = ""
    out_of_line: bool = False

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(cls, function: FunctionType) -> Source:
        """Of a Python function."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        outside = dict(function.__globals__) | dict(inspect.getclosurevars(function).nonlocals)
        marks = vars(function)
        return cls(function.__name__, tree, outside, marks.get("reordering", ""), marks.get("out_of_line", False))

    @property
    def parameters(self) -> list[str]:
        return [a.arg for a in self.tree.args.args]

    @property
    def expression(self) -> ast.expr | None:
        """The value of a function that is one expression, but for what it says of itself."""
        body = [s for s in self.tree.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        alone = body[0] if len(body) == 1 and not self.flags else None
        return alone.value if isinstance(alone, ast.Return) else None

    def __hash__(self) -> int:
        return hash(id(self.tree))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source) and self.tree is other.tree and self.outside is other.outside


def parsed(text: str, names: Mapping[str, Any]) -> dict[str, Source]:
    """The functions of a text, which know each other and ``names``."""
    outside = dict(names)
    definitions = [d for d in ast.parse(text).body if isinstance(d, ast.FunctionDef)]
    outside |= (functions := {d.name: Source(d.name, d, outside) for d in definitions})
    return functions


class Module:
    """LLVM's assembly of functions, each compiled once for the types that it is called with."""

    def __init__(self) -> None:
        self.functions: dict[tuple, tuple[str, str]] = {}
        self.declared: dict[str, str] = {}
        self.count = 0
        self.texts: list[str] = []

    def export(self, function: Source, name: str, parameters: tuple[str, ...] = ("i64",)) -> None:
        """Compile a function that is to be found by this name."""
        self.compiled(function, parameters, name)

    def compiled(self, function: Source, types: tuple[str, ...], exported: str = "") -> tuple[str, str]:
        """The name of a function and the type of its value, "" for none."""
        key = function, types
        if key not in self.functions:
            # Closures of one name may differ.
            self.count += 1
            name = exported or f"{function.name}.{self.count}"
            scope = Function(self, function, types)
            returned = scope.run()
            linkage = "" if exported else "internal "
            parameters = ", ".join(f"{llvm_type(t)} %{n}" for t, n in zip(types, scope.parameters, strict=True))
            kind = llvm_type(returned) if returned else "void"
            inlining = " noinline" if function.out_of_line else ""
            self.texts.append(f"define {linkage}{kind} @{name}({parameters}){inlining} {{\n{scope.text}\n}}\n")
            self.functions[key] = name, returned
        return self.functions[key]

    def declare(self, name: str, returned: str, types: Sequence[str]) -> None:
        self.declared[name] = f"declare {returned} @{name}({', '.join(types)})"

    def __str__(self) -> str:
        return "\n".join([*self.declared.values(), *self.texts])


class Function:
    """One function under compilation."""

    def __init__(self, module: Module, function: Source, types: tuple[str, ...]):
        self.module, self.function = module, function
        self.parameters, self.outside = function.parameters, function.outside
        if len(self.parameters) != len(types):
            raise TypeError(f"{function.name} takes {len(self.parameters)} arguments, and got {len(types)}")
        self.values = {n: Value(t, f"%{n}") for n, t in zip(self.parameters, types)}
        self.places: dict[str, Value] = {}
        self.assigned = _assignments(function.tree)
        self.allocated: dict[Value, str] = {}
        self.lines: list[str] = []
        self.count = 0
        self.block = "entry"
        self.open = True
        self.returned = ""

    @property
    def text(self) -> str:
        return "\n".join(["entry:", *self.allocated.values(), *self.lines])

    def run(self) -> str:
        for name in self.parameters:
            if self.assigned[name]:
                self.assign(name, self.values.pop(name))
        self.statements(self.function.tree.body)
        if self.open:
            self.line("ret void" if not self.returned else "unreachable")
        return self.returned

    # Assembly --------------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        if self.open:
            self.lines.append(f"  {text}")

    def op(self, kind: str, text: str) -> Value:
        """An operation and the register of its value."""
        self.count += 1
        register = f"%.{self.count}"
        self.line(f"{register} = {text}")
        return Value(kind, register)

    def label(self, stem: str) -> str:
        self.count += 1
        return f"{stem}.{self.count}"

    def begin(self, label: str) -> None:
        """Begin a block; one that is still open goes on there."""
        self.line(f"br label %{label}")
        self.enter(label)

    def enter(self, label: str) -> None:
        """Begin a block that others branch to."""
        self.lines.append(f"{label}:")
        self.block, self.open = label, True

    def branch(self, condition: Value, yes: str, no: str) -> None:
        self.line(f"br i1 {condition.text}, label %{yes}, label %{no}")
        self.open = False

    def call(self, name: str, returned: str, values: Sequence[Value]) -> Value | None:
        arguments = ", ".join(f"{llvm_type(v.type)} {v.text}" for v in values)
        if not returned:
            self.line(f"call void @{name}({arguments})")
            return None
        return self.op(returned, f"call {llvm_type(returned)} @{name}({arguments})")

    def external(self, name: str, returned: str, values: Sequence[Value]) -> Value | None:
        """A call of a function that is not of the language."""
        self.module.declare(name, llvm_type(returned), [llvm_type(v.type) for v in values])
        return self.call(name, returned, values)

    # Statements ------------------------------------------------------------------------------------------------------

    def statements(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            getattr(self, f"_{type(statement).__name__}", self.refuse)(statement)

    def refuse(self, node: ast.AST) -> Any:
        raise SyntaxError(f"{self.function.name}: the kernels' language has no `{ast.unparse(node)}`")

    def _Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.evaluate(node.value)

    def _Assign(self, node: ast.Assign) -> None:
        self.store(node.targets[0], self.evaluate(node.value))

    def _AugAssign(self, node: ast.AugAssign) -> None:
        self.store(node.target, self.arithmetic(node.op, self.evaluate(node.target), self.evaluate(node.value), node))

    def store(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Tuple):
            for one, part in zip(target.elts, value, strict=True):
                self.store(one, part)
        elif isinstance(target, ast.Subscript):
            cells = self.evaluate(target.value)
            kind, address = self.cell(cells, self.evaluate(target.slice))
            value = self.cast(value, kind)
            self.line(f"store {llvm_type(kind)} {value.text}, ptr {address}")
        elif isinstance(target, ast.Name):
            self.assign(target.id, value)
        else:
            self.refuse(target)

    def assign(self, name: str, value: Value) -> None:
        if self.assigned[name] == 1 and name not in self.parameters:
            self.values[name] = value
            return
        # A name may stand for values of several types, one after the other.
        place = Value(value.type, f"%{name}.{value.type.replace(':', '.')}")
        if place not in self.allocated:
            self.allocated[place] = f"  {place.text} = alloca {llvm_type(value.type)}"
        self.places[name] = place
        self.line(f"store {llvm_type(value.type)} {value.text}, ptr {place.text}")

    def _If(self, node: ast.If) -> None:
        yes, no, end = self.label("then"), self.label("else"), self.label("end")
        self.branch(self.truth(self.evaluate(node.test)), yes, no if node.orelse else end)
        self.enter(yes)
        self.statements(node.body)
        if node.orelse:
            self.line(f"br label %{end}")
            self.enter(no)
            self.statements(node.orelse)
        self.begin(end)

    def _While(self, node: ast.While) -> None:
        test, body, end = self.label("test"), self.label("body"), self.label("end")
        self.begin(test)
        self.branch(self.truth(self.evaluate(node.test)), body, end)
        self.enter(body)
        self.statements(node.body)
        self.line(f"br label %{test}")
        self.enter(end)

    def _For(self, node: ast.For) -> None:
        """A loop over a range; its step is positive unless it is a negative literal."""
        if not (isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Call)):
            return self.refuse(node)
        bounds = [self.cast(self.evaluate(a), "i64") for a in node.iter.args]
        start, stop = (Value("i64", "0"), bounds[0]) if len(bounds) == 1 else bounds[:2]
        step = bounds[2] if len(bounds) == 3 else constant(1)
        compare = "sgt" if step.text.startswith("-") else "slt"
        before, test, body, end = self.block, self.label("test"), self.label("body"), self.label("end")
        index, following = Value("i64", f"%{test}.i"), f"%{test}.next"
        self.begin(test)
        place = len(self.lines)
        inside = self.op("bool", f"icmp {compare} i64 {index.text}, {stop.text}")
        self.branch(inside, body, end)
        self.enter(body)
        name, hidden = node.target.id, self.values.get(node.target.id)
        self.values[name] = index
        self.statements(node.body)
        self.values.pop(name) if hidden is None else self.values.update({name: hidden})
        self.line(f"{following} = add nsw i64 {index.text}, {step.text}")
        self.lines.insert(
            place, f"  {index.text} = phi i64 [ {start.text}, %{before} ], [ {following}, %{self.block} ]"
        )
        self.line(f"br label %{test}")
        self.enter(end)

    def _Return(self, node: ast.Return) -> None:
        value = self.evaluate(node.value) if node.value else None
        kind = self.returned = self.returned or (value.type if value else "")
        if value:
            self.line(f"ret {llvm_type(kind)} {self.cast(value, kind).text}")
        else:
            self.line("ret void")
        self.open = False
        self.enter(self.label("unreached"))
        self.line("unreachable")
        self.open = False

    # Expressions -----------------------------------------------------------------------------------------------------

    def evaluate(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp | ast.UnaryOp) and _is_literal(node):
            return constant(eval(compile(ast.Expression(node), "", "eval")))
        return getattr(self, f"_{type(node).__name__}", self.refuse)(node)

    def _Constant(self, node: ast.Constant) -> Value:
        return constant(node.value)

    def _Name(self, node: ast.Name) -> Any:
        if node.id in self.values:
            return self.values[node.id]
        if node.id in self.places:
            kind, register = self.places[node.id]
            return self.op(kind, f"load {llvm_type(kind)}, ptr {register}")
        known = self.outside.get(node.id)
        if isinstance(known, Source):
            # Its address, as that of a function of one word.
            name, _ = self.module.compiled(known, ("i64",))
            return self.op("i64", f"ptrtoint ptr @{name} to i64")
        return constant(known)

    def _Tuple(self, node: ast.Tuple) -> list[Value]:
        return [self.evaluate(x) for x in node.elts]

    def _Subscript(self, node: ast.Subscript) -> Value:
        kind, address = self.cell(self.evaluate(node.value), self.evaluate(node.slice))
        return self.op(kind, f"load {llvm_type(kind)}, ptr {address}")

    def cell(self, cells: Value, index: Value) -> tuple[str, str]:
        """The type and the address of a number."""
        kind = cells.type.removeprefix("cells:")
        place = self.op("", f"getelementptr {llvm_type(kind)}, ptr {cells.text}, i64 {self.cast(index, 'i64').text}")
        return kind, place.text

    def _IfExp(self, node: ast.IfExp) -> Value:
        test = self.truth(self.evaluate(node.test))
        yes, no = self.alike(self.evaluate(node.body), self.evaluate(node.orelse))
        return self.select(test, yes, no)

    def _BoolOp(self, node: ast.BoolOp) -> Value:
        name = "and" if isinstance(node.op, ast.And) else "or"
        values = [self.truth(self.evaluate(v)) for v in node.values]
        return functools.reduce(lambda a, b: self.op("bool", f"{name} i1 {a.text}, {b.text}"), values)

    def truth(self, value: Value) -> Value:
        return value if element(value.type) == "bool" else self.compare("!=", value, constant(0))

    def _Compare(self, node: ast.Compare) -> Value:
        if len(node.ops) > 1:
            return self.refuse(node)
        symbol = _COMPARISONS[type(node.ops[0])]
        return self.compare(symbol, self.evaluate(node.left), self.evaluate(node.comparators[0]))

    def compare(self, symbol: str, a: Value, b: Value) -> Value:
        a, b = self.alike(a, b)
        if a.is_float:
            code = f"fcmp {_OF_FLOATS[symbol]}"
        else:
            sign = "" if symbol in ("==", "!=") else "u" if a.type[0] in "ub" else "s"
            code = f"icmp {sign}{_OF_INTEGERS[symbol]}"
        return self.op(like("bool", a.type), f"{code} {llvm_type(a.type)} {a.text}, {b.text}")

    def _UnaryOp(self, node: ast.UnaryOp) -> Value:
        x = self.evaluate(node.operand)
        if isinstance(node.op, ast.Not):
            return self.op("bool", f"xor i1 {self.truth(x).text}, true")
        if isinstance(node.op, ast.Invert):
            return self.op(x.type, f"xor {llvm_type(x.type)} {x.text}, -1")
        if not isinstance(node.op, ast.USub):
            return self.refuse(node)
        if x.is_constant:
            return _negative(x)
        if x.is_float:
            return self.op(x.type, f"fneg {llvm_type(x.type)} {x.text}")
        return self.op(x.type, f"sub {llvm_type(x.type)} {self.cast(constant(0), x.type).text}, {x.text}")

    def _BinOp(self, node: ast.BinOp) -> Value:
        return self.arithmetic(node.op, self.evaluate(node.left), self.evaluate(node.right), node)

    def arithmetic(self, op: ast.operator, a: Value, b: Value, node: ast.AST) -> Value:
        if isinstance(op, ast.LShift | ast.RShift):
            b = self.cast(b, a.type)
            right = "lshr" if a.type[0] == "u" else "ashr"
            name = "shl" if isinstance(op, ast.LShift) else right
        else:
            a, b = self.alike(a, b)
            if isinstance(op, ast.FloorDiv | ast.Mod) and not a.is_float:
                return self.divided(a, b, isinstance(op, ast.Mod))
            names = _FLOAT_OPS if a.is_float else _INTEGER_OPS
            name = names.get(type(op)) or self.refuse(node)
        flags = f" {self.function.flags}" if a.is_float and self.function.flags else ""
        return self.op(a.type, f"{name}{flags} {llvm_type(a.type)} {a.text}, {b.text}")

    def divided(self, a: Value, b: Value, rest: bool) -> Value:
        """The quotient of integers rounded down, or the rest, which has the sign of the divisor."""
        kind = llvm_type(a.type)
        quotient = self.op(a.type, f"sdiv {kind} {a.text}, {b.text}")
        remainder = self.op(a.type, f"srem {kind} {a.text}, {b.text}")
        signs = self.op(a.type, f"xor {kind} {remainder.text}, {b.text}")
        zero = Value(a.type, "0")
        uneven = self.op("bool", f"and i1 {self.compare('<', signs, zero).text}, "
                                f"{self.compare('!=', remainder, zero).text}")  # fmt: skip
        if rest:
            more = self.op(a.type, f"select i1 {uneven.text}, {kind} {b.text}, {kind} 0")
            return self.op(a.type, f"add {kind} {remainder.text}, {more.text}")
        less = self.op(a.type, f"sext i1 {uneven.text} to {kind}")
        return self.op(a.type, f"add {kind} {quotient.text}, {less.text}")

    def alike(self, a: Value, b: Value) -> tuple[Value, Value]:
        """Two numbers in one type: the wider one, or of an integer and a float the float."""
        if a.type == b.type:
            return a, b
        if count := several(a.type) or several(b.type):
            kind = element(a.type if several(a.type) else b.type)
            return self.cast(a, f"{kind}x{count}"), self.cast(b, f"{kind}x{count}")
        kind = max((a.type, b.type), key=lambda t: (t[0] == "f", t != "bool", 0 if t == "bool" else int(t[1:])))
        return self.cast(a, kind), self.cast(b, kind)

    def cast(self, x: Value, kind: str) -> Value:
        """A number in another type."""
        if x.type == kind:
            return x
        if several(x.type) or several(kind):
            return self.cast_several(x, like(element(kind), x.type) if several(x.type) else kind)
        if not {x.type, kind} <= set(_LLVM):
            raise TypeError(f"{self.function.name}: a {x.type} is no {kind}")
        if x.is_constant:
            return constant(_NUMPY[kind](_number(x)))
        old, new = llvm_type(x.type), llvm_type(kind)
        if kind == "bool":
            return self.truth(x)
        floats = x.is_float, kind[0] == "f"
        if old == new:
            return Value(kind, x.text)
        unsigned = x.type[0] in "ub"
        if all(floats):
            name = "fpext" if new == "double" else "fptrunc"
        elif floats[0]:
            name = "fptoui" if kind[0] == "u" else "fptosi"
        elif floats[1]:
            name = "uitofp" if unsigned else "sitofp"
        else:
            wider = int(new[1:]) > int(old[1:])
            name = ("zext" if unsigned else "sext") if wider else "trunc"
        return self.op(kind, f"{name} {old} {x.text} to {new}")

    def cast_several(self, x: Value, kind: str) -> Value:
        """Numbers in another type of the same size, or one number as several."""
        if several(x.type):
            if llvm_type(x.type) != llvm_type(kind):
                raise TypeError(f"{self.function.name}: {x.type} are no {kind}")
            return Value(kind, x.text)
        one = self.cast(x, element(kind))
        if one.is_constant:
            return Value(kind, f"<{', '.join([f'{llvm_type(one.type)} {one.text}'] * several(kind))}>")
        pack, count = llvm_type(kind), several(kind)
        first = self.op(kind, f"insertelement {pack} poison, {llvm_type(one.type)} {one.text}, i32 0")
        return self.op(kind, f"shufflevector {pack} {first.text}, {pack} poison, <{count} x i32> zeroinitializer")

    # Calls -----------------------------------------------------------------------------------------------------------

    def _Call(self, node: ast.Call) -> Any:
        values = [self.evaluate(a) for a in node.args]
        if isinstance(node.func, ast.Attribute):
            return self.library(node.func.attr, values)
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        known = self.outside.get(name)
        if known is None and name in ("min", "max", "abs"):
            return self.builtin(name, values)
        if isinstance(known, Intrinsic):
            return known.emit(self, *values)
        if isinstance(known, type) and issubclass(known, np.generic):
            return self.cast(values[0], _NAMES[np.dtype(known)])
        if isinstance(known, FunctionType):
            known = Source.of(known)
        if not isinstance(known, Source):
            return self.refuse(node)
        if known.expression is not None:
            return self.expanded(known, values)
        compiled, returned = self.module.compiled(known, tuple(v.type for v in values))
        return self.call(compiled, returned, values)

    def expanded(self, function: Source, values: list[Value]) -> Any:
        """The value of a function that is one expression, in place."""
        outer = self.values, self.places, self.outside
        self.values, self.places = dict(zip(function.parameters, values, strict=True)), {}
        self.outside = function.outside
        value = self.evaluate(function.expression)  # pyright: ignore[reportArgumentType]
        self.values, self.places, self.outside = outer
        return value

    def builtin(self, name: str, values: Sequence[Value]) -> Value:
        if name == "abs":
            (x,) = values
            negative = self.op(x.type, f"sub {llvm_type(x.type)} 0, {x.text}")
            return self.select(self.compare("<", x, constant(0)), negative, x)
        a, b = self.alike(*values)
        return self.select(self.compare("<" if name == "min" else ">", b, a), b, a)

    def select(self, test: Value, yes: Value, no: Value) -> Value:
        kind = llvm_type(yes.type)
        return self.op(yes.type, f"select {llvm_type(test.type)} {test.text}, {kind} {yes.text}, {kind} {no.text}")

    def library(self, name: str, values: Sequence[Value]) -> Value | None:
        """A function of C's mathematics, which has one for each type."""
        return self.external(f"{name}f" if values[0].type == "f32" else name, values[0].type, values)


_COMPARISONS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_OF_FLOATS = {"==": "oeq", "!=": "une", "<": "olt", "<=": "ole", ">": "ogt", ">=": "oge"}
_OF_INTEGERS = {"==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}
_FLOAT_OPS = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
_INTEGER_OPS = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor",
}  # fmt: skip


def constant(value: Any) -> Value:
    """A number as it stands in assembly."""
    if isinstance(value, bool | np.bool_):
        return Value("bool", "true" if value else "false")
    if isinstance(value, int):
        value = i64(value)
    elif isinstance(value, float):
        value = f64(value)
    if not isinstance(value, np.generic) or np.dtype(type(value)) not in _NAMES:
        raise TypeError(f"the kernels' language has no {value!r}")
    kind = _NAMES[np.dtype(type(value))]
    if kind[0] == "f":
        return Value(kind, f"0x{struct.pack('>d', float(value)).hex().upper()}")
    return Value(kind, str(int(value)))


def _number(x: Value) -> Any:
    """The number of a constant."""
    if x.type == "bool":
        return x.text == "true"
    return struct.unpack(">d", bytes.fromhex(x.text[2:]))[0] if x.is_float else int(x.text)


def _negative(x: Value) -> Value:
    return constant(operator.neg(_NUMPY[x.type](_number(x))))


def _is_literal(node: ast.expr) -> bool:
    leaves = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)
    return all(isinstance(inner, leaves) for inner in ast.walk(node))


def _assignments(tree: ast.FunctionDef) -> Counter[str]:
    """How often each name is assigned, but as the target of a loop."""
    loops = {id(n.target) for n in ast.walk(tree) if isinstance(n, ast.For)}
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return Counter(n.id for n in names if id(n) not in loops)
