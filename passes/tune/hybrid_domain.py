"""tune.hybrid_domain: a generator moves to where several small sets of images meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.data.batches import as_batches
from graphwright.ir.data.sources import import_object, open_source
from graphwright.ir.errors import ArgumentError
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import Hook, Moment, OwnLoss, tune
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import main_of, wide
from graphwright.ir.tune.options import Function
from graphwright.ir.tune.working import frozen
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._features.subspace import Subspace, spanned
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of

STILL = 1e-3
"""Below this share of the way ahead, an embedding has not moved, and has no direction yet."""


class HybridDomainOptions(Bounded):
    """Options of tune.hybrid_domain."""

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer goes by its own name. Behind a pass of the family `adapt`, those of its adapters."""

    encoder: Annotated[Function, Field(examples=["my_nets:encoder"])]
    """Function that gives the encoder's module, which maps images to embeddings (batch, numbers);
    it stays as it is."""

    domains: Annotated[tuple[str, ...], Field(min_length=1, examples=[["a.npz", "b.npz"]])]
    """The reference images of each domain, some ten of the generator's form: a file with one array
    (count, ...), or a `module:function` that gives it as a tensor."""

    direction: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the loss of the direction."""

    tune: OwnLoss = OwnLoss(optimizer="adam", lr=1e-3)
    """Options of training. The data is inputs of the generator; labels are not looked at."""


class HybridDomain(Pass[HybridDomainOptions]):
    """Tunes a generator with a few images of each of several domains, and no discriminator, to make
    what belongs to all of them and is otherwise what it made before.

    A frozen encoder sees every domain as the affine subspace that its references span. With r_k(e)
    what is left of an embedding perpendicular to domain k, e' the embedding of what the tuned
    generator makes and e that of the original's for the same input, the loss is the mean of

        sum over k of |r_k(e')| + direction * (1 - cos(e' - e, -sum over k of r_k(e))):

    near every domain, by the straight way, which leaves all else as it was. Samples that have not
    moved yet count for the first part alone.

    Source: P32, whose code is not published; the formulas are a reconstruction from its abstract
    and project page, and the factor of the direction is ours.
    """

    papers = ("P32",)
    contract = "lossy"
    needs = "training"
    before = ("quantize.*",)
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        """Embeds the references, and trains.

        Raises:
            ArgumentError: a file has not one array, or the encoder does not take its images or the
                generator's.
        """
        o = self.options
        encoder = _encoder(o.encoder, context)
        with torch.no_grad():
            made = main_of(program.signature, program(*program.examples))
            numbers = embedded(encoder, made.to(context.device)).shape[1]
            domains = [self._domain(name, encoder, context) for name in o.domains]
        for name, domain in zip(o.domains, domains, strict=True):
            if domain.basis.shape[1] >= numbers:
                raise ArgumentError(
                    f"{self.id}: the references of {name} span all {numbers} numbers of an "
                    "embedding, so that every image belongs to it",
                    fix="Give fewer references, or an encoder with more numbers.",
                )
        chosen = chosen_parameters(program, o.targets, self.id)
        data = as_batches(context.training_data, program.signature)
        recipe = Approach(program, encoder, domains, o.direction, context)
        tuned = tune(program, data, o.tune, context, names=chosen.names,
                     hooks=[recipe, *training_hooks(program)])  # fmt: skip
        metrics = metrics_of(tuned.history)
        metrics["first_distance"], metrics["last_distance"] = recipe.distances
        return Result(tuned.program, tuple(chosen.actions(tuned)), metrics)

    def _domain(self, name: str, encoder: nn.Module, context: Context) -> Subspace:
        images = _images(name, context)
        if len(images) < 2:
            raise ArgumentError(f"{self.id}: a domain has two images or more", where=name)
        return spanned(embedded(encoder, images.to(context.device)))


class Approach(Hook):
    """The loss of the way to all domains.

    Attributes:
        distances: mean of sum |r_k(e')| in the first and in the last batch.
    """

    counts_on_last_step = False

    def __init__(
        self, program: Program, encoder: nn.Module, domains: Sequence[Subspace], direction: float,
        context: Context,
    ) -> None:  # fmt: skip
        """
        Args:
            program: the generator.
            encoder: of images.
            domains: subspaces.
            direction: factor.
            context: says the device.
        """
        self.signature, self.source = program.signature, frozen(program, context.device)
        self.inputs = [spec.name for spec in program.signature.inputs]
        self.encoder, self.domains, self.direction = encoder, tuple(domains), direction
        self.distances = (0.0, 0.0)

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        now = embedded(self.encoder, wide(main_of(self.signature, outputs)))
        with torch.no_grad():
            made = self.source(**{name: batch[name] for name in self.inputs})
            before = embedded(self.encoder, wide(main_of(self.signature, made)))
        distance, way = approach(now, before, self.domains)
        value = float(distance.detach())
        self.distances = (value if at.step == 0 else self.distances[0], value)
        return loss + distance + self.direction * way

    def state_dict(self) -> dict[str, Any]:
        return {"distances": list(self.distances)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        first, last = state["distances"]
        self.distances = (first, last)


def approach(now: Tensor, before: Tensor, domains: Sequence[Subspace]) -> tuple[Tensor, Tensor]:
    """Means of sum |r_k(now)|, and of 1 - cos(now - before, -sum r_k(before)).

    Args:
        now: embeddings (batch, numbers).
        before: of the original generator, for the same inputs.
        domains: where to go.
    """
    distance = torch.stack([d.residual(now).norm(dim=1) for d in domains]).sum(0).mean()
    ahead = -torch.stack([d.residual(before) for d in domains]).sum(0)
    moved = now - before
    length = moved.detach().norm(dim=1)
    counts = length > STILL * ahead.norm(dim=1)
    if not counts.any():
        return distance, distance.new_zeros(())
    turned = 1 - F.cosine_similarity(moved[counts], ahead[counts], eps=1e-12)
    return distance, turned.sum() / len(now)


def embedded(encoder: nn.Module, images: Tensor) -> Tensor:
    """Embeddings (batch, numbers).

    Raises:
        ArgumentError: the encoder does not take the images, or gives something else.
    """
    try:
        found = encoder(wide(images))
    except Exception as error:  # whatever the user's module does
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ArgumentError(
            f"the encoder does not take images of the shape {list(images.shape)}: {first}"
        ) from error
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
        raise ArgumentError("the encoder gives no embeddings (batch, numbers)")
    return found


def _images(name: str, context: Context) -> Tensor:
    """The references of a domain."""
    if ":" in name:
        made: Any = import_object(name, context.folder, "the domain")
        found = made() if callable(made) else made
        if isinstance(found, Tensor) and found.dim() > 1:
            return found
        raise ArgumentError("gives no tensor of images (count, ...)", where=name)
    table = open_source(name, context.folder)
    if not isinstance(table, dict) or len(table) != 1 or not next(iter(table.values())).shape:
        raise ArgumentError("a domain is a file with one array of images", where=name)
    (column,) = table.values()
    return column.read(0, column.shape[0])


def _encoder(name: str, context: Context) -> nn.Module:
    made: Any = import_object(name, context.folder, "the encoder")
    module = made if isinstance(made, nn.Module) else made()
    if not isinstance(module, nn.Module):
        raise ArgumentError("gives no torch module", where=name)
    return module.to(context.device).eval().requires_grad_(False)
