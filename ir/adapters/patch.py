"""Robust weight signatures: what makes a model robust, as a patch for other models of its kind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.atomic import write_atomically
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.safetensor_files import read_safetensors
from graphwright.ir.graph.digest import tensor_digest
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import Layer, layers, select
from graphwright.ir.program import Program

Codes = Literal["linear", "log", "tanh"]

FORMAT = "graphwright robust weight signature, 1"
LEAST = 2.0**-16
"""Smallest magnitude of `log` codes, as a share of the largest."""

Stored = Program | Mapping[str, Tensor]


@dataclass(frozen=True)
class Patch:
    """A signature: what is added to weights, and norms that take the place of others.

    Attributes:
        changes: by the name of the stored tensor, float32.
        norms: whole tensors of batch norms of the robust model, by name.
    """

    changes: Mapping[str, Tensor]
    norms: Mapping[str, Tensor] = field(default_factory=dict)


def signature(robust: Tensor, pretrained: Tensor, standard: Tensor) -> Tensor:
    """d - (<d, u> / |u|^2) u with d = robust - pretrained and u = standard - pretrained; float64.

    Where the standard model is the pretrained one there is no direction to take out.

    Source: Cai et al. 2023, "Robust Weight Signatures: Gaining Robustness as Easy as Patching
    Weights?", equation 3.
    """
    start = pretrained.detach().double()
    d, u = robust.detach().double() - start, standard.detach().double() - start
    length = u.square().sum()
    return d if not length else d - (d * u).sum() / length * u


def extract_patch(
    standard: Program,
    robust: Stored,
    pretrained: Stored,
    *,
    first: int = 7,
    targets: Sequence[str] = ("*",),
) -> Patch:
    """The signature of a robust model, from it, a standard one and the start of both.

    Args:
        standard: fine-tuned from `pretrained` on clean data; its graph says which layers come
            first.
        robust: fine-tuned from `pretrained` on the same data with a corruption: a program, or
            tensors by name.
        pretrained: the common start.
        first: layers that have a part in it, the first ones; the last layer, which is the task's
            own, never has.
        targets: of which they are the first: selector patterns.

    Raises:
        ModelError: a tensor is missing in one of the models, or has another shape; all are named.
    """
    of_robust, start = (_tensors(model) for model in (robust, pretrained))
    products = layers(standard, PRODUCTS)
    last = products[-1].weight if products else ""
    chosen = [layer for layer in select(standard, targets, PRODUCTS) if layer.weight != last]
    names = dict.fromkeys(name for layer in chosen[:first] for name in _of_layer(layer))
    norms = dict.fromkeys(name for layer in layers(standard, {"batch_norm"})
                          for name in _of_norm(layer))  # fmt: skip
    own = dict(standard.state)
    for what, model in (("robust", of_robust), ("pretrained", start)):
        asked = {n: own[n] for n in (*names, *(norms if what == "robust" else ()))}
        refuse_other_base(asked, model, f"the {what} model")
    changes = {}
    for name in names:
        if torch.equal(own[name], start[name].to(own[name].dtype)):
            warnings.warn(f"{name}: the standard model is the pretrained one here, and nothing is "
                          "projected out", stacklevel=2)  # fmt: skip
        changes[name] = signature(of_robust[name], start[name], own[name]).float()
    return Patch(changes, {name: of_robust[name].detach().clone() for name in norms})


def refuse_other_base(asked: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raises ModelError where a tensor is missing or of another shape; names all with shapes."""
    wrong = []
    for name, tensor in asked.items():
        shape = tuple(tensor.shape)
        if name not in given:
            wrong.append(f"{name}: {shape}, and there is none")
        elif tuple(given[name].shape) != shape:
            wrong.append(f"{name}: {shape}, and there it is {tuple(given[name].shape)}")
    if wrong:
        raise ModelError(f"{what} is of another architecture: {len(wrong)} tensors do not fit",
                         details=tuple(wrong))  # fmt: skip


def _tensors(model: Stored) -> Mapping[str, Tensor]:
    return model.original_state_dict() if isinstance(model, Program) else model


def _of_layer(layer: Layer) -> list[str]:
    """Names of a layer's own weight and bias."""
    nodes = [n for n in layer.node.all_input_nodes if n.op == "get_attr"]
    return [str(n.target) for n in nodes]


def _of_norm(layer: Layer) -> list[str]:
    arguments = full_arguments(layer.node)[0][1:5]
    return [str(n.target) for n in arguments if getattr(n, "op", "") == "get_attr"]


# ---- files


def save_patch(
    patch: Patch, path: str | Path, *, bits: int | None = 8, codes: Codes = "linear"
) -> None:
    """Writes a patch to one safetensors file.

    Args:
        patch: the patch.
        path: of the file.
        bits: of every entry, 2 to 8, between the least and the largest of its tensor; None stores
            float32.
        codes: steps that are equal in the entry, in its logarithm (beside a sign), or in its tanh.

    Raises:
        ArgumentError: bits are out of range.
    """
    from safetensors.torch import save

    if bits is not None and not 2 <= bits <= 8:
        raise ArgumentError(f"bits of a patch are 2 to 8, or None, and not {bits}")
    tensors: dict[str, Tensor] = {}
    rows: dict[str, Any] = {}
    for name, change in patch.changes.items():
        row: dict[str, Any] = {"shape": list(change.shape)}
        if bits is None:
            tensors[name] = change.float().contiguous()
        else:
            packed, low, high = encode(change, bits, codes)
            tensors[name] = packed
            row |= {"bits": bits, "codes": codes, "low": low, "high": high}
        rows[name] = row | {"digest": tensor_digest(tensors[name])}
    for name, tensor in patch.norms.items():
        key = f"norm:{name}"
        tensors[key] = tensor.detach().contiguous()
        rows[key] = {"shape": list(tensor.shape), "digest": tensor_digest(tensors[key])}
    metadata = {"format": "pt", "patch": json.dumps({"format": FORMAT, "tensors": rows})}
    write_atomically(Path(path), save(tensors, metadata))


def load_patch(path: str | Path) -> Patch:
    """Reads a file that `save_patch` wrote.

    Raises:
        ModelError: it is none, or damaged.
    """
    from safetensors import safe_open

    where = str(path)
    tensors = read_safetensors(Path(path))
    with safe_open(where, "pt") as file:
        text = (file.metadata() or {}).get("patch", "{}")
    try:
        record = json.loads(text)
        rows = dict(record["tensors"])
        is_ours = record["format"] == FORMAT and set(rows) == set(tensors)
    except (ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise ModelError("this is no patch", where=where, fix="gw.save_patch writes one.")
    changes, norms = {}, {}
    for key, tensor in tensors.items():
        row = rows[key]
        if row.get("digest") != tensor_digest(tensor):
            raise ModelError(f"the patch is damaged: {key!r} is not what was saved", where=where)
        if key.startswith("norm:"):
            norms[key.removeprefix("norm:")] = tensor
        elif "bits" in row:
            changes[key] = decode(tensor, row)
        else:
            changes[key] = tensor
    return Patch(changes, norms)


def encode(change: Tensor, bits: int, codes: Codes) -> tuple[Tensor, float, float]:
    """Codes of a tensor, packed, and the ends of their range."""
    values = change.detach().double().flatten()
    levels = 2 ** (bits - 1 if codes == "log" else bits) - 1
    moved = _forth(values, codes)
    low, high = float(moved.min()), float(moved.max())
    step = (high - low) / levels or 1.0
    numbers = ((moved - low) / step).round().to(torch.uint8)
    if codes == "log":
        numbers += (values < 0).to(torch.uint8) << (bits - 1)
    planes = np.unpackbits(numbers.numpy()[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(planes)), low, high


def decode(packed: Tensor, row: Mapping[str, Any]) -> Tensor:
    """The tensor of packed codes, float32."""
    bits, codes, shape = int(row["bits"]), row["codes"], tuple(row["shape"])
    count = prod(shape)
    planes = np.unpackbits(packed.numpy())[: count * bits].reshape(count, bits)
    weights = 1 << np.arange(bits - 1, -1, -1)
    numbers = torch.from_numpy((planes * weights).sum(1))
    sign = torch.ones(count, dtype=torch.float64)
    if codes == "log":
        sign = torch.where(numbers >= 1 << (bits - 1), -1.0, 1.0).double()
        numbers = numbers % (1 << (bits - 1))
    levels = 2 ** (bits - 1 if codes == "log" else bits) - 1
    moved = row["low"] + numbers.double() * ((row["high"] - row["low"]) / levels)
    if codes == "log":
        moved = moved.exp2()
    elif codes == "tanh":
        moved = moved.atanh()
    found: Tensor = (sign * moved).float().reshape(shape)
    return found


def _forth(values: Tensor, codes: Codes) -> Tensor:
    if codes == "linear":
        return values
    if codes == "tanh":
        return values.tanh()
    size = values.abs()
    return size.clamp_min(float(size.max()) * LEAST or 1.0).log2()
