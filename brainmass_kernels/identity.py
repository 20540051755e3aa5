"""What a run computes, as a short digest: the same in every process, and another where anything differs.

The file of an interrupted run holds digests that tell this run from others when it resumes. Names cannot: an edited
drift keeps its name. So the traced programs are hashed: operations, shapes, dtypes and constants, but no names of
variables, no lines of source and no addresses.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from . import units
from ._jax import Literal
from ._version import __version__
from .arguments import prepare
from .jaxprs import CALLS, call_body, drop_dead, read_by, variables
from .recording import Reduction
from .run import Data, Run
from .signals import Signal, axis_of, chain_of, root, unit_of
from .simulation import times
from .step import Step, build

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{4,}")
# Where these differ, all else may differ with them and says nothing more.
_BASIC = ("brainmass_kernels", "jax", "dtype")


# Runs ---------------------------------------------------------------------------------------------------------------


def of_run(run: Run) -> dict[str, str]:
    """What decides the numbers of a run beside its data, by name.

    Returns
    -------
    ``dtype``, ``scheme``, ``time unit``, ``equations`` (the step, what a network's masses send, the scheme's change of
    coordinates), ``delayed <name>`` of a delay inside a mass, and for each result ``record <name>``: the quantity and
    its equation, or the programs of a statistic
    """
    step = build(run.spec, bool(run.inverse_steps))
    return {
        "dtype": str(np.dtype(run.spec.dtype)),
        "scheme": run.spec.scheme,
        "time unit": str(run.spec.model.time_unit),
        "equations": _equations(step),
        **{f"delayed {name}": str(each) for name, each in run.spec.model.delayed.items()},
        **{f"record {name}": _recorded(what, run, step) for name, what in run.entries},
    }


def of_call(model, duration, dt, **arguments) -> dict[str, str]:
    """`of_run` of what `simulate` with the same arguments would run, and the states that it starts from."""
    run, data = prepare(model=model, duration=duration, dt=dt, **arguments)
    return {**of_run(run), **{n: x for n, x in of_data(run, data).items() if n.startswith("initial ")}}


def of_data(run: Run, data: Data) -> dict[str, str]:
    """The values that a run starts from, by name: parameters, inputs, noise intensities, initial states."""
    spec = run.spec
    named = {**dict(zip(spec.hoisted, data.hoisted)), **dict(zip(spec.varying, data.varying))}
    return {
        **{name: of_array(x) for name, x in named.items()},
        **{f"readout {k}": of_array(x) for k, x in enumerate(data.arrays)},
        **{f"initial {name}": of_array(x) for name, x in zip(spec.model.states, data.state)},
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that trace programs: digests are only compared within one version."""
    return {"brainmass_kernels": __version__, "jax": metadata.version("jax")}


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """What differs between two runs, in words; empty where nothing does."""
    differing = [n for n in (*theirs, *(n for n in ours if n not in theirs)) if theirs.get(n) != ours.get(n)]
    basic = [n for n in differing if n in _BASIC]
    return ", ".join(_in_words(n, theirs.get(n), ours.get(n)) for n in basic or differing)


def _in_words(name: str, theirs: str | None, ours: str | None) -> str:
    if name == "equations":
        return "the model's equations"
    kind, _, of = name.partition(" ")
    if kind == "record":
        was = "was not recorded" if theirs is None else "is recorded no more" if ours is None else "is another"
        return f"'record' ({of} {was})"
    if kind == "over" and of:
        return f"'over' (the values of {of})"
    if theirs is None or ours is None:
        return f"'{name}' ({'not ' if theirs is None else ''}given then, {'not ' if ours is None else ''}given now)"
    # The digest of an array says nothing to a reader.
    return f"'{name}'" if "(" in (theirs[:1], ours[:1]) else f"'{name}' ({theirs} then, {ours} now)"


def _equations(step: Step) -> str:
    spec, written = step.spec, step.written
    n, aval = len(spec.hoisted), jax.ShapeDtypeStruct((), spec.dtype)
    entered = jax.make_jaxpr(lambda *flat: step.enter(flat[:n], flat[n:]))(*[aval] * (n + len(spec.model.states)))
    programs = [written["advance"].jaxpr, *([written["send"].jaxpr] if "send" in written else []), entered]
    names = [spec.hoisted, spec.carried, spec.arriving, spec.noisy]
    return _hash(repr(names), *map(text_of, programs))


def _recorded(what: str | Reduction | Signal, run: Run, step: Step) -> str:
    source = root(what)
    closed = step.written["observe"].jaxpr
    output = closed.jaxpr.outvars[run.spec.record.index(source)]
    equation = text_of(drop_dead(closed.replace(jaxpr=closed.jaxpr.replace(outvars=[output]))))
    if isinstance(what, str):
        return f"{source} {_hash(equation)}"
    return f"{type(what).__name__} of {source} {_hash(equation, *_statistic(what, run))}"


def _statistic(what: Reduction | Signal, run: Run) -> list[str]:
    """The programs of a signal or statistic, its axis, and its unit."""
    sampling, lanes = run.sampling, math.prod(run.batch)
    assert sampling is not None
    like = jax.ShapeDtypeStruct((lanes,), run.spec.dtype)
    block = jax.ShapeDtypeStruct((min(sampling.block, sampling.count), lanes), run.spec.dtype)
    first = jax.ShapeDtypeStruct((), jnp.int32)
    if isinstance(what, Reduction) and isinstance(what.of, str):
        start, add = (functools.partial(f, sampling=sampling) for f in (what.start, what.add))
        ends, arrays = [functools.partial(what.finish, sampling=sampling)], ()
    else:
        chain = chain_of(what, sampling)
        start, add, ends = chain.start, chain.add, [] if chain.last is None else [chain.finish]
        arrays = ([jax.ShapeDtypeStruct(x, run.spec.dtype) for x in run.arrays],)
    carry = jax.eval_shape(start, like)
    traced = [jax.make_jaxpr(start)(like), jax.make_jaxpr(add)(carry, block, first, *arrays)]
    traced += [jax.make_jaxpr(finish)(carry) for finish in ends]
    known = run.spec.model.recordable()
    axis = axis_of(what, times(run, 1.0 * run.spec.model.time_unit), sampling)
    of_axis = [] if axis is None else [str(units.unit_of(axis)), of_array(u.get_magnitude(axis))]
    return [*map(text_of, traced), str(unit_of(what, known)), *of_axis]


# Programs and values ------------------------------------------------------------------------------------------------


def of_function(fun: Callable, *avals: Any) -> str:
    """A digest of what a function computes from arguments of these shapes and dtypes."""
    return _hash(text_of(jax.make_jaxpr(fun)(*avals)))


def of_array(value) -> str:
    """A number as it is, an array as its shape and a digest."""
    array = _plain(value)
    if array.size == 1:
        return repr(array.reshape(()).item())
    return f"{array.shape} {_hash(array.tobytes())}"


def of_text(text: str) -> str:
    return _hash(text)


def text_of(closed) -> str:
    """A closed jaxpr as text without names, source lines or addresses, so that equal texts compute the same."""
    return _text(closed.jaxpr, closed.consts)


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _text(jaxpr, consts) -> str:
    places: dict[Any, int] = {}

    def place(v) -> str:
        return _value(v.val, v.aval) if isinstance(v, Literal) else str(places.setdefault(v, len(places)))

    def listed(variables) -> str:
        return " ".join(map(place, variables))

    def typed(variables) -> str:
        return " ".join(f"{place(v)}:{_aval(v.aval)}" for v in variables)

    used = {*variables(jaxpr.outvars), *read_by(jaxpr.eqns)}
    lines = [f"in {typed(jaxpr.invars)}"]
    lines += [f"const {place(v)} {_value(x, v.aval)}" for v, x in zip(jaxpr.constvars, consts) if v in used]
    for eqn in jaxpr.eqns:
        operands, name = listed(eqn.invars), eqn.primitive.name
        if name in CALLS:
            # The name of a call and its placement compute nothing.
            operation = "call", _text(*call_body(eqn))
        else:
            operation = name, " ".join(f"{n}={_parameter(x)}" for n, x in sorted(eqn.params.items()))
        lines.append(f"{typed(eqn.outvars)} = {' '.join(operation)} {operands}")
    return "\n".join([*lines, f"out {listed(jaxpr.outvars)}"])


def _aval(aval) -> str:
    return f"{aval.dtype}{list(aval.shape)}" if hasattr(aval, "shape") else type(aval).__name__


def _value(value, aval) -> str:
    array = _key_data(value)
    small = array.size == 1
    return f"{_aval(aval)}({array.tobytes().hex() if small else _hash(array.tobytes())})"


def _parameter(value) -> str:
    """A parameter of an operation: programs and values by their content, functions and the like by name."""
    if hasattr(value, "jaxpr") and hasattr(value, "consts"):
        return "{" + _text(value.jaxpr, value.consts) + "}"
    if hasattr(value, "eqns") and hasattr(value, "invars"):
        return "{" + _text(value, ()) + "}"
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = _key_data(value)
        return f"{array.dtype}{array.shape}({_hash(array.tobytes())})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{n}: {_parameter(x)}" for n, x in value.items())) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(_parameter, value))) + "}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_parameter, value))})"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (str, bytes, int, float, complex, type(None), np.dtype)):
        return repr(value)
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    text = str(value)
    return f"{type(value).__qualname__}" if _ADDRESS.search(text) else f"{type(value).__qualname__} {text}"


def _key_data(value) -> np.ndarray:
    """An array in its own dtype; of random keys, their words."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.ascontiguousarray(value)


def _plain(value) -> np.ndarray:
    array = np.asarray(value)
    return np.ascontiguousarray(array, np.float64 if array.dtype.kind == "f" else None)
