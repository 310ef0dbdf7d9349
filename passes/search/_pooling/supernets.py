"""Several sets of weights that are trained for all placements of strides at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from graphwright.ir.context import Context
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.kinds import NORMS
from graphwright.ir.layers.selectors import layers
from graphwright.ir.mode import NORMS as BATCH_NORMS
from graphwright.ir.program import Program
from graphwright.ir.tune.checkpoint import Checkpoint
from graphwright.ir.tune.losses import main_output
from graphwright.passes.search._pooling.balance import balanced, divided, mixture
from graphwright.passes.search._pooling.places import Path, Place, restrided

Labelled = Mapping[str, Tensor]

TEMPERATURES = (1.0, 100.0)
"""Of the softmax over models, from the first epoch to the last (P13, the code)."""

KEPT = 0.95
"""Share of a score that stays when a path has been judged once more (P13, the code)."""

IGNORED = -100
"""Label that does not count."""


@dataclass(frozen=True)
class Schedule:
    """How the sets of weights are trained.

    Attributes:
        models: sets of weights.
        epochs: of the training batches.
        lr, lr_end: learning rate at the beginning, and at the end of its cosine.
        momentum: of SGD.
    """

    models: int
    epochs: int
    lr: float
    lr_end: float
    momentum: float


class Supernets:
    """The search and its state.

    In every step one path is drawn evenly, one of the models by the balanced mixture for it, and
    that model takes a step of SGD on a training batch; then the path's score with that model moves
    towards its accuracy on one validation batch. Norms use the statistics of their batch, because
    those of one path are wrong for another.

    Args:
        program: in inference mode.
        places, paths: where strides may be.
        training, validation: batches with `labels`.
        schedule: of the training.
        context: seed, device, progress.
        scratch: whether weights begin at random, or as they are.
    """

    def __init__(
        self, program: Program, places: Sequence[Place], paths: Sequence[Path],
        training: Sequence[Labelled], validation: Sequence[Labelled], schedule: Schedule,
        context: Context, *, scratch: bool,
    ) -> None:  # fmt: skip
        self.program, self.places, self.paths = program, places, paths
        self.training, self.validation = training, validation
        self.schedule, self.context = schedule, context
        self.output = main_output(program.signature)
        self.names = [spec.name for spec in program.signature.inputs]
        self.scores = torch.ones(len(paths), schedule.models, dtype=torch.float64)
        self.weights = [
            {n: nn.Parameter(t.clone()) for n, t in self._start(number, scratch).items()}
            for number in range(schedule.models)
        ]
        self.optimizers = [torch.optim.SGD(w.values(), schedule.lr, momentum=schedule.momentum)
                           for w in self.weights]  # fmt: skip
        self.step = 0
        self._modules: dict[tuple[int, bool], fx.GraphModule] = {}
        self._uses: list[Tensor] = []

    def run(self, checkpoint: Checkpoint) -> None:
        """Trains to the end."""
        self._load(checkpoint.load())
        each = len(self.training)
        total = each * self.schedule.epochs
        while self.step < total:
            epoch, place = divmod(self.step, each)
            if place == 0:
                _, self._uses = balanced(mixture(self.scores, self._temperature(epoch)))
            loss = self._one_step(epoch, self._order(epoch)[place], total)
            self.step += 1
            if checkpoint.is_due:
                checkpoint.save(self._state())
            self.context.progress(f"loss {loss:.4g}", self.step, total)
        checkpoint.save(self._state())

    def accuracy(self, path: int) -> float:
        """Of a path, with the model of its best score, over all validation batches."""
        model = int(self.scores[path].argmax())
        right = [self._right(path, model, batch) for batch in self.validation]
        return sum(r for r, _ in right) / max(1, sum(n for _, n in right))

    def _order(self, epoch: int) -> list[int]:
        """The order of an epoch's batches."""
        generator = self.context.generator("order", epoch)
        return torch.randperm(len(self.training), generator=generator).tolist()

    def _temperature(self, epoch: int) -> float:
        low, high = TEMPERATURES
        return low + (high - low) * epoch / max(1, self.schedule.epochs - 1)

    def _one_step(self, epoch: int, index: int, total: int) -> float:
        generator = self.context.generator("step", self.step)
        path = int(torch.randint(len(self.paths), (), generator=generator))
        parts = divided(mixture(self.scores, self._temperature(epoch)), self._uses)
        model = int(torch.multinomial(parts[path], 1, generator=generator))
        optimizer = self.optimizers[model]
        low, high = self.schedule.lr_end, self.schedule.lr
        for group in optimizer.param_groups:
            group["lr"] = low + (high - low) * (1 + math.cos(math.pi * self.step / total)) / 2
        optimizer.zero_grad()
        torch.manual_seed(generator.initial_seed())  # dropout
        batch = self.training[index]
        logits = self._logits(path, model, batch, training=True)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, -2), batch["labels"].flatten(), ignore_index=IGNORED
        )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(f"the loss is {value} in step {self.step}", fix="Lower `lr`.")
        loss.backward()
        optimizer.step()
        right, count = self._right(path, model, self.validation[self.step % len(self.validation)])
        self.scores[path, model] *= KEPT
        self.scores[path, model] += (1 - KEPT) * right / max(1, count)
        return value

    def _right(self, path: int, model: int, batch: Labelled) -> tuple[int, int]:
        """Right answers, and how many questions there were."""
        with torch.no_grad():
            found = self._logits(path, model, batch, training=False).argmax(-1)
        counts = batch["labels"] != IGNORED
        return int((found == batch["labels"])[counts].sum()), int(counts.sum())

    def _logits(self, path: int, model: int, batch: Labelled, *, training: bool) -> Tensor:
        module = self._module(path, training)
        inputs = tuple(batch[name] for name in self.names)
        weights: dict[str, Tensor] = dict(self.weights[model])
        found: Tensor = functional_call(module, weights, inputs)[self.output]
        return found

    def _module(self, path: int, training: bool) -> fx.GraphModule:
        if (path, training) not in self._modules:
            base = self._training if training else self._judging
            made = restrided(base, self.places, self.paths[path], "search.pooling")
            self._modules[path, training] = made.module
        return self._modules[path, training]

    @cached_property
    def _training(self) -> Program:
        return with_batch_statistics(self.program.train())

    @cached_property
    def _judging(self) -> Program:
        return with_batch_statistics(self.program)

    def _start(self, number: int, scratch: bool) -> dict[str, Tensor]:
        if scratch:
            return fresh_weights(self.program, self.context.generator("weights", number))
        return {name: p.detach() for name, p in self.program.trainable().items()}

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step, "scores": self.scores, "uses": self._uses,
            "weights": [{n: p.detach() for n, p in w.items()} for w in self.weights],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }  # fmt: skip

    def _load(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self.step, self.scores, self._uses = state["step"], state["scores"], list(state["uses"])
        with torch.no_grad():
            for weights, kept in zip(self.weights, state["weights"], strict=True):
                for name, parameter in weights.items():
                    parameter.copy_(kept[name])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)


def with_batch_statistics(program: Program) -> Program:
    """The program whose norms over batches use the statistics of the batch, and keep none."""
    editor = Editor(program, by="search.pooling")
    for node in editor.graph.nodes:
        if node.op == "call_function" and node.target in BATCH_NORMS:
            args = [*node.args]
            args[3:6] = [None, None, True]
            editor.set_args(node, *args, **dict(node.kwargs))
    return editor.finish(propagate=False)


def fresh_weights(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """Random values for all that can be trained: uniform by the number of inputs as torch's own
    layers begin, ones for the factors of norms, zeros for all other vectors."""
    factors = {layer.weight for layer in layers(program, NORMS)}
    found = {}
    for name, parameter in program.trainable().items():
        value = torch.zeros_like(parameter)
        if name in factors:
            value.fill_(1.0)
        elif parameter.dim() > 1:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        found[name] = value
    return found


def split(batches: Iterator[Labelled]) -> tuple[list[Labelled], list[Labelled]]:
    """Every other batch for training, the rest for validation: half of the data each.

    Raises:
        ArgumentError: there are no two batches.
    """
    every = list(batches)
    if len(every) < 2:
        raise ArgumentError(
            "half of the training data is for training and half for validation, and there is one "
            "batch", fix="Give more data, or a smaller batch_size.",
        )  # fmt: skip
    return every[::2], every[1::2]
