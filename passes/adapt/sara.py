"""adapt.sara: the smallest entries of every weight, trained again."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.adapters.record import Adapter
from graphwright.ir.graph.nodes import adapter_of, full_arguments
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hook, Moment
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass, weight_shape
from graphwright.passes.adapt._math.entries import entries_linear

aten = torch.ops.aten

SMALLEST_SIDE = 64
"""Matrices with a side of no more than this have no part in the penalty, as in the paper's code."""


class SaraOptions(AdapterOptions):
    """Options of adapt.sara."""

    threshold: Annotated[float, Field(gt=0)] = 2e-3
    """Entries of a smaller absolute value are trained."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of each weight's entries, the smallest ones, in the place of `threshold`."""

    nuclear: Annotated[float, Field(ge=0)] = 5e-4
    """Factor of the nuclear norm of the trained entries, as a matrix with zeros elsewhere, in the
    loss: of one layer in every step."""

    reselect: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    """Share of the steps after which entries that have grown beyond their limit stay as they are,
    and the optimizer starts anew on the others; never when absent."""


class Sara(AdapterPass[SaraOptions]):
    """Trains the entries of every weight that are next to nothing, and nothing else.

    Small weights have little effect, but can learn one. The layer reads its weight with the
    trained entries put in; gradients and the optimizer's state are kept of these alone. The
    penalty on the nuclear norm keeps what they add low in rank, and entries that have become
    large are left alone from the middle of the training on. Merging gives the plain layer.

    Source: Hu et al. 2024, "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive
    Sparse Low-Rank Adaptation", equations 3 to 7. Entries start with their sign (the published
    code starts them from their absolute value).
    """

    papers = ("P59",)
    kinds = PRODUCTS

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        stored = branch.editor.tensor(branch.weight)
        assert stored is not None  # `refusal` has left out what is rebuilt
        weight = stored.detach()
        places = smallest(weight, self.options.threshold, self.options.share)
        index = branch.constant("places", places)
        values = branch.parameter("values", weight.flatten()[places])
        flat = branch.before(aten.flatten.using_ints, branch.weight)
        put = branch.before(aten.index_put.default, flat, [index], values)
        branch.read_weight(branch.before(aten.reshape.default, put, list(weight.shape)))
        return f"{len(places)} of {weight.numel()} entries"

    def refusal(self, layer: Layer) -> str:
        return "" if layer.weight else "its weight is rebuilt, and has no entries of its own"

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        flat = layer.weight.flatten().clone()
        flat[layer.parts["places"]] = layer.parts["values"].to(flat.dtype)
        return flat.reshape(layer.weight.shape), layer.bias

    @classmethod
    def hooks(cls, program: Program, adapter: Adapter) -> list[Hook]:
        return [Progressive(program, adapter)]


def smallest(weight: Tensor, threshold: float, share: float | None) -> Tensor:
    """Places (flat, in order) of the entries to train."""
    size = weight.abs().flatten().float()
    if share is None:
        return (size < threshold).nonzero().flatten()
    count = max(1, round(share * len(size)))
    return size.topk(count, largest=False).indices.sort().values


class Progressive(Hook):
    """The penalty of `adapt.sara`, the entries that stay as they are from the middle on, and the
    products that keep no second weight for their gradient."""

    counts_steps = True

    def __init__(self, program: Program, adapter: Adapter) -> None:
        options = SaraOptions.model_validate(dict(adapter.options), strict=False)
        self.nuclear, self.reselect = options.nuclear, options.reselect
        self.values: dict[str, tuple[Tensor, tuple[int, ...], float]] = {}
        for layer in layers(program, PRODUCTS):
            parts = adapter.layers.get(layer.name)
            if parts is None:
                continue
            places = program.state[parts["places"]]
            start = program.state[parts["values"]].detach().abs()
            limit = options.threshold if options.share is None else float(start.max())
            self.values[parts["values"]] = (places, weight_shape(layer), limit)
        self.kept: dict[str, Tensor] = {}

    def on_graph(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.linear.default):
            x, whole, bias = full_arguments(node)[0]
            if whole.target is not aten.reshape.default or not adapter_of(whole):
                continue
            put = whole.args[0]
            if (
                put.target is not aten.index_put.default
                or str(put.args[2].target) not in self.values
            ):
                continue
            flat, (places,), values = put.args
            with graph.inserting_before(node):
                new = graph.call_function(entries_linear, (x, flat.args[0], places, values, bias))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
        graph.eliminate_dead_code()

    def before_step(self, at: Moment) -> None:
        if self.reselect is not None and at.step == int(at.total * self.reselect):
            self._reselect(at)
        if self.nuclear:
            self._add_penalty(at)

    def after_step(self, at: Moment) -> None:
        with torch.no_grad():
            for name, kept in self.kept.items():
                live = at.parameters[name]
                live.copy_(torch.where(kept.isnan(), live, kept.to(live.dtype)))

    def _reselect(self, at: Moment) -> None:
        for name, (_, _, limit) in self.values.items():
            live = at.parameters.get(name)
            if live is None:
                continue
            value = live.detach()
            self.kept[name] = torch.where(value.abs() > limit, value, float("nan"))
            at.optimizer.state.pop(live, None)

    def _add_penalty(self, at: Moment) -> None:
        """Adds the gradient U V^T of the nuclear norm, at the trained entries of one layer."""
        fit = [
            name
            for name, (_, shape, _) in self.values.items()
            if name in at.parameters and len(shape) == 2 and min(shape) > SMALLEST_SIDE
        ]
        if not fit:
            return
        chosen = torch.randint(len(fit), (), generator=torch.Generator().manual_seed(at.step))
        name = fit[int(chosen)]
        places, shape, _ = self.values[name]
        live = at.parameters[name]
        if live.grad is not None:
            live.grad += self.nuclear * nuclear_gradient(live.detach(), places, shape)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = dict(state["kept"])


def nuclear_gradient(values: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Gradient of the nuclear norm of a matrix that has `values` at `places` and zeros elsewhere.

    Directions whose singular value is zero have no part in it.

    Args:
        values: (count,).
        places: (count,) int64, flat.
        shape: of the matrix.
    """
    matrix = torch.zeros(shape, dtype=torch.float32, device=values.device)
    matrix.view(-1)[places.to(values.device)] = values.float()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > s.max() * torch.finfo(torch.float32).eps * max(shape)
    found: Tensor = (u[:, kept] @ vh[kept]).flatten()[places.to(values.device)]
    return found.to(values.dtype)
