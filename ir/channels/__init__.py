"""Channel algebra: which slices of which tensors go together, and removing them exactly."""

from __future__ import annotations

from graphwright.ir.channels.cutting import (
    channel_groups,
    cut,
    cut_tensors,
    kept_positions,
    zero,
)
from graphwright.ir.channels.groups import ChannelGroup, Member

__all__ = ["ChannelGroup", "Member", "channel_groups", "cut", "cut_tensors", "kept_positions",
           "zero"]  # fmt: skip
