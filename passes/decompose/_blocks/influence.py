"""Blocks of a transformer in a graph, and how much each turns what it is given.

Source: Men et al. 2024, "ShortGPT", section 2.2: block influence, one minus the cosine of the
hidden state in front of a block and behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graphwright.ir.calibration.observe import Several, observe
from graphwright.ir.context import Batch
from graphwright.ir.graph.constants import constant_nodes
from graphwright.ir.graph.nodes import VIEWS, op_name
from graphwright.ir.layers.kinds import matrix_product
from graphwright.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Join:
    """The sum by which a part enters the residual stream: what it is added to, and the sum."""

    residual: fx.Node
    result: fx.Node


def join(program: Program, node: fx.Node) -> Join | None:
    """Where what a layer gives is added to the residual stream; None when it is not."""
    constant = constant_nodes(program.graph)
    inside = {node}
    current = node.next
    while current.op != "output":
        operands = set(current.all_input_nodes)
        if operands & inside and isinstance(current.meta.get("val"), Tensor):
            others = [o for o in operands - inside if o not in constant and _is_hidden(o, node)]
            is_sum = current.target is aten.add.Tensor and len(operands & inside) == 1
            if is_sum and others and not _is_product(others[0]):
                return Join(others[0], current)
            if matrix_product(current) is not None:
                return None
            inside.add(current)
        current = current.next
    return None


def _is_hidden(other: fx.Node, node: fx.Node) -> bool:
    mine, value = node.meta["val"], other.meta.get("val")
    return isinstance(value, Tensor) and value.shape[-1:] == mine.shape[-1:] and value.dim() > 1


def _is_product(node: fx.Node) -> bool:
    """Whether a value is that of another layer, as in blocks whose parts are side by side."""
    while node.op == "call_function" and matrix_product(node) is None:
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or op_name(node) not in VIEWS:
            return False
        node = first
    return node.op == "call_function"


@dataclass
class Influence:
    """Sum over tokens of the cosine of two hidden states."""

    total: float = 0.0
    tokens: int = 0
    waiting: list[Tensor] = field(default_factory=list)

    def value(self) -> float:
        """One minus the mean cosine."""
        return 1 - self.total / max(1, self.tokens)


@dataclass(frozen=True)
class _Entering:
    of: Influence

    def update(self, x: Tensor) -> None:
        self.of.waiting.append(x.reshape(-1, x.shape[-1]))


@dataclass(frozen=True)
class _Leaving:
    of: Influence

    def update(self, x: Tensor) -> None:
        before = self.of.waiting.pop()
        after = x.reshape(-1, x.shape[-1])
        cosine = torch.nn.functional.cosine_similarity(before.double(), after.double())
        self.of.total += float(cosine.sum())
        self.of.tokens += len(cosine)


def influences(
    program: Program, joins: Sequence[tuple[Join, Join]], batches: Iterable[Batch]
) -> list[float]:
    """The influence of every block, on real tokens.

    Args:
        program: the program.
        joins: of its first and its last part.
        batches: calibration data.
    """
    found = [Influence() for _ in joins]
    observers: dict[str, list[_Entering | _Leaving]] = {}
    for influence, (first, last) in zip(found, joins, strict=True):
        observers.setdefault(last.result.name, []).append(_Leaving(influence))
        observers.setdefault(first.residual.name, []).append(_Entering(influence))
    several = {name: Several(*each) for name, each in observers.items()}
    observe(program, several, batches, padding=False)
    return [each.value() for each in found]
