"""A pass's word on one layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """A pass's report on one layer: `("fc1", "int8")`.

    Attributes:
        layer: its name.
        what: what it is now.
        reason: why it was left alone, or a remark on what was done.
        changed: whether the pass did something to it.
    """

    layer: str
    what: str
    reason: str = ""
    changed: bool = True

    @classmethod
    def left(cls, layer: str, reason: str, what: str = "left alone") -> Action:
        """A layer that the pass did nothing to, and why."""
        return cls(layer, what, reason, changed=False)
