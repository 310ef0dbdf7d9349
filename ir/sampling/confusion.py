"""Guidance away from the class that a sample is taken for (P73), out of a classifier's logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor

Measure = Literal["missing", "against_reference"]


class Confusion(nn.Module):
    """The class that every sample is most confused with, and how much.

    Args:
        measure: `missing`, 1 - p_c; `against_reference`, p_ref / (p_c + p_ref).
    """

    def __init__(self, measure: Measure) -> None:
        super().__init__()
        self.measure = measure

    def forward(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """(reference [batch] in the labels' dtype, confusion [batch] in 0..1).

        Args:
            logits: [batch, classes].
            label: [batch], the class that was asked for.
        """
        share = logits.softmax(1)
        own = torch.arange(logits.shape[1], device=logits.device)[None] == label[:, None]
        asked = torch.where(own, share, torch.zeros_like(share)).sum(1)
        rest = torch.where(own, -torch.ones_like(share), share)  # its own class is never taken
        reference = rest.argmax(1).to(label.dtype)
        if self.measure == "missing":
            return reference, 1 - asked
        largest = rest.amax(1)
        return reference, largest / (asked + largest).clamp_min(1e-30)


class AwayFromReference(nn.Module):
    """D and E led away from another class, the further the more confused the sample is."""

    def forward(
        self, data: Tensor, other: Tensor, noise: Tensor, other_noise: Tensor,
        confusion: Tensor, most: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(D, E).

        Args:
            data, noise: of the class that was asked for, [batch, ...].
            other, other_noise: of the reference.
            confusion: [batch] in 0..1.
            most: scale where it is 1; where it is 0, the scale is 1, which is no guidance.
        """
        scale = (1 + (most - 1) * confusion).reshape(-1, *[1] * (data.dim() - 1))
        return other + scale * (data - other), other_noise + scale * (noise - other_noise)


def again(
    editor: Editor, changed: Mapping[fx.Node, fx.Node], wanted: Sequence[fx.Node], before: fx.Node
) -> list[fx.Node]:
    """The values of `wanted` with other nodes in the place of some, from the same tensors.

    Calls that depend on none of those are shared.

    Args:
        editor: of the program.
        changed: other nodes by the nodes that they stand for.
        wanted: what to compute again.
        before: node to insert before.
    """
    known: dict[fx.Node, fx.Node] = dict(changed)
    for node in list(editor.graph.nodes):
        if node in wanted and all(each in known for each in wanted):
            break
        if node.op == "call_function" and any(each in known for each in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known.get(n, n))
            known[node] = editor.call(node.target, *args, before=before, like=node, **kwargs)
    return [known.get(node, node) for node in wanted]
