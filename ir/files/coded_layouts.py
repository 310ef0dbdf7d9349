"""How GPTQ, AWQ and compressed-tensors checkpoints store a linear layer of few bits.

All three hold q, scale and zero with weight = (q - zero) * scale, groups of inputs sharing the
latter two; they differ in how codes lie in 32-bit words.

    gptq                qweight (in * bits / 32, out): a string of bits along the inputs, low first.
                        qzeros (groups, out * bits / 32): likewise along the outputs, less one in
                        the first version of the format. scales (groups, out). g_idx (in): group.
    awq                 qweight (in, out / 8): eight outputs a word, in the order 0 2 4 6 1 3 5 7.
                        qzeros (groups, out / 8): the same. scales (groups, out). 4 bits.
    compressed-tensors  weight_packed (out, words): 32 // bits inputs a word, low first.
                        weight_zero_point (words, groups): likewise along the outputs; absent in
                        symmetric schemes. weight_scale (out, groups). weight_shape: (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.ops.blocks import pack_codes, unpack_codes

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each nibble of a word holds, low nibble first."""

PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape",
                           "weight_g_idx"),
}  # fmt: skip
"""Names of a layer's tensors, the codes first, by format."""


@dataclass(frozen=True)
class Coded:
    """A linear layer's weight in codes.

    Attributes:
        q: (out, in) uint8.
        scale: (out, groups) float.
        zero: (out, groups) uint8; None for 2^(bits - 1) everywhere.
        order: (in,) int64 that brings inputs of one group side by side; None where they are.
            The columns of `q` are in that order.
        bits: 2 to 8.
        block: inputs of a group.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    bits: int
    block: int

    def value(self) -> Tensor:
        """The weight (out, in), inputs in their own order."""
        wide = self.scale.repeat_interleave(self.block, 1)[:, : self.q.shape[1]]
        middle: Tensor | int = 1 << (self.bits - 1)
        if self.zero is not None:
            middle = self.zero.repeat_interleave(self.block, 1)[:, : self.q.shape[1]]
            middle = middle.to(wide.dtype)
        weight = (self.q.to(wide.dtype) - middle) * wide
        return weight if self.order is None else weight[:, torch.argsort(self.order)]


def bytes_of(words: Tensor) -> Tensor:
    """int32 (..., n) as uint8 (..., 4 n), low byte first."""
    return words.contiguous().view(torch.uint8)


def words_of(values: Tensor) -> Tensor:
    """uint8 (..., 4 n) as int32 (..., n)."""
    return values.contiguous().view(torch.int32)


def string_along_rows(words: Tensor, count: int, bits: int) -> Tensor:
    """Codes (..., count) of a string of bits in words (..., count * bits / 32)."""
    codes: Tensor = unpack_codes(bytes_of(words), count, bits)
    return codes


def fields_along_rows(words: Tensor, count: int, bits: int) -> Tensor:
    """Codes (..., count) that lie 32 // bits in a word, no code across two words."""
    each = 32 // bits
    shifts = torch.arange(each, dtype=torch.int32) * bits
    codes: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count].to(torch.uint8)


def as_fields(codes: Tensor, bits: int) -> Tensor:
    """Undoes `fields_along_rows`."""
    each = 32 // bits
    wide = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % each))
    shifts = torch.arange(each) * bits
    words = (wide.unflatten(-1, (-1, each)) << shifts).sum(-1)
    # As signed words: bit 31 is the sign.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


# ---- gptq


def read_gptq(parts: Mapping[str, Tensor], bits: int, block: int, *, offset: int) -> Coded:
    """A layer of a GPTQ checkpoint.

    Args:
        parts: `qweight`, `qzeros`, `scales`, and `g_idx` where inputs were reordered.
        bits: 2, 3, 4 or 8.
        block: inputs of a group; -1 for all.
        offset: what stored zero points are less by: 1 in the first version, 0 in the second.
    """
    qweight, scales = parts["qweight"], parts["scales"]
    inputs, out = qweight.shape[0] * 32 // bits, qweight.shape[1]
    block = inputs if block < 1 else block
    q = string_along_rows(qweight.T, inputs, bits)
    stored = string_along_rows(parts["qzeros"], out, bits)
    zero = ((stored.to(torch.int16) + offset) & (2**bits - 1)).to(torch.uint8)
    order = group_order(parts.get("g_idx"), inputs, block)
    q = q if order is None else q[:, order]
    return Coded(q, scales.T.contiguous(), zero.T.contiguous(), order, bits, block)


def write_gptq(coded: Coded) -> dict[str, Tensor]:
    """A layer in the first version of the format.

    Raises:
        ModelError: sizes that do not fill words.
    """
    bits = coded.bits
    out, inputs = coded.q.shape
    _check_words("gptq", (out * bits, "outputs"), (inputs * bits, "inputs"))
    back = None if coded.order is None else torch.argsort(coded.order)
    q = coded.q if back is None else coded.q[:, back]
    zero = _zero_points(coded)
    stored = ((zero.to(torch.int16) - 1) & (2**bits - 1)).to(torch.uint8)
    groups = torch.arange(inputs) // coded.block
    return {
        "qweight": words_of(pack_codes(q, bits)).T.contiguous(),
        "qzeros": words_of(pack_codes(stored.T.contiguous(), bits)),
        "scales": coded.scale.T.contiguous(),
        "g_idx": (groups if back is None else groups[back]).to(torch.int32),
    }


def group_order(g_idx: Tensor | None, inputs: int, block: int) -> Tensor | None:
    """The order that sorts inputs by group; None where they are sorted.

    Raises:
        ModelError: groups that are not all of the block's size.
    """
    if g_idx is None or not g_idx.numel():
        return None
    wanted = torch.arange(inputs) // block
    if torch.equal(g_idx.long(), wanted):
        return None
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], wanted):
        raise ModelError(f"g_idx does not make groups of {block} inputs")
    return order


# ---- awq


def read_awq(parts: Mapping[str, Tensor], bits: int, block: int) -> Coded:
    """A layer of an AWQ checkpoint, version gemm.

    Args:
        parts: `qweight`, `qzeros`, `scales`.
        bits: 4.
        block: inputs of a group; -1 for all.
    """
    if bits != 4:
        raise ModelError(f"AWQ checkpoints of {bits} bits are not known; 4 are")
    inputs, out = parts["qweight"].shape[0], parts["scales"].shape[1]
    place = torch.argsort(torch.tensor(AWQ_ORDER))

    def outputs(words: Tensor) -> Tensor:
        codes = fields_along_rows(words, out, 4).unflatten(-1, (-1, 8))
        turned: Tensor = codes[..., place].flatten(-2)
        return turned

    q, zero = outputs(parts["qweight"]), outputs(parts["qzeros"])
    return Coded(
        q.T.contiguous(), parts["scales"].T.contiguous(), zero.T.contiguous(), None, 4,
        inputs if block < 1 else block,
    )  # fmt: skip


def write_awq(coded: Coded) -> dict[str, Tensor]:
    """A layer in the version gemm.

    Raises:
        ModelError: not 4 bits, reordered inputs, or outputs that do not fill words.
    """
    if coded.bits != 4 or coded.order is not None:
        raise ModelError("an AWQ checkpoint holds 4 bits, and inputs in their own order")
    _check_words("awq", (coded.q.shape[0] * 4, "outputs"))
    order = torch.tensor(AWQ_ORDER)

    def words(codes: Tensor) -> Tensor:
        turned = codes.T.unflatten(-1, (-1, 8))[..., order].flatten(-2)
        return as_fields(turned, 4)

    return {
        "qweight": words(coded.q),
        "qzeros": words(_zero_points(coded)),
        "scales": coded.scale.T.contiguous(),
    }


# ---- compressed-tensors


def read_compressed_tensors(parts: Mapping[str, Tensor], bits: int, block: int) -> Coded:
    """A layer of a compressed-tensors checkpoint, format pack-quantized.

    Args:
        parts: `weight_packed`, `weight_scale`, `weight_shape`, and where there are any
            `weight_zero_point` and `weight_g_idx`.
        bits: 2 to 8; signed codes, stored with 2^(bits - 1) added.
        block: inputs of a group; -1 for all.
    """
    out, inputs = (int(size) for size in parts["weight_shape"])
    block = inputs if block < 1 else block
    q = fields_along_rows(parts["weight_packed"], inputs, bits)
    scale = parts["weight_scale"].reshape(out, -1)
    zero = parts.get("weight_zero_point")
    if zero is not None:
        zero = fields_along_rows(zero.T, out, bits).T.contiguous()
    order = group_order(parts.get("weight_g_idx"), inputs, block)
    return Coded(q if order is None else q[:, order], scale, zero, order, bits, block)


def write_compressed_tensors(coded: Coded) -> dict[str, Tensor]:
    """A layer in the format pack-quantized."""
    out, inputs = coded.q.shape
    back = None if coded.order is None else torch.argsort(coded.order)
    q = coded.q if back is None else coded.q[:, back]
    found = {
        "weight_packed": as_fields(q, coded.bits),
        "weight_scale": coded.scale.contiguous(),
        "weight_shape": torch.tensor([out, inputs]),
    }
    if coded.zero is not None:
        found["weight_zero_point"] = as_fields(coded.zero.T, coded.bits).T.contiguous()
    if back is not None:
        found["weight_g_idx"] = (torch.arange(inputs) // coded.block)[back].to(torch.int32)
    return found


def _zero_points(coded: Coded) -> Tensor:
    if coded.zero is not None:
        return coded.zero
    return torch.full(tuple(coded.scale.shape), 1 << (coded.bits - 1), dtype=torch.uint8)


def _check_words(name: str, *sizes: tuple[int, str]) -> None:
    for size, what in sizes:
        if size % 32:
            raise ModelError(f"the {what} of a layer do not fill 32-bit words, as {name} asks")
