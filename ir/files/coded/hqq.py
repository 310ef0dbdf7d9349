"""Checkpoints of HQQ in safetensors: every layer carries its own description.

W_q                     codes of the weight as rows of groups, packed along the rows: the rows
                        are cut into 8 / bits stretches, the first in the high bits of a byte
                        (3 bits: ten stretches in the fields of an int32, the first the highest)
scale, zero             one for every group, float: weight = (q - zero) * scale
nbits, group_size, axis, shape, packing, ...     numbers and texts, each a tensor
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphwright.ir.files.coded.forms import Expanded
from graphwright.ir.files.coded.layout import Layer, Layout

_META = ("nbits", "group_size", "axis", "shape", "packing", "channel_wise", "compute_dtype",
         "encoded_state_dict", "optimize", "quant_scale", "quant_zero", "round_zero",
         "stores_quant_config", "unpack_view_dtype", "view_as_float")  # fmt: skip


class Hqq(Layout):
    """A checkpoint of HQQ. Its zero points are no codes, so weights are read as floats."""

    name = "HQQ"
    parts = ("W_q", "scale", "zero", *_META)

    def read(self, owner: str, parts: Mapping[str, Tensor]) -> Layer:
        bits, axis = int(parts["nbits"]), int(parts["axis"])
        out, inputs = (int(size) for size in parts["shape"])
        group = int(parts["group_size"]) if parts["group_size"].numel() else inputs
        count = out * inputs // group
        rows = count if axis == 1 else group
        q = unpack(parts["W_q"], bits, rows).float()
        weight = (q - parts["zero"].float()) * parts["scale"].float()
        return Layer(Expanded(weight.reshape(out, inputs), f"HQQ's {bits}-bit codes"))


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Codes (rows, n) of stretches of rows in the bits of bytes, or of an int32 for 3 bits."""
    if packed.is_floating_point():
        packed = packed.view(torch.int32 if bits == 3 else torch.uint8)
    each = 10 if bits == 3 else 8 // bits
    shifts = [bits * place for place in reversed(range(each))]
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in shifts])[:rows]
