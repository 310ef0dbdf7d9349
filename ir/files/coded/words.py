"""Orders of codes in 32-bit words: as a string of bits, as fields, or as planes.

    string   code i has bits i * bits .. (i + 1) * bits - 1 of the words, low first; a code may
             cross from one word to the next.
    fields   32 // bits codes in a word, low first; what is left of the word is empty.
    planes   every 32 codes are cut into planes of 4, 2 and 1 bits of the codes, low bits first;
             each plane is a string of its own (GPTQModel's gptq_p).

At 1, 2, 4 and 8 bits all three are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.ops.blocks import pack_codes, unpack_codes

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Widths of the planes of a code, the lowest bits first."""


def bytes_of(words: Tensor) -> Tensor:
    """Words (..., n) of any integer dtype as uint8 (..., n * itemsize), low byte first."""
    return words.contiguous().view(torch.uint8)


def words_of(values: Tensor) -> Tensor:
    """uint8 (..., 4 n) as int32 (..., n)."""
    return values.contiguous().view(torch.int32)


def from_string(words: Tensor, count: int, bits: int) -> Tensor:
    """Codes (..., count) uint8 of a string of bits in words (..., n)."""
    codes: Tensor = unpack_codes(bytes_of(words), count, bits)
    return codes


def to_string(codes: Tensor, bits: int) -> Tensor:
    """Undoes `from_string`; the last word is filled up with zeros."""
    packed = pack_codes(codes, bits)
    return words_of(torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4)))


def from_fields(words: Tensor, count: int, bits: int) -> Tensor:
    """Codes (..., count) uint8 that lie 32 // bits in an int32 word."""
    each = 32 // bits
    shifts = torch.arange(each, dtype=torch.int32) * bits
    codes: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count].to(torch.uint8)


def to_fields(codes: Tensor, bits: int) -> Tensor:
    """Undoes `from_fields`."""
    each = 32 // bits
    wide = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % each))
    shifts = torch.arange(each) * bits
    words = (wide.unflatten(-1, (-1, each)) << shifts).sum(-1)
    # As signed words: bit 31 is the sign.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def from_planes(words: Tensor, count: int, bits: int) -> Tensor:
    """Codes (..., count) uint8 that lie in planes; `count` is a multiple of 32."""
    if bits not in PLANES:
        return from_string(words, count, bits)
    groups = words.unflatten(-1, (count // 32, bits))
    codes = torch.zeros(*groups.shape[:-1], 32, dtype=torch.uint8)
    done = 0
    for width in PLANES[bits]:
        codes |= from_string(groups[..., done : done + width], 32, width) << done
        done += width
    return codes.flatten(-2)
