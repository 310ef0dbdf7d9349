"""What rounds of removals have taken, measured against the program before the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.channels.families import Family, families
from graphwright.passes.prune._units.measures import Measure


@dataclass
class Removed:
    """Groups before the first round by name, and what each has lost since.

    Attributes:
        whole: what the share is of, in the first program.
        units: of every eligible group.
        limits: largest share that each may lose.
        kinds: families of each.
        parameters, macs: of the first program.
        gone: units that each has lost.
        error: largest difference that a cut made.
    """

    whole: float
    units: dict[str, int]
    limits: dict[str, float]
    kinds: dict[str, tuple[Family, ...]]
    parameters: float
    macs: float
    gone: dict[str, int] = field(default_factory=dict)
    error: float = 0.0

    @classmethod
    def nothing(
        cls, groups: Sequence[ChannelGroup], limits: Sequence[float], left: Measure
    ) -> Removed:
        """The state before the first round.

        Args:
            groups: eligible ones.
            limits: largest share of each.
            left: what the share is of.
        """
        analysis = groups[0].analysis
        none = np.zeros(analysis.count, bool)
        kinds = families(groups)
        return cls(
            max(left(none), 1e-12),
            {g.name: g.units for g in groups},
            {g.name: limit for g, limit in zip(groups, limits, strict=True)},
            {g.name: kinds[g] for g in groups},
            max(1, analysis.parameters(none)),
            max(1.0, analysis.macs(none)),
        )

    def share(self, left: Measure, of_units: bool, groups: Sequence[ChannelGroup]) -> Measure:
        """The share of the whole that is gone with the flagged classes of the present program.

        Args:
            left: what the present program has left.
            of_units: whether that counts units of `groups` alone, not those of all first groups.
            groups: eligible ones of the present program.
        """
        apart = 0.0
        if of_units:
            apart = self.whole - sum(self.gone.values()) - sum(g.units for g in groups)
        return lambda removed: 1 - (left(removed) + apart) / self.whole

    def least(self, groups: Sequence[ChannelGroup], min_kept: int) -> list[int]:
        """Least number of units that each group keeps."""
        found = []
        for group in groups:
            units = self.units.get(group.name, group.units)
            most = int(self.limits.get(group.name, 1.0) * units + 1e-9)
            found.append(max(min_kept, units - most))
        return found

    def note(self, picks: Mapping[ChannelGroup, Sequence[int]], error: float) -> None:
        """Takes note of a round."""
        for group, units in picks.items():
            self.gone[group.name] = self.gone.get(group.name, 0) + len(units)
        self.error = max(self.error, error)
