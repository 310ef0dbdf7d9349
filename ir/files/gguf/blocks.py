"""Tensors of a GGUF file as our own forms, without rounding anything again.

Nearly all types are affine in blocks: weight = scale * (code - zero) + min. A block with a min of
its own keeps it apart (`Blocks.rest`), after the whole steps of the scale that lie in it went into
the zero point: what is left is half a step at most, so that rounded activations meet codes around
zero. Scales of two levels are multiplied, which float32 holds exactly. Types of 16
levels, which are whole numbers, become codes of 8 or 5 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.forms import Blocks, Expanded, Form
from graphwright.ir.files.gguf.reader import Stored

MOST_SUMMED = 1 << 27
"""Columns times blocks of a weight whose blocks have a minimum: the size of the matrix of ones that
sums the blocks of its inputs. A short file with one long row must not ask for all memory."""


@dataclass(frozen=True)
class Affine:
    """Blocks of a type: weight = scale * (code - zero) + minimum.

    Attributes:
        codes: (n, numbers of a block) uint8.
        scale: (n, groups of a block) float32.
        zero: of all codes; unused where there is a minimum.
        minimum: (n, groups of a block) float32, or None.
    """

    codes: Tensor
    scale: Tensor
    zero: int
    minimum: Tensor | None = None


FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Types that are numbers as torch has them."""

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Levels of IQ4_NL and IQ4_XS."""

FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Values of e2m1, doubled."""


def values_of(stored: Stored) -> Tensor | None:
    """The numbers of a tensor in a float type, in its shape; None for other types."""
    dtype = FLOATS.get(stored.type.name)
    if dtype is None:
        return None
    # A copy where the bytes do not begin at a whole number, which a view asks for.
    data = stored.data if stored.data.data_ptr() % dtype.itemsize == 0 else stored.data.clone()
    return data.view(dtype).reshape(stored.shape)


def form_of(stored: Stored) -> Form:
    """The form of a matrix.

    Args:
        stored: of a block type, (out, in).

    Raises:
        ModelError: a type that nobody here reads.
    """
    name = stored.type.name
    out, columns = stored.shape
    if name not in _READ:
        return Expanded(_by_the_package(stored), f"the blocks of {name}")
    read, bits, block = _READ[name]
    parts = read(stored.data.reshape(-1, stored.type.size))
    codes = parts.codes.reshape(out, columns)
    scale = parts.scale.reshape(out, -1).contiguous()
    if parts.minimum is None:
        middle = parts.zero == 1 << (bits - 1)
        zero = None if middle else torch.full(scale.shape, parts.zero, dtype=torch.uint8)
        return Blocks(codes, scale, zero, None, bits, block)
    zero, rest = split_minimum(scale, parts.minimum.reshape(scale.shape), bits)
    if not bool(rest.any()):
        return Blocks(codes, scale, zero, None, bits, block)
    if columns * scale.shape[1] > MOST_SUMMED:
        wide = (codes.unflatten(1, (-1, block)) - zero.unsqueeze(-1).float()) * scale.unsqueeze(-1)
        return Expanded((wide + rest.unsqueeze(-1)).flatten(1), f"{name} in rows so long")
    return Blocks(codes, scale, zero, None, bits, block, rest)


def split_minimum(scale: Tensor, minimum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A minimum as whole steps of its scale and what is left: minimum = rest - zero * scale.

    Args:
        scale, minimum: (out, groups) float32.
        bits: of the codes.

    Returns:
        zero (out, groups) uint8, and the rest float32, rounded once.
    """
    wide, low = scale.double(), minimum.double()
    steps = torch.where(wide == 0, 0.0, -low / torch.where(wide == 0, 1.0, wide))
    zero = torch.nan_to_num(steps).round().clamp(0, 2**bits - 1)
    return zero.to(torch.uint8), (low + zero * wide).float()


def _by_the_package(stored: Stored) -> Tensor:
    """The values of a type that has no form of ours, as llama.cpp's own package reads them."""
    name = stored.type.name
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        found = dequantize(stored.data.numpy(), GGMLQuantizationType[name])
    except (ImportError, NotImplementedError, KeyError) as error:
        raise ModelError(
            f"blocks of {name} are not read",
            fix="Convert the model to Q4_K, Q6_K, Q8_0 or another common type"
            + ("; or install the package gguf, which has their values." if
               isinstance(error, ImportError) else "."),
        ) from None  # fmt: skip
    return torch.from_numpy(found).reshape(stored.shape)


def _half(data: Tensor) -> Tensor:
    """Bytes (n, 2 k) as (n, k) float32 of half precision."""
    return data.contiguous().view(torch.float16).float()


def _spread(data: Tensor, bits: int, run: int) -> Tensor:
    """Fields of bytes as codes: of every `run` bytes, first all lowest fields, then the next ones.

    Args:
        data: (n, bytes) uint8.
        bits: of a field.
        run: bytes.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1)
    fields: Tensor = (data.unflatten(1, (-1, 1, run)) >> shifts) & (2**bits - 1)
    return fields.flatten(1)


def _nibbles(data: Tensor, run: int = 16) -> Tensor:
    return _spread(data, 4, run)


def _high_bits(data: Tensor) -> Tensor:
    """Bit i of a 32-bit word belongs to code i."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((data.unsqueeze(-1) >> shifts) & 1).flatten(1)


def _q4_0(data: Tensor) -> Affine:
    return Affine(_nibbles(data[:, 2:]), _half(data[:, :2]), 8)


def _q4_1(data: Tensor) -> Affine:
    return Affine(_nibbles(data[:, 4:]), _half(data[:, :2]), 0, _half(data[:, 2:4]))


def _q5_0(data: Tensor) -> Affine:
    codes = _nibbles(data[:, 6:]) | (_high_bits(data[:, 2:6]) << 4)
    return Affine(codes, _half(data[:, :2]), 16)


def _q5_1(data: Tensor) -> Affine:
    codes = _nibbles(data[:, 8:]) | (_high_bits(data[:, 4:8]) << 4)
    return Affine(codes, _half(data[:, :2]), 0, _half(data[:, 2:4]))


def _q8_0(data: Tensor) -> Affine:
    return Affine(data[:, 2:] ^ 128, _half(data[:, :2]), 128)  # from two's complement


def _q2_k(data: Tensor) -> Affine:
    scales, d, low = data[:, :16], _half(data[:, 80:82]), _half(data[:, 82:84])
    codes = _spread(data[:, 16:80], 2, 32)
    return Affine(codes, d * (scales & 15).float(), 0, -low * (scales >> 4).float())


def _q3_k(data: Tensor) -> Affine:
    codes = _spread(data[:, 32:96], 2, 32) | (_spread(data[:, :32], 1, 32) << 2)
    low, high = _nibbles(data[:, 96:104], 8), _spread(data[:, 104:108], 2, 4)
    scales = (low | (high << 4)).float() - 32
    return Affine(codes, _half(data[:, 108:110]) * scales, 4)


def _scales_of_k(data: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and mins (n, 8) of Q4_K and Q5_K, which 12 bytes hold."""
    scale, low, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([scale & 63, (rest & 15) | ((scale >> 2) & 48)], 1)
    lows = torch.cat([low & 63, (rest >> 4) | ((low >> 2) & 48)], 1)
    return scales.float(), lows.float()


def _q4_k(data: Tensor) -> Affine:
    scales, lows = _scales_of_k(data[:, 4:16])
    d, low = _half(data[:, :2]), _half(data[:, 2:4])
    return Affine(_nibbles(data[:, 16:], 32), d * scales, 0, -low * lows)


def _q5_k(data: Tensor) -> Affine:
    scales, lows = _scales_of_k(data[:, 4:16])
    d, low = _half(data[:, :2]), _half(data[:, 2:4])
    codes = _nibbles(data[:, 48:], 32) | (_spread(data[:, 16:48], 1, 32) << 4)
    return Affine(codes, d * scales, 0, -low * lows)


def _q6_k(data: Tensor) -> Affine:
    codes = _nibbles(data[:, :128], 64) | (_spread(data[:, 128:192], 2, 32) << 4)
    scales = data[:, 192:208].contiguous().view(torch.int8).float()
    return Affine(codes, _half(data[:, 208:]) * scales, 32)


def _levels(codes: Tensor, levels: tuple[int, ...], zero: int) -> Tensor:
    """Codes of whole-numbered levels as codes around `zero`."""
    table = torch.tensor([level + zero for level in levels], dtype=torch.uint8)
    return table[codes.long()]


def _iq4_nl(data: Tensor) -> Affine:
    codes = _levels(_nibbles(data[:, 2:]), IQ4_LEVELS, 128)
    return Affine(codes, _half(data[:, :2]), 128)


def _iq4_xs(data: Tensor) -> Affine:
    low = _nibbles(data[:, 4:8], 1)
    high = _spread(data[:, 2:4], 2, 1)
    scales = (low | (high << 4)).float() - 32
    codes = _levels(_nibbles(data[:, 8:]), IQ4_LEVELS, 128)
    return Affine(codes, _half(data[:, :2]) * scales, 128)


def _mxfp4(data: Tensor) -> Affine:
    powers = torch.tensor([math.ldexp(0.5, exponent - 127) for exponent in range(256)])
    scale = powers[data[:, :1].long()]
    return Affine(_levels(_nibbles(data[:, 1:]), FP4_LEVELS, 16), scale, 16)


def _tq2_0(data: Tensor) -> Affine:
    return Affine(_spread(data[:, :64], 2, 32), _half(data[:, 64:]), 1)


_READ: dict[str, tuple[Callable[[Tensor], Affine], int, int]] = {
    "Q4_0": (_q4_0, 4, 32),
    "Q4_1": (_q4_1, 4, 32),
    "Q5_0": (_q5_0, 5, 32),
    "Q5_1": (_q5_1, 5, 32),
    "Q8_0": (_q8_0, 8, 32),
    "Q2_K": (_q2_k, 2, 16),
    "Q3_K": (_q3_k, 3, 16),
    "Q4_K": (_q4_k, 4, 32),
    "Q5_K": (_q5_k, 5, 32),
    "Q6_K": (_q6_k, 6, 16),
    "IQ4_NL": (_iq4_nl, 8, 32),
    "IQ4_XS": (_iq4_xs, 8, 32),
    "MXFP4": (_mxfp4, 5, 32),
    "TQ2_0": (_tq2_0, 2, 256),
}
"""By type: its reader, the bits of a code, and the numbers that share a scale."""

CODED = tuple(_READ)
"""Types whose blocks stay codes."""
