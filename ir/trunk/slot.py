"""The training of a module in its place of a frozen network."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphwright.ir.graph.nodes import op_name
from graphwright.ir.program import Program
from graphwright.ir.signature import leaf_of
from graphwright.ir.tune.features import reading
from graphwright.ir.tune.hooks import Hook, Moment, Values
from graphwright.ir.tune.losses import main_output, wide

BATCH_NORM = torch.ops.aten.batch_norm.default
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")


class Slot(Hook):
    """Trains the module in one place of the meta model to imitate the teacher's in that place.

    (1 - alpha) loss + alpha t^2 / (rows * classes) * sum of KL(teacher || student), at temperature
    t.
    The rest of the meta model runs as in inference: its norms and dropouts are switched off, and
    gradients pass through it.

    Source: P44 (Lo et al. 2024, "m2mKD"), whose mean is over all logits, as in the released code.
    """

    counts_on_last_step = False

    def __init__(
        self, teacher: Program, own: Collection[str], alpha: float, temperature: float
    ) -> None:
        self.alpha, self.temperature = alpha, temperature
        self.tensors = frozenset(own)
        self.structure = teacher.signature.structure
        self.teach = reading(teacher.eval(), ())
        self.main = main_output(teacher.signature)
        self.inputs = [spec.name for spec in teacher.signature.inputs]

    def on_graph(self, graph: fx.Graph) -> None:
        behind: set[fx.Node] = set()
        for node in graph.nodes:
            reads = {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
            within = bool(reads & self.tensors)
            if within or (not reads and any(n in behind for n in node.all_input_nodes)):
                behind.add(node)
            elif node.target is BATCH_NORM and isinstance(node.args[3], fx.Node):
                node.args = (*node.args[:5], False, *node.args[6:])
            if node not in behind and op_name(node) in DROPOUTS:
                node.args = (*node.args[:2], False)

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        own = wide(leaf_of(self.structure, outputs, self.main))
        with torch.no_grad():
            flat = self.teach(*(batch[name] for name in self.inputs))[-1]
        return (1 - self.alpha) * loss + self.alpha * imitation(
            own, wide(flat[self.main]), self.temperature
        )


def imitation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """t^2 times the mean over all logits of the terms of KL(teacher || student)."""
    divergence = F.kl_div(
        F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1),
        reduction="sum", log_target=True,
    )  # fmt: skip
    return divergence * (temperature**2 / student.numel())
