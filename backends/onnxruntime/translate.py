"""Program to ONNX, directly from the traced graph: no retracing and no decomposition."""

from __future__ import annotations

import json
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import fx

from graphwright.backends.onnxruntime import aten
from graphwright.backends.onnxruntime.adapters import FACT, expose, switch_record
from graphwright.backends.onnxruntime.aten.contrib import by_face
from graphwright.backends.onnxruntime.cache import (
    cache_record,
    drop_positions,
    onnx_names,
    place_cache_sizes,
)
from graphwright.backends.onnxruntime.decompose import computed_ahead, taken_apart
from graphwright.backends.onnxruntime.emitter import (
    Emitter,
    Untranslatable,
    onnx_dtype,
    sizes_of,
)
from graphwright.backends.onnxruntime.pads import guard_pads
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.ops import OPS
from graphwright.ir.program import Program

IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
"""ONNX file format version by opset; runtimes refuse files newer than they need to be."""


def dimension_names(program: Program) -> dict[Any, str]:
    """sympy symbol of each dynamic dimension to its name in the signature."""
    names: dict[Any, str] = {}
    for node, spec in zip(_placeholders(program), program.signature.inputs, strict=True):
        for size, dim in zip(sizes_of(node), spec.shape, strict=True):
            if isinstance(dim, str) and not isinstance(size, int) and size.is_Symbol:
                names.setdefault(size, dim)
    return names


def _placeholders(program: Program) -> list[fx.Node]:
    return list(program.graph.find_nodes(op="placeholder"))


def translate(program: Program, opset: int) -> ir.Model:
    """The program as an ONNX model with its names, dynamic dimensions and metadata.

    Raises:
        Untranslatable: a node that has no exact form here; the standard exporter may know it.
    """
    return translate_with_values(program, opset)[0]


def translate_with_values(
    program: Program, opset: int, without: list[Untranslatable] | None = None
) -> tuple[ir.Model, dict[fx.Node, Any]]:
    """As `translate`, with the ONNX value of every node of the program's graph.

    Args:
        program, opset: as for `translate`.
        without: takes the nodes that have no translation, instead of the first being raised; the
            model is then of no use.
    """
    table = aten.load()
    e = Emitter(program.state, dimension_names(program), opset)
    names = onnx_names(program)
    inputs = []
    for node, spec in zip(_placeholders(program), program.signature.inputs, strict=True):
        value = ir.Value(name=e.name(names.get(spec.name, spec.name)))
        value.shape = ir.Shape(list(spec.shape))
        value.type = ir.TensorType(onnx_dtype(node.meta["val"].dtype))
        e.values[node] = value
        e.place(node, value)
        inputs.append(value)
    place_cache_sizes(e, program)
    for spec in program.signature.outputs:
        e.name(names.get(spec.name, spec.name))
    for node in program.graph.nodes:
        if node.op == "get_attr":
            packed = gw_meta(node).get("packed")
            if packed is not None:
                e.values[node] = e.packed_weight(str(node.target), *packed)
            elif not node.meta["val"].dtype.is_complex and not _only_transposed(node):
                e.values[node] = e.weight(str(node.target))
        elif node.op == "call_function":
            try:
                _translate_node(e, table, node)
            except Untranslatable as why:
                if without is None:
                    raise
                without.append(why)
                e.values[node] = _stand_in(e, node)
    outputs = _outputs(e, program)
    domains = dict(e.domains)
    graph = ir.Graph(
        inputs, outputs, nodes=e.nodes, initializers=list(e.initializers.values()),
        opset_imports=domains, name="graphwright",
    )  # fmt: skip
    model = ir.Model(
        graph, ir_version=IR_VERSIONS[opset], producer_name="graphwright", functions=e.functions
    )
    RemoveUnusedNodesPass()(model)
    drop_positions(model, program)
    expose(model, program)
    finish(model, program)
    return model, e.values


def untranslatable(program: Program, opset: int) -> list[Untranslatable]:
    """Every node that has no translation of its own here, in order; those behind it are tried."""
    found: list[Untranslatable] = []
    translate_with_values(program, opset, found)
    return found


def _only_transposed(node: fx.Node) -> bool:
    linear = torch.ops.aten.linear.default
    return node.meta["val"].dim() == 2 and all(
        user.target is linear
        and user.args[1] is node
        and node not in (user.args[0], *user.args[2:])
        for user in node.users
    )


def _stand_in(e: Emitter, node: fx.Node) -> Any:
    """Values of the right types for a node that has none."""
    fakes = node.meta["val"]
    one = isinstance(fakes, torch.Tensor)
    made = []
    for fake in [fakes] if one else fakes:
        value = e.op("Identity", None)
        value.shape = ir.Shape(e.shape_names(fake.shape))
        value.type = ir.TensorType(onnx_dtype(fake.dtype))
        made.append(value)
    if one:
        e.place(node, made[0])
    return made[0] if one else made


def _own_op(node: fx.Node) -> Any:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "graphwright":
        return OPS.get(target._schema.name.split("::")[1])
    return None


def _translate_node(e: Emitter, table: dict[Any, Any], node: fx.Node) -> None:
    fake = node.meta.get("val")
    e.begin(node)
    if node.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        e.place_number(node, e.values[source], source.meta["val"].dtype)
        return
    if not isinstance(fake, torch.Tensor | list | tuple):
        return  # A size: computed from its expression where it is used.
    own = _own_op(node)
    if own is not None and node.target not in table:
        result = by_face(e, node, own.onnx)
    else:
        try:
            result = _by_table(e, table, node)
        except Untranslatable as why:
            known = computed_ahead(e, node)
            result = _by_parts(e, table, node, why) if known is None else _stored(e, node, known)
    e.values[node] = result
    if isinstance(fake, torch.Tensor) and fake.dtype.is_complex:
        e.place(node, result[0])
    elif isinstance(fake, torch.Tensor):
        e.typed(result, node)
        e.place(node, result)


def _by_table(e: Emitter, table: dict[Any, Any], node: fx.Node) -> Any:
    if node.target not in table:
        raise Untranslatable(node, "no translation")
    try:
        return table[node.target](e, node, *node.args, **node.kwargs)
    except (KeyError, TypeError, AttributeError) as error:
        raise Untranslatable(node, f"unusual arguments ({error!r})") from error


def _stored(e: Emitter, node: fx.Node, results: list[torch.Tensor]) -> Any:
    """The results of a node as initializers."""
    values = [e.derived(node.name, result) for result in results]
    return values[0] if isinstance(node.meta["val"], torch.Tensor) else values


def _by_parts(e: Emitter, table: dict[Any, Any], node: fx.Node, why: Untranslatable) -> Any:
    """A node in terms of the operators that torch takes it apart into.

    Raises:
        Untranslatable: `why`, where torch cannot; else the first part without a translation.
    """
    found = taken_apart(node, table.keys())
    if found is None:
        raise why
    graph, given = found
    for placeholder, arg in zip(graph.find_nodes(op="placeholder"), given, strict=True):
        if arg in e.values:
            e.values[placeholder] = e.values[arg]
    for part in [node for node in graph.nodes if node.op == "call_function"]:
        part._rename(f"{node.name}_{part.name}")
        try:
            _translate_node(e, table, part)
        except Untranslatable as inner:
            reason = f"it comes down to {inner.node.target}, {inner.why}"
            raise Untranslatable(node, reason) from inner
    return fx.map_arg(graph.output_node().args[0], lambda part: e.values[part])


def _outputs(e: Emitter, program: Program) -> list[ir.Value]:
    """Graph outputs under the signature's names."""
    e.begin(program.graph.output_node())
    taken: set[int] = set()
    outputs = []
    names = onnx_names(program)
    sums = {total: name for name, total in program.signature.derived.items()}
    nodes = program.graph.output_node().args[0]
    assert isinstance(nodes, tuple | list)
    for node, spec in zip(nodes, program.signature.outputs, strict=True):
        value = e.values[node]
        if value.producer() is None or id(value) in taken or _is_shared(e, node, value):
            value = e.op("Identity", value)
            e.typed(value, node)
        taken.add(id(value))
        value.name = names.get(spec.name, spec.name)
        sizes = e.shape_names(node.meta["val"].shape)
        value.shape = ir.Shape([sums.get(str(size), size) for size in sizes])
        value.type = ir.TensorType(onnx_dtype(node.meta["val"].dtype))
        outputs.append(value)
    return outputs


def _is_shared(e: Emitter, node: fx.Node, value: ir.Value) -> bool:
    """Whether the value was first made for another node that has another dtype or shape."""
    return value.type is not None and value.type.dtype != onnx_dtype(node.meta["val"].dtype)


def finish(model: ir.Model, program: Program) -> None:
    """Guards its pads, puts our metadata into it, takes doc strings and node metadata out."""
    guard_pads(model)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.doc_string = None
        node.metadata_props.clear()
    model.doc_string = None
    model.graph.doc_string = None
    signature = program.signature
    record = {
        "signature": signature.to_json(),
        "aliases": {name: list(names) for name, names in program.aliases.items()},
        "passes": [{"id": p.id, "options": p.options, "seed": p.seed, "contract": p.contract}
                   for p in program.provenance],
    }  # fmt: skip
    record |= cache_record(program)
    if FACT in program.facts:
        record["adapters"] = switch_record(program)
    model.metadata_props["graphwright"] = json.dumps(record, sort_keys=True)
