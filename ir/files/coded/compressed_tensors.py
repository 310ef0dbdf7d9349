"""Checkpoints of compressed-tensors: integer and float8 weights, with or without rounded inputs.

pack-quantized (any of 2 to 8 bits):

    weight_packed (out, words)            signed codes, 2^(bits - 1) added, along the inputs: fields
                                          of a word before version 0.18, a string of bits from there
    weight_scale (out, groups)
    weight_zero_point (words, groups)     likewise along the outputs; before version 0.10 int8
                                          (out, groups), signed; absent in symmetric schemes
    weight_shape                          (out, in)
    weight_g_idx (in)                     the group of every input; only with act order

int-quantized, float-quantized, naive-quantized: `weight` (out, in) is int8 or float8 itself, and
`weight_scale` has one value, one per output, per group, or per tile; `input_scale` and
`input_zero_point` belong to inputs with a stored scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.forms import Blocks, Floats8, Form, Integers, tiled
from graphwright.ir.files.coded.gptq import zero_points
from graphwright.ir.files.coded.layout import FLOAT8, Layer, Layout, group_order
from graphwright.ir.files.coded.rounding import Rounding
from graphwright.ir.files.coded.schemes import Args, Groups
from graphwright.ir.files.coded.words import from_fields, from_string, to_fields, to_string

PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
PACKED = "pack-quantized"


class CompressedTensors(Layout):
    """A checkpoint of compressed-tensors."""

    name = "compressed-tensors"
    parts = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape",
             "weight_g_idx", "input_scale", "input_zero_point")  # fmt: skip

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(config, where)
        self.groups = Groups(config, self)
        self.is_string = _version(config) >= (0, 18)
        if config.get("kv_cache_scheme"):
            self.notes.append("the checkpoint's rounding of keys and values is not followed")

    def owners(self, tensors: Mapping[str, Tensor]) -> list[str]:
        coded = (torch.int8, *FLOAT8)
        return [*super().owners(tensors),
                *(name.removesuffix(".weight") for name, tensor in tensors.items()
                  if name.endswith(".weight") and tensor.dtype in coded)]  # fmt: skip

    def read(self, owner: str, parts: Mapping[str, Tensor]) -> Layer:
        scheme = self.groups.of(owner)
        packed = "weight_packed" in parts
        if packed != (scheme.format == PACKED):
            raise ModelError(f"{owner!r} is not stored as {scheme.format}, as its scheme says")
        form = self._packed(scheme.weights, parts) if packed else _plain(scheme.weights, parts)
        return Layer(form, _rounding(scheme.inputs, parts, self))

    def _packed(self, args: Args, parts: Mapping[str, Tensor]) -> Blocks:
        out, inputs = (int(size) for size in parts["weight_shape"])
        block = _group(args, inputs, parts["weight_scale"])
        q = self._codes(parts["weight_packed"], inputs, args.bits)
        zero = parts.get("weight_zero_point")
        if zero is not None and zero.dtype == torch.int8:
            zero = _unsigned(zero.reshape(out, -1), args.bits)
        elif zero is not None:
            zero = self._codes(zero.T.contiguous(), out, args.bits).T.contiguous()
        scale = parts["weight_scale"]
        scale = scale.expand(out, 1) if args.strategy == "tensor" else scale.reshape(out, -1)
        order = group_order(parts.get("weight_g_idx"), inputs, block)
        return Blocks(q if order is None else q[:, order], scale.contiguous(), zero, order,
                      args.bits, block)  # fmt: skip

    def _codes(self, words: Tensor, count: int, bits: int) -> Tensor:
        """Codes as a string or as fields: told by the number of words, or else by the version."""
        in_fields, in_string = -(-count // (32 // bits)), -(-count * bits // 32)
        have = words.shape[-1]
        if have not in (in_fields, in_string):
            raise ValueError(f"{count} codes of {bits} bits do not take {have} words")
        is_string = self.is_string if in_fields == in_string else have == in_string
        return (from_string if is_string else from_fields)(words, count, bits)


def _version(config: Mapping[str, Any]) -> tuple[int, int]:
    """The version that wrote the file; the first where none is told."""
    numbers = str(config.get("version") or "0.0").split(".")
    return int(numbers[0]), int(numbers[1])


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes with 2^(bits - 1) added, uint8."""
    return (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _plain(args: Args, parts: Mapping[str, Tensor]) -> Form:
    codes, scale = parts["weight"], parts["weight_scale"]
    out, inputs = (int(size) for size in codes.shape)
    zero = parts.get("weight_zero_point")
    if codes.dtype in FLOAT8:
        if codes.dtype != torch.float8_e4m3fn:
            raise ModelError(f"weights of {codes.dtype} are not read; float8_e4m3fn is")
        return floats8(codes, scale, args.tile(out, inputs))
    if args.strategy in ("tensor", "channel"):
        wanted = (out,) if args.strategy == "channel" else ()
        zero = None if zero is None or not zero.any() else zero.to(torch.int8).reshape(wanted)
        return Integers(codes, scale.reshape(wanted), zero)
    if args.strategy != "group":
        raise ModelError(f"8-bit integers with a scale per {args.strategy} are not read")
    zero = None if zero is None else _unsigned(zero, 8)
    return Blocks(_unsigned(codes, 8), scale, zero, None, 8, _group(args, inputs, scale))


def _group(args: Args, inputs: int, scale: Tensor) -> int:
    """Inputs of a group; where a scheme leaves it open, as many as the scales make it."""
    if args.strategy != "group":
        return inputs
    return args.group or -(-inputs // scale.shape[-1])


def floats8(codes: Tensor, scale: Tensor, tile: tuple[int, int]) -> Floats8:
    """Float8 e4m3 values (out, in) with one scale for each tile (outputs, inputs) of them."""
    out, inputs = (int(size) for size in codes.shape)
    raw = codes.contiguous().view(torch.uint8)
    if tile == (out, inputs):
        return Floats8(raw, scale.reshape(()))
    rows, columns = -(-out // tile[0]), -(-inputs // tile[1])
    return Floats8(raw, tiled(scale.reshape(rows, columns), (out, inputs), tile))


def _rounding(args: Args | None, parts: Mapping[str, Tensor], layout: Layout) -> Rounding | None:
    """The rounding of inputs that a scheme asks for.

    Raises:
        ModelError: in a way that is not read.
    """
    if args is None:
        return None
    type_: Literal["float8", "int8"] = "float8" if args.type == "float" else "int8"
    if args.bits != 8:
        raise layout.refuse(f"whose inputs are rounded to {args.bits} bits")
    if not args.is_dynamic and args.strategy == "tensor":
        zero = parts.get("input_zero_point")
        return Rounding(type_, float(parts["input_scale"]), 0 if zero is None else int(zero))
    if args.is_dynamic and args.is_symmetric and args.strategy in ("token", "group"):
        return Rounding(type_, group=args.group if args.strategy == "group" else 0)
    kind = "dynamic" if args.is_dynamic else "static"
    raise layout.refuse(f"whose inputs are rounded per {args.strategy}, {kind}, "
                        f"{'' if args.is_symmetric else 'a'}symmetric")  # fmt: skip


def write_compressed_tensors(
    form: Blocks, *, as_string: bool = False, with_zero: bool = False
) -> dict[str, Tensor]:
    """The tensors of a layer, format pack-quantized.

    Args:
        form: of the weight.
        as_string: as version 0.18 and later pack 3, 5, 6 and 7 bits.
        with_zero: write zero points also where the form leaves them out.
    """
    out, inputs = form.shape
    pack = to_string if as_string else to_fields
    back = None if form.order is None else torch.argsort(form.order)
    q = form.q if back is None else form.q[:, back]
    found = {
        "weight_packed": pack(q, form.bits),
        "weight_scale": form.scale.contiguous(),
        "weight_shape": torch.tensor([out, inputs]),
    }
    if with_zero or form.zero is not None:
        found["weight_zero_point"] = pack(
            zero_points(form).T.contiguous(), form.bits
        ).T.contiguous()
    if back is not None:
        found["weight_g_idx"] = (torch.arange(inputs) // form.block)[back].to(torch.int32)
    return found
