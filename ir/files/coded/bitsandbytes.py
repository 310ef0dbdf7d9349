"""Checkpoints of bitsandbytes as transformers stores them.

4 bits (nf4, fp4), blocks over the flattened weight, two codes to a byte, the first high:

    weight                            packed codes, uint8, or another dtype over the same bytes
    weight.absmax                     scale of every block: float, or uint8 codes of `dynamic`
    weight.quant_map                  the 16 levels
    weight.nested_absmax, .nested_quant_map    scales and levels of the scales' codes
    weight.quant_state.bitsandbytes__nf4       JSON in bytes: shape, dtype, block sizes, offset

8 bits: `weight` int8 (out, in), `SCB` (out,) with 127 times the scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.forms import Integers
from graphwright.ir.files.coded.layout import Layer, Layout
from graphwright.ir.ops.table import levels
from graphwright.ir.stored.table import SCALE_BLOCK, Table

STATE = "weight.quant_state.bitsandbytes__"


class BitsAndBytes(Layout):
    """A checkpoint of bitsandbytes."""

    name = "bitsandbytes"
    parts = ("weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map",
             "weight.nested_absmax", "weight.nested_quant_map", f"{STATE}nf4",
             f"{STATE}fp4")  # fmt: skip

    def owners(self, tensors: Mapping[str, Tensor]) -> list[str]:
        marks = (".SCB", ".weight.absmax")
        return [
            name.removesuffix(mark) for name in tensors for mark in marks if name.endswith(mark)
        ]

    def read(self, owner: str, parts: Mapping[str, Tensor]) -> Layer:
        if "SCB" in parts:
            note = ("inputs of 8-bit layers are left in float, where bitsandbytes rounds all but "
                    "the largest")  # fmt: skip
            if note not in self.notes:
                self.notes.append(note)
            return Layer(Integers(parts["weight"], parts["SCB"].float() / 127, None))
        return Layer(_four_bits(parts))


def _four_bits(parts: Mapping[str, Tensor]) -> Table:
    name = next(part for part in parts if part.startswith(STATE))
    state: dict[str, Any] = json.loads(bytes(parts[name].tolist()))
    table = str(state["quant_type"])
    _check_levels(parts["weight.quant_map"], table)
    shape = tuple(int(size) for size in state["shape"])
    codes = parts["weight"].contiguous().view(torch.uint8).flatten()
    absmax, block = parts["weight.absmax"], int(state["blocksize"])
    if "weight.nested_absmax" not in parts:
        return Table(codes, absmax.float(), None, table, block, shape)
    _check_levels(parts["weight.nested_quant_map"], "dynamic")
    if int(state["nested_blocksize"]) != SCALE_BLOCK:
        raise ModelError(f"scales in blocks of {state['nested_blocksize']} are not read")
    offset = torch.tensor(float(state["nested_offset"]))
    return Table(codes, None, (absmax, parts["weight.nested_absmax"].float(), offset), table, block,
                 shape)  # fmt: skip


def _check_levels(stored: Tensor, table: str) -> None:
    """The levels are a part of the file: ours must be the same ones."""
    if table not in ("nf4", "fp4", "dynamic"):
        raise ModelError(f"codes of the table {table!r} are not read; nf4 and fp4 are")
    if not torch.allclose(stored.float(), levels(table), atol=1e-6, rtol=0):
        raise ModelError(f"the levels of the file are not those of {table}")
