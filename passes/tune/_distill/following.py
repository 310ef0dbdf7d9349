"""Teachers at work: run once for every batch, for the loss and for the hooks that look at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from graphwright.ir.program import Program
from graphwright.ir.tune.features import reading
from graphwright.ir.tune.hooks import Hook, Moment, Values
from graphwright.ir.tune.losses import Flat, Loss, main_output, relative_difference, wide
from graphwright.ir.tune.working import frozen
from graphwright.passes.tune._distill.distances import mean_probabilities, soft_labels
from graphwright.passes.tune._distill.pairs import Compared

Match = Literal["soft_labels", "mse"]


@dataclass(frozen=True)
class Taught:
    """What the teachers give for a batch.

    Attributes:
        outputs: the main output of each, in float32 at least.
        inside: the first one's values at the nodes that were asked for, by name.
    """

    outputs: list[Tensor]
    inside: Mapping[str, Tensor]


class Teaching:
    """Runs the teachers on a batch, once."""

    def __init__(
        self, teachers: Sequence[Program], nodes: Sequence[str], device: torch.device
    ) -> None:
        """
        Args:
            teachers: take the same inputs; they are no part of the training, so that their norms
                stay as they are.
            nodes: names of nodes of the first one whose values are asked for.
            device: where they run.
        """
        signature = teachers[0].signature
        self.inputs = [spec.name for spec in signature.inputs]
        self.nodes = tuple(dict.fromkeys(nodes))
        self.mains = [main_output(teacher.signature) for teacher in teachers]
        self._first = reading(frozen(teachers[0], device), self.nodes)
        self._others = [frozen(teacher, device) for teacher in teachers[1:]]
        self._batch: Values | None = None
        self._taught = Taught([], {})

    @torch.no_grad()
    def __call__(self, batch: Values) -> Taught:
        """What they give for a batch; the last one's is kept."""
        if batch is not self._batch:
            inputs = tuple(batch[name] for name in self.inputs)
            *inside, flat = self._first(*inputs)
            all_flat = [flat, *(other.run_flat(inputs) for other in self._others)]
            outputs = [wide(f[main]) for f, main in zip(all_flat, self.mains, strict=True)]
            self._taught = Taught(outputs, dict(zip(self.nodes, inside, strict=True)))
            self._batch = batch
        return self._taught


def following(
    teaching: Teaching, main: int, match: Match, temperature: float,
    output: float, labels: float, on_labels: Loss | None,
) -> Loss:  # fmt: skip
    """The loss `output` * distance from the teachers' outputs + `labels` * loss on labels.

    Args:
        teaching: the teachers.
        main: index of the output that is compared.
        match: `soft_labels`, or `mse`, the relative squared difference from the teachers' mean.
        temperature: of soft labels.
        output: factor of the distance.
        labels: factor of the loss on labels.
        on_labels: that loss; None where its factor is 0.
    """

    def loss(flat: Flat, batch: Mapping[str, Tensor]) -> Tensor:
        own, mask = wide(flat[main]), batch.get("attention_mask")
        total = own.new_zeros(())
        if output:
            outputs = teaching(batch).outputs
            if match == "mse":
                near = relative_difference(own, torch.stack(outputs).mean(0), mask)
            else:
                near = soft_labels(own, mean_probabilities(outputs, temperature), temperature, mask)
            total = total + output * near
        if on_labels is not None:
            total = total + labels * on_labels(flat, batch)
        return total

    return loss


class Inside(Hook):
    """Adds to the loss how far values inside are from the teacher's: factor * mean over places."""

    counts_on_last_step = False

    def __init__(self, teaching: Teaching, groups: Sequence[tuple[float, Sequence[Compared]]]):
        """
        Args:
            teaching: the teachers.
            groups: places, and the factor of their mean distance.
        """
        self.teaching, self.groups = teaching, tuple(groups)
        self.seen: dict[int, tuple[Tensor, ...]] = {}

    def on_graph(self, graph: fx.Graph) -> None:
        nodes = {node.name: node for node in graph.nodes}
        order = {name: number for number, name in enumerate(nodes)}
        for number, place in enumerate(self._places()):
            last = max(place.own, key=order.__getitem__)
            with graph.inserting_after(nodes[last]):
                graph.call_function(self._note(number), tuple(nodes[name] for name in place.own))

    def also_run(self, at: Moment, batch: Values) -> Sequence[Values]:
        self.seen.clear()
        return ()

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        inside, mask, number = self.teaching(batch).inside, batch.get("attention_mask"), 0
        for factor, places in self.groups:
            distances = []
            for place in places:
                theirs = [inside[name] for name in place.theirs]
                distances.append(place.distance(self.seen[number], theirs, mask))
                number += 1
            loss = loss + factor * torch.stack(distances).mean()
        return loss

    def _places(self) -> list[Compared]:
        return [place for _, places in self.groups for place in places]

    def _note(self, number: int) -> Callable[..., None]:
        def note(*values: Tensor) -> None:
            self.seen.setdefault(number, values)  # of the first run, that of the batch

        note.__name__ = f"note_{number}"
        return note
