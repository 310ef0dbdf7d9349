"""reparameterize.equalize: moves scale between layers until their channels have equal ranges."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.channels import channel_groups
from graphwright.ir.graph.nodes import full_arguments, op_name
from graphwright.ir.layers.kinds import BIAS_ARGUMENT, OUTPUT_AXIS
from graphwright.ir.layers.products import bias_node
from graphwright.ir.layers.selectors import layers
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.ir.repair.chains import Chain, Reader, find_chain
from graphwright.passes.base import Action, Context, Pass, Result


class EqualizeOptions(Options):
    """Options of reparameterize.equalize."""

    rounds: Annotated[int, Field(ge=1)] = 20
    """Times that all pairs of layers are gone through, at most."""

    stop: Annotated[float, Field(gt=0)] = 1e-3
    """Ends when no factor of a round is further from 1 than this."""


class Equalize(Pass[EqualizeOptions]):
    """Divides a layer's output channels by factors and multiplies what reads them by the same.

    For channel i with largest weight r1 in the layer and r2 in those that read it, the factor is
    sqrt(r1 / r2): both have the range sqrt(r1 r2) then. Layers that share a chain of channels are
    found by the channel algebra: a producer, activations with f(s x) = s f(x) for s > 0 (ReLU,
    leaky ReLU, none), pooling and reshaping, and all readers, depthwise ones among them. Pairs
    are gone through again until nothing moves.

    It helps where one scale serves a whole weight or activation; weights with a scale per channel
    gain nothing in the layer, only in its readers. Batch norms are folded first
    (`cleanup.fold_batch_norm`); a chain with one stays, with the reason.

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", section 4.1.
    """

    contract = "exact"
    stores_weights = True
    weights = "reformed"
    before = ("quantize.*", "prune.*")
    after = ("cleanup.fold_batch_norm",)

    def run(self, program: Program, context: Context) -> Result:
        groups = channel_groups(program)
        if not groups:
            return Result(program, (Action.left("graph", "no layer"),))
        base = groups[0].analysis.program
        stored = {layer.weight for layer in layers(program) if layer.weight}
        chains: list[Chain] = []
        actions = []
        for group in groups:
            chain = find_chain(base, group, stored)
            if isinstance(chain, str):
                continue
            reason = _why_not(base, chain)
            if reason:
                actions.append(Action.left(chain.producer.name, reason))
            else:
                chains.append(chain)
        state: dict[str, Tensor] = dict(base.state)
        before = [_spread(state, chain) for chain in chains]
        rounds = 0
        for _ in range(self.options.rounds if chains else 0):
            moved = max(_equalize(state, chain) for chain in chains)
            rounds += 1
            if moved <= self.options.stop:
                break
        changed = {n: state[n] if n in base.state else t for n, t in program.state.items()}
        for chain, old in zip(chains, before, strict=True):
            new = _spread(state, chain)
            readers = ", ".join(reader.layer.name for reader in chain.readers)
            what = f"ranges of channels {old:.3g} to {new:.3g} times apart, with {readers}"
            actions.append(Action(chain.producer.name, what))
        if not actions:
            actions.append(Action.left("graph", "no two layers share a chain of channels"))
        result = program.replace(state=changed) if chains else program
        return Result(result, tuple(actions), {"rounds": float(rounds)})


def _why_not(program: Program, chain: Chain) -> str:
    if chain.norm is not None:
        return "a batch norm follows it: fold it first"
    if not chain.is_homogeneous:
        names = ", ".join(op_name(node) for node in chain.activations)
        return f"{names} of a multiple is no multiple"
    for layer in (chain.producer, *(reader.layer for reader in chain.readers)):
        if not program.state[layer.weight].is_floating_point():
            return f"the weight of {layer.name} is codes"
    bias = _bias_name(chain)
    if bias is None and _has_bias(chain):
        return "its bias is computed in the graph"
    if bias and len(program.graph.find_nodes(op="get_attr", target=bias)[0].users) > 1:
        return "its bias is read elsewhere too"
    return ""


def _has_bias(chain: Chain) -> bool:
    place = BIAS_ARGUMENT.get(chain.producer.kind)
    return place is not None and full_arguments(chain.producer.node)[0][place] is not None


def _bias_name(chain: Chain) -> str | None:
    node = bias_node(chain.producer)
    return str(node.target) if node is not None and node.op == "get_attr" else None


def _equalize(state: dict[str, Tensor], chain: Chain) -> float:
    """Moves one chain's factors; returns the largest distance of one from 1."""
    own, readers = _ranges(state, chain)
    alive = (own > 0) & (readers > 0)
    factors = torch.where(alive, (own / readers).sqrt(), torch.ones_like(own))
    producer = chain.producer
    axis = OUTPUT_AXIS[producer.kind]
    weight = state[producer.weight]
    shape = [-1 if n == axis else 1 for n in range(weight.dim())]
    _store(state, producer.weight, weight.detach().double() / factors.view(shape))
    bias = _bias_name(chain)
    if bias is not None:
        _store(state, bias, state[bias].detach().double() / factors)
    for reader in chain.readers:
        _scale(state, reader, factors)
    return float((factors - 1).abs().max())


def _scale(state: dict[str, Tensor], reader: Reader, factors: Tensor) -> None:
    name = reader.layer.weight
    old = state[name].detach().double()
    if reader.is_depthwise:
        _store(state, name, old * factors.view(-1, *[1] * (old.dim() - 1)))
        return
    axis = 1 - OUTPUT_AXIS[reader.layer.kind]
    wide = torch.ones(old.shape[axis], dtype=torch.float64, device=old.device)
    wide[reader.columns.flatten()] = factors.repeat_interleave(reader.columns.shape[1])
    _store(state, name, old * wide.view([-1 if n == axis else 1 for n in range(old.dim())]))


def _ranges(state: dict[str, Tensor], chain: Chain) -> tuple[Tensor, Tensor]:
    """Largest magnitude of every channel in the producer, and in its readers together."""
    axis = OUTPUT_AXIS[chain.producer.kind]
    weight = state[chain.producer.weight].detach().double()
    own = weight.movedim(axis, 0).flatten(1).abs().amax(1)
    found = []
    for reader in chain.readers:
        old = state[reader.layer.weight].detach().double().abs()
        if reader.is_depthwise:
            found.append(old.flatten(1).amax(1))
            continue
        columns = old.movedim(1 - OUTPUT_AXIS[reader.layer.kind], 0).flatten(1).amax(1)
        found.append(columns[reader.columns].amax(1))
    return own, torch.stack(found).amax(0)


def _spread(state: dict[str, Tensor], chain: Chain) -> float:
    """Largest range of a producer's channel over the smallest."""
    own, _ = _ranges(state, chain)
    alive = own[own > 0]
    return float(alive.max() / alive.min()) if len(alive) else 1.0


def _store(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    old = state[name]
    new: Tensor = value.to(old.dtype)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    state[name] = new
