"""tune.adaptive_mix: features of a mix of two inputs are drawn to the mix of their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Hook, Moment, OwnLoss, tune
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import cross_entropy, main_of, wide
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._features.place import embedding_of
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of

Distance = Literal["mse", "cosine"]


class AdaptiveMixOptions(Bounded):
    """Options of tune.adaptive_mix."""

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer goes by its own name."""

    features: str | None = None
    """The embedding: a layer, whose output it is, or a node. When absent, what the last layer
    reads."""

    alpha: Annotated[float, Field(gt=0)] = 1.0
    """Both parameters of the Beta distribution of the mixing share, one per batch."""

    noise: Annotated[float, Field(ge=0)] = 0.05
    """Standard deviation of the noise on the features that are aimed at."""

    shrink: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the distance of features."""

    distance: Distance = "mse"
    """Distance of features: mean squared difference, or minus the cosine of all features of a
    sample, which the paper takes for discriminators."""

    tune: OwnLoss = OwnLoss(
        optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="multistep",
        milestones=(0.3, 0.6, 0.8), gamma=0.2,
    )  # fmt: skip
    """Options of training; the labels are classes."""


class AdaptiveMix(Pass[AdaptiveMixOptions]):
    """Trains a classifier in a feature space that shrinks: what lies between two inputs is drawn to
    what lies between their features.

    With v the embedding, h the head, and m = c x + (1 - c) x' for two samples of a batch, features
    are mixed too: z = c v(x) + (1 - c) v(x'). Logits are h(z) + h(v(m)), and the loss is

        c CE(logits, y) + (1 - c) CE(logits, y') + shrink * distance(v(m), z + noise),

    with no gradient through the last argument. Every step runs the network twice. The paper's
    classifiers also have a frozen orthogonal head on normalized features, which is a matter of the
    model and not of this pass; for its discriminators there is the distance alone.

    Source: P03, equations of the classification task as released.
    """

    papers = ("P03",)
    contract = "lossy"
    needs = "training"
    before = ("quantize.*",)
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        """Trains under the mixed losses.

        Raises:
            ModelError: the features are no embedding, or an input is not of floating point.
            ArgumentError: there are no labels.
        """
        o = self.options
        node = embedding_of(program, o.features, self.id)
        for spec in program.signature.inputs:
            if not getattr(torch, spec.dtype).is_floating_point:
                raise ModelError(f"{self.id} mixes inputs, and {spec.name!r} is {spec.dtype}")
        data = as_batches(context.training_data, program.signature)
        if not data.has_labels:
            raise ArgumentError(f"{self.id} needs labels", where=data.source,
                                fix="Add an array named `labels`.")  # fmt: skip
        chosen = chosen_parameters(program, o.targets, self.id)
        mixing = Mixing(program, node.name, o.alpha, o.noise, o.shrink, o.distance)
        tuned = tune(program, data, o.tune, context, names=chosen.names,
                     hooks=[mixing, *training_hooks(program)])  # fmt: skip
        metrics = metrics_of(tuned.history) | {"last_distance": mixing.last_distance}
        return Result(tuned.program, tuple(chosen.actions(tuned)), metrics)


class Mixing(Hook):
    """Runs the head on mixed features, and the network on mixed inputs.

    Attributes:
        share: c, of the batch.
        order: the other sample of each.
        last_distance: of features, in the last step.
    """

    counts_on_last_step = False

    def __init__(
        self, program: Program, node: str, alpha: float, noise: float, shrink: float,
        distance: Distance,
    ) -> None:  # fmt: skip
        """
        Args:
            program: with embedding and head.
            node: name of the embedding.
            alpha: of the Beta distribution.
            noise: deviation.
            shrink: factor.
            distance: of features.
        """
        self.signature, self.node = program.signature, node
        self.inputs = [spec.name for spec in program.signature.inputs]
        self.beta = torch.distributions.Beta(alpha, alpha)
        self.noise, self.shrink, self.distance = noise, shrink, distance
        self.share, self.order = 1.0, torch.empty(0, dtype=torch.int64)
        self.last_distance = 0.0
        self._seen: list[Tensor] = []

    def on_graph(self, graph: fx.Graph) -> None:
        node = next(n for n in graph.nodes if n.name == self.node)
        with graph.inserting_after(node):
            cut = graph.call_function(self._cut, (node,))
        cut.meta = dict(node.meta)
        node.replace_all_uses_with(cut)
        cut.args = (node,)

    def also_run(self, at: Moment, batch: Values) -> Sequence[Values]:
        """The mixed inputs."""
        first = batch[self.inputs[0]]
        self.share = float(self.beta.sample())
        self.order = torch.randperm(len(first), device=first.device)
        self._seen.clear()
        return [{name: self._mixed(batch[name]) for name in self.inputs}]

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        logits = wide(main_of(self.signature, outputs)) + wide(main_of(self.signature, at.also[0]))
        labels = batch["labels"]
        own, other = (cross_entropy(logits, {"labels": of})
                      for of in (labels, labels[self.order]))  # fmt: skip
        between, inside = (wide(seen) for seen in self._seen[:2])
        distance = shrinkage(inside, between, self.noise, self.distance)
        self.last_distance = float(distance.detach())
        return loss + self.share * own + (1 - self.share) * other + self.shrink * distance

    def state_dict(self) -> dict[str, Any]:
        return {"last_distance": self.last_distance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_distance = state["last_distance"]

    def _mixed(self, x: Tensor) -> Tensor:
        return self.share * x + (1 - self.share) * x[self.order]

    def _cut(self, value: Tensor) -> Tensor:
        """In the run of the batch features are mixed; in the second they are looked at."""
        if not self._seen:
            if len(value) != len(self.order):
                raise ModelError(f"tune.adaptive_mix: the first axis of {self.node!r} is not the "
                                 f"batch: {len(value)} for {len(self.order)} samples")  # fmt: skip
            value = self._mixed(value)
        self._seen.append(value)
        return value


def shrinkage(inside: Tensor, between: Tensor, noise: float, distance: Distance) -> Tensor:
    """Distance of features of mixed inputs from mixed features, which take no gradient.

    Args:
        inside: v(m), (batch, ...).
        between: z, of the same shape.
        noise: deviation of what is added to z.
        distance: `mse`, or `cosine`: minus the cosine, a mean over samples.
    """
    aim = (between + noise * torch.randn_like(between)).detach()
    if distance == "cosine":
        return -F.cosine_similarity(inside.flatten(1), aim.flatten(1)).mean()
    return F.mse_loss(inside, aim)
