"""A Program as a `torch.export.ExportedProgram`, and back, without tracing again.

`to_exported_program` lifts the graph: every tensor of the state becomes a placeholder in front of
the inputs, and the signature says which. It copies no weights and costs milliseconds where an
export costs seconds. `from_exported_program` takes a lifted graph apart again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.arrange import KEPT
from graphwright.ir.graph.nodes import fake_mode_of
from graphwright.ir.program import Program


def to_exported_program(program: Program) -> ExportedProgram:
    """The program as an ExportedProgram that shares its tensors.

    Inputs are positional, in signature order, under their own names; parameters and buffers keep
    their qualified names; range constraints are the signature's. Torch's verifier has accepted it.

    Raises:
        ModelError: torch's verifier refuses the graph; says why.
    """
    graph = fx.Graph()
    mapping = _lift_state(program, graph)
    inputs = _copy_calls(program.graph, graph, mapping)
    outputs = graph.output_node().args[0]
    specs = [_state_spec(name, tensor, mapping[name].name) for name, tensor in _ordered(program)]
    specs += [InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None) for n in inputs]
    results = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in outputs]  # type: ignore[union-attr,arg-type]
    from torch._export.verifier import SpecViolationError, TrainingIRVerifier

    try:
        exported = ExportedProgram(
            root=torch.nn.Module(),
            graph=graph,
            graph_signature=ExportGraphSignature(specs, results),
            state_dict=dict(program.state),
            range_constraints=_range_constraints(program),
            module_call_graph=[_call_entry(program, len(results))],
            example_inputs=(tuple(program.examples), {}),
            constants={},
            verifiers=[TrainingIRVerifier],
        )
    except (SpecViolationError, RuntimeError) as error:
        raise ModelError(
            f"the graph is not one torch.export accepts: {innermost(error)}"
        ) from error
    # Guards name the arguments of the model that was traced; these inputs have names of their own.
    exported._guards_code = []
    return exported


def _ordered(program: Program) -> list[tuple[str, torch.Tensor]]:
    """Parameters first, then buffers, each in state order, as torch.export has them."""
    items = list(program.state.items())
    return sorted(items, key=lambda item: not isinstance(item[1], torch.nn.Parameter))


def _lift_state(program: Program, graph: fx.Graph) -> dict[Any, fx.Node]:
    """Placeholders for the state, under the names of the `get_attr` nodes they stand for."""
    readers: dict[str, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), []).append(node)
    missing = [name for name in readers if name not in program.state]
    if missing:
        raise ModelError(f"the graph reads {missing[0]!r}, which the program's state lacks")
    taken = {node.name for node in program.graph.nodes}
    mode = fake_mode_of(program.graph)
    mapping: dict[Any, fx.Node] = {}
    for index, (name, tensor) in enumerate(_ordered(program)):
        nodes = readers.get(name, [])
        label = nodes[0].name if nodes else _free_name(f"unused_state_{index}", taken)
        lifted = graph.create_node("placeholder", label, name=label)
        lifted.name = label
        if nodes:
            lifted.meta = {key: nodes[0].meta[key] for key in KEPT if key in nodes[0].meta}
        else:
            with torch.no_grad():
                fake = mode.from_tensor(tensor.detach(), static_shapes=True)
            lifted.meta = {"val": fake}
        mapping[name] = lifted
        mapping.update(dict.fromkeys(nodes, lifted))
    return mapping


def _free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _copy_calls(old: fx.Graph, new: fx.Graph, mapping: dict[Any, fx.Node]) -> list[fx.Node]:
    """Copies everything but the state; returns the placeholders of the user's inputs."""
    for node in old.find_nodes(op="placeholder"):
        mapping[node] = new.create_node("placeholder", node.name, name=node.name)
        mapping[node].name = node.name
    inputs = [mapping[node] for node in old.find_nodes(op="placeholder")]
    for node in old.nodes:
        if node in mapping:
            continue
        mapping[node] = new.node_copy(node, lambda n: mapping[n])
        mapping[node].name = node.name
    for node in old.nodes:
        if node.op in ("placeholder", "call_function"):
            mapping[node].meta = {key: node.meta[key] for key in KEPT if key in node.meta}
    output = new.output_node()
    output.meta["val"] = tuple(n.meta["val"] for n in output.args[0])  # type: ignore[union-attr]
    return inputs


def _state_spec(name: str, tensor: torch.Tensor, node_name: str) -> InputSpec:
    if isinstance(tensor, torch.nn.Parameter):
        return InputSpec(InputKind.PARAMETER, TensorArgument(node_name), name)
    return InputSpec(InputKind.BUFFER, TensorArgument(node_name), name, persistent=True)


def _call_entry(program: Program, count: int) -> ModuleCallEntry:
    leaf: Any = None
    arguments: Any = ((leaf,) * len(program.signature.inputs), {})
    result = _containers(program.signature.structure)
    out_spec = pytree.tree_structure(result)
    if out_spec.num_leaves != count:
        out_spec = pytree.tree_structure((leaf,) * count)
    names = [spec.name for spec in program.signature.inputs]
    signature = ModuleCallSignature([], [], pytree.tree_structure(arguments), out_spec, names)
    return ModuleCallEntry("", signature)


def _containers(structure: Any) -> Any:
    """Plain containers in the shape of the model's output; constants of it are left out."""
    ((kind, body),) = structure.items()
    if kind in ("tuple", "list", "state"):
        parts = [_containers(part) for part in body if "value" not in part]
        return parts if kind == "list" else tuple(parts)
    if kind in ("dict", "named"):
        return {key: _containers(part) for key, part in body.items() if "value" not in part}
    return 0


def _range_constraints(program: Program) -> dict[Any, Any]:
    """Range of every symbol: the signature's for named dimensions, torch's own for the rest."""
    import sympy
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    ranges: dict[Any, Any] = {}
    placeholders = program.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, program.signature.inputs, strict=True):
        for size, dim in zip(node.meta["val"].shape, spec.shape, strict=True):
            named = isinstance(dim, str) and dim in program.signature.dims
            if named and isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                bounds = program.signature.dims[str(dim)]
                high = int_oo if bounds.max is None else bounds.max
                ranges[size.node.expr] = ValueRanges(bounds.min, high)
    env = fake_mode_of(program.graph).shape_env
    if env is not None:
        values = (node.meta.get("val") for node in program.graph.nodes)
        for symbol in sorted(_symbols(values), key=str):
            if isinstance(symbol, sympy.Symbol) and symbol not in ranges:
                ranges[symbol] = env.var_to_range.get(symbol, ValueRanges(0, int_oo))
    return ranges


def _symbols(values: Iterable[Any]) -> set[Any]:
    found: set[Any] = set()
    for leaf in pytree.tree_leaves(list(values)):
        sizes = (*leaf.shape, *leaf.stride()) if isinstance(leaf, torch.Tensor) else (leaf,)
        for size in sizes:
            if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
                found |= size.node.expr.free_symbols
    return found


def from_exported_program(exported: ExportedProgram) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """Flat graph and state of an ExportedProgram, without running or tracing it.

    The graph has a placeholder per tensor input (named as the node was), `get_attr` nodes in
    front of them whose targets are qualified names, and one flat tuple of nodes as output.
    Arguments that were baked in are gone. `exported` is not changed; tensors are shared.

    Raises:
        ModelError: the program writes to its inputs or buffers, or returns a constant.
    """
    tensors: Mapping[str, Any] = {**exported.constants, **exported.state_dict}
    signature = exported.graph_signature
    kept = signature.output_specs
    odd = [s for s in kept if s.kind != OutputKind.USER_OUTPUT]
    if odd:
        raise ModelError(
            f"the program writes to {odd[0].target!r} when it runs",
            fix="Export the model in eval mode, under torch.no_grad().",
        )
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    state: dict[str, torch.Tensor] = {}
    placeholders = exported.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            if not isinstance(spec.arg, ConstantArgument):
                mapping[node] = graph.create_node("placeholder", node.name, name=node.name)
            continue
        name = str(spec.target)
        if not isinstance(tensors.get(name), torch.Tensor):
            raise ModelError(f"the program holds {name!r}, which is not a tensor")
        state[name] = tensors[name]
        if node.users:
            mapping[node] = graph.create_node("get_attr", name, name=node.name)
    for node, made in mapping.items():
        made.name = node.name
        made.meta = {key: node.meta[key] for key in KEPT if key in node.meta}
    _copy_body(exported.graph, graph, mapping)
    return graph, state


def _copy_body(old: fx.Graph, new: fx.Graph, mapping: dict[fx.Node, fx.Node]) -> None:
    for node in old.nodes:
        if node.op == "get_attr":
            raise ModelError(
                f"control flow at {node.name!r} became a subgraph, which passes cannot see",
                fix="Replace torch.cond / while_loop / map by plain operations.",
            )
        # Torch's reader makes a getitem for every result of a call, used or not.
        is_dead = node.target is operator.getitem and not node.users
        if node.op != "call_function" or is_dead:
            continue
        mapping[node] = new.node_copy(node, lambda n: mapping[n])
        mapping[node].name = node.name
        mapping[node].meta = {key: node.meta[key] for key in KEPT if key in node.meta}
    results = old.output_node().args[0]
    results = results if isinstance(results, tuple | list) else (results,)
    if not all(isinstance(result, fx.Node) for result in results):
        raise ModelError("the program returns a constant beside its tensors")
    new.output(tuple(mapping[result] for result in results))  # type: ignore[index]
