"""Dimensions that follow from others, while it is found out which ones are free."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import DimRange, completed
from graphwright.ir.trace.guards import Guard


@dataclass(frozen=True)
class Derived:
    """Sums of dimensions by name.

    Attributes:
        sums: as `Signature.derived`, as they were asked for.
        sizes: example size of every dimension that was asked to be free.
    """

    sums: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def checked(self) -> Derived:
        """Itself.

        Raises:
            ArgumentError: a sum names what is no dimension, or the examples break it.
        """
        for dim, sum_of in self.sums.items():
            unknown = [name for name in (dim, *_names(sum_of)) if name not in self.sizes]
            if unknown:
                raise ArgumentError(f"derived: {dim} = {sum_of}: {unknown[0]!r} is no dimension")
            size = completed({dim: sum_of}, self.sizes)[dim]
            if size != self.sizes[dim]:
                raise ArgumentError(
                    f"derived: {dim} = {sum_of} is {size} in the examples, and {dim!r} there is "
                    f"{self.sizes[dim]}"
                )
        return self

    def among(self, free: Collection[str]) -> dict[str, str]:
        """The sums of dimensions that are still free, with numbers for those that are not."""
        return {
            dim: " + ".join(
                term if term.isdecimal() or term in free else str(self.sizes[term])
                for term in _terms(sum_of)
            )
            for dim, sum_of in self.sums.items() if dim in free
        }  # fmt: skip

    def with_followers(self, fixed: Collection[str], free: Collection[str]) -> set[str]:
        """The dimensions that cannot stay free when some are fixed.

        A fixed sum fixes all its terms, and one whose terms are fixed is.
        """
        out = set(fixed)
        for dim, sum_of in self.sums.items():
            names = set(_names(sum_of))
            if dim in out:
                out |= names & set(free)
            elif dim in free and not (names & set(free)) - out:
                out.add(dim)
        return out

    def completed(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """All sizes, the examples' where `sizes` says nothing and nothing follows."""
        return completed(self.sums, {**self.sizes, **sizes})

    def on_free(self, guard: Guard, free: Collection[str]) -> Guard:
        """The condition as one on free dimensions that do not follow from others."""
        sums = self.among(free)
        if not any(dim in sums for dim in guard.dims):
            return guard
        text, dims = guard.text, []
        for dim in guard.dims:
            dims += _names(sums[dim]) if dim in sums else [dim]
            text = f"{text}, {dim} = {sums[dim]}" if dim in sums else text
        inner = guard.test
        return replace(
            guard,
            dims=tuple(dict.fromkeys(dims)),
            text=text,
            test=lambda sizes: inner(self.completed(sizes)),
        )

    def ranges(
        self, found: Mapping[str, DimRange], asked: Mapping[str, DimRange]
    ) -> dict[str, DimRange]:
        """Ranges of the sums that are free, by those of their terms and by what was asked for."""
        out = {}
        for dim, sum_of in self.among(found).items():
            lows = {name: found[name].min for name in _names(sum_of)}
            least = max(completed({dim: sum_of}, lows)[dim], asked.get(dim, DimRange()).min)
            highs = {name: found[name].max for name in _names(sum_of)}
            known = {name: high for name, high in highs.items() if high is not None}
            most = completed({dim: sum_of}, known).get(dim) if len(known) == len(highs) else None
            wanted = asked.get(dim, DimRange()).max
            ends = [end for end in (most, wanted) if end is not None]
            out[dim] = DimRange(least, min(ends, default=None))
        return out


def _terms(sum_of: str) -> list[str]:
    return [term.strip() for term in sum_of.split("+")]


def _names(sum_of: str) -> list[str]:
    return [term for term in _terms(sum_of) if not term.isdecimal()]
