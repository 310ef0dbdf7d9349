"""Saved artifacts read with suspicion: what an ONNX file names must lie inside it or beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from graphwright.backends.onnxruntime.adapters import Switch
from graphwright.ir.errors import ModelError
from graphwright.ir.generation.record import Generation
from graphwright.ir.signature import Signature

_LOADS_FILES = frozenset({"EPContext"})
"""Operators whose kernels open a file that the model names."""


@dataclass(frozen=True)
class Record:
    """What an artifact says of itself.

    Attributes:
        signature: inputs, outputs and structure, as the program's.
        switch: the adapters that it takes; None where it takes none.
        generation: the record of a decoder with a cache; None for others.
        shares_cache: whether past and present may be one buffer.
    """

    signature: Signature
    switch: Switch | None
    generation: Generation | None
    shares_cache: bool


def read_record(path: Path) -> Record:
    """The record of an artifact.

    Weights beside the file are not read, but checked.

    Raises:
        ModelError: damaged, not written by us, or it names a file that is not beside it.
    """
    where = str(path)
    try:
        head = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises what its version does
        raise ModelError("not a readable ONNX file", where=where) from error
    record = {item.key: item.value for item in head.metadata_props}.get("graphwright")
    if record is None:
        raise ModelError(
            "carries no graphwright metadata",
            where=where,
            fix="Only artifacts that Graphwright wrote are opened.",
        )
    for operator in sorted({node.op_type for node in _nodes(head)} & _LOADS_FILES):
        raise ModelError(f"operator {operator} opens a file of the model's choice", where=where)
    for tensor in _tensors(head):
        _check_place(tensor, path)
    try:
        whole = json.loads(record)
        taken, generates = whole.get("adapters"), whole.get("generation")
        return Record(
            Signature.from_json(whole["signature"]),
            Switch(taken["base"], taken["shapes"]) if taken else None,
            Generation.from_json(generates) if generates else None,
            bool(whole.get("cache")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            "the record of this artifact is damaged",
            where=where,
            details=(f"{type(error).__name__}: {error}"[:300],),
        ) from error


def _check_place(tensor: onnx.TensorProto, path: Path) -> None:
    """Weights outside of the model file lie in a file beside it, which is long enough."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    facts = {item.key: item.value for item in tensor.external_data}
    name = facts.get("location", "")
    where = f"{path}: tensor {tensor.name!r}"
    if not name or name != Path(name).name or "\\" in name or name in (".", ".."):
        raise ModelError(f"its bytes lie outside the folder, in {name!r}", where=where)
    data = path.parent / name
    if not data.is_file() or data.is_symlink():
        raise ModelError(f"its bytes are said to lie in {name!r}, which is no file", where=where)
    try:
        start, length = int(facts.get("offset") or 0), int(facts.get("length") or 0)
    except ValueError:
        start = length = -1
    if start < 0 or length < 0 or start + length > data.stat().st_size:
        raise ModelError(f"its bytes lie beyond the end of {name!r}", where=where)


def _graphs(model: onnx.ModelProto) -> Iterator[Any]:
    """The graph, those nested in its nodes, and functions."""
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                pending += [*attribute.graphs]
                if attribute.HasField("g"):
                    pending.append(attribute.g)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return (node for graph in _graphs(model) for node in graph.node)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(model):
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            for sparse in (*attribute.sparse_tensors, attribute.sparse_tensor):
                yield from (sparse.values, sparse.indices)
