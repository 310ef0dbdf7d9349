"""tune.contrastive_sr: a super-resolver whose images are near sharp ones and far from blurred."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from graphwright.ir.data.batches import Batches, as_batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.options import Bounded, Rule, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Hook, Moment, tune
from graphwright.ir.tune.adversarial import critic_loss
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import main_of, main_output, wide
from graphwright.ir.tune.options import OwnLoss
from graphwright.ir.tune.player import Player, PlayerOptions, drawn_from
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of
from graphwright.passes.tune._images.bands import Embedding
from graphwright.passes.tune._images.contrast import cross_entropy_contrast, ratio_contrast
from graphwright.passes.tune._images.data import image_of
from graphwright.passes.tune._images.versions import degraded, sharpened

FORMS = {"cross_entropy": cross_entropy_contrast, "ratio": ratio_contrast}

Count = Annotated[int, Field(ge=0)]


class EmbeddingOptions(PlayerOptions):
    """Options of the embedding network and of its training."""

    width: Annotated[int, Field(ge=1)] = 64
    """Channels of its first convolution; the last one has eight times as many."""


class ContrastiveSrOptions(Bounded):
    """Options of tune.contrastive_sr."""

    rules = (
        Rule("pixel_range", "pixel_range[0] < pixel_range[1]", "pixel_range has to rise"),
    )  # fmt: skip

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer goes by its own name."""

    form: Literal["cross_entropy", "ratio"] = "cross_entropy"
    """Form of the contrast: `cross_entropy` of similarities, or `ratio` of distances from positives
    and negatives."""

    factor: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the contrast beside the mean absolute difference from the label."""

    positives: Count = 3
    """Sharpened versions of the label that are positives beside the label."""

    negatives: Count = 3
    """Blurred and noisy versions of the label that are negatives beside the enlarged input."""

    pixel_range: tuple[float, float] = (0.0, 1.0)
    """Least and largest pixel value of the images."""

    embedding: EmbeddingOptions = EmbeddingOptions(lr=1e-4, betas=(0.9, 0.999))
    """The network whose features are compared, and its training."""

    tune: OwnLoss = OwnLoss(optimizer="adam", lr=1e-4, schedule="step", step_share=0.5, gamma=0.5)
    """Options of training. Labels are the images that the network should give."""


class ContrastiveSr(Pass[ContrastiveSrOptions]):
    """Trains a super-resolver so that its images are nearer to sharp images than to blurred ones.

    Loss: mean |f(x) - y| + factor * L, with L a contrast of features: f(x) against positives, the
    label y and sharpened versions of it, and negatives, the input enlarged by bicubic interpolation
    and blurred versions of y with noise. The features are those of a discriminator on Haar
    high-pass bands, which learns along to tell y from f(x). It takes no gradient from the contrast,
    and its judgement has no part in the loss: the paper adds the adversarial loss for some results.

    It is a pass apart from `tune.contrastive`, whose samples are embeddings and whose references
    are the model as it was: here they are images made from labels.

    Released code does not always do what the paper says. Its embedding runs without gradients
    towards the network too, so that the contrast has no effect; here it has. Its motion blurs are
    kernels in files, lines of any angle here; it enlarges inputs with corners aligned, which moves
    them by part of a pixel, here they stay in place.

    Source: P31 (Wu et al., "PCL-SR"); forms of the contrast and numbers as in its released code.
    """

    papers = ("P31",)
    contract = "lossy"
    needs = "training"
    before = ("quantize.*",)
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        """Trains the network, and the embedding along.

        Raises:
            ModelError: the network does not make an image of as many channels out of an image.
            ArgumentError: labels are no images of the output's size, or beyond `pixel_range`.
        """
        name = image_of(program, self.id, "").name
        channels = program.signature.inputs[0].shape[1]
        output = program.signature.outputs[main_output(program.signature)].shape
        if len(output) != 4 or output[1] != channels or not isinstance(channels, int):
            raise ModelError(
                f"{self.id} trains networks that make an image of an image with as many channels; "
                f"this one makes {list(output)} of {list(program.signature.inputs[0].shape)}"
            )
        data = as_batches(context.training_data, program.signature)
        self._refuse_labels(program, data)
        chosen = chosen_parameters(program, self.options.targets, self.id)
        with drawn_from(context.generator("embedding")):
            embedding = Embedding(channels, self.options.embedding.width)
        recipe = Contrast(program, name, embedding, self.options, context.device)
        tuned = tune(program, data, self.options.tune, context, names=chosen.names,
                     hooks=[recipe, *training_hooks(program)])  # fmt: skip
        return Result(tuned.program, tuple(chosen.actions(tuned)), metrics_of(tuned.history))

    def _refuse_labels(self, program: Program, data: Batches) -> None:
        inputs, labels = next(iter(data.labelled()))
        if labels is None:
            raise ArgumentError(f"{self.id} needs labels, the images that the network should give",
                                where=data.source, fix="Add an array named `labels`.")  # fmt: skip
        with torch.no_grad():
            made = program.run_flat(tuple(inputs[s.name] for s in program.signature.inputs))
        shape = made[main_output(program.signature)].shape
        if labels.shape != shape or not labels.is_floating_point():
            raise ArgumentError(f"{self.id}: the network makes images {list(shape)}, and the "
                                f"labels are {labels.dtype} {list(labels.shape)}")  # fmt: skip
        least, largest = self.options.pixel_range
        low, high = float(labels.min()), float(labels.max())
        if low < least or high > largest:
            raise ArgumentError(
                f"{self.id}: labels go from {low:.4g} to {high:.4g}, beyond {least:g} to "
                f"{largest:g}", fix="Set `pixel_range`."
            )  # fmt: skip


class Contrast(Hook):
    """Makes the loss, and lets the embedding learn."""

    counts_on_last_step = False

    def __init__(
        self, program: Program, name: str, embedding: Embedding, options: ContrastiveSrOptions,
        device: torch.device,
    ) -> None:  # fmt: skip
        """
        Args:
            program: the network.
            name: of its input.
            embedding: with its first values.
            options: of the pass.
            device: of training.
        """
        self.signature, self.name, self.options = program.signature, name, options
        self.player = Player(embedding, options.embedding, options.tune, device)

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        made = wide(main_of(self.signature, outputs))
        label = batch["labels"].to(made)
        positives, negatives = self.versions(wide(batch[self.name]).to(made), label)
        with torch.enable_grad():
            embed = self.player.network
            self.player.learn(at, critic_loss(embed(label)[0], embed(made.detach())[0]))
        with self.player.fixed() as embed:
            _, own = embed(made)
            with torch.no_grad():
                better, worse = ([embed(x)[1] for x in some] for some in (positives, negatives))
        contrast = FORMS[self.options.form](own, better, worse)
        return loss + F.l1_loss(made, label) + self.options.factor * contrast

    def versions(self, given: Tensor, label: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Positives and negatives, each of the label's shape.

        Args:
            given: input images.
            label: what the network should make of them.
        """
        o, bounds = self.options, self.options.pixel_range
        positives = [label]
        positives += [sharpened(label, 0.5 + 5 * torch.rand(len(label)), bounds)
                      for _ in range(o.positives)]  # fmt: skip
        large = F.interpolate(given, label.shape[2:], mode="bicubic", align_corners=False)
        negatives = [large.clamp(*bounds)]
        negatives += [degraded(label, bounds) for _ in range(o.negatives)]
        return positives, negatives

    def state_dict(self) -> dict[str, Any]:
        """The embedding and its moments."""
        return {"embedding": self.player.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        self.player.load_state_dict(state["embedding"])
