"""A cached decoder's graph with buffers in the place of pasts: what a step of generation runs.

`cat(past, new)` and the attention behind it become one call that writes the new tokens into
buffers and attends over them (`graphwright::cached_attention`); presents and the mask disappear,
for the lengths of the rows say what there is. Logits are those of each row's last token alone,
unless all are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.generation.record import CachedLayer, Generation
from graphwright.ir.graph.cached import SDPA, CachedAttention, NotCached, cached_attention_at
from graphwright.ir.graph.nodes import copy_graph
from graphwright.ir.graph.sizes import dimension_names
from graphwright.ir.ops.attention import attention
from graphwright.ir.ops.cached_attention import cached_attention
from graphwright.ir.ops.quantize_cache import quantize_cache
from graphwright.ir.program import Program

aten = torch.ops.aten
LENGTHS, COUNTS, TABLE = "cache_lengths", "token_counts", "block_table"


@dataclass(frozen=True)
class BufferSpec:
    """One buffer of a layer.

    Attributes:
        name: of the graph's input.
        heads, size: of a token.
        dtype: of what is stored.
        bits: of a code; 0 for floats.
        scales: name of the input with a scale for every token; empty where there is none.
    """

    name: str
    heads: int
    size: int
    dtype: torch.dtype
    bits: int = 0
    scales: str = ""

    @property
    def stored(self) -> int:
        """Elements of a head of a token in the buffer."""
        return self.size * self.bits // 8 if self.bits == 4 else self.size


@dataclass(frozen=True)
class StaticGraph:
    """The graph and its inputs.

    Attributes:
        graph: inputs ids, positions where the model takes some, `cache_lengths`, `token_counts`,
            `block_table`, then the buffers; one output, the logits.
        positions: whether it takes positions.
        buffers: in the order of the graph's inputs.
    """

    graph: fx.Graph
    positions: bool
    buffers: tuple[BufferSpec, ...]


def static_graph(program: Program, record: Generation, *, last: bool) -> StaticGraph:
    """The graph of a step.

    Args:
        program: with pasts as inputs and presents as outputs.
        record: which they are.
        last: logits of each row's last token, (batch, 1, vocabulary), and not of all.

    Raises:
        NotCached: a part of the cache is read in a way that buffers do not serve.
    """
    if record.kind != "decoder" or record.states or record.cross or not record.layers:
        raise NotCached("it keeps more than keys and values of its own tokens")
    graph = copy_graph(program.graph)
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    by_name = dict(zip((s.name for s in program.signature.inputs), inputs.values(), strict=True))
    ids = by_name[record.ids]
    _read_sizes_from(ids, [by_name[name] for name in record.past])
    with graph.inserting_after(ids):
        lengths, counts, table = (graph.placeholder(n) for n in (LENGTHS, COUNTS, TABLE))
    layers = {layer.past_key: layer for layer in record.layers}
    found = _attentions(graph, program, layers, {n: k for k, n in by_name.items()})
    buffers: list[BufferSpec] = []
    for layer in record.layers:
        buffers += _replace(graph, found[layer.past_key], layer, (lengths, table))
    _leave_logits(graph, program, record, counts if last else None)
    graph.eliminate_dead_code()
    _refuse_other_readers(by_name, record)
    _order_inputs(graph, by_name, record, (lengths, counts, table), buffers)
    graph.lint()
    return StaticGraph(graph, record.positions is not None, tuple(buffers))


def _attentions(
    graph: fx.Graph, program: Program, layers: Mapping[str, CachedLayer],
    names: Mapping[fx.Node, str],
) -> dict[str, CachedAttention]:  # fmt: skip
    """The attention that reads each layer's cache, by the name of its past keys."""
    found: dict[str, CachedAttention] = {}
    sizes, forms = dimension_names(program), dict[Any, Any]()
    for node in graph.nodes:
        if node.target not in (SDPA, attention):
            continue
        call = cached_attention_at(node, program.state, sizes, forms)
        key = names[call.keys.past]
        layer = layers.get(key)
        if layer is None or names[call.values.past] != layer.past_value or key in found:
            raise NotCached(f"{node.name} reads keys and values of different layers")
        found[key] = call
    if missing := sorted(set(layers) - set(found)):
        raise NotCached(f"no attention that is known as such reads {', '.join(missing)}")
    return found


def _read_sizes_from(ids: fx.Node, pasts: list[fx.Node]) -> None:
    """The batch is asked of the token ids: the first axis of a buffer may count blocks."""
    for past in pasts:
        for user in list(past.users):
            if user.target is aten.sym_size.int and user.args[1] == 0:
                user.args = (ids, 0)


def _replace(
    graph: fx.Graph, call: CachedAttention, layer: CachedLayer, common: tuple[fx.Node, fx.Node]
) -> list[BufferSpec]:
    """Puts the call that writes in place where the attention stood; the buffers it wants."""
    operands, scales, specs = [], [], []
    for part, name in ((call.keys, layer.past_key), (call.values, layer.past_value)):
        new, scale, spec = _stored(graph, part.new, name)
        operands.append(new)
        scales.append(scale)
        specs.append(spec)
    lengths, table = common
    with graph.inserting_before(call.node):
        result = graph.call_function(
            cached_attention,
            (call.query, *operands, call.keys.past, call.values.past, lengths, table, call.scale,
             call.window or 0, call.softcap, call.sinks, *scales),
        )  # fmt: skip
    result.meta = dict(call.node.meta)
    call.node.replace_all_uses_with(result)
    graph.erase_node(call.node)  # for its dropout it would count as alive
    return specs


def _stored(graph: fx.Graph, new: fx.Node, name: str) -> tuple[fx.Node, fx.Node | None, BufferSpec]:
    """What goes into the buffer, its scales as a node, and the buffer's form."""
    value = new.meta["val"]
    heads, size = int(value.shape[1]), int(value.shape[3])
    if new.target is not quantize_cache:
        return new, None, BufferSpec(name, heads, size, value.dtype)
    x, scale, bits = new.args
    assert isinstance(x, fx.Node)
    if bits == 16:
        return x, None, BufferSpec(name, heads, size, torch.float16)
    dtype = torch.int8 if bits == 8 else torch.uint8
    if bits == 4 and size % 2:
        raise NotCached(f"{name}: an odd number of 4-bit codes does not fill bytes")
    if isinstance(scale, fx.Node):
        with graph.inserting_before(new):
            flat = graph.call_function(aten.select.int, (scale, 1, 0))
        return x, flat, BufferSpec(name, heads, size, dtype, int(bits))  # type: ignore[arg-type]
    with graph.inserting_after(next(iter(graph.nodes))):
        node = graph.placeholder(f"{name}_scales")
    return x, node, BufferSpec(name, heads, size, dtype, int(bits), node.name)  # type: ignore[arg-type]


def _leave_logits(
    graph: fx.Graph, program: Program, record: Generation, counts: fx.Node | None
) -> None:
    """The one output; of each row's last token where `counts` says which that is."""
    output = graph.output_node()
    names = [spec.name for spec in program.signature.outputs]
    flat: Any = output.args[0]
    logits = flat[names.index(record.logits)]
    if counts is not None:
        source = _head_input(logits)
        with graph.inserting_before(next(iter(source.users)) if source is not logits else output):
            at = graph.call_function(aten.sub.Tensor, (counts, 1))
            at = graph.call_function(aten.clamp.default, (at, 0))
            size = graph.call_function(aten.sym_size.int, (source, 2))
            at = graph.call_function(aten.view.default, (at, [-1, 1, 1]))
            at = graph.call_function(aten.expand.default, (at, [-1, 1, size]))
            picked = graph.call_function(aten.gather.default, (source, 1, at))
        if source is logits:
            logits = picked
        else:
            (reader,) = source.users.keys() - {size, picked}
            reader.replace_input_with(source, picked)
    output.args = ((logits,),)


ROW_BY_ROW = (
    aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.to.dtype, aten.mul.Scalar,
    aten.div.Scalar,
)  # fmt: skip


def _head_input(logits: fx.Node) -> fx.Node:
    """The last hidden state, whose rows alone decide the rows of the logits.

    The head is looked for behind what is computed of every logit by itself. Where something else
    stands there, the logits themselves are picked from.
    """
    node = logits
    while True:
        node = _whole(node)
        if node.target not in ROW_BY_ROW or any(isinstance(a, fx.Node) for a in node.args[1:]):
            break
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if "linear" not in name or len(node.users) != 1:
        return logits
    source = node.args[0]
    while isinstance(source, fx.Node) and len(source.users) == 1 and _whole(source) is not source:
        source = source.args[0]
    if not isinstance(source, fx.Node) or len(source.users) != 1 or source.meta["val"].dim() != 3:
        return logits
    return source


def _whole(node: fx.Node) -> fx.Node:
    """The node behind a slice of everything."""
    is_slice = node.target is aten.slice.Tensor and len(node.args) == 4
    if is_slice and node.args[2] == 0 and node.args[3] == 2**63 - 1:
        return node.args[0]  # type: ignore[return-value]
    return node


def _refuse_other_readers(by_name: Mapping[str, fx.Node], record: Generation) -> None:
    for name in (record.mask, *record.past):
        if name is None:
            continue
        others = [u.name for u in by_name[name].users if u.target is not cached_attention]
        if others:
            raise NotCached(f"{name} is read by {', '.join(sorted(others)[:3])} too")


def _order_inputs(
    graph: fx.Graph, by_name: Mapping[str, fx.Node], record: Generation,
    common: tuple[fx.Node, ...], buffers: list[BufferSpec],
) -> None:  # fmt: skip
    """Ids, positions, lengths, counts, table, buffers in order, scales behind them."""
    kept = [by_name[record.ids], *([by_name[record.positions]] if record.positions else [])]
    kept += [*common, *(by_name[spec.name] for spec in buffers)]
    scales = {node.name: node for node in graph.find_nodes(op="placeholder")}
    kept += [scales[spec.scales] for spec in buffers if spec.scales]
    for node in list(graph.find_nodes(op="placeholder")):
        if node not in kept:
            if node.users:
                raise NotCached(f"it reads the input {node.name}")
            graph.erase_node(node)
    first = next(iter(graph.nodes))
    for node in reversed(kept):
        if node is not first:
            first.prepend(node)
            first = node
