"""Channel algebra: which slices of which tensors go together, and removing them exactly."""

from __future__ import annotations

from graphwright.ir.channels.cutting import (
    channel_groups,
    cut,
    cut_tensors,
    kept_positions,
    masked_outputs,
    zero,
)
from graphwright.ir.channels.groups import ChannelGroup, Member
from graphwright.ir.channels.permuting import permute

__all__ = ["ChannelGroup", "Member", "channel_groups", "cut", "cut_tensors",
           "kept_positions", "masked_outputs", "permute", "zero"]  # fmt: skip
