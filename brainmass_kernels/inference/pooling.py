"""What several targets have in common: values of their own, shared ones, and groups with a mean and a spread."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .. import routing
from ..fitting.problem import Pooling
from .likelihoods import POSITIVE
from .positions import Member, Position
from .priors import HalfNormal, Prior


@dataclasses.dataclass(frozen=True)
class Ties:
    """Names with one value for all targets, and of groups by name the prior of the spread, or None for the default."""

    shared: tuple[str, ...]
    group: dict[str, Prior | None]

    @classmethod
    def of(cls, shared, group) -> Ties:
        """
        Raises
        ------
        ValueError, TypeError : a name twice, or in both; a spread that is no prior
        """
        shared = (shared,) if isinstance(shared, str) else tuple(shared or ())
        if isinstance(group, str):
            group = (group,)
        group = dict(group) if isinstance(group, Mapping) else dict.fromkeys(group or ())
        if both := [name for name in shared if name in group]:
            raise ValueError(f"'group' got {', '.join(both)}, which 'shared' has too: one value has no spread")
        for name, prior in group.items():
            if not (prior is None or isinstance(prior, Prior)):
                raise TypeError(
                    f"'group' got {prior!r} for {name!r}, but takes the prior of the spread, such as "
                    "bk.priors.HalfNormal(0.3), or None: a density infers the spread"
                )
        return cls(shared, group)

    def check(self, names, subjects: int, target: str) -> None:
        """
        Raises
        ------
        ValueError : an unknown name, or a group of one target
        """
        for argument, given in (("shared", self.shared), ("group", self.group)):
            for name in given:
                routing.check(name, dict.fromkeys(names), f"name in '{argument}'")
        if self.group and subjects == 1:
            raise ValueError(
                f"'group' got {', '.join(self.group)}, but 'target' has one of {target}, whose spread nothing says: "
                "leave it out, or take several targets, such as series (n, K)"
            )

    @property
    def as_fit(self) -> Pooling:
        """What a `Problem` knows of it."""
        return Pooling(group=tuple((name, 1.0) for name in self.group), shared=self.shared)

    def positions(self, one: Position, start: float, subjects: int) -> list[tuple[Position, float]]:
        """The positions of a parameter of so many targets, with where each starts, of its position in one target."""
        if subjects == 1 or one.name in self.shared:
            return [(one, start)]
        if one.name not in self.group:
            return [(dataclasses.replace(one, subjects=subjects), start)]
        member = Member(one.name, one.low, one.high, one.unit, one.prior, subjects)
        mean = dataclasses.replace(one, name=member.mean_name)
        scale, unit = member.spread
        prior = self.group[one.name]
        prior = HalfNormal(scale * unit) if prior is None else prior
        spread = Position.of(member.spread_name, prior, unit, None, POSITIVE, "'group'")
        return [(member, 0.0), (mean, start), (spread, 0.0)]
