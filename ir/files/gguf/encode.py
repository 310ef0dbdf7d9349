"""Weights as blocks of a GGUF file. What a type cannot say exactly is measured."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.files.coded.forms import Blocks
from graphwright.ir.files.coded.layout import Layer
from graphwright.ir.files.coded.modules import coded_linear
from graphwright.ir.files.gguf.reader import Stored
from graphwright.ir.files.gguf.types import NUMBERS, TYPES

BLOCK = 32
"""Numbers of a block of the types that are written."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16}


def encode_floats(weight: Tensor, name: str) -> tuple[Stored, float]:
    """A tensor as F32, F16 or Q8_0, and the largest change relative to its largest number.

    Args:
        weight: of any float dtype; for Q8_0 a matrix of rows of whole blocks.
        name: of the type.
    """
    weight = weight.detach().float().contiguous()
    if name == "Q8_0":
        rows = weight.unflatten(-1, (-1, BLOCK))
        d = (rows.abs().amax(-1, keepdim=True) / 127).half()
        wide = d.float()
        q = torch.where(wide == 0, 0.0, rows / torch.where(wide == 0, 1.0, wide)).round()
        q = q.clamp(-128, 127)
        change = _change(q * wide, rows)
        return _stored("Q8_0", weight.shape, [_raw(d), q.to(torch.int8).view(torch.uint8)]), change
    held = weight.to(_FLOATS[name])
    kind = TYPES[NUMBERS[name]]
    shape = tuple(weight.shape)
    data = held.view(torch.uint8).reshape(-1, shape[-1] * kind.size)
    return Stored(kind, shape, data), _change(held.float(), weight)


def encode_blocks(form: Blocks) -> tuple[Stored, float] | None:
    """A weight in codes as Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, its codes moved and never chosen anew.

    Returns:
        The blocks, and the largest change relative to the largest number, which the precision of
        scales and minima makes: half. None where no type says it: rows of broken blocks, blocks
        that are not whole ones of 32, an order of columns, 8-bit codes with a minimum, scales that
        half precision does not hold.
    """
    regrouped = _regrouped(form)
    if regrouped is None:
        return None
    q, scale, zero, rest = regrouped
    centred = q.int() - zero.int().unsqueeze(-1)
    half = 8 if form.bits <= 4 else 16 if form.bits == 5 else 128
    if rest is None and int(centred.min()) >= -half and int(centred.max()) < half:
        name, codes, low = f"Q{8 if half == 128 else 4 if half == 8 else 5}_0", centred, None
    elif half == 128:
        return None
    else:
        name, codes = f"Q{4 if half == 8 else 5}_1", q.int()
        minimum = -zero.double() * scale.double()
        low = (minimum if rest is None else minimum + rest.double()).half()
    d = scale.half()
    finite = [bool(torch.isfinite(t).all()) for t in (d, low) if t is not None]
    if not all(finite):
        return None
    value = codes * d.double().unsqueeze(-1)
    value = value if low is None else value + low.double().unsqueeze(-1)
    wanted = coded_linear(Layer(form)).weight.detach().double()
    change = _change(value.flatten(1), wanted)
    parts = [_raw(d.unsqueeze(-1))]
    if low is not None:
        parts.append(_raw(low.unsqueeze(-1)))
    parts += _codes(codes if low is not None else codes + half, half)
    return _stored(name, form.shape, parts), change


def _regrouped(form: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Codes (out, blocks, 32), scales, zero points and rests (out, blocks)."""
    columns = form.shape[1]
    whole = form.block % BLOCK == 0 or form.block >= columns
    if form.order is not None or columns % BLOCK or not whole:
        return None
    owner = torch.arange(columns // BLOCK) * BLOCK // form.block
    zero = form.zero
    if zero is None:
        zero = torch.full(form.scale.shape, 1 << (form.bits - 1), dtype=torch.uint8)
    rest = None if form.rest is None else form.rest[:, owner]
    return form.q.unflatten(1, (-1, BLOCK)), form.scale[:, owner], zero[:, owner], rest


def _codes(codes: Tensor, half: int) -> list[Tensor]:
    """Codes (out, blocks, 32) from 0 on as the bytes of a block: the fifth bits, then nibbles."""
    if half == 128:
        return [(codes - half).to(torch.int8).view(torch.uint8)]
    codes = codes.to(torch.uint8)
    low = codes & 15
    nibbles = low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << 4)
    if half == 8:
        return [nibbles]
    places = 1 << torch.arange(8, dtype=torch.uint8)
    high = ((codes >> 4).unflatten(-1, (4, 8)) * places).sum(-1, dtype=torch.uint8)
    return [high, nibbles]


def _raw(halves: Tensor) -> Tensor:
    return halves.contiguous().view(torch.uint8)


def _stored(name: str, shape: tuple[int, ...], parts: list[Tensor]) -> Stored:
    data = torch.cat(parts, -1).flatten(1)
    return Stored(TYPES[NUMBERS[name]], tuple(shape), data)


def _change(found: Tensor, wanted: Tensor) -> float:
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    return float((found - wanted).abs().max()) / largest if largest else 0.0
