"""A program as a networkx graph, as a table of layers, and as blocks small enough to draw."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx

from graphwright.ir.graph.cost import Cost, cost
from graphwright.ir.graph.nodes import VIEWS, op_name
from graphwright.ir.graph.sizes import dimension_names
from graphwright.ir.program import Program
from graphwright.ir.view.families import _OTHER_KINDS, family_of

MAX_BLOCKS = 26
"""Blocks that the coarse drawing shows at most, where the model's modules allow it."""


@dataclass(frozen=True)
class LayerRow:
    """One row of the layer table; shapes are texts such as `(batch, seq, 384)`."""

    name: str
    kind: str
    inputs: str
    output: str
    parameters: int
    weight_bytes: int
    macs: int | None
    formula: str


@dataclass(frozen=True)
class Block:
    """One box of a drawing.

    Attributes:
        title: first line, a module or an operator.
        detail: second line, what it is made of or what it gives.
        family: what colour it has: see `family_of`.
        count: how many equal, consecutive repetitions it stands for.
        tooltip: full names.
    """

    title: str
    detail: str
    family: str
    count: int = 1
    tooltip: str = ""


def to_networkx(program: Program) -> nx.DiGraph:
    """The graph with a node per fx node, by name, and an edge per use.

    Node attributes: `op` (fx's), `kind` (operator, or `input`, `state`, `output`), `scope` (module
    path), `scope_class`, `shape` (sizes and dimension names, None without a tensor), `dtype`,
    `by` (the pass that made it). Edges carry `operands`: at which places the value is used.
    """
    graph = nx.DiGraph()
    for node in program.graph.nodes:
        path, kind = _scope(node)
        value = node.meta.get("val")
        graph.add_node(
            node.name,
            op=node.op,
            kind=op_name(node) or _OTHER_KINDS.get(node.op, node.op),
            scope=path,
            scope_class=kind,
            shape=shape_of(value, program) if isinstance(value, torch.Tensor) else None,
            dtype=str(getattr(value, "dtype", "")).removeprefix("torch."),
            by=node.meta.get("custom", {}).get("gw", {}).get("by", "trace"),
        )
        operands: dict[str, list[int]] = {}
        for place, operand in enumerate(_operands(node)):
            operands.setdefault(operand.name, []).append(place)
        for name, places in operands.items():
            graph.add_edge(name, node.name, operands=places)
    return graph


def layer_table(program: Program, counted: Cost | None = None) -> list[LayerRow]:
    """Every call that stores weights or multiplies matrices, in execution order."""
    nodes = {node.name: node for node in program.graph.nodes}
    rows = []
    for layer in (counted or cost(program)).layers:
        node = nodes[layer.node]
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        rows.append(
            LayerRow(
                name=layer.name,
                kind=layer.kind,
                inputs=", ".join(shape_text(n.meta.get("val"), program) for n in inputs),
                output=shape_text(node.meta.get("val"), program),
                parameters=layer.parameters,
                weight_bytes=layer.weight_bytes,
                macs=layer.macs,
                formula=layer.formula,
            )
        )
    return rows


def shape_of(value: torch.Tensor, program: Program) -> tuple[int | str, ...]:
    """Sizes of a (fake) tensor; dynamic ones by the signature's names, as `2*seq`."""
    names = dimension_names(program)
    sizes: list[int | str] = []
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            expression = size.node.expr
            text = str(expression.xreplace({s: names.get(s, s) for s in expression.free_symbols}))
            sizes.append(int(text) if text.isdigit() else text)
        else:
            sizes.append(int(size))
    return tuple(sizes)


def shape_text(value: Any, program: Program) -> str:
    """`(batch, 16)` of a tensor, several of a tuple of tensors, empty for anything else."""
    if isinstance(value, torch.Tensor):
        return f"({', '.join(map(str, shape_of(value, program)))})"
    if isinstance(value, (tuple, list)):
        return ", ".join(filter(None, (shape_text(v, program) for v in value)))
    return ""


# --- blocks ------------------------------------------------------------------------------------


def op_blocks(program: Program) -> nx.DiGraph:
    """One block per operator on tensors; weights are part of the operator that reads them."""
    graph = nx.DiGraph()
    for node in program.graph.nodes:
        if node.op == "get_attr" or not _has_tensor(node):
            continue
        title = op_name(node) or node.name
        detail = shape_text(node.meta.get("val"), program)
        path, _ = _scope(node)
        tooltip = f"{node.name}{f' in {path}' if path else ''}"
        graph.add_node(node, block=Block(title, detail, family_of(node), 1, tooltip))
        for operand in node.all_input_nodes:
            if operand in graph:
                graph.add_edge(operand, node)
    return graph


def module_blocks(program: Program, max_blocks: int = MAX_BLOCKS) -> nx.DiGraph:
    """Blocks of consecutive operators of one module, equal repetitions folded into one.

    The depth at which modules are cut is the deepest that keeps to `max_blocks`, 1 if none does.
    """
    calls = _by_use(program)
    depths = {len(_scope(owner)[0].split(".")) for _, owner in calls} | {1}
    best = _fold(_segments(calls, 1, program))
    for depth in sorted(depths - {1}):
        folded = _fold(_segments(calls, depth, program))
        if len(folded) > max_blocks:
            break
        best = folded
    return _connect(best, program)


@dataclass
class _Segment:
    """Operators that run one after the other in one module."""

    path: str
    kind: str
    nodes: list[fx.Node]
    signature: Hashable = None


@dataclass
class _Folded:
    """Equal segments, one per repetition."""

    repetitions: list[_Segment]


def _by_use(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Tensor operators in execution order, each with the operator whose module it is shown in.

    What depends on no input (a rebuilt weight) may stand anywhere in the graph: it goes with, and
    right before, the first operator that uses it.
    """
    found: list[tuple[fx.Node, fx.Node]] = []
    constant: set[fx.Node] = set()
    waiting: set[fx.Node] = set()

    def place(node: fx.Node, owner: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand in waiting:
                waiting.remove(operand)
                place(operand, owner)
        found.append((node, owner))

    for node in program.graph.nodes:
        operands = node.all_input_nodes
        if node.op == "get_attr" or (operands and all(n in constant for n in operands)):
            constant.add(node)
            if node.op == "call_function" and _has_tensor(node):
                waiting.add(node)
        elif node.op == "call_function" and _has_tensor(node):
            place(node, node)
    return found


def _segments(
    calls: Sequence[tuple[fx.Node, fx.Node]], depth: int, program: Program
) -> list[_Segment]:
    segments: list[_Segment] = []
    for node, owner in calls:
        scopes = _scopes(owner)
        cut = [(path, kind) for path, kind in scopes if path.count(".") < depth]
        path, kind = cut[-1] if cut else ("", "")
        if not segments or segments[-1].path != path:
            segments.append(_Segment(path, kind, []))
        segments[-1].nodes.append(node)
    for segment in segments:
        last = segment.nodes[-1].meta.get("val")
        ops = tuple(op_name(node) for node in segment.nodes)
        # only modules that differ in a number are repetitions: siblings of other names are not
        path = re.sub(r"(?<![^.])\d+(?![^.])", "#", segment.path)
        segment.signature = (path, segment.kind, ops, shape_text(last, program))
    return segments


def _fold(segments: list[_Segment], longest: int = 8) -> list[_Folded]:
    """Runs of equal segments, and of equal sequences of up to `longest` segments, made one."""
    folded: list[_Folded] = []
    start, signatures = 0, [segment.signature for segment in segments]
    while start < len(segments):
        period, times = 1, 1
        for p in range(1, min(longest, (len(segments) - start) // 2) + 1):
            first, n = signatures[start : start + p], 1
            while signatures[start + n * p : start + (n + 1) * p] == first:
                n += 1
            if p * (n - 1) > period * (times - 1):
                period, times = p, n
        for offset in range(period):
            same = [segments[start + k * period + offset] for k in range(times)]
            folded.append(_Folded(same))
        start += period * times
    return folded


def _connect(folded: list[_Folded], program: Program) -> nx.DiGraph:
    graph = nx.DiGraph()
    place: dict[fx.Node, int | fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            place[node] = node
            detail = shape_text(node.meta.get("val"), program)
            graph.add_node(node, block=Block(node.name, detail, "input"))
    for index, item in enumerate(folded):
        graph.add_node(index, block=_block(item, program))
        for segment in item.repetitions:
            place |= dict.fromkeys(segment.nodes, index)
    output = next(node for node in program.graph.nodes if node.op == "output")
    graph.add_node(output, block=Block("output", "", "output"))
    place[output] = output
    for node, target in place.items():
        for operand in node.all_input_nodes:
            source = place.get(operand)
            # from one repetition back to the next there is no arrow: the count says it
            if source is not None and source != target and not _goes_back(source, target):
                graph.add_edge(source, target)
    return graph


def _goes_back(source: int | fx.Node, target: int | fx.Node) -> bool:
    return isinstance(source, int) and isinstance(target, int) and source > target


def _block(item: _Folded, program: Program) -> Block:
    first, last = item.repetitions[0], item.repetitions[-1]
    ops = Counter(op_name(node) for node in first.nodes if op_name(node) not in VIEWS)
    names = [f"{n} {name}" if n > 1 else name for name, n in ops.most_common()]
    shown = 3 if sum(map(len, names[:3])) <= 26 else 2 if sum(map(len, names[:2])) <= 28 else 1
    made_of = ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
    shape = shape_text(first.nodes[-1].meta.get("val"), program)
    title = _numbered(first.path, last.path)
    families = Counter(family_of(node) for node in first.nodes)
    strongest = max(families, key=lambda name: (_WEIGHT.get(name, 0), families[name]))
    if not first.path:  # operators of the model itself, between its modules
        loose = list(ops) or ["reshape"]
        title = ", ".join(loose[:3]) + (", …" if len(loose) > 3 else "")
        made_of = ""
    tooltip = f"{first.path} to {last.path}" if len(item.repetitions) > 1 else first.path
    kind = first.kind.rpartition(".")[2]
    detail = " · ".join(filter(None, [made_of, shape]))
    tooltip = f"{tooltip} ({kind}, {len(first.nodes)} operators)" if kind else tooltip
    return Block(title, detail, strongest, len(item.repetitions), tooltip)


def _numbered(first: str, last: str) -> str:
    """One name for repeated modules: `layer.0.output` to `layer.5.output` is `layer.0–5.output`."""
    pairs = zip(first.split("."), last.split("."), strict=True)
    return ".".join(a if a == b else f"{a}–{b}" for a, b in pairs)


_WEIGHT = {"attention": 6, "own": 5, "product": 4, "lookup": 3, "norm": 2, "activation": 1}


# --- small readers -----------------------------------------------------------------------------


def _scopes(node: fx.Node) -> list[tuple[str, str]]:
    """(path, class) of the modules around a call, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(str(path), str(kind)) for path, kind in stack.values() if path and path[0] != "_"]


def _scope(node: fx.Node) -> tuple[str, str]:
    scopes = _scopes(node)
    return scopes[-1] if scopes else ("", "")


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return any(isinstance(part, torch.Tensor) for part in value)
    return isinstance(value, torch.Tensor) or node.op in ("placeholder", "output")
