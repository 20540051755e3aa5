"""Simplify the step: hoist what depends on parameters only, and fold what is affine in the state.

Most of a second-order mass is affine. As equations, a step multiplies and adds the same parameters over and over. Here
every value in the loop becomes ``c0 + c1 atom1 + c2 atom2 + ...``: an atom is a state, an input, or the result of a
nonlinear operation, and the coefficients depend on parameters only, so that they are computed once, before the loop.
A coefficient ``1 + c`` stays ``atom + c atom``, a state plus a small increment, for the precision of float32.

A sum that is used twice may be formed once or multiplied out at each use. A trial of each decides which takes fewer
operations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._jax import Literal
from .pointwise import Program, evaluate_equation, logistic2, tanh_absolute

# Most sums that are tried: each trial is one more pass over the step.
_MOST_TRIALS = 200


@dataclasses.dataclass(eq=False)
class Node:
    """One value: an argument, a literal, an operation on nodes, or an affine sum."""

    kind: str  # "arg", "lit", "op", "sum"
    hoisted: bool
    aval: Any
    index: int = -1  # of an argument
    value: Any = None  # of a literal
    eqn: Any = None  # of an operation
    args: tuple = ()  # nodes of an operation, (coefficient, node) pairs of a sum
    const: Any = None  # coefficient of a sum
    number: int = 0  # in order of creation; an order by address would differ from process to process


@dataclasses.dataclass(frozen=True)
class Coefficient:
    """``literal + symbol``, the symbol a hoisted node or ``None``."""

    literal: float = 0.0
    symbol: Node | None = None

    @property
    def is_zero(self) -> bool:
        return self.symbol is None and self.literal == 0.0


ZERO, ONE = Coefficient(), Coefficient(1.0)


@dataclasses.dataclass(frozen=True)
class Form:
    """``const + sum of coefficient * atom``."""

    const: Coefficient
    terms: tuple[tuple[Node, Coefficient], ...] = ()


class Graph:
    """Nodes without duplicates, and the algebra of coefficients and forms over them."""

    def __init__(self, dtype, base_two: bool):
        self.dtype, self.base_two = np.dtype(dtype), base_two
        self.aval = jax.ShapeDtypeStruct((), self.dtype)
        self.nodes: dict[Any, Node] = {}
        #: What the rates that are powers of two are of.
        self.rates: dict[Node, Form] = {}
        self.sums: dict[Any, Coefficient] = {}
        self.products: dict[Any, Coefficient] = {}

    def _shared(self, key, make: Callable[[], Node]) -> Node:
        node = self.nodes.get(key)
        if node is None:
            node = self.nodes[key] = make()
            node.number = len(self.nodes)
        return node

    def argument(self, index: int, aval, hoisted: bool) -> Node:
        return self._shared(("arg", index), lambda: Node("arg", hoisted, aval, index=index))

    def literal(self, value, aval) -> Node:
        value = np.asarray(value, aval.dtype)
        return self._shared(
            ("lit", str(value.dtype), value.tobytes()), lambda: Node("lit", True, aval, value=value[()])
        )

    def operation(self, eqn, args: Sequence[Node]) -> Node:
        key = ("op", eqn.primitive.name, _params_key(eqn.params), tuple(map(id, args)))
        hoisted = all(a.hoisted for a in args)
        return self._shared(key, lambda: Node("op", hoisted, eqn.outvars[0].aval, eqn=eqn, args=tuple(args)))

    # Coefficients -----------------------------------------------------------------------------------------------

    def _hoisted_sum(self, const: float, pairs: Sequence[tuple[float, Node]]) -> Node:
        """``const + sum of literal * hoisted node``."""
        key = ("hsum", const, tuple((f, id(n)) for f, n in pairs))
        args = tuple((Coefficient(f), n) for f, n in pairs)
        return self._shared(key, lambda: Node("sum", True, self.aval, args=args, const=Coefficient(const)))

    def _hoisted_product(self, a: Node, b: Node) -> Node:
        a, b = sorted((a, b), key=lambda node: node.number)
        return self._shared(("hmul", id(a), id(b)), lambda: Node("product", True, self.aval, args=(a, b)))

    def add(self, a: Coefficient, b: Coefficient) -> Coefficient:
        key = (a.literal, a.symbol, b.literal, b.symbol)
        if key not in self.sums:
            self.sums[key] = self._add(a, b)
        return self.sums[key]

    def multiply(self, a: Coefficient, b: Coefficient) -> Coefficient:
        key = (a.literal, a.symbol, b.literal, b.symbol)
        if key not in self.products:
            self.products[key] = self._multiply(a, b)
        return self.products[key]

    def _add(self, a: Coefficient, b: Coefficient) -> Coefficient:
        pairs = [(1.0, c.symbol) for c in (a, b) if c.symbol is not None]
        symbol = None
        if len(pairs) == 2 and pairs[0][1] is pairs[1][1]:
            pairs = [(2.0, pairs[0][1])]
        if pairs:
            symbol = pairs[0][1] if len(pairs) == 1 and pairs[0][0] == 1.0 else self._hoisted_sum(0.0, pairs)
        return Coefficient(a.literal + b.literal, symbol)

    def scale(self, c: Coefficient, by: float) -> Coefficient:
        if by == 1.0 or c.symbol is None:
            return Coefficient(c.literal * by, c.symbol)
        return Coefficient(c.literal * by, None if by == 0.0 else self._hoisted_sum(0.0, [(by, c.symbol)]))

    def _multiply(self, a: Coefficient, b: Coefficient) -> Coefficient:
        if a.symbol is None:
            return self.scale(b, a.literal)
        if b.symbol is None:
            return self.scale(a, b.literal)
        product = Coefficient(0.0, self._hoisted_product(a.symbol, b.symbol))
        cross = self.add(
            self.scale(Coefficient(0.0, a.symbol), b.literal), self.scale(Coefficient(0.0, b.symbol), a.literal)
        )
        return self.add(Coefficient(a.literal * b.literal), self.add(cross, product))

    # Forms ------------------------------------------------------------------------------------------------------

    def form(self, node: Node) -> Form:
        if node.kind == "lit":
            return Form(Coefficient(float(node.value)))
        return Form(Coefficient(0.0, node)) if node.hoisted else Form(ZERO, ((node, ONE),))

    def combine(self, a: Form, b: Form, sign: float = 1.0) -> Form:
        terms = dict(a.terms)
        for atom, c in b.terms:
            terms[atom] = self.add(terms.get(atom, ZERO), self.scale(c, sign))
        nonzero = tuple((atom, c) for atom, c in terms.items() if not c.is_zero)
        return self._centred(Form(self.add(a.const, self.scale(b.const, sign)), nonzero))

    def _centred(self, form: Form) -> Form:
        """Of a rate less a half the tanh that it is, whose small values keep their digits."""
        if len(form.terms) != 1 or form.terms[0][0] not in self.rates:
            return form
        (rate, c), const = form.terms[0], form.const
        if c.symbol is not None or const.symbol is not None or const.literal != -0.5 * c.literal:
            return form
        return Form(ZERO, ((self.function("tanh", self.rates[rate], 0.5), self.scale(c, 0.5)),))

    def function(self, kind: str, x: Form, scale: float) -> Node:
        """A function of the hardware, of a scaled form."""
        scaled = self.node(self.scaled(x, Coefficient(scale)))
        return self._shared((kind, id(scaled)), lambda: Node(kind, False, self.aval, args=(scaled,)))

    def scaled(self, a: Form, by: Coefficient) -> Form:
        if by.is_zero:
            return Form(ZERO)
        return Form(self.multiply(a.const, by), tuple((atom, self.multiply(c, by)) for atom, c in a.terms))

    def node(self, form: Form) -> Node:
        """The form as one value of the loop (or, without atoms, one hoisted value)."""
        if not form.terms:
            c = form.const
            if c.symbol is None:
                return self.literal(c.literal, self.aval)
            return c.symbol if c.literal == 0.0 else self._hoisted_sum(c.literal, [(1.0, c.symbol)])
        if form.const.is_zero and len(form.terms) == 1 and form.terms[0][1] == ONE:
            return form.terms[0][0]
        key = ("sum", _coefficient_key(form.const), tuple((id(n), _coefficient_key(c)) for n, c in form.terms))
        args = tuple((c, n) for n, c in form.terms)
        return self._shared(key, lambda: Node("sum", False, self.aval, args=args, const=form.const))


def _coefficient_key(c: Coefficient):
    return c.literal, id(c.symbol)


def _params_key(params):
    return tuple(sorted((k, str(v)) for k, v in params.items()))


def _fold(graph: Graph, closed, args: Sequence[Node], frozen: set[int], sums: list[int]) -> list[Node]:
    """Rewrite a scalar jaxpr over the graph.

    Sums whose equation number is in ``frozen`` are formed where they stand; the numbers of all go to ``sums``.
    """
    env: dict[Any, Form | Node] = dict(zip(closed.jaxpr.invars, args, strict=True))
    env.update((v, graph.literal(c, v.aval)) for v, c in zip(closed.jaxpr.constvars, closed.consts))

    def node(v) -> Node:
        if isinstance(v, Literal):
            return graph.literal(v.val, v.aval)
        value = env[v]
        return value if isinstance(value, Node) else graph.node(value)

    def form(v) -> Form:
        value = graph.literal(v.val, v.aval) if isinstance(v, Literal) else env[v]
        return value if isinstance(value, Form) else graph.form(value)

    for number, eqn in enumerate(closed.jaxpr.eqns):
        out = eqn.outvars[0]
        affine = None
        if out.aval.dtype == graph.dtype and not all(_is_hoisted(env, v) for v in eqn.invars):
            affine = _affine_rule(graph, eqn, form)
        if affine is None:
            env[out] = graph.operation(eqn, [node(v) for v in eqn.invars])
            continue
        if len(affine.terms) > 1:
            sums.append(number)
            if number in frozen:
                affine = graph.form(graph.node(affine))
        env[out] = affine
    return [node(v) for v in closed.jaxpr.outvars]


def _is_hoisted(env, v) -> bool:
    if isinstance(v, Literal):
        return True
    value = env[v]
    return value.hoisted if isinstance(value, Node) else not value.terms


def _affine_rule(graph: Graph, eqn, form: Callable[[Any], Form]) -> Form | None:
    """The result of an equation as a form, or ``None`` if it is not affine."""
    name, v = eqn.primitive.name, eqn.invars
    if name in ("add", "add_any"):
        return graph.combine(form(v[0]), form(v[1]))
    if name == "sub":
        return graph.combine(form(v[0]), form(v[1]), -1.0)
    if name == "neg":
        return graph.scaled(form(v[0]), Coefficient(-1.0))
    if name in ("mul", "div"):
        a, b = form(v[0]), form(v[1])
        if name == "div" and not b.terms:
            return graph.scaled(a, _reciprocal(graph, b.const))
        if name == "mul" and not (a.terms and b.terms):
            return graph.scaled(a, b.const) if a.terms else graph.scaled(b, a.const)
        return None
    if name == "logistic":
        return _rate(graph, form(v[0]))
    if name == "copy" or (name == "convert_element_type" and v[0].aval.dtype == graph.dtype):
        return form(v[0])
    return None


def _rate(graph: Graph, x: Form) -> Form:
    """``1 / (1 + exp(-x))`` by functions of the hardware; scale and offset fold into the surrounding forms."""
    if not graph.base_two:
        return Form(Coefficient(0.5), ((graph.function("tanh", x, 0.5), Coefficient(0.5)),))
    rate = graph.function("logistic2", x, -1.0 / math.log(2.0))
    graph.rates[rate] = x
    return Form(ZERO, ((rate, ONE),))


def _reciprocal(graph: Graph, c: Coefficient) -> Coefficient:
    if c.symbol is None:
        return Coefficient(1.0 / c.literal)
    node = graph.node(Form(c))
    inverse = graph._shared(("inv", id(node)), lambda: Node("reciprocal", True, graph.aval, args=(node,)))
    return Coefficient(0.0, inverse)


# Evaluation and cost ------------------------------------------------------------------------------------------------


def _children(node: Node) -> list[Node]:
    if node.kind == "sum":
        atoms = [n for _, n in node.args]
        return atoms + [c.symbol for c in (*(c for c, _ in node.args), node.const) if c.symbol is not None]
    return list(node.args)


def _reachable(outputs: Sequence[Node], stop: Callable[[Node], bool] = lambda _: False) -> list[Node]:
    """The nodes that the outputs depend on, each after its own children; none below a node for which ``stop`` holds."""
    order, done = [], set()
    stack = [(n, False) for n in reversed(outputs)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif id(node) not in done:
            done.add(id(node))
            stack.append((node, True))
            if not stop(node):
                stack += [(c, False) for c in reversed(_children(node))]
    return order


def _is_coefficient(node: Node) -> bool:
    """Whether the loop gets a node as a number; a comparison of hoisted values is made in the loop again."""
    return node.hoisted and node.aval.dtype.kind == "f"


def _parts(c: Coefficient) -> tuple[float, Node | None]:
    """A coefficient as a plain addition of the atom (0, 1 or -1) and a factor."""
    return (c.literal, c.symbol) if c.literal in (1.0, -1.0) else (0.0, c.symbol)


def operations(outputs: Sequence[Node]) -> int:
    """The number of operations of these outputs in the loop."""
    total = 0
    for node in _reachable(outputs, _is_coefficient):
        if _is_coefficient(node) or node.kind in ("arg", "lit"):
            continue
        if node.kind != "sum":
            total += 1
            continue
        for c, _ in node.args:
            plain, symbol = _parts(c)
            total += (plain != 0.0) + 2 * (symbol is not None or plain == 0.0)
        total += (not node.const.is_zero) - 1
    return total


class _Evaluator:
    """Evaluates nodes on values, each once; hoisted nodes may be looked up in a table of coefficients."""

    def __init__(self, args, coefficients: dict[int, Any] | None = None):
        self.args, self.values = args, dict(coefficients or {})

    def __call__(self, node: Node):
        for n in _reachable([node], lambda n: id(n) in self.values):
            if id(n) not in self.values:
                self.values[id(n)] = self._evaluate(n)
        return self.values[id(node)]

    def _evaluate(self, n: Node):
        value = self.values
        if n.kind == "arg":
            return self.args[n.index]
        if n.kind == "lit":
            return n.value
        if n.kind == "op":
            return evaluate_equation(n.eqn, [value[id(a)] for a in n.args])
        if n.kind == "product":
            return value[id(n.args[0])] * value[id(n.args[1])]
        if n.kind == "reciprocal":
            return 1.0 / value[id(n.args[0])]
        if n.kind == "tanh":
            return tanh_absolute.bind(value[id(n.args[0])])
        if n.kind == "logistic2":
            return logistic2.bind(value[id(n.args[0])])
        return self._sum(n)

    def _sum(self, n: Node):
        """Add each product by a fused multiply-add, if the hardware has it, beginning with the constant."""
        dtype = n.aval.dtype
        small, plain = [], []
        for c, atom in n.args:
            literal, symbol = _parts(c)
            x = self.values[id(atom)]
            if symbol is not None:
                factor = self.values[id(symbol)]
                if c.literal not in (0.0, 1.0, -1.0):
                    factor = factor + dtype.type(c.literal)
                small.append((x, factor))
            elif literal == 0.0:
                small.append((x, dtype.type(c.literal)))
            if literal != 0.0:
                plain.append((x, literal))
        total = None
        if not n.const.is_zero:
            total = dtype.type(n.const.literal)
            if n.const.symbol is not None:
                symbol = self.values[id(n.const.symbol)]
                total = symbol + total if n.const.literal else symbol
        plain.sort(key=lambda p: -p[1])
        # A rate by tanh has such a constant, its offset. A rate by powers of two has none, and the state is added last:
        # so the small terms are summed first, and the state is rounded once.
        rates = any(atom.kind == "logistic2" for _, atom in n.args)
        if total is None and plain and plain[0][1] > 0 and not (rates and small):
            total = plain.pop(0)[0]
        for x, factor in small:
            total = x * factor if total is None else total + x * factor
        for x, sign in plain:
            if total is None:
                total = x if sign > 0 else -x
            else:
                total = total + x if sign > 0 else total - x
        return total


# The rewrite --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hoisted:
    """Programs after hoisting.

    Attributes
    ----------
    setup : hoisted arguments -> coefficients
    programs : each takes ``(*coefficients, *its remaining arguments)``
    operations : operations a call of each program
    """

    setup: Program
    programs: tuple[Program, ...]
    operations: tuple[int, ...]


def hoist(programs: Sequence[Program], n_hoisted: int, dtype, base_two: bool = False) -> Hoisted:
    """Move what depends on the first ``n_hoisted`` arguments (shared by all programs) out of the programs.

    The remaining arguments of every program must be a prefix of those of the longest one. Logistic functions are
    computed by powers of two with ``base_two``, else by tanh.
    """
    graph = Graph(dtype, base_two)
    outputs = [_cheapest(graph, p, n_hoisted) for p in programs]
    table = _coefficient_nodes(outputs)
    return Hoisted(
        _setup_program(table, programs[0], n_hoisted),
        tuple(_loop_program(table, p, n_hoisted, out, dtype) for p, out in zip(programs, outputs)),
        tuple(operations(out) for out in outputs),
    )


def _folded(graph: Graph, program: Program, n_hoisted: int, frozen: set[int]):
    args = [graph.argument(i, a, i < n_hoisted) for i, a in enumerate(program.in_avals)]
    sums: list[int] = []
    return _fold(graph, program.jaxpr, args, frozen, sums), sums


def _cheapest(graph: Graph, program: Program, n_hoisted: int) -> list[Node]:
    """The program's outputs with the fewest operations: each sum in turn is tried as formed once or multiplied out."""
    frozen: set[int] = set()
    best, candidates = _folded(graph, program, n_hoisted, frozen)
    least = operations(best)
    for number in candidates[:_MOST_TRIALS]:
        outputs, _ = _folded(graph, program, n_hoisted, frozen | {number})
        total = operations(outputs)
        if total < least:
            frozen, best, least = frozen | {number}, outputs, total
    return best


def _coefficient_nodes(outputs: Sequence[Sequence[Node]]) -> list[Node]:
    """The hoisted values that the loop reads, in order of first use."""
    table: dict[int, Node] = {}
    for out in outputs:
        for node in _reachable(out, _is_coefficient):
            reads = [node] if _is_coefficient(node) and any(node is o for o in out) else []
            if not _is_coefficient(node):
                reads += [c for c in _children(node) if _is_coefficient(c)]
            for n in reads:
                if n.kind != "lit":
                    table.setdefault(id(n), n)
    return list(table.values())


def _setup_program(table: Sequence[Node], program: Program, n_hoisted: int) -> Program:
    def setup(*args):
        value = _Evaluator(args)
        return tuple(value(n) for n in table)

    return Program(setup, program.in_avals[:n_hoisted], "setup")


def _loop_program(table, program: Program, n_hoisted: int, outputs: Sequence[Node], dtype) -> Program:
    n_coefs = len(table)

    def loop(*args):
        padded = (None,) * n_hoisted + args[n_coefs:]
        value = _Evaluator(padded, {id(n): c for n, c in zip(table, args[:n_coefs])})
        return tuple(jnp.asarray(value(n), n.aval.dtype) for n in outputs)

    avals = tuple(jax.ShapeDtypeStruct((), n.aval.dtype) for n in table) + program.in_avals[n_hoisted:]
    return Program(loop, avals, program.label)
