"""Hooks: the places at which a recipe acts on the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """The state of the loop at a hook.

    Attributes:
        step: optimizer steps done so far; the one under way has this number, counted from 0.
        total: steps that there will be at most.
        micro: batch within the step, counted from 0; the last is `accumulate` - 1.
        parameters: the live parameters in training, by name.
        optimizer: the live optimizer.
        is_training: whether the values are for a training step; else for an evaluation.
        also: outputs on the batches that the hook asked for (`also_run`), in the model's own
            structure; there in `on_loss`.
    """

    step: int
    total: int
    micro: int
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    is_training: bool = True
    also: tuple[Any, ...] = ()


class Hook:
    """Does nothing; a recipe overrides what it needs. Several are called in the order given.

    In every batch: `on_batch`, `also_run`, `on_parameters` and a forward pass (for the batch, and
    once more for every other one that is asked for), `on_loss`, `before_backward`,
    `after_backward`.
    After the last batch of a step: clipping, `before_step`, the optimizer's step, `after_step`.
    What a hook writes, it writes under `torch.no_grad()` and in place.

    Attributes:
        counts_steps: whether what it does is spread over `Moment.total` steps, so that a run must
            not end in fewer.
        counts_on_last_step: whether it needs the values of the last step (a mask that closes, a
            penalty that rises), which an average over steps (`ema`) is not.
    """

    counts_steps: bool = False
    counts_on_last_step: ClassVar[bool] = True

    def own(self) -> Mapping[str, nn.Parameter]:
        """Parameters of the recipe's own, trained along with the program's: by names that are not
        the program's. They are the hook's objects, which it reads when training is over; they are
        in checkpoints, and have no part in the resulting program.
        """
        return {}

    def on_graph(self, graph: fx.Graph) -> None:
        """Called once with the graph that is trained, which it may rewrite in place.

        Evaluations and the result keep the program's own graph.
        """

    def on_parameters(self, at: Moment, values: Values) -> Values:
        """Values that the forward pass uses instead of the parameters: masked or noisy ones, say.

        Gradients flow through it to the parameters. Other tensors of the program may be given by
        name too. Evaluations use it too; the result holds the parameters themselves, and the recipe
        says what becomes of them.

        Args:
            at: where the loop stands.
            values: parameters by name, or what the hook before made of them; not to be changed.
        """
        return values

    def on_batch(self, at: Moment, batch: Values) -> Values:
        """The batch that the step trains on: the one that was read, or one made from it.

        Args:
            at: where the loop stands.
            batch: inputs by name, and `labels` if there are any; not to be changed.
        """
        return batch

    def also_run(self, at: Moment, batch: Values) -> Sequence[Values]:
        """Further batches that the program runs on in this step: the same once more (dropout and
        `on_parameters` draw anew), or inputs made from it.

        `on_loss` finds the outputs in `at.also`, and gradients flow through all of them. The loss
        that it is given is that of `batch` alone.

        Args:
            at: where the loop stands.
            batch: inputs by name, and `labels` if there are any.

        Returns:
            Inputs by name, one mapping for every further run.
        """
        return ()

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        """The loss to minimize; by default the scalar it is given.

        Args:
            at: where the loop stands.
            loss: mean over the batch.
            outputs: of the program, in the model's own structure.
            batch: inputs by name, and `labels` if there are any.
        """
        return loss

    def before_backward(self, at: Moment, loss: Tensor) -> None:
        """Called with the final loss of a batch."""

    def after_backward(self, at: Moment) -> None:
        """Called when the gradients of a batch have been added to those of the step."""

    def before_step(self, at: Moment) -> None:
        """Called before the optimizer's step: gradients are averaged and clipped, `lr` is set."""

    def after_step(self, at: Moment) -> None:
        """Called after the optimizer's step, with the gradients still there."""

    def keep_best(self) -> None:
        """Called when an evaluation is the best so far, and the result may be that of it."""

    def restore_best(self) -> None:
        """Called at the end, when the parameters are again those of the best evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """State that must survive a kill: tensors, numbers, texts, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


class Hooks(Hook):
    """Several hooks as one, in order."""

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self.hooks = tuple(hooks)
        self._asked = [0] * len(self.hooks)

    def own(self) -> Mapping[str, nn.Parameter]:
        return {name: value for hook in self.hooks for name, value in hook.own().items()}

    def on_graph(self, graph: fx.Graph) -> None:
        for hook in self.hooks:
            hook.on_graph(graph)

    def on_parameters(self, at: Moment, values: Values) -> Values:
        for hook in self.hooks:
            values = hook.on_parameters(at, values)
        return values

    def on_batch(self, at: Moment, batch: Values) -> Values:
        for hook in self.hooks:
            batch = hook.on_batch(at, batch)
        return batch

    def also_run(self, at: Moment, batch: Values) -> list[Values]:
        asked = [list(hook.also_run(at, batch)) for hook in self.hooks]
        self._asked = [len(batches) for batches in asked]
        return [more for batches in asked for more in batches]

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        start = 0
        for hook, count in zip(self.hooks, self._asked, strict=True):
            own = replace(at, also=at.also[start : start + count])
            loss, start = hook.on_loss(own, loss, outputs, batch), start + count
        return loss

    def before_backward(self, at: Moment, loss: Tensor) -> None:
        for hook in self.hooks:
            hook.before_backward(at, loss)

    def after_backward(self, at: Moment) -> None:
        for hook in self.hooks:
            hook.after_backward(at)

    def before_step(self, at: Moment) -> None:
        for hook in self.hooks:
            hook.before_step(at)

    def after_step(self, at: Moment) -> None:
        for hook in self.hooks:
            hook.after_step(at)

    def keep_best(self) -> None:
        for hook in self.hooks:
            hook.keep_best()

    def restore_best(self) -> None:
        for hook in self.hooks:
            hook.restore_best()

    def state_dict(self) -> dict[str, Any]:
        return {str(index): hook.state_dict() for index, hook in enumerate(self.hooks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, hook in enumerate(self.hooks):
            hook.load_state_dict(state[str(index)])
