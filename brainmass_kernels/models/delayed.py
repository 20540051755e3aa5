"""Delays inside a mass: what its equations read of its own past."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import brainunit as u
import numpy as np

from .. import units
from ..errors import check_name

if TYPE_CHECKING:
    from .base import Model


@dataclasses.dataclass(frozen=True, eq=False)
class Delayed:
    """What a mass showed some time ago, which its drift reads like an input: ``delayed = {"late": bk.Delayed(...)}``.

    In ``delayed`` of a `Model`, by the name under which the drift (or the drive) reads it: ``i.late`` is the value of
    ``of`` a time ``factor * by`` before the step, constant during a step, in every scheme. Each lane has its own
    history and may have its own delay. A delay of 0 reads the present step.

    Parameters
    ----------
    of : the observable or state that is delayed
    by : the parameter of the model, a time, that is the delay
    factor : the part of that time that is the delay, such as 0.5 of the time around a loop
    interpolate : read linearly between two steps instead of rounding the delay up to whole steps, which also gives
        gradients in the delay
    max_delay : the longest delay that there may be, a time. It is needed only where the delay is traced by jit, vmap or
        grad, as in a fit; a traced delay beyond it, or a negative one, gives NaN

    Raises
    ------
    TypeError, ValueError : an argument, by its name

    Notes
    -----
    One delay for all lanes, known before the run is traced, is compiled in, and every implementation with networks
    takes it. Delays that differ between lanes, or that are traced, are data: others compile nothing anew, and
    ``mosaic_tpu`` refuses them.

    Examples
    --------
    >>> import brainunit as u
    >>> import brainmass_kernels as bk
    >>> @bk.model
    ... class Late(bk.Model):
    ...     t0: float = 10.0 * u.ms
    ...     states = {"x": u.UNITLESS}
    ...     delayed = {"late": bk.Delayed("x", by="t0", interpolate=True, max_delay=50 * u.ms)}
    ...     time_unit = u.ms
    ...
    ...     @staticmethod
    ...     def drift(s, p, i):
    ...         return {"x": -i.late / 20.0}
    """

    of: str
    by: str = dataclasses.field(kw_only=True)
    factor: float = dataclasses.field(default=1.0, kw_only=True)
    interpolate: bool = dataclasses.field(default=False, kw_only=True)
    max_delay: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        for name in ("of", "by"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"'{name}' got {getattr(self, name)!r}, but takes a name")
        factor = self.factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ValueError(f"'factor' got {factor!r}, but takes a positive number such as 0.5")
        if not isinstance(self.interpolate, (bool, np.bool_)):
            raise TypeError(f"'interpolate' got {self.interpolate!r}, but takes True or False")
        if self.max_delay is not None:
            units.positive_time(self.max_delay, u.second, "max_delay")

    @property
    def most(self) -> float | None:
        """The longest delay that there may be, in seconds."""
        return None if self.max_delay is None else units.positive_time(self.max_delay, u.second, "max_delay")

    def renamed(self, group: str) -> Delayed:
        """The same of a group of regions, whose names begin with its own."""
        return dataclasses.replace(self, of=f"{group}.{self.of}", by=f"{group}.{self.by}")


def names_read(cls: type[Model]) -> tuple[str, ...]:
    """The names that equations read of ``i``: inputs, and what is delayed."""
    return (*cls.inputs, *cls.delayed)


def check_delayed(cls: type[Model], parameters: Mapping[str, Any]) -> None:
    """The delays that a class declares against its names.

    Raises
    ------
    TypeError, ValueError : no dict of `Delayed`; a name that means something else; an observable or a parameter that
        the class lacks, or a parameter that is no time
    """
    title = cls.__name__
    if not isinstance(cls.delayed, Mapping):
        raise TypeError(f"{title}.delayed got {type(cls.delayed).__name__}, but takes a dict of bk.Delayed by name")
    for name, each in cls.delayed.items():
        where = f"{title}.delayed[{name!r}]"
        if not isinstance(each, Delayed):
            raise TypeError(f"{where} got {each!r}, but takes bk.Delayed(observable or state, by=parameter)")
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"{where} got the name {name!r}, but takes a word such as 'late', which i.late reads")
        if name in cls.observables:
            raise ValueError(f"{title} has '{name}' as an observable and as a delayed quantity: give one another name")
        check_name(each.of, cls.recordable(), f"observable or state of {where}")
        check_name(each.by, parameters, f"parameter in by= of {where}")
        unit = units.unit_of(parameters[each.by])
        if unit.dim != u.second.dim:
            raise ValueError(
                f"{where} got by='{each.by}', which is in {units.name_of(unit)}, but takes a parameter that is a time"
            )
