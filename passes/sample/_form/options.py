"""Options that several guiders have."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from graphwright.ir.options import Options, Rule


class Interval(Options):
    """The part of a trajectory that is guided."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("stop", "start < stop", "stop ({stop}) has to be above start ({start})"),
    )

    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the steps before guidance begins."""

    stop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the steps after which it ends."""

    def interval(self) -> dict[str, Any]:
        """For the driver."""
        return {"start": self.start, "stop": self.stop}
