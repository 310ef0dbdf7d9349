"""Names of stacks of experts."""

from __future__ import annotations

import re

from torch import fx

from graphwright.ir.graph.constants import weight_source
from graphwright.ir.layers.kinds import KINDS, WEIGHT_ARGUMENT
from graphwright.ir.program import Program

PART = re.compile(r"[._](codes|kept|low_rank_b|(\d+_)?(main|outlier)_indices)(_\d+)?$")
"""End of the name of the first tensor that a stored form of a weight is rebuilt from."""


def stack_name(program: Program, node: fx.Node) -> str:
    """The name of a stack of experts, by its call; that of the call where it has no weight."""
    source = weight_source(node.args[WEIGHT_ARGUMENT[KINDS[node.target]]])
    return node.name if source is None else stack_names(program, source)[0]


def stack_names(program: Program, stored: fx.Node) -> tuple[str, ...]:
    """A module has several stacks, and each is a layer of its own, called after its tensor."""
    name = str(stored.target)
    aliases = program.aliases.get(name, (name,))
    return tuple(PART.sub("", a) for a in aliases) if _is_part(stored) else aliases


def _is_part(stored: fx.Node) -> bool:
    """Whether a stored tensor is what our ops rebuild a weight from."""
    targets = [user.target for user in stored.users]
    names = [str(getattr(target, "_opname", "")) for target in targets]
    is_own = all(getattr(target, "namespace", "") == "graphwright" for target in targets)
    return is_own and all(name.startswith(("dequantize", "expand", "add_low")) for name in names)
