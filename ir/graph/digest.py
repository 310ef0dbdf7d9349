"""One number for what a program computes and carries: the key of resume and of provenance."""

from __future__ import annotations

import hashlib
import json
import operator
from dataclasses import asdict
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.program import Program

_TENSOR_DIGESTS: Any = WeakIdKeyDictionary()
"""Digest per live tensor. Programs share tensors and never write to them, so a chain of passes
hashes each weight once; the version counter guards against a write all the same."""


def digest(program: Program) -> str:
    """sha256 (hex) over graph, tensors, signature, examples, aliases, provenance and facts.

    Equal before and after `save` and `load`, and in every process. Shapes recorded on nodes and
    source lines are left out: they follow from the rest, or do not matter.
    """
    total = hashlib.sha256()
    for name, tensor in program.state.items():
        kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
        total.update(f"{name} {kind} {tensor.requires_grad} {tensor_digest(tensor)}\n".encode())
    for tensor in program.examples:
        total.update(tensor_digest(tensor).encode())
    for line in _graph_lines(program.graph):
        total.update(line.encode())
    rest = {
        "signature": program.signature.to_json(),
        "aliases": {name: list(names) for name, names in program.aliases.items()},
        "provenance": [asdict(entry) for entry in program.provenance],
        "facts": dict(program.facts),
    }
    total.update(json.dumps(rest, sort_keys=True).encode())
    return total.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 (hex) over dtype, shape and values (not strides); remembered per tensor object."""
    known = _TENSOR_DIGESTS.get(tensor)
    if known is not None and known[0] == tensor._version:
        return str(known[1])
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    data = tensor.detach().resolve_conj().resolve_neg()
    # Row by row where a copy is needed, so that no second model is made in memory.
    pieces = [data] if data.device.type == "cpu" and data.is_contiguous() else list(_rows(data))
    for piece in pieces:
        flat = piece.cpu().contiguous().reshape(-1)
        if flat.numel():
            found.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    _TENSOR_DIGESTS[tensor] = (tensor._version, found.hexdigest())
    return found.hexdigest()


def _rows(data: torch.Tensor) -> Any:
    return data.unbind(0) if data.dim() and data.shape[0] <= 4096 else (data,)


def _graph_lines(graph: fx.Graph) -> Any:
    """One line per call. Where `get_attr` and `getitem` nodes stand and how they are called does
    not count: saving merges equal ones and puts them behind their producer."""
    for node in graph.nodes:
        if node.op in ("call_function", "placeholder") and node.target is not operator.getitem:
            arguments = _text((node.args, node.kwargs))
            record = {k: v for k, v in sorted(gw_meta(node).items()) if k != "source"}
            scope = list(dict(node.meta.get("nn_module_stack", {})).values())[-1:]
            yield f"{node.name} {node.target} {arguments} {record} {scope}\n"
        elif node.op == "output":
            yield f"{_text(node.args)}\n"


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        if value.op == "get_attr":
            return f"state({value.target})"
        if value.target is operator.getitem:
            return f"item({_text(value.args)})"
        return f"node({value.name})"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_text(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(_text(part) for part in value) + "]"
    return repr(value)
