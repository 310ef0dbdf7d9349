"""From an `nn.Module` (or an ExportedProgram) to a Program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphwright.ir.canonical import canonicalize
from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.ir.signature import DimRange, Signature, TensorSpec, flatten, leaf_names, rebuild

Dynamic = Mapping[str, Mapping[int, str]]
"""Input name -> {axis: dimension name}."""


def trace(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic: Dynamic | None = None,
    *,
    dims: Mapping[str, DimRange] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Program:
    """Traces a model in inference mode with `torch.export`.

    Args:
        model: the trained model; switched to eval mode for the trace and back.
        example_inputs: positional arguments, or arguments by name. Tensors become inputs; other
            values are baked in. Dynamic axes want sizes of 2 or more.
        dynamic: for each input, which axes are dynamic and under what name; the same name in two
            inputs is the same size.
        dims: ranges of dynamic dimensions; [1, unbounded) where absent.
        ranges: half-open range of sensible values per input.

    Raises:
        ModelError: the model cannot be traced; names the line of the model's own code.
    """
    names, arguments = _named_arguments(model, example_inputs)
    flat = _Flat(model, arguments)
    inputs = dict(zip(flat.names, flat.tensors, strict=True))
    dynamic = {name: dict(axes) for name, axes in (dynamic or {}).items()}
    _check_dynamic(inputs, dynamic)
    bounds = {d: DimRange() for axes in dynamic.values() for d in axes.values()} | dict(dims or {})
    was_training = model.training
    model.eval()
    try:
        exported = _export(flat, tuple(inputs.values()), _dynamic_shapes(inputs, dynamic))
    finally:
        model.train(was_training)
    constants = {n: v for n, v in arguments.items() if isinstance(v, bool | int | float | str)}
    return _assemble(exported, inputs, dynamic, bounds, constants, flat, dict(ranges or {}), model)


class _Recorded:
    """Output structure seen during the trace; torch resets plain attributes of the module."""

    structure: Any = None


class _Flat(nn.Module):
    """Flat tensors in, flat tuple of tensors out, around a model with any calling convention."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.tensors: list[torch.Tensor] = []
        self.argument_tree = {n: flatten_argument(v, self.tensors) for n, v in arguments.items()}
        tree = {"dict": self.argument_tree}
        self.names = [name for _, name in sorted(leaf_names(tree))]
        self.recorded = _Recorded()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments = {n: rebuild(tree, tensors) for n, tree in self.argument_tree.items()}
        positional = arguments.pop("*", ())
        leaves: list[torch.Tensor] = []
        self.recorded.structure = flatten(self.model(*positional, **arguments), leaves)
        return tuple(leaves)


def flatten_argument(value: Any, leaves: list[torch.Tensor]) -> Any:
    """As `flatten`, and any object that is no container is baked in as it is."""
    try:
        return flatten(value, leaves)
    except TypeError:
        return {"value": value}


def _named_arguments(
    model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        arguments = dict(example_inputs)
    else:
        if isinstance(example_inputs, torch.Tensor):
            example_inputs = (example_inputs,)
        parameters = inspect.signature(model.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD,)]
        if len(names) < len(example_inputs):
            arguments = {"*": tuple(example_inputs)}
        else:
            arguments = dict(zip(names, example_inputs, strict=False))
    return list(arguments), arguments


def _check_dynamic(inputs: Mapping[str, torch.Tensor], dynamic: Dynamic) -> None:
    for name, axes in dynamic.items():
        if name not in inputs:
            raise ModelError(f"dynamic dimensions for {name!r}, and the inputs are {list(inputs)}")
        for axis in axes:
            if not -inputs[name].dim() <= axis < inputs[name].dim():
                raise ModelError(
                    f"input {name!r} has {inputs[name].dim()} axes, and no axis {axis}"
                )


def _dynamic_shapes(
    inputs: Mapping[str, torch.Tensor], dynamic: Dynamic
) -> tuple[tuple[dict[int, Any], ...]]:
    """`Dim.DYNAMIC` everywhere: torch then finds the range itself, where a named Dim would make
    the user guess it; a dimension that the model fixes is an error, not silently fixed."""
    free = torch.export.Dim.DYNAMIC
    return (
        tuple(
            dict.fromkeys((axis % t.dim() for axis in dynamic.get(name, {})), free)
            for name, t in inputs.items()
        ),
    )


def _bounds(
    graph: fx.Graph, specs: tuple[TensorSpec, ...], found: Any, given: Mapping[str, DimRange]
) -> dict[str, DimRange]:
    """Range per named dimension: the user's, narrowed by what tracing found out."""
    bounds: dict[str, DimRange] = {}
    for node, spec in zip(graph.find_nodes(op="placeholder"), specs, strict=True):
        for size, dim in zip(node.meta["val"].shape, spec.shape, strict=True):
            if not isinstance(dim, str):
                continue
            low, high = given[dim].min, given[dim].max
            limits = found.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if limits is not None:
                # torch assumes 2 or more for every dynamic size; 1 runs all the same.
                low = max(low, int(limits.lower) if limits.lower > 2 else 1)
                if limits.upper.is_number and limits.upper < 2**31:
                    high = min(high or int(limits.upper), int(limits.upper))
            bounds[dim] = DimRange(low, high)
    return bounds


def _export(
    flat: _Flat, tensors: tuple[torch.Tensor, ...], shapes: Any
) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(flat, tensors, dynamic_shapes=shapes)
    except Exception as error:
        raise ModelError(
            f"the model cannot be traced: {str(error).splitlines()[0]}",
            fix="Change that line, or fix the dimension it depends on.",
        ) from error


def _assemble(
    exported: torch.export.ExportedProgram,
    inputs: dict[str, torch.Tensor],
    dynamic: Dynamic,
    bounds: Mapping[str, DimRange],
    constants: dict[str, Any],
    flat: _Flat,
    ranges: Mapping[str, tuple[float, float]],
    model: nn.Module,
) -> Program:
    module = exported.module(check_guards=False)
    graph = fx.Graph()
    out = graph.graph_copy(module.graph, {})
    graph.output(tuple(fx.node.map_arg(_as_tuple(out), lambda n: n)))
    _rename_placeholders(graph, list(inputs))
    state = _collect_state(graph, module, "model.")
    aliases = _canonical_names(graph, state, model)
    for node in graph.nodes:
        _clean_meta(node)
    output = graph.output_node().args[0]
    assert isinstance(output, tuple)
    specs = tuple(
        TensorSpec(n, _dtype(t.dtype), _shape(n, t, dynamic), ranges.get(n))
        for n, t in inputs.items()
    )
    symbols = _symbol_names(graph, specs)
    names = dict(leaf_names(flat.recorded.structure))
    outputs = tuple(
        TensorSpec(names[i], _dtype(n.meta["val"].dtype), _symbolic(n.meta["val"].shape, symbols))
        for i, n in enumerate(output)
    )
    used = _bounds(graph, specs, exported.range_constraints, bounds)
    signature = Signature(specs, outputs, flat.recorded.structure, used, constants)
    program = Program(graph, state, signature, tuple(inputs.values()), aliases)
    return canonicalize(program)


def _as_tuple(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, tuple | list) else (out,)


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
                f"control flow at {node.name!r} was traced into a subgraph, which passes cannot see",
                fix="Replace torch.cond / while_loop / map by plain operations.",
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


def _clean_meta(node: fx.Node) -> None:
    """Keeps shapes and module scope; the source line is shortened, absolute paths dropped."""
    kept = {key: node.meta[key] for key in ("val",) if key in node.meta}
    stack = node.meta.get("nn_module_stack")
    if stack:
        scopes = [(_scope(path), kind) for path, kind in stack.values()]
        kept["nn_module_stack"] = {path: (path, kind) for path, kind in scopes if path}
    source = _source_line(node.meta.get("stack_trace", ""))
    kept["custom"] = {"gw": {"source": source} if source else {}}
    node.meta = kept


def _scope(path: str) -> str:
    """Module path inside the user's model, from torch's own notation of it."""
    path = path.replace("L['self']", "").replace("L__self__", "").strip(".")
    return path.removeprefix("model").removeprefix(".")


def _source_line(stack_trace: str) -> str:
    import re

    frames = re.findall(r'File "([^"]+)", line (\d+)', stack_trace or "")
    if not frames:
        return ""
    file, line = frames[-1]
    return f"{file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(name: str, tensor: torch.Tensor, dynamic: Dynamic) -> tuple[int | str, ...]:
    axes = {axis % tensor.dim(): d for axis, d in dynamic.get(name, {}).items()}
    return tuple(axes.get(i, size) for i, size in enumerate(tensor.shape))


def _symbol_names(graph: fx.Graph, specs: tuple[TensorSpec, ...]) -> dict[Any, str]:
    """sympy symbol of a dynamic dimension -> the user's name for it."""
    names: dict[Any, str] = {}
    for node, spec in zip(graph.find_nodes(op="placeholder"), specs, strict=True):
        for size, dim in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(dim, str) and isinstance(size, torch.SymInt):
                names[size.node.expr] = dim
    return names


def _symbolic(shape: Any, symbols: dict[Any, str]) -> tuple[int | str, ...]:
    out: list[int | str] = []
    for size in shape:
        if isinstance(size, torch.SymInt):
            import sympy

            expr = size.node.expr
            named = {s: sympy.Symbol(n) for s, n in symbols.items()}
            out.append(str(expr.xreplace(named)))
        else:
            out.append(int(size))
    return tuple(out)
