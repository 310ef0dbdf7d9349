"""From torch's ExportedProgram to a Program: flat graph, own names, own metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.ir.signature import DimRange, Signature, TensorSpec, leaf_names
from graphwright.ir.trace.dims import Dynamic, is_free, ranges_found
from graphwright.ir.trace.inline import inline_regions


def assemble(
    exported: torch.export.ExportedProgram,
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    structure: Any,
    *,
    dynamic: Dynamic | None = None,
    dims: Mapping[str, DimRange] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    constants: Mapping[str, Any] | None = None,
    derived: Mapping[str, str] | None = None,
    prefix: str = "model.",
) -> Program:
    """A Program, not yet canonical, that computes what `exported` does.

    Args:
        exported: an export in torch's training form.
        model: whose names the parameters keep, and which says what is tied.
        inputs: example tensors by name, in the order of the user inputs of `exported`.
        structure: tree of the output, see `signature.flatten`.
        dynamic: names of free axes.
        dims: ranges of free dimensions.
        ranges: half-open range of sensible values per input.
        constants: baked arguments.
        derived: free dimensions that follow from others.
        prefix: taken off the names of the exported parameters.

    Raises:
        ModelError: a part of the graph is a subgraph that only runs on a condition.
    """
    graph, module = _unlifted(exported)
    _rename_placeholders(graph, list(inputs))
    state = _collect_state(graph, module, prefix)
    aliases = _canonical_names(graph, state, model)
    for node in graph.nodes:
        _clean_meta(node, prefix)
    specs = tuple(
        TensorSpec(name, _dtype(t.dtype), shape, (ranges or {}).get(name))
        for (name, t), shape in zip(inputs.items(), _shapes(graph, dynamic or {}), strict=True)
    )
    symbols = _symbol_names(graph, specs)
    names = output_names(structure, inputs)
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, tuple)
    results = tuple(
        TensorSpec(
            names[i], _dtype(n.meta["val"].dtype), _symbolic(n.meta["val"].shape, symbols, derived)
        )
        for i, n in enumerate(outputs)
    )
    found = ranges_found(graph, specs, exported.range_constraints, dims or {})
    carried = tuple(structure["state"][1]["dict"]) if "state" in structure else ()
    signature = Signature(
        specs, results, structure, found, dict(constants or {}), carried, dict(derived or {})
    )
    return Program(graph, state, signature, tuple(inputs.values()), aliases)


def with_own_outputs(program: Program) -> Program:
    """The program with the shapes of its outputs as its graph has them now."""
    signature = program.signature
    symbols = _symbol_names(program.graph, signature.inputs)
    outputs = program.graph.output_node().args[0]
    assert isinstance(outputs, tuple)
    results = tuple(
        replace(spec, shape=_symbolic(node.meta["val"].shape, symbols, signature.derived))
        for spec, node in zip(signature.outputs, outputs, strict=True)
    )
    return program.replace(signature=replace(signature, outputs=results))


def output_names(structure: Any, inputs: Mapping[str, Any]) -> dict[int, str]:
    """Name per leaf of the output; one that an input has too gets `_out` behind it.

    Runtimes know values by name only (a denoiser's `sample` goes in and comes out).
    """
    return {i: f"{name}_out" if name in inputs else name for i, name in leaf_names(structure)}


def _unlifted(exported: torch.export.ExportedProgram) -> tuple[fx.Graph, nn.Module]:
    """A graph whose parameters are `get_attr` nodes, and the module that holds them."""
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = fx.Graph()
    out = graph.graph_copy(module.graph, {})
    graph.output(tuple(out) if isinstance(out, tuple | list) else (out,))
    inline_regions(graph, module)
    return graph, module


def _rename_placeholders(graph: fx.Graph, names: list[str]) -> None:
    placeholders = graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, names, strict=True):
        node.target = name
        node._rename(name)


def _collect_state(graph: fx.Graph, module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for node in list(graph.find_nodes(op="get_attr")):
        if not node.users:
            graph.erase_node(node)
            continue
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                "a part of the model runs on a condition or in a loop over data, which passes "
                "cannot see into",
                where=_source_line(next(iter(node.users)).meta.get("stack_trace", "")),
                fix="Replace torch.cond, while_loop, map or scan by plain operations.",
            )
        name = str(node.target).removeprefix(prefix)
        node.target = name
        node._rename(name.replace(".", "_"))
        state[name] = value
    return state


def _canonical_names(
    graph: fx.Graph, state: dict[str, torch.Tensor], model: nn.Module
) -> dict[str, tuple[str, ...]]:
    """Gives a tied tensor its first registered name; the alias table keeps the others."""
    by_identity: dict[int, list[str]] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        by_identity.setdefault(id(tensor), []).append(name)
    aliases: dict[str, tuple[str, ...]] = {}
    for names in by_identity.values():
        present = [name for name in names if name in state]
        if len(names) < 2 or not present:
            continue
        first = names[0]
        tensor = state[present[0]]
        for name in present:
            for node in graph.find_nodes(op="get_attr", target=name):
                node.target = first
            state.pop(name)
        state[first] = tensor
        aliases[first] = tuple(names)
    return aliases


def _clean_meta(node: fx.Node, prefix: str) -> None:
    """Keeps shapes and module scope; the source line is shortened, absolute paths dropped."""
    kept = {key: node.meta[key] for key in ("val",) if key in node.meta}
    stack = node.meta.get("nn_module_stack")
    if stack:
        scopes = [(_scope(path, prefix), kind) for path, kind in stack.values()]
        kept["nn_module_stack"] = {path: (path, kind) for path, kind in scopes if path}
    source = _source_line(node.meta.get("stack_trace", ""))
    kept["custom"] = {"gw": {"source": source} if source else {}}
    node.meta = kept


def _scope(path: str, prefix: str) -> str:
    """Module path inside the user's model, from torch's own notation of it."""
    path = path.replace("L['self']", "").replace("L__self__", "").strip(".")
    return f"{path}.".removeprefix(prefix).strip(".")


def _source_line(stack_trace: str) -> str:
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack_trace or "")
    written = [(file, line) for file, line in frames if not file.startswith("<")]
    if not written:
        return ""
    file, line = written[-1]
    return f"{file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shapes(graph: fx.Graph, dynamic: Dynamic) -> list[tuple[int | str, ...]]:
    """Per input: the user's name where a size is still symbolic, a number elsewhere."""
    shapes: list[tuple[int | str, ...]] = []
    for node in graph.find_nodes(op="placeholder"):
        axes = dynamic.get(str(node.target), {})
        sizes = node.meta["val"].shape
        named = (axes[i] if i in axes and is_free(s) else int(s) for i, s in enumerate(sizes))
        shapes.append(tuple(named))
    return shapes


def _symbol_names(graph: fx.Graph, specs: tuple[TensorSpec, ...]) -> dict[Any, str]:
    """sympy symbol of a free dimension -> the user's name for it."""
    names: dict[Any, str] = {}
    for node, spec in zip(graph.find_nodes(op="placeholder"), specs, strict=True):
        for size, dim in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(dim, str) and isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                names.setdefault(size.node.expr, dim)
    return names


def _symbolic(
    shape: Any, symbols: dict[Any, str], derived: Mapping[str, str] | None
) -> tuple[int | str, ...]:
    """Sizes by the names of dimensions, those of sums where one has a name."""
    import sympy

    named = {symbol: sympy.Symbol(name) for symbol, name in symbols.items()}
    sums = {_sum(sum_of): dim for dim, sum_of in (derived or {}).items()}
    sizes: list[int | str] = []
    for size in shape:
        expression = size.node.expr.xreplace(named) if is_free(size) else None
        sizes.append(int(size) if expression is None else sums.get(expression, str(expression)))
    return tuple(sizes)


def _sum(sum_of: str) -> Any:
    import sympy

    terms = [term.strip() for term in sum_of.split("+")]
    return sympy.Add(*(int(t) if t.isdecimal() else sympy.Symbol(t) for t in terms))
