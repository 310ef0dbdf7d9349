"""search.pooling: where a convolutional network makes its image smaller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.context import Context
from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError
from graphwright.ir.graph.digest import digest
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.checkpoint import Checkpoint, make_key
from graphwright.ir.work import Load, Work
from graphwright.passes.base import Action, Pass, Result
from graphwright.passes.search._pooling.places import find_places, paths, restrided
from graphwright.passes.search._pooling.supernets import Schedule, Supernets, fresh_weights, split


class PoolingOptions(Bounded):
    """Options of search.pooling."""

    targets: Selector = ("*",)
    """Convolutions that may halve the image: selector patterns over names and kinds. Of a residual
    block the one that halves now counts, else the first that sees neighbours."""

    models: Annotated[int, Field(ge=1)] = 4
    """Sets of weights that judge; 1 is a plain supernet with one."""

    epochs: Annotated[int, Field(ge=1)] = 100
    """Epochs of the search."""

    lr: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate of the search at its beginning."""

    lr_end: Annotated[float, Field(ge=0)] = 1e-3
    """Learning rate at the end of its cosine."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the search's SGD."""

    candidates: Annotated[int, Field(ge=1)] = 50
    """Best placements by their scores that are judged once more, on all validation data."""

    scratch: bool = True
    """Whether weights begin at random, in the search and in the training behind it. Else they begin
    as they are."""

    tune: TuneOptions = TuneOptions(epochs=100, optimizer="sgd", lr=0.1, min_lr=1e-3)
    """Options of the training of the network that was found, on all data."""


class Pooling(Pass[PoolingOptions]):
    """Moves the strides of a network to where they serve best, and trains it.

    As many convolutions halve the image as before, at places that a search chooses; channels stay.
    Several sets of weights are trained for all placements at once: each placement is drawn to one
    of them, the more surely the better it did there, while all are kept equally busy, so that
    placements which need different weights do not spoil each other's judgement. The placements of
    the best scores are judged on all validation data, and the winner is trained from the beginning.
    The result is an ordinary convolutional network. Half of the training batches are for validation
    during the search.

    Source: Javan et al. 2023, "Balanced Mixture of SuperNets for Learning the CNN Pooling
    Architecture" (P13), and its code. Norms keep their factors, which the code leaves out.
    """

    contract = "lossy"
    needs = "training"
    weights = "trained"
    papers = ("P13",)
    before = ("quantize.*", "adapt.*", "prune.*")
    computes_in = ("float64", "float32")

    def cost(self, load: Load) -> Work:
        # the search trains on one half of the batches, and runs the other half
        searched = load.training_steps(TuneOptions(epochs=self.options.epochs), load.training)
        judged = load.forward(load.training).times(self.options.candidates / 2)
        return super().cost(load) + searched + judged

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        places = find_places(program, o.targets)
        every = paths(places)
        for path in every:  # all of them, before any work: one that does not fit is refused
            restrided(program, places, path, self.id)
        training, validation = split(self._labelled(program, context))
        schedule = Schedule(o.models, o.epochs, o.lr, o.lr_end, o.momentum)
        nets = Supernets(program.eval(), places, every, training, validation, schedule,
                         context.within("search"), scratch=o.scratch)  # fmt: skip
        nets.run(self._checkpoint(program, context))
        best = nets.scores.max(1).values
        ranked = best.argsort(descending=True, stable=True)[: o.candidates].tolist()
        judged = {path: nets.accuracy(path) for path in ranked}
        winner = max(ranked, key=lambda path: (judged[path], float(best[path])))
        found = restrided(program, places, every[winner], self.id)
        if o.scratch:
            found = _with(found, fresh_weights(found, context.generator("retrained")))
        tuned = tune(found, context.training_data, o.tune, context)
        actions = [_action(place.name, place.halves, bool(bit))
                   for place, bit in zip(places, every[winner], strict=True)]  # fmt: skip
        metrics = {
            "placements": float(len(every)), "score": float(best[winner]),
            "score_of_given": float(best[0]), "validation_accuracy": judged[winner],
            "last_loss": tuned.history.losses[-1],
        }  # fmt: skip
        return Result(tuned.program, tuple(actions), metrics)

    def _labelled(self, program: Program, context: Context) -> Iterator[Mapping[str, Tensor]]:
        for inputs, labels in as_batches(context.training_data, program.signature).labelled():
            if labels is None or labels.is_floating_point():
                raise ArgumentError(
                    f"{self.id} judges networks by their accuracy, and the training data has no "
                    "class labels", fix="Add a `labels` column of integers.",
                )  # fmt: skip
            yield {**inputs, "labels": labels}

    def _checkpoint(self, program: Program, context: Context) -> Checkpoint:
        key = make_key(
            run=context.key, program=digest(program), seed=context.seed, scope=context.scope,
            options=self.options.model_dump(mode="json"),
        )  # fmt: skip
        stem = f"search-{make_key(scope=context.scope)[:12]}"
        return Checkpoint(context.work, stem, key, context.checkpoint_seconds, context.warn)


def _with(program: Program, values: Mapping[str, Tensor]) -> Program:
    state = {**program.state, **{n: nn.Parameter(t) for n, t in values.items()}}
    return program.replace(state=state)


def _action(name: str, before: bool, after: bool) -> Action:
    if before == after:
        return Action.left(name, "its stride is 2 as before" if after else "its stride stays 1")
    return Action(name, "halves the image now" if after else "no longer halves the image")
