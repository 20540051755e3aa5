"""Groups: a network whose regions are of different models, as one model of all of them.

Every lane has the states of all groups. Those of its own group move; the others rest, without drift or noise. So one
program runs all lanes, on every implementation, and a quantity of a group is a slice of the regions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import units
from ._jax import is_traced
from .models.base import Block, Model, SecondOrderModel, check_model, check_name, derived, remade
from .models.delayed import names_read

# The parameter that says of each lane which group it belongs to.
MEMBER = "_group"


class Places(NamedTuple):
    """A source or target that differs between groups: pairs of a group and a name in its model."""

    pairs: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, value: Any, argument: str) -> Places | str | None:
        """From an argument: a dict by group; a name stays one."""
        if value is None or isinstance(value, (str, Places)):
            return value
        if not isinstance(value, Mapping) or not all(isinstance(x, str) for pair in value.items() for x in pair):
            raise TypeError(f"'{argument}' got {value!r}, but takes a name, or a dict of names by group")
        if not value:
            raise ValueError(f"'{argument}' is empty, but takes a name for at least one group")
        return cls(tuple(value.items()))

    @property
    def name(self) -> str:
        """Its name in the model of all groups."""
        return "+".join(f"{group}.{name}" for group, name in self.pairs)


class Group(NamedTuple):
    """Regions of one model.

    Attributes
    ----------
    model : of each
    lanes : their numbers in the network
    """

    model: Model
    lanes: np.ndarray


class Groups(Model):
    """The model of all groups of a network; `union` makes it.

    Attributes
    ----------
    groups : the groups, by name
    joint : what couplings read or drive in several groups at once
    """

    groups: ClassVar[dict[str, Group]] = {}
    joint: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    @property
    def regions(self) -> int:
        """How many regions all groups have."""
        return sum(len(group.lanes) for group in self.groups.values())

    def __getattr__(self, name: str):
        group, dot, field = name.partition(".")
        groups = vars(self).get("groups", {})
        if dot and group in groups:
            return getattr(groups[group].model, field)
        if name == MEMBER and groups:
            return self.member()
        raise AttributeError(f"{type(self).__name__} has no '{name}'")

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Of each group its first region, and one after its last."""
        return tuple((int(group.lanes.min()), int(group.lanes.max()) + 1) for group in self.groups.values())

    def member(self) -> np.ndarray:
        """The number of each region's group, ``(N,)``."""
        member = np.zeros(self.regions, np.float32)
        for number, group in enumerate(self.groups.values()):
            member[group.lanes] = number
        return member

    def magnitudes(self) -> dict[str, Any]:
        """The parameters as plain arrays, each for all regions or for one."""
        values = {
            f"{name}.{n}": self.spread(f"{name}.{n}", x)
            for name, group in self.groups.items()
            for n, x in group.model.magnitudes().items()
        }
        return values | {MEMBER: self.member()}

    def replace(self, **fields) -> Groups:
        """The same groups with other values of these parameters, by ``"<group>.<name>"``."""
        known = {name for name in self.parameters() if name != MEMBER}
        for name in fields:
            check_name(name, known, "parameter", TypeError)
        groups = {}
        for name, group in self.groups.items():
            own = {n.partition(".")[2]: x for n, x in fields.items() if n.partition(".")[0] == name}
            groups[name] = group._replace(model=group.model.replace(**own) if own else group.model)
        return _of(type(self), groups)

    def recorded(self) -> tuple[str, ...]:
        """What is recorded by default: of each group its observables, or, if it has none, its states."""
        every = ((name, group.model) for name, group in self.groups.items())
        return tuple(f"{name}.{n}" for name, model in every for n in model.observables or model.states)

    def lanes_of(self, name: str) -> np.ndarray | None:
        """The regions that a quantity is of, by its name; ``None``, all."""
        group = self.groups.get(name.partition(".")[0])
        return None if group is None or "+" in name else group.lanes

    def spread(self, name: str, value: Any) -> Any:
        """A value ``(..., regions of the group)`` as one for all; elsewhere it is what nobody reads."""
        lanes = self.lanes_of(name)
        if lanes is None or not np.ndim(value) or np.shape(value)[-1] != len(lanes):
            return value
        place = np.zeros(self.regions, np.int32)
        place[lanes] = np.arange(len(lanes))
        return (value if is_traced(value) else np.asarray(value))[..., place]


def union(groups: Mapping[str, Any], sources: Sequence[Places], targets: Sequence[Places]) -> Groups:
    """The model of all groups.

    Parameters
    ----------
    groups : ``(model, regions)`` by name; the regions are their number, counted on from the group before, or indices
    sources, targets : what couplings of the network read and drive, where it differs between groups

    Raises
    ------
    ValueError, TypeError : a group that is no such pair; regions that are in two groups or in none; a name that a
        group's model lacks; units that differ in kind
    """
    parts: dict[str, Group] = {}
    for name, entry in groups.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"'model' got the group {name!r}, but takes words such as 'cortex'")
        if not (isinstance(entry, tuple) and len(entry) == 2):
            raise TypeError(f"the group '{name}' got {entry!r}, but takes (model, number or indices of regions)")
        check_model(entry[0])
        if isinstance(entry[0], Groups):
            raise TypeError(f"the group '{name}' got groups, but takes a model")
        parts[name] = Group(entry[0], _lanes(entry[1], name, parts))
    if not parts:
        raise ValueError("'model' got no group, but takes at least one")
    _check_lanes(parts)
    for name, group in parts.items():
        _check_values(name, group)
    for what, places in (("source", sources), ("target", targets)):
        for each in places:
            _check_places(each, what, parts)
    classes = tuple((name, type(group.model)) for name, group in parts.items())
    # That of one group is an input of its own already.
    joint = dict.fromkeys(places for places in targets if len(places.pairs) > 1)
    cls = _union(classes[0][1], classes, tuple(dict.fromkeys(sources)), tuple(joint))
    return _of(cls, parts)


def _of(cls: type[Groups], groups: dict[str, Group]) -> Groups:
    self = cls()
    vars(self)["groups"] = groups
    return self


def _lanes(regions: Any, name: str, before: Mapping[str, Group]) -> np.ndarray:
    if isinstance(regions, (int, np.integer)) and not isinstance(regions, bool):
        if regions < 1:
            raise ValueError(f"the group '{name}' got {regions} regions, but takes at least one")
        first = 1 + max((int(group.lanes.max()) for group in before.values()), default=-1)
        return np.arange(first, first + regions)
    lanes = np.asarray(regions)
    if lanes.dtype == bool:
        lanes = np.flatnonzero(lanes)
    if lanes.ndim != 1 or not lanes.size or not np.issubdtype(lanes.dtype, np.integer) or lanes.min() < 0:
        raise ValueError(f"the group '{name}' got {regions!r}, but takes a number of regions, their indices, or a mask")
    return lanes


def _check_lanes(groups: Mapping[str, Group]) -> None:
    every = np.concatenate([group.lanes for group in groups.values()])
    unique, counts = np.unique(every, return_counts=True)
    if (counts > 1).any():
        inside = [name for name, group in groups.items() if unique[counts > 1][0] in group.lanes]
        raise ValueError(f"region {unique[counts > 1][0]} is in the groups {' and '.join(inside)}, but takes one")
    missing = np.setdiff1d(np.arange(unique[-1] + 1), unique)
    if missing.size:
        raise ValueError(f"region {missing[0]} is in no group: indices take 0 to {unique[-1]}")


def _check_values(name: str, group: Group) -> None:
    """Raise unless the last axis of each parameter is that of the group's regions."""
    count = len(group.lanes)
    for parameter, x in group.model.magnitudes().items():
        if np.ndim(x) and np.shape(x)[-1] not in (1, count):
            raise ValueError(
                f"{parameter} of the group '{name}' got shape {np.shape(x)}, but takes one value, or one for each of "
                f"its {count} regions along the last axis"
            )


def _check_places(places: Places, what: str, groups: Mapping[str, Group]) -> None:
    unit = None
    for name, quantity in places.pairs:
        check_name(name, groups, f"group of a {what}")
        model = groups[name].model
        known = model.recordable() if what == "source" else model.inputs
        check_name(quantity, known, f"{what} of the group '{name}'")
        own = units.unit_of(known[quantity]) if what == "target" else known[quantity]
        if unit is not None and own.dim != unit.dim:
            raise ValueError(
                f"a {what} got {places.name}, which are in {units.name_of(unit)} and {units.name_of(own)}, but takes "
                f"quantities of one kind"
            )
        unit = own if unit is None else unit


# The class ------------------------------------------------------------------------------------------------------------


def _view(values, group: str, names, factors: Mapping[str, float]) -> SimpleNamespace:
    """The quantities of a group under their own names, as its equations take them."""
    own = {n: getattr(values, f"{group}.{n}") for n in names}
    return SimpleNamespace(**{n: units.scaled(x, factors[n]) if n in factors else x for n, x in own.items()})


@derived
def _union(base: type[Model], classes, sources: tuple[Places, ...], targets: tuple[Places, ...]) -> type[Groups]:
    """The class of all groups, one for each choice of models, sources and targets."""
    every, numbers = dict(classes), {name: k for k, (name, _) in enumerate(classes)}
    time = base.time_unit
    factors = {name: _conversions(cls, time) for name, cls in classes}
    second = all(issubclass(cls, SecondOrderModel) and cls.time_unit == time for cls in every.values())

    def within(p, name: str, x, other=0.0):
        """``x`` in the lanes of the group, elsewhere another value."""
        return jnp.where(getattr(p, MEMBER) == numbers[name], x, other)

    def dotted(attribute: str) -> dict[str, Any]:
        return {f"{name}.{n}": x for name, cls in classes for n, x in getattr(cls, attribute).items()}

    def parts_of(name: str, s, p, i=None):
        cls, own = every[name], factors[name]
        views = [_view(s, name, cls.states, own.states), _view(p, name, cls.parameters(), own.parameters)]
        if i is None:
            return views
        given = {f"{name}.{n}": getattr(i, f"{name}.{n}") for n in names_read(cls)}
        for places in targets:
            for group, target in places.pairs:
                if group == name:
                    given[f"{name}.{target}"] += _converted(getattr(i, places.name), places, group, target, every, time)
        given = SimpleNamespace(**{n: within(p, name, x) for n, x in given.items()})
        return [*views, _view(given, name, names_read(cls), own.inputs)]

    def drift(s, p, i):
        rates = {}
        for name, cls in classes:
            own, speed = factors[name], units.time_factor(time, cls.time_unit, name)
            for n, rate in cls.drift(*parts_of(name, s, p, i)).items():
                rates[f"{name}.{n}"] = within(p, name, units.scaled(rate, speed / own.states.get(n, 1.0)))
        return rates

    def drive(s, p, i):
        drives = {}
        for name, cls in classes:
            own: Any = cls
            for n, x in own.drive(*parts_of(name, s, p, i)).items():
                drives[f"{name}.{n}"] = within(p, name, x)
        return drives

    def diffusion(s, p):
        factors = {}
        for name, cls in classes:
            own = cls.diffusion(*parts_of(name, s, p))
            factors |= {f"{name}.{n}": within(p, name, own.get(n, 1.0)) for n in cls.states}
        return factors

    def observe(s, p):
        seen = {}
        for name, cls in classes:
            views, own = parts_of(name, s, p), factors[name]
            for n, x in cls.observe(*views).items():
                seen[f"{name}.{n}"] = units.scaled(x, 1.0 / own.observables[n]) if n in own.observables else x
        known = {**vars(s), **seen}
        for places in sources:
            sent: Any = 0.0
            for group, quantity in places.pairs:
                x = _converted(known[f"{group}.{quantity}"], places, group, quantity, every, time, source=True)
                sent = within(p, group, x, sent)
            seen[places.name] = sent
        return seen

    joint_sources = {
        places.name: every[places.pairs[0][0]].recordable()[places.pairs[0][1]] for places in sources
    }  # fmt: skip
    joint_targets = {
        places.name: units.attach(0.0, units.unit_of(every[places.pairs[0][0]].inputs[places.pairs[0][1]]))
        for places in targets
    }
    schemes = {cls.scheme for cls in every.values()}
    body = {
        "__doc__": f"The groups {', '.join(every)}.",
        "__module__": __name__,
        "__reduce__": remade(_union, base, classes, sources, targets),
        "states": dotted("states"),
        "inputs": dotted("inputs") | joint_targets,
        "observables": dotted("observables") | joint_sources,
        "initial": dotted("initial"),
        "time_unit": time,
        "scheme": schemes.pop() if len(schemes) == 1 and (second or not _needs_blocks(schemes)) else "heun",
        "pairs": tuple((f"{n}.{a}", f"{n}.{b}") for n, cls in classes for a, b in cls.pairs),
        "also": dotted("also"),
        "delayed": {f"{name}.{n}": each.renamed(name) for name, cls in classes for n, each in cls.delayed.items()},
        "as_declared": tuple(f"{name}.{n}" for name, cls in classes for n in cls.as_declared),
        "parameters": classmethod(
            lambda _: {f"{n}.{field}": x for n, cls in classes for field, x in cls.parameters().items()} | {MEMBER: 0.0}
        ),
        "joint": tuple(n for n in (*joint_sources, *joint_targets) if "+" in n),
        "observe": staticmethod(observe),
        "diffusion": staticmethod(diffusion),
        "drift": staticmethod(drift),
    }
    if second:
        body["blocks"] = tuple(
            Block(*(f"{name}.{x}" for x in block)) for name, cls in classes for block in getattr(cls, "blocks", ())
        )
        body["drive"] = staticmethod(drive)
    cls = type("Groups", (Groups, SecondOrderModel) if second else (Groups,), body)
    _register(cls)
    return cls


def _needs_blocks(schemes) -> bool:
    return bool({"strang", "exact"} & set(schemes))


def _conversions(cls: type[Model], time):
    """The factors from numbers in another unit of time to those of the equations; none where it is the same."""
    own = cls.time_factors()
    if cls.time_unit == time:
        return type(own)({}, {}, {}, {})

    def factors(unit_of: Mapping[str, Any]) -> dict[str, float]:
        by_name = {
            n: cls.time_factor(n, unit) / units.time_factor(unit, time, n)
            for n, unit in unit_of.items()
            if n not in cls.as_declared
        }
        return {n: factor for n, factor in by_name.items() if factor != 1.0}

    inputs = {n: units.unit_of(x) for n, x in cls.inputs.items()}
    known = type(own)(*map(factors, (cls.parameter_units(), inputs, cls.states, cls.observables)))
    now = {**known.states, **known.observables}
    return known._replace(inputs=known.inputs | {n: now[x.of] for n, x in cls.delayed.items() if x.of in now})


def _converted(x, places: Places, group: str, quantity: str, every, time, source: bool = False):
    """From a group's quantity to the joint source, or from the joint target to it; both as ``time`` counts."""
    first, name = places.pairs[0]

    def unit(cls, n):
        return cls.recordable()[n] if source else units.unit_of(cls.inputs[n])

    joint, own = unit(every[first], name), unit(every[group], quantity)
    if joint == own:
        return x
    before, after = (own, joint) if source else (joint, own)
    factor = float(units.strip(units.attach(1.0, before), after, quantity))
    return units.scaled(
        x, factor * units.time_factor(after, time, quantity) / units.time_factor(before, time, quantity)
    )


def _register(cls) -> None:
    def flatten(self: Groups):
        keys = [jax.tree_util.DictKey(name) for name in self.groups]
        lanes = tuple((name, group.lanes.tobytes()) for name, group in self.groups.items())
        return list(zip(keys, (group.model for group in self.groups.values()))), lanes

    def unflatten(lanes, models):
        places = ((name, np.frombuffer(raw, np.int64)) for name, raw in lanes)
        return _of(cls, {name: Group(model, own) for (name, own), model in zip(places, models)})

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
