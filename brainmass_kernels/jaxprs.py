"""What is asked of any jaxpr: its equations, what they compute, and which of them a result needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from ._jax import Literal, at_source

# Equations that call a function: its body takes their place where a jaxpr is inlined.
CALLS = frozenset(
    """
    pjit jit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    """.split()
)

# What an equation computes, from its operands: a value for each of its results.
Rule = Callable[[Any, list], Sequence[Any]]


def variables(atoms: Iterable[Any]) -> list[Any]:
    """The operands or results that are no literals, in order."""
    return [v for v in atoms if not isinstance(v, Literal)]


def call_body(eqn):
    """The jaxpr and the constants of a call equation (jit, remat, custom_jvp, ...)."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            body = eqn.params[name]
            return (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
    raise TypeError(f"no body in a call of '{eqn.primitive.name}'")


def walk(jaxpr, is_whole: Callable[[Any], bool] = lambda eqn: False, calls: tuple = ()) -> Iterator[tuple[Any, tuple]]:
    """Each equation, with the calls around it, outermost first; the body of a call takes the call's place.

    Parameters
    ----------
    is_whole : tells the calls that are not entered
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in CALLS and not is_whole(eqn):
            yield from walk(call_body(eqn)[0], is_whole, (*calls, eqn))
        else:
            yield eqn, calls


# Evaluation ---------------------------------------------------------------------------------------------------------


def value_of(v, env: dict[Any, Any]):
    """The value of a literal or of a variable."""
    return v.val if isinstance(v, Literal) else env[v]


def bind(eqn, operands) -> Sequence[Any]:
    """The `Rule` that leaves an equation as it is."""
    with at_source(eqn):
        results = eqn.primitive.bind(*operands, **eqn.params)
    return results if eqn.primitive.multiple_results else [results]


def inline(eqn, operands, rule: Rule = bind) -> Sequence[Any]:
    """As `bind`, except that the equations of a call's body are computed by ``rule``."""
    if eqn.primitive.name in CALLS:
        return evaluate(*call_body(eqn), operands, rule)
    return bind(eqn, operands)


def compute(eqns: Iterable[Any], env: dict[Any, Any], rule: Rule = bind) -> None:
    """Add the results of equations to ``env``, the values by variable."""
    for eqn in eqns:
        env.update(zip(eqn.outvars, rule(eqn, [value_of(v, env) for v in eqn.invars]), strict=True))


def evaluate(jaxpr, consts, args, rule: Rule = bind) -> list[Any]:
    """The outputs of a jaxpr."""
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
    compute(jaxpr.eqns, env, rule)
    return [value_of(v, env) for v in jaxpr.outvars]


def rewritten(closed, rule: Rule):
    """The closed jaxpr of the same arguments, traced with each equation computed by ``rule``, without dead code."""
    avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals]
    return drop_dead(jax.make_jaxpr(lambda *args: evaluate(closed.jaxpr, closed.consts, args, rule))(*avals))


# Dependence ---------------------------------------------------------------------------------------------------------


def read_by(eqns: Iterable[Any]) -> set[Any]:
    """The variables that equations read."""
    return {v for eqn in eqns for v in variables(eqn.invars)}


def needed_for(outs: Iterable[Any], eqns: Sequence[Any], given: set[Any] | frozenset = frozenset()) -> list[Any]:
    """The equations that make ``outs`` from the variables ``given`` and from arguments, in order."""
    wanted, kept = set(variables(outs)) - given, []
    for eqn in reversed(eqns):
        if not wanted.isdisjoint(eqn.outvars):
            kept.append(eqn)
            wanted |= set(variables(eqn.invars)) - given
    return kept[::-1]


def depending_on(changing: Iterable[Any], eqns: Iterable[Any]) -> set[Any]:
    """The variables ``changing``, and all that equations make of them."""
    reached = set(changing)
    for eqn in eqns:
        if not reached.isdisjoint(variables(eqn.invars)):
            reached.update(eqn.outvars)
    return reached


def drop_dead(closed):
    """The same closed jaxpr without the equations that no output needs."""
    jaxpr = closed.jaxpr
    return closed.replace(jaxpr=jaxpr.replace(eqns=needed_for(jaxpr.outvars, jaxpr.eqns)))
