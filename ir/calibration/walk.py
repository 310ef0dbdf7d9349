"""One walk over a program in which its layers are changed one after the other.

All calibration batches advance together, node by node. When the input of a layer is known, the
method sees it, finds the layer's new weight, and the walk goes on with that: every layer is
calibrated on what the compressed layers before it really give ("true sequential"), every node
runs once per batch, and what is alive is one cut through the graph, which is moved to
memory-mapped files above a budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

import graphwright.ir.ops  # noqa: F401  registers graphwright::fake_quantize and the weight ops
from graphwright.ir.calibration.experts import (
    is_stack,
    joined,
    part_geometry,
    part_names,
    routing_node,
    site_of,
)
from graphwright.ir.calibration.lifetimes import last_uses
from graphwright.ir.calibration.observe import bound_batches
from graphwright.ir.calibration.padding import real_tokens
from graphwright.ir.calibration.site import Method, Site, Solved, Task
from graphwright.ir.calibration.spill import Spill
from graphwright.ir.calibration.store import LayerStore
from graphwright.ir.calibration.workers import Workers
from graphwright.ir.context import Batch, Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.constants import constant_nodes, constant_operand, constant_value
from graphwright.ir.layers.kinds import BIAS_ARGUMENT, INPUT_ARGUMENT, WEIGHT_ARGUMENT
from graphwright.ir.layers.products import geometry, input_node, weight_key, weight_node
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program

DEFAULT_BUDGET = 2 << 30
"""Bytes of activations that stay in memory."""


def sweep(
    program: Program,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    method: Method,
    context: Context,
    *,
    follow: Literal["solved", "program"] = "solved",
    both: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> dict[str, Solved]:
    """Solves layers in the order of the graph, and returns what was found by node name.

    A tied weight is solved where it is first read. In a run with a work folder every finished
    layer is kept there, so that a killed run does none of them twice; the walk ends at the last
    layer that is missing, and does not begin when none is.

    Args:
        program: left as it is.
        layers: of kinds in `ir.layers.products.PRODUCTS`.
        batches: calibration data.
        method: gathers and solves.
        context: jobs, seed, work folder, progress.
        follow: `solved`: inputs as the solved layers give them. `program`: as the unchanged
            program gives them; all layers are then independent, and as many as there are jobs are
            solved at a time.
        both: also keep the activations of the unchanged program (`Site.original_inputs`).
        budget: bytes of activations that stay in memory.

    Returns:
        `Solved` by name of the layer's node, without the weights: keep in `state` what you need.

    Raises:
        ArgumentError: there is no batch.
        ModelError: an activation is NaN or infinite; names the layer and the batch. An empty one
            (an expert that no token went to) is for the method to deal with.
    """
    return _Sweep(program, layers, batches, method, context, follow, both, budget).run()


@dataclass
class _Stream:
    """Values of one version of the program, for every batch."""

    values: dict[fx.Node, list[Any]] = field(default_factory=dict)


class _Sweep:
    def __init__(
        self,
        program: Program,
        layers: Sequence[Layer],
        batches: Iterable[Batch],
        method: Method,
        context: Context,
        follow: str,
        both: bool,
        budget: int,
    ) -> None:
        self.program, self.method, self.context = program, method, context
        self.follows_solved = follow == "solved"
        self.spill = Spill(budget)
        self.inputs = [tuple(t.to(context.device) for t in b)
                       for b in bound_batches(program, batches)]  # fmt: skip
        if not self.inputs:
            raise ArgumentError("the calibration data is empty", fix="Give at least one batch.")
        self.solved_stream = _Stream()
        self.original = _Stream() if both and self.follows_solved else None
        self.workers = Workers(context.jobs)
        self.store = LayerStore.of(context, program, method)
        self.real = real_tokens(program, self.inputs)
        self.sites = self._sites(layers)
        self.leader = {layer.node: site for site in self.sites for layer in site.layers}
        self.geometries = {layer.node: geometry(program, layer) for layer in layers}
        self.kinds = {layer.node: layer for layer in layers}
        self.found: dict[str, Solved] = {}
        self.experts: dict[fx.Node, dict[str, Solved]] = {}
        self.now: dict[fx.Node, Solved] = {}
        self.pending: list[tuple[Layer, Task]] = []
        self.done: set[int] = set()
        self.missing = {id(site) for site in self.sites if not self._is_known(site)}
        self.constant = constant_nodes(program.graph)
        self.last_use = last_uses(program.graph, self.constant)

    # ---- the walk

    def run(self) -> dict[str, Solved]:
        with torch.no_grad():
            for node in self.program.graph.nodes:
                if node.op == "output" or not self.missing:
                    break  # nothing reads what the last layers give
                self._step(node)
                for dead in self.last_use.get(node, ()):
                    for stream in self._streams():
                        stream.values.pop(dead, None)
            self._flush()
        for site in self.sites:
            if id(site) not in self.done:
                self._solve(site)  # known: taken from the store
        return self.found

    def _streams(self) -> list[_Stream]:
        both = (self.solved_stream, self.original)
        return [stream for stream in both if stream is not None]

    def _step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            place = [spec.name for spec in self.program.signature.inputs].index(str(node.target))
            for stream in self._streams():
                stream.values[node] = [batch[place] for batch in self.inputs]
            return
        if node in self.constant:
            return
        site = self.leader.get(node)
        if site is not None and id(site) not in self.done:
            self.done.add(id(site))
            self.missing.discard(id(site))
            self._solve(site)
            if not self.missing:
                return
        constants = self._constants_of(node)
        for stream in self._streams():
            changed = None
            if stream is self.solved_stream and self.follows_solved:
                changed = self.now.pop(node, None)
            stream.values[node] = [
                self._call(stream, node, index, constants, changed)
                for index in range(len(self.inputs))
            ]

    def _constants_of(self, node: fx.Node) -> dict[fx.Node, Any]:
        """Values of a call's constant operands: made for this call, and gone after it."""
        replaced = self.now.get(node) if self.follows_solved and self.original is None else None
        skip = None
        if replaced is not None and replaced.weight is not None:
            skip = weight_node(self.kinds[node])  # rebuilding the old weight would be for nothing
        return {
            operand: constant_operand(self.program, operand, self.context.device)
            for operand in node.all_input_nodes
            if operand in self.constant and operand is not skip
        }

    def _call(
        self,
        stream: _Stream,
        node: fx.Node,
        index: int,
        constants: dict[fx.Node, Any],
        changed: Solved | None,
    ) -> Any:
        def value(operand: fx.Node) -> Any:
            if operand in self.constant:
                return constants.get(operand)
            return stream.values[operand][index]

        def concrete(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return value(leaf)
            return self.context.device if isinstance(leaf, torch.device) else leaf

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), concrete)
        if changed is not None:
            args = _with(self.kinds[node].kind, list(args), changed)
        return self.spill.put(node.target(*args, **kwargs))  # type: ignore[operator]

    # ---- solving

    def _is_known(self, site: Site) -> bool:
        count = site.geometry.groups
        names = [name for layer in site.layers for name in part_names(layer, count)]
        return all(self.store.load(name) is not None for name in names)

    def _solve(self, site: Site) -> None:
        if not is_stack(site.layers[0]):
            self._solve_site(site)
            return
        routing = self.solved_stream.values[routing_node(site.layers[0])]
        for expert in range(site.geometry.groups):
            self._solve_site(site_of(site, expert, routing))

    def _solve_site(self, site: Site) -> None:
        missing = []
        for layer in site.layers:
            kept = self.store.load(layer.name)
            if kept is None:
                missing.append(layer)
            else:
                self._accept(layer, kept)
        if not missing:
            return
        for index, x in enumerate(site.inputs()):
            if not bool(torch.isfinite(x).all()):
                raise ModelError(
                    f"calibration batch {index} gives NaN or infinity in front of "
                    f"{missing[0].name!r}",
                    fix="Check the calibration data, and the model on it.",
                )
        stats = self.method.gather(replace(site, layers=tuple(missing)))
        for layer in missing:
            self.pending.append((layer, self._task(layer, stats)))
        if self.follows_solved or len(self.pending) >= self.workers.width:
            self._flush()

    def _task(self, layer: Layer, stats: Any) -> Task:
        # A generator of its own: the layer's numbers do not depend on which others are selected.
        seed = self.context.generator("layer", layer.name).initial_seed()
        place = BIAS_ARGUMENT.get(self.kinds[layer.node].kind)
        args = layer.node.args
        bias = args[place] if place is not None and len(args) > place else None
        weight = constant_value(self.program, weight_node(layer)).to(self.context.device)
        own_bias: Tensor | None = None
        if isinstance(bias, fx.Node) and bias in self.constant:
            own_bias = constant_value(self.program, bias).to(self.context.device)
        shape = self.geometries[layer.node]
        if layer.kind != shape.kind:  # an expert of a stack
            expert = int(layer.name.rpartition(".")[2])
            weight, shape = weight[expert], part_geometry(shape)
            own_bias = None if own_bias is None else own_bias[expert]
        return Task(layer.name, shape, weight, own_bias, stats, seed)

    def _flush(self) -> None:
        pending, self.pending = self.pending, []
        width = self.workers.width if pending else 1
        for start in range(0, len(pending), width):  # so that what is finished is soon kept
            part = pending[start : start + width]
            results = self.workers.map(self.method.solve, [task for _, task in part])
            for (layer, _), solved in zip(part, results, strict=True):
                self.store.save(layer.name, solved)
                self._accept(layer, solved)

    def _accept(self, layer: Layer, solved: Solved) -> None:
        whole, count = self.kinds[layer.node], self.geometries[layer.node].groups
        if is_stack(whole):
            parts = self.experts.setdefault(layer.node, {})
            parts[layer.name] = solved
            if len(parts) < count:
                return
            names = part_names(whole, count)
            layer, solved = whole, joined([parts[name] for name in names])
        self.context.progress(layer.name, len(self.found) + 1, len(self.kinds))
        kept = replace(solved, weight=None)
        for other in self.kinds.values():
            if weight_key(other) == weight_key(layer):
                self.found[other.node.name] = kept
                if self.follows_solved:
                    self.now[other.node] = solved

    # ---- preparation

    def _sites(self, layers: Sequence[Layer]) -> list[Site]:
        grouped: dict[tuple[Any, ...], list[Layer]] = {}
        tied: set[str] = set()
        order = {node: index for index, node in enumerate(self.program.graph.nodes)}
        for layer in sorted(layers, key=lambda each: order[each.node]):
            if weight_key(layer) in tied:
                continue
            tied.add(weight_key(layer))
            shape = geometry(self.program, layer)
            routing = routing_node(layer) if is_stack(layer) else None
            key = (input_node(layer), routing, *shape.rows_key())
            grouped.setdefault(key, []).append(layer)
        return [self._site(key[0], members) for key, members in grouped.items()]

    def _site(self, node: fx.Node, members: list[Layer]) -> Site:
        def originals() -> Iterator[Tensor]:
            stream = self.original if self.follows_solved else self.solved_stream
            if stream is None:
                raise ArgumentError("the original activations are kept with both=True only")
            yield from stream.values[node]

        return Site(
            tuple(members),
            geometry(self.program, members[0]),
            node,
            self.context.generator("site", node.name).initial_seed(),
            self.real,
            lambda other: iter(self.solved_stream.values[other]),
            originals,
        )


def _with(kind: str, args: list[Any], changed: Solved) -> tuple[Any, ...]:
    """A layer's arguments with what was solved in their places."""
    if changed.weight is not None:
        args[WEIGHT_ARGUMENT[kind]] = changed.weight
    if changed.bias is not None:
        place = BIAS_ARGUMENT[kind]
        args += [None] * (place + 1 - len(args))
        args[place] = changed.bias
    if changed.grid is not None:
        place = INPUT_ARGUMENT[kind]
        args[place] = torch.ops.graphwright.fake_quantize(args[place], *changed.grid)
    return tuple(args)
