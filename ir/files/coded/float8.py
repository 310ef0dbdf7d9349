"""Checkpoints of float8 e4m3 weights: DeepSeek's and transformers' fp8, fbgemm_fp8, modelopt.

weight (out, in)    float8 e4m3
weight_scale_inv    (rows of tiles, columns of tiles), or one value: what values are multiplied
                    by, in spite of the name
weight_scale        the same of fbgemm_fp8 (out, 1) and modelopt (one value)
input_scale, activation_scale    of inputs with a stored scale
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graphwright.ir.files.coded.compressed_tensors import floats8
from graphwright.ir.files.coded.layout import FLOAT8, Layer, Layout
from graphwright.ir.files.coded.rounding import Rounding

SCALES = ("weight_scale_inv", "weight_scale")
INPUT_SCALES = ("input_scale", "activation_scale")


class Float8(Layout):
    """A checkpoint of float8 weights."""

    name = "float8"
    parts = ("weight", *SCALES, *INPUT_SCALES, "input_scale_ub")

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(config, where)
        algorithm = config.get("quant_algo")
        if algorithm not in (None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
            raise self.refuse(f"of modelopt's algorithm {algorithm!r}")
        if config.get("kv_cache_quant_algo"):
            self.notes.append("the checkpoint's rounding of keys and values is not followed")
        self.is_rounded_per_token = (
            config.get("quant_method") == "fbgemm_fp8" or algorithm == "FP8_PER_CHANNEL_PER_TOKEN"
        )
        self.tile: Any = config.get("weight_block_size")

    def owners(self, tensors: Mapping[str, Tensor]) -> list[str]:
        return [name.removesuffix(".weight") for name, tensor in tensors.items()
                if name.endswith(".weight") and tensor.dtype in FLOAT8]  # fmt: skip

    def read(self, owner: str, parts: Mapping[str, Tensor]) -> Layer:
        codes = parts["weight"]
        if str(codes.dtype) != "torch.float8_e4m3fn":
            raise self.refuse(f"with weights of {codes.dtype}")
        scale = next(parts[name] for name in SCALES if name in parts).float()
        out, inputs = (int(size) for size in codes.shape)
        tile = self._tile(scale, out, inputs)
        return Layer(floats8(codes, scale, tile), self._rounding(parts, tile[1], inputs))

    def _rounding(self, parts: Mapping[str, Tensor], columns: int, inputs: int) -> Rounding | None:
        """By a stored scale, per token, or per as many inputs of a token as a tile has."""
        stored = next((parts[name] for name in INPUT_SCALES if name in parts), None)
        if stored is not None:
            return Rounding("float8", float(stored.max()))
        if self.is_rounded_per_token or self.tile is not None:
            return Rounding("float8", group=columns if columns < inputs else 0)
        note = "inputs are left in float: the description does not say how they are rounded"
        if note not in self.notes:
            self.notes.append(note)
        return None

    def _tile(self, scale: Tensor, out: int, inputs: int) -> tuple[int, int]:
        """(outputs, inputs) that share a scale."""
        if scale.numel() == 1:
            return out, inputs
        if scale.numel() == out and (scale.dim() == 1 or scale.shape[1] == 1):
            return 1, inputs
        if self.tile is None:
            raise self.refuse("with scales of tiles and no weight_block_size")
        return int(self.tile[0]), int(self.tile[1])
