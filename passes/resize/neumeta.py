"""resize.neumeta: learns the weights of all widths at once, and makes a network of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from graphwright.ir.channels import ChannelGroup, channel_groups, permute
from graphwright.ir.channels.eligible import eligible_groups
from graphwright.ir.channels.families import Family
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.products import geometry
from graphwright.ir.layers.selectors import layers
from graphwright.ir.options import Bounded, OutputFile, Rule, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.work import STRUCTURAL, Load, Work
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.resize._manifold import network
from graphwright.passes.resize._manifold.layout import Layout, kept_units, layouts
from graphwright.passes.resize._manifold.learning import Learning
from graphwright.passes.resize._manifold.manifold import Manifold, base_digest, unit
from graphwright.passes.resize._manifold.smoothing import distances, path_length, short_path

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(ge=0)]


class NeumetaOptions(Bounded):
    """Options of resize.neumeta."""

    width: Share = 0.5
    """Share of the units of every resized channel group that the resulting network has."""

    widths: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.5, 0.625, 0.75, 0.875, 1.0)
    """Widths that are trained; a batch sees one of them. `width` may be any between the least and
    the largest."""

    targets: Selector = ("*",)
    """Layers whose output channels are resized: selector patterns over names and kinds. A group
    that holds output channels of another layer stays."""

    spare: tuple[Family, ...] = ("residual",)
    """Kinds of channel groups that keep their width: the `residual` stream, attention `heads`, the
    width of `embeddings`, `hidden` channels (all others)."""

    layers: Positive = 4
    """Layers of the network that makes a tensor, besides its last: one, and residual blocks."""

    hidden: Positive = 256
    """Width of these layers."""

    frequencies: Positive = 16
    """Frequencies of the encoding of coordinates."""

    noise: Factor = 1.0
    """Width of the uniform jitter of coordinates in training, in channels."""

    draws: Positive = 100
    """Draws of every tensor whose mean is the result: the first without jitter."""

    weight_norm: Factor = 1e-4
    """Factor of the sum of the norms of the tensors in the loss."""

    reconstruction: Factor = 1.0
    """Factor of the distance to the pretrained tensors in the loss, at width 1: the mean of squared
    differences, each weighted by the size of the value, over the mean square of the tensor."""

    average: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the moving average of the networks' parameters, which is what is used."""

    save: OutputFile | None = None
    """File to write the manifold to, relative to the spec's folder: `resize.resample` makes
    networks of other widths from it, without training. Written when the pass runs: not again where
    a later run takes the pass from its checkpoint."""

    tune: TuneOptions = TuneOptions(
        epochs=200, lr=1e-3, weight_decay=1e-2, schedule="multistep", milestones=(0.5, 0.75)
    )
    """Options of training."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("width", "any([w <= width for w in widths]) and any([w >= width for w in widths])",
             "width {width} is outside of widths {widths}, beyond which a manifold says nothing"),
    )  # fmt: skip


class Neumeta(Pass[NeumetaOptions]):
    """Replaces the tensors of channel groups by networks over coordinates, trained at many widths.

    Channels are first put into an order in which neighbours are alike (a short path through their
    weights), which leaves the function as it is. Then one network for every tensor learns to make
    it from the positions of its channels and its sizes: at a width drawn anew for every batch, with
    jittered coordinates, by the task's loss, and at full width also by the distance to the
    pretrained values. What results is a plain network of the width `width`; the networks that made
    it are not in it.

    Batch norms have to be folded first. Tensors that belong to no resized group stay as they are,
    frozen. The jitter is on all six coordinates. Two things are made free of the scale of weights,
    which in the paper is that of networks of about 64 channels: the unit of a network's values, the
    pretrained tensor's root mean square over the share of its inputs that are left, and the
    distance of reconstruction. Positions of one channel (behind a flattening) are values at one
    coordinate, as those of a kernel are. Few channels need less `noise` and `frequencies`.

    Source: P48 (Yang et al. 2024, "Neural Metamorphosis"), with the released defaults but for the
    learning of soft labels, which `tune: {loss: kl}` gives.
    """

    contract = "lossy"
    needs = "training"
    weights = "trained"
    papers = ("P48",)
    before = ("quantize.*", "adapt.*")
    computes_in = ("float64", "float32")

    def cost(self, load: Load) -> Work:
        return super().cost(load) + Work(edited=STRUCTURAL * load.nodes)

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        groups, left = chosen_groups(program, o.targets, o.spare)
        orders, actions = smooth(groups, o.width)
        names = tensors_of(groups)
        _check_kinds(program, names)
        whole = layouts(program, groups, names, 1.0)
        manifold = Manifold(
            base_digest(program), {g.name: order for g, order in orders.items()},
            self._networks(program, whole, context),
            {name: unit(program.state[name], whole[name]) for name in names},
            o.frequencies, o.noise, (min(o.widths), max(o.widths)),
        )  # fmt: skip
        learning = Learning(
            manifold, permute(program, orders), groups, o.widths, context, shown=o.width,
            decay=o.average, norm=o.weight_norm, reconstruction=o.reconstruction,
        )  # fmt: skip
        tuned = tune(
            permute(program, orders), context.training_data, o.tune, context,
            hooks=[learning], names=(),
        )  # fmt: skip
        trained = replace(manifold, networks=learning.networks())
        if o.save is not None:
            path = Path(o.save)
            trained.save(path if path.is_absolute() else context.folder / path)
        result = trained.at(program, groups, o.width, o.draws, context.generator("draws"))
        losses = tuned.history.losses
        metrics = {
            "tensors_made": float(len(names)),
            "manifold_values": float(sum(v.numel() for p in trained.networks.values()
                                         for v in p.values())),
            "first_loss": losses[0], "last_loss": losses[-1],
        }  # fmt: skip
        return Result(result, (*actions, *left), metrics)

    def _networks(
        self, program: Program, whole: Mapping[str, Layout], context: Context
    ) -> dict[str, dict[str, torch.Tensor]]:
        o = self.options
        found = {}
        for name, layout in whole.items():
            parameters = network.start(
                6 * (1 + 2 * o.frequencies), o.hidden, o.layers, layout.values,
                context.generator("network", name),
            )  # fmt: skip
            dtype = program.state[name].dtype
            found[name] = {part: value.to(dtype) for part, value in parameters.items()}
        return found


def chosen_groups(
    program: Program, targets: tuple[str, ...], spare: tuple[Family, ...]
) -> tuple[list[ChannelGroup], list[Action]]:
    """The channel groups to resize, and the reasons of the others.

    Raises:
        ModelError: there is none, or a batch norm is left.
    """
    for layer in layers(program):
        if layer.kind == "batch_norm":
            raise ModelError(
                f"batch norm {layer.name} is left, whose statistics belong to one width",
                fix="Put cleanup.fold_batch_norm in front.",
            )
    groups, left = eligible_groups(program, channel_groups(program), targets, spare)
    if not groups:
        raise ModelError(
            "no channel group can be resized",
            fix="`graphwright inspect --groups` says why; widen `targets`, or shorten `spare`.",
        )
    return groups, left


def smooth(
    groups: list[ChannelGroup], width: float
) -> tuple[dict[ChannelGroup, list[int]], list[Action]]:
    """An order of the units of every group, and what it does to the length of the path."""
    orders, actions = {}, []
    for group in groups:
        distance = distances(group)
        order = short_path(distance)
        orders[group] = order
        before = path_length(distance, list(range(group.units)))
        share = path_length(distance, order) / before if before else 1.0
        actions.append(
            Action(group.name, f"{group.units} -> {kept_units(group, width)} units, path through "
                               f"them {share:.0%} of its length before")
        )  # fmt: skip
    return orders, actions


def tensors_of(groups: list[ChannelGroup]) -> list[str]:
    """Parameters that units of the groups have slices of, in state order."""
    weights = groups[0].analysis.weights
    members = {m.parameter for g in groups for m in g.members if m.parameter in weights}
    return [name for name in groups[0].analysis.program.state if name in members]


def _check_kinds(program: Program, names: list[str]) -> None:
    tied = {n for names in program.aliases.values() for n in names}
    for name in names:
        tensor = program.state[name]
        if not isinstance(tensor, torch.nn.Parameter):
            raise ModelError(f"{name} is stored in codes, which no manifold makes",
                             fix="Resize in front of quantization.")  # fmt: skip
        if name in tied:
            raise ModelError(f"{name} is shared by two layers, whose places differ",
                             fix="Leave them out of `targets`.")  # fmt: skip
    for layer in layers(program):
        if layer.weight in names and layer.kind in PRODUCTS and geometry(program, layer).groups > 1:
            raise ModelError(
                f"{layer.name} is a convolution in groups, for which the paper has no coordinates",
                fix="Leave the layer out of `targets`.",
            )
