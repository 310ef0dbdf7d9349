"""adapt.attribute: a generator's latent scaled and shifted, to give it the look of one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, fx, nn

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.adapters.record import Adapter, find_adapter
from graphwright.ir.calibration.observe import observe
from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.nodes import adapter_of
from graphwright.ir.layers.kinds import INPUT_ARGUMENT, MATRICES, TURNED
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.program import Program
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.hooks import Hook, Moment, Values
from graphwright.ir.tune.losses import main_of, wide
from graphwright.ir.tune.options import Function
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass
from graphwright.passes.adapt._form.low_rank import matrix_shape
from graphwright.passes.base import Context, Result

aten = torch.ops.aten


class AttributeOptions(AdapterOptions):
    """Options of adapt.attribute."""

    per_layer: bool = False
    """Whether every layer that reads the latent has a scale and a shift of its own."""

    truncation: Annotated[float, Field(gt=0, le=1)] = 0.7
    """While it is trained, latents are brought to this share of their distance from the mean latent
    (that of the training data's); afterwards they are as they are."""

    discriminator: Function | None = None
    """Function that gives the discriminator's module, which maps images to features (batch,
    numbers); it stays as it is. With it, the adaptor is trained at once against a new classifier on
    these features; without it, by a tune pass of one's own."""

    tune: TuneOptions = TuneOptions(loss="mse")
    """Options of training. The labels of the training data are the real images."""

    direct: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the loss `tune.loss` beside the adversarial one; the paper has none."""

    @model_validator(mode="after")
    def _has_a_game(self) -> Self:
        if self.discriminator is None and {"tune", "direct"} & self.model_fields_set:
            raise ValueError("tune and direct belong to training with a discriminator")
        return self


class Attribute(AdapterPass[AttributeOptions]):
    """Lets the layers that read a generator's latent w read a w + b, and trains a and b alone.

    `targets` are these layers. a starts at one and b at zero. In training the frozen generator's
    images and the real ones (variants of a single image) are told apart by one linear layer on a
    frozen discriminator's features, which is trained along and then dropped. Latents near the mean
    alone take part, so that what the one image shows is learned as an attribute of all images, and
    the differences between them stay. a and b merge into the layers (`adapt.merge`).

    Source: Yang et al. 2021, "One-Shot Generative Domain Adaptation" (GenDA), section 3. No code
    is published; 0.7 is the usual truncation, and both sides of the game take their steps together.
    """

    papers = ("P19",)
    contract = "lossy"
    needs = "training"
    weights = "trained"
    kinds = MATRICES

    def prepare(self, program: Program, chosen: Sequence[Layer], context: Context) -> list[float]:
        """The mean latent.

        Raises:
            ModelError: the layers read latents of several sizes or means.
        """
        means = _means(program, chosen, context)
        first = means[chosen[0].name]
        for layer in chosen[1:]:
            other = means[layer.name]
            if other.shape != first.shape or not torch.allclose(other, first, 1e-3, 1e-4):
                raise ModelError(
                    f"{self.id}: {chosen[0].name!r} and {layer.name!r} do not read one latent",
                    fix="Target the layers that read the latent, and no others.",
                )
        return [float(value) for value in first]

    def run(self, program: Program, context: Context) -> Result:
        """Puts the adaptor in, and trains it where a discriminator is given; see the class."""
        options = self.options
        chosen, actions = self.sorted_out(program, select(program, options.targets, self.kinds))
        mean = self.prepare(program, chosen, context)
        given = {**self.resolved_options(), "mean": mean}
        result = self.insert(program, context, chosen, actions, mean, given=given)
        if options.discriminator is None:
            return result
        adapted = result.program
        adapter = find_adapter(adapted, options.name)
        backbone = _backbone(options.discriminator, context)
        game = Adversary(adapted, backbone, options.direct, context)
        names = set(adapter.tensors())
        tuned = tune(adapted, context.training_data, options.tune, context.within("attribute"),
                     hooks=[*self.hooks(adapted, adapter), game], names=names)  # fmt: skip
        metrics = {
            **result.metrics,
            "first_loss": tuned.history.losses[0],
            "last_loss": tuned.history.losses[-1],
        }
        return Result(tuned.program, result.actions, metrics)

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        size = matrix_shape(layer)[1]
        starts = {"latent_scale": torch.ones(size), "latent_shift": torch.zeros(size)}
        nodes = []
        for part, start in starts.items():
            if self.options.per_layer:
                nodes.append(branch.parameter(part, start))
                continue
            name = f"latent.{part}.{self.options.name}"
            if name not in branch.editor.state:
                value = nn.Parameter(start.to(branch.dtype))
                branch.editor.add_state(name, value)
            branch.parts[part] = name
            nodes.append(branch.editor.get(name))
        scaled = branch.before(aten.mul.Tensor, branch.input, nodes[0])
        branch.read_input(branch.before(aten.add.Tensor, scaled, nodes[1]), steps=2)
        return f"{size} numbers of the latent scaled and shifted"

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        if layer.bias is None:
            raise ModelError(f"{layer.name!r} has no bias that could take in the latent's shift",
                             fix="Leave the adaptor in the graph.")  # fmt: skip
        scale, shift = layer.parts["latent_scale"], layer.parts["latent_shift"]
        if layer.kind in TURNED:
            return layer.weight * scale[:, None], layer.bias + shift @ layer.weight
        return layer.weight * scale, layer.bias + layer.weight @ shift

    @classmethod
    def hooks(cls, program: Program, adapter: Adapter) -> list[Hook]:
        return [Truncated(adapter)]


class Truncated(Hook):
    """Brings latents nearer to their mean while the adaptor is trained."""

    def __init__(self, adapter: Adapter) -> None:
        self.name = adapter.name
        self.scales = {parts["latent_scale"] for parts in adapter.layers.values()}
        self.share = float(adapter.options["truncation"])
        self.mean = tuple(float(value) for value in adapter.options["mean"])

    def on_graph(self, graph: fx.Graph) -> None:
        for node in list(graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
            x, scale = node.args[:2]
            if (
                adapter_of(node) != self.name
                or str(getattr(scale, "target", "")) not in self.scales
            ):
                continue
            with graph.inserting_before(node):
                node.update_arg(0, graph.call_function(truncated, (x, self.mean, self.share)))


def truncated(latent: Tensor, mean: Sequence[float], share: float) -> Tensor:
    """mean + share (latent - mean)."""
    center = torch.tensor(mean, dtype=latent.dtype, device=latent.device)
    return center + share * (latent - center)


class Adversary(Hook):
    """The loss of the game between an adaptor and a classifier on a discriminator's features."""

    def __init__(
        self, program: Program, backbone: nn.Module, direct: float, context: Context
    ) -> None:
        self.signature, self.direct = program.signature, direct
        self.backbone = backbone.to(context.device)
        self.context = context
        self.weight = nn.Parameter(torch.zeros(1, self._features(program)))
        self.bias = nn.Parameter(torch.zeros(1))

    def own(self) -> Mapping[str, nn.Parameter]:
        return {"attribute_classifier.weight": self.weight, "attribute_classifier.bias": self.bias}

    def _features(self, program: Program) -> int:
        """Numbers that the discriminator sees an image as."""
        with torch.no_grad():
            image = main_of(self.signature, program(*program.examples)).to(self.context.device)
            found = self._seen(image)
        return found.shape[1]

    def _seen(self, images: Tensor) -> Tensor:
        try:
            found = self.backbone(wide(images))
        except Exception as error:  # whatever the user's module does
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise ArgumentError(f"the discriminator does not take the generator's images: {first}"
                                ) from error  # fmt: skip
        if not isinstance(found, Tensor) or found.dim() != 2:
            raise ArgumentError("the discriminator gives no features (batch, numbers)")
        return found

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        fake = self._seen(main_of(self.signature, outputs))
        with torch.no_grad():
            real = self._seen(batch["labels"])
        of_adaptor, of_classifier = game(fake, real, self.weight, self.bias)
        return of_adaptor + of_classifier + self.direct * loss


def game(fake: Tensor, real: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the adaptor and of the classifier, neither with a gradient for the other's.

    The adaptor's is softplus(-d(fake)), the classifier's softplus(-d(real)) + softplus(d(fake)):
    the non-saturating game.

    Args:
        fake: features (batch, numbers) of generated images.
        real: features (batch, numbers) of real ones.
        weight: of the classifier (1, numbers).
        bias: of the classifier (1,).
    """
    of_adaptor = F.softplus(-F.linear(fake, weight.detach(), bias.detach())).mean()
    of_classifier = F.softplus(-F.linear(real, weight, bias)).mean()
    of_classifier = of_classifier + F.softplus(F.linear(fake.detach(), weight, bias)).mean()
    return of_adaptor, of_classifier


def _backbone(name: str, context: Context) -> nn.Module:
    from graphwright.ir.data.sources import import_object

    made: Any = import_object(name, context.folder, "the discriminator")
    module = made if isinstance(made, nn.Module) else made()
    if not isinstance(module, nn.Module):
        raise ArgumentError("gives no torch module", where=name)
    return module.eval().requires_grad_(False)


class Mean:
    """Mean of all rows that it is shown."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).double().cpu()
        self.total = rows.sum(0) if self.total is None else self.total + rows.sum(0)
        self.count += len(rows)


def _means(program: Program, chosen: Sequence[Layer], context: Context) -> dict[str, Tensor]:
    """Mean of what every layer reads, over the training data, by its name."""
    reads: dict[str, str] = {}
    for layer in chosen:
        node = layer.node.args[INPUT_ARGUMENT[layer.kind]]
        assert isinstance(node, fx.Node)
        reads[layer.name] = node.name
    observers = {name: Mean() for name in reads.values()}
    batches = as_batches(context.training_data, program.signature)
    with torch.no_grad():
        observe(program, observers, batches)
    found: dict[str, Tensor] = {}
    for layer_name, name in reads.items():
        mean = observers[name]
        if mean.total is None:
            raise ArgumentError("the training data is empty")
        found[layer_name] = mean.total / mean.count
    return found
