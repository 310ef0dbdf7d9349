"""A trunk of blocks in modules, and networks in which one module is another's."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.program import Program
from graphwright.ir.signature import leaf_of
from graphwright.ir.tune.features import reading
from graphwright.ir.tune.hooks import Hook, Moment, Values
from graphwright.ir.tune.losses import main_output, wide
from graphwright.passes.resize._units.units import Unit, blocks, find_units, without

BATCH_NORM = torch.ops.aten.batch_norm.default
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")


@dataclass(frozen=True)
class Trunk:
    """A program's blocks in consecutive modules.

    Attributes:
        program: the whole program, the teacher.
        modules: the blocks of every module, each a tuple of units.
        owner: the module that every stored tensor belongs to, by name: that of the node which reads
            it first. What is in front of the blocks is of the first, what is behind them of the
            last.
    """

    program: Program
    modules: tuple[tuple[tuple[Unit, ...], ...], ...]
    owner: Mapping[str, int]

    def reduced(self, depths: Sequence[int], by: str) -> Program:
        """The program with so many blocks in every module, evenly spread, the first among them."""
        gone: list[Unit] = []
        for module, depth in zip(self.modules, depths, strict=True):
            kept = spread(len(module), depth)
            gone += [u for i, block in enumerate(module) if i not in kept for u in block]
        return without(self.program, gone, by)

    def hybrid(self, meta: Program, place: int, depth: int, meta_depth: int, by: str) -> Program:
        """The meta model with the teacher's module of a depth in one place."""
        depths = [meta_depth] * len(self.modules)
        depths[place] = depth
        graph = self.reduced(depths, by)
        state = {
            name: tensor if self.owner[name] == place else meta.state[name]
            for name, tensor in graph.state.items()
        }
        return graph.replace(state=state)

    def names(self, program: Program, place: int) -> list[str]:
        """Tensors of a program that belong to a module."""
        return [name for name in program.state if self.owner[name] == place]


def spread(count: int, kept: int) -> list[int]:
    """`kept` of `count` places, evenly spread, the first among them."""
    return sorted({number * count // kept for number in range(min(kept, count))})


def split_trunk(program: Program, count: int) -> Trunk:
    """The blocks of a program in `count` modules of as equal lengths as possible.

    Raises:
        ModelError: there are fewer blocks.
    """
    found = [tuple(units) for units in blocks(find_units(program)).values()]
    if len(found) < count:
        raise ModelError(
            f"{count} modules need as many blocks of residual units; the program has {len(found)}",
            fix="Lower modules.",
        )
    edges = [number * len(found) // count for number in range(count + 1)]
    modules = tuple(tuple(found[a:b]) for a, b in itertools.pairwise(edges))
    order = {node.name: number for number, node in enumerate(program.graph.nodes)}
    ends = [order[module[-1][-1].join] for module in modules[:-1]]
    owner: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            first = min((order[user.name] for user in node.users), default=0)
            owner[str(node.target)] = sum(first > end for end in ends)
    return Trunk(program, modules, owner)


class Slot(Hook):
    """Trains the module in one place of the meta model to imitate the teacher's in that place.

    (1 - alpha) loss + alpha t^2 / (rows * classes) * sum of KL(teacher || student), at temperature
    t.
    The rest of the meta model runs as in inference: its norms and dropouts are switched off, and
    gradients pass through it.

    Source: P44 (Lo et al. 2024, "m2mKD"), whose mean is over all logits, as in the released code.
    """

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
