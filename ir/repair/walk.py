"""The walk of UDFC over a program: damage a layer's channels, repair their readers, go on.

Layers come front to back. A reader is repaired before it is damaged itself, so that what is done to
a layer is made up for by what is done to the next ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize
from graphwright.ir.channels import ChannelGroup, channel_groups, cut
from graphwright.ir.context import Context
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import full_arguments, op_name
from graphwright.ir.layers.kinds import BIAS_ARGUMENT, OUTPUT_AXIS
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program
from graphwright.ir.repair.chains import Chain, Reader, find_chain
from graphwright.ir.repair.closed_form import (
    Channels,
    Choice,
    Repair,
    candidates,
    choose,
    feature_candidates,
)
from graphwright.ir.repair.merging import merge
from graphwright.ir.stored.grid import rounded
from graphwright.ir.stored.insert import rebuild_channels, replace_weight


@dataclass(frozen=True)
class Plan:
    """Settings of one walk.

    Attributes:
        ratio: share of the channels of every chain that goes.
        bits: of weight codes; None leaves weights as they are.
        repair, l1, l2: how readers are repaired.
        norm: by which channels are chosen.
        search: whether smaller scales are tried for least squared error.
        balance, threshold: of the repair `merge`.
    """

    ratio: float = 0.0
    bits: int | None = None
    repair: Literal[Repair, "merge"] = "auto"
    l1: float = 1.0
    l2: float | None = None
    norm: Literal["l1", "l2"] = "l2"
    search: bool = False
    balance: float = 0.85
    threshold: float = 0.1


@dataclass
class Done:
    """The changes to the channels of a chain, and the reason where readers were not repaired."""

    kept: int
    units: int
    choice: Choice | None
    reason: str = ""


@dataclass
class Compressed:
    """The walk's result.

    Attributes:
        program: with repaired weights; pruned channels are out, nothing is quantized yet.
        done: by producer's name.
        groups: those that are no chain, and why.
    """

    program: Program
    done: dict[str, Done] = field(default_factory=dict)
    groups: dict[ChannelGroup, str] = field(default_factory=dict)

    def reason(self, layer: Layer) -> str:
        """The reason why the output channels of a layer stay as they are."""
        axis = OUTPUT_AXIS[layer.kind]
        for group, reason in self.groups.items():
            if any(m.parameter == layer.weight and m.dim == axis for m in group.members):
                return reason
        return "its weight is computed in the graph" if not layer.weight else "no group holds them"


def compress(
    program: Program, context: Context, plan: Plan, prune: set[str], quantize: set[str]
) -> Compressed:
    """Damages and repairs every chain.

    Args:
        program: left as it is.
        context: gives the random stream of the Gaussian inputs.
        plan: what is asked for.
        prune: names of layers whose output channels may go.
        quantize: names of weights that will be rounded.

    Raises:
        ModelError: a weight or a statistic of a chain is not finite.
    """
    groups = channel_groups(program)
    if not groups:
        return Compressed(program)
    base = groups[0].analysis.program  # what is computed from stored tensors alone is folded
    stored = {layer.weight for layer in layers(program)}
    result, chains = Compressed(program), []
    for group in groups:
        found = find_chain(base, group, stored)
        if isinstance(found, str):
            result.groups[group] = found
        else:
            chains.append(found)
    order = {node: number for number, node in enumerate(base.graph.nodes)}
    chains.sort(key=lambda chain: order[chain.producer.node])
    state: dict[str, Tensor] = dict(base.state)
    picks: dict[ChannelGroup, list[int]] = {}
    for number, chain in enumerate(chains):
        context.progress("repairing", number + 1, len(chains))
        ratio = plan.ratio if chain.producer.name in prune else 0.0
        bits = plan.bits if chain.producer.weight in quantize else None
        generator = context.generator("udfc", chain.producer.name)
        gone, done = _one(base, state, chain, plan, ratio, bits, generator)
        result.done[chain.producer.name] = done
        if len(gone):
            picks[chain.group] = chain.units[gone].tolist()
    if picks:
        result.program = cut(base.replace(state=state), picks)
    else:
        result.program = program.replace(
            state={n: state[n] if n in stored else t for n, t in program.state.items()}
        )
    return result


def _one(
    program: Program,
    state: dict[str, Tensor],
    chain: Chain,
    plan: Plan,
    ratio: float,
    bits: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, Done]:
    """Damages one chain and repairs its readers in `state`; returns the channels that go."""
    weight = _rows(state[chain.producer.weight], chain.producer)
    gain, offsets, deviations, means = _affine(program, state, chain, weight)
    filters = weight * gain[:, None]
    if not bool(torch.isfinite(filters).all() and torch.isfinite(offsets).all()):
        raise ModelError(f"{chain.producer.name}: weights or batch norm hold NaN or infinity")
    count = min(int(ratio * len(filters) + 1e-9), len(filters) - 1)
    sizes = filters.norm(p=1.0 if plan.norm == "l1" else 2.0, dim=1)
    order = torch.sort(sizes, stable=True).indices
    gone, kept = order[:count], order[count:].sort().values
    now = weight if bits is None else rounded(weight, bits, plan.search)
    if not count and bits is None:
        return gone, Done(len(kept), len(filters), None)
    damaged = (now * gain[:, None])[kept]
    channels = Channels(filters, offsets, deviations, kept, damaged, means)
    found, reason = _candidates(chain, channels, plan, bits, generator)
    readers = sum((_gram(state, reader) for reader in chain.readers), torch.zeros(()))
    choice = choose(
        channels, readers, chain.activation, found, generator, take_last=plan.repair == "merge"
    )
    for reader in chain.readers:
        _repair(state, reader, choice.mixture, kept)
    return gone, Done(len(kept), len(filters), choice, reason)


def _candidates(
    chain: Chain, channels: Channels, plan: Plan, bits: int | None, generator: torch.Generator
) -> tuple[Iterable[tuple[str, Tensor]], str]:
    """(name, S) of what may be taken, S0 first, and why there is no more where there is not."""
    if plan.repair != "merge":
        repair = plan.repair
        if not chain.can_mix:
            repair = "none" if plan.repair == "none" or bits is None else "diagonal"
        found: Iterable[tuple[str, Tensor]] = candidates(channels, repair, plan.l1, plan.l2)
        if repair in ("auto", "features"):
            fitted = feature_candidates(channels, chain.activation, plan.l2, generator)
            found = itertools.chain(found, list(fitted))
        return found, "no repair is lower"
    nothing = [("none", channels.nothing)]
    count = len(channels.filters) - len(channels.kept)
    if not count:
        return nothing, "merging repairs no rounding"
    if not chain.can_mix:
        return nothing, "nothing merged: a depthwise convolution reads each channel by itself"
    if not chain.is_homogeneous:
        names = ", ".join(op_name(node) for node in chain.activations)
        return nothing, f"nothing merged: {names} of a multiple is no multiple"
    mixture, merged = merge(channels, chain.norm is not None, plan.balance, plan.threshold)
    if not merged:
        return nothing, f"nothing merged: no cosine with a kept filter reaches {plan.threshold:g}"
    return [*nothing, (f"merge ({merged} of {count})", mixture)], ""


def _rows(weight: Tensor, layer: Layer) -> Tensor:
    """(out, k) float64."""
    axis = OUTPUT_AXIS[layer.kind]
    return weight.detach().double().movedim(axis, 0).flatten(1)


def _affine(
    program: Program, state: Mapping[str, Tensor], chain: Chain, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gain, offset, deviation, mean) of every channel's pre-activation.

    Without a batch norm, inputs are taken to have the deviation 1 and the mean 0.
    """

    def values(node: object, default: float) -> Tensor:
        name = str(getattr(node, "target", ""))
        if name in state and name:
            return state[name].detach().double()
        return torch.full((len(weight),), default).to(weight)

    args, _ = full_arguments(chain.producer.node)
    place = BIAS_ARGUMENT.get(chain.producer.kind)
    bias = values(args[place] if place is not None else None, 0.0)
    if chain.norm is None:
        return torch.ones_like(bias), bias, weight.norm(dim=1), bias
    norm, _ = full_arguments(chain.norm)
    gamma, beta = values(norm[1], 1.0), values(norm[2], 0.0)
    mean, variance = values(norm[3], 0.0), values(norm[4], 1.0)
    gain = gamma / torch.sqrt(variance + norm[7])
    return gain, beta + gain * (bias - mean), gamma.abs(), beta


def _columns(state: Mapping[str, Tensor], reader: Reader) -> Tensor:
    """The reader's weight as (channels, places * rest) float64."""
    weight = state[reader.layer.weight].detach().double()
    if reader.is_depthwise:
        return weight.flatten(1)
    axis = 1 - OUTPUT_AXIS[reader.layer.kind]
    return weight.movedim(axis, 0)[reader.columns].flatten(1)


def _gram(state: Mapping[str, Tensor], reader: Reader) -> Tensor:
    """V_i . V_j of every two channels; a depthwise filter meets only its own channel."""
    columns = _columns(state, reader)
    if reader.is_depthwise:
        return torch.diag(columns.square().sum(1))
    return columns @ columns.T


def _repair(state: dict[str, Tensor], reader: Reader, mixture: Tensor, kept: Tensor) -> None:
    """Kept columns become mixtures of all; those of channels that go become zero."""
    old = state[reader.layer.weight]
    columns = _columns(state, reader)
    mixed = torch.zeros_like(columns)
    if reader.is_depthwise:
        rows = torch.arange(len(kept))
        mixed[kept] = columns[kept] * mixture[rows, kept][:, None]
        new = mixed.reshape(old.shape)
    else:
        mixed[kept] = mixture @ columns
        axis = 1 - OUTPUT_AXIS[reader.layer.kind]
        new = old.detach().double().movedim(axis, 0).clone()
        new[reader.columns] = mixed.reshape(*reader.columns.shape, *new.shape[1:])
        new = new.movedim(0, axis)
    state[reader.layer.weight] = torch.nn.Parameter(
        new.to(old.dtype).contiguous(), requires_grad=old.requires_grad
    )


def repair_text(done: Done) -> str:
    """A text on the changes to the readers."""
    choice = done.choice
    if choice is None:
        return "as it was"
    if choice.name == "none":
        return f"error {choice.before:.3f} on Gaussian inputs, {done.reason}"
    return (
        f"repair {choice.name}: error {choice.before:.3f} to {choice.after:.3f} on Gaussian inputs"
    )


def metrics(before: Program, found: Compressed) -> dict[str, float]:
    """Figures of the report."""
    choices = [done.choice for done in found.done.values() if done.choice is not None]
    sizes = [
        sum(p.numel() for p in program.parameters().values()) for program in (before, found.program)
    ]
    mean = max(1, len(choices))
    return {
        "chains": float(len(choices)),
        "repaired": float(sum(choice.name != "none" for choice in choices)),
        "error_before_repair": sum(choice.before for choice in choices) / mean,
        "error_after_repair": sum(choice.after for choice in choices) / mean,
        "parameters_left": sizes[1] / max(1, sizes[0]),
    }


def with_codes(
    program: Program, by: str, chosen: list[Layer], codes: Mapping[str, tuple[Tensor, Tensor]]
) -> Program:
    """The program with weights rebuilt from codes; every layer reads the one node of its weight.

    Args:
        program: left as it is.
        by: id of the pass.
        chosen: layers of this program, whose weights are replaced.
        codes: int8 codes and scales (channels,) by weight name.
    """
    editor = Editor(program, by=by)
    for layer in {layer.weight: layer for layer in reversed(chosen)}.values():
        values, scale = codes[layer.weight]
        make = rebuild_channels(values, scale, OUTPUT_AXIS[layer.kind])
        replace_weight(editor, layer, make, matrix=False)
    return editor.finish()
