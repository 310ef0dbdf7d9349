"""Checkpoints in codes, packed bit by bit from the formats' own descriptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

Array = np.ndarray[Any, Any]
OUT, IN, BLOCK = 32, 64, 16
IN_ORDER = np.arange(IN) // BLOCK
REORDERED = np.random.default_rng(5).permutation(IN_ORDER)


def net() -> nn.Module:
    """What the checkpoints belong to; named in the spec as its factory."""
    return nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, 8))


SECTION = {"factory": f"{__name__}:net"}


def words(length: int, places: list[tuple[int, int, int]]) -> Array:
    """(value, first bit, bits) written one bit at a time into `length` words of 32 bits."""
    bits = [0] * (32 * length)
    for value, first, count in places:
        for i in range(count):
            bits[first + i] = value >> i & 1
    packed = [sum(bits[32 * w + i] << i for i in range(32)) for w in range(length)]
    return np.array(packed, dtype=np.uint32).view(np.int32)


def string(codes: Array, bits: int) -> Array:
    """Codes as one string of bits."""
    places = [(int(code), i * bits, bits) for i, code in enumerate(codes)]
    return words(-(-len(codes) * bits // 32), places)


def fields(codes: Array, bits: int) -> Array:
    """32 // bits codes in a word, none across two."""
    each = 32 // bits
    places = [(int(c), i // each * 32 + i % each * bits, bits) for i, c in enumerate(codes)]
    return words(-(-len(codes) // each), places)


def planes(codes: Array, bits: int) -> Array:
    """Every 32 codes as strings of their low and of their high bits."""
    widths = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]
    found = []
    for first in range(0, len(codes), 32):
        done = 0
        for width in widths:
            found.append(string(codes[first : first + 32] >> done & (2**width - 1), width))
            done += width
    return np.concatenate(found)


def sample(bits: int, symmetric: bool, seed: int = 0) -> tuple[Array, Array, Array]:
    """q (out, in), scale and zero (out, groups)."""
    random = np.random.default_rng(seed)
    q = random.integers(0, 2**bits, (OUT, IN))
    groups = IN // BLOCK
    scale = random.uniform(0.01, 0.02, (OUT, groups)).astype(np.float16)
    zero = random.integers(0, 2**bits, (OUT, groups))
    return q, scale, np.full_like(zero, 2 ** (bits - 1)) if symmetric else zero


def value(q: Array, scale: Array, zero: Array, group: Array) -> Array:
    """The weight (out, in) that codes stand for."""
    return (q - zero[:, group]) * scale.astype(np.float32)[:, group]


def gptq(q: Array, scale: Array, zero: Array, bits: int, offset: int, group: Array,
         pack: Any = string) -> dict[str, Array]:  # fmt: skip
    """A layer of GPTQ; zero points are stored less `offset`, modulo 2^bits."""
    stored = (zero - offset) % 2**bits
    rows = [pack(stored[:, g], bits) for g in range(zero.shape[1])]
    columns = [pack(q[o], bits) for o in range(OUT)]
    return {"qweight": np.stack(columns, 1), "qzeros": np.stack(rows), "scales": scale.T,
            "g_idx": group.astype(np.int32)}  # fmt: skip


def awq(q: Array, scale: Array, zero: Array) -> dict[str, Array]:
    """A layer of AWQ: eight outputs a word, in an order of its own."""

    def row(codes: Array) -> Array:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return string(codes.reshape(-1, 8)[:, order].flatten(), 4)

    return {"qweight": np.stack([row(q[:, i]) for i in range(IN)]),
            "qzeros": np.stack([row(zero[:, g]) for g in range(zero.shape[1])]),
            "scales": scale.T}  # fmt: skip


def compressed(q: Array, scale: Array, zero: Array | None, bits: int,
               pack: Any = fields) -> dict[str, Array]:  # fmt: skip
    """A layer of compressed-tensors, pack-quantized."""
    found = {"weight_packed": np.stack([pack(q[o], bits) for o in range(OUT)]),
             "weight_scale": scale, "weight_shape": np.array([OUT, IN])}  # fmt: skip
    if zero is not None:
        rows = [pack(zero[:, g], bits) for g in range(zero.shape[1])]
        found["weight_zero_point"] = np.stack(rows, 1)
    return found


def compressed_config(bits: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    """The description of such a checkpoint."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group",
               "group_size": BLOCK}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", **more,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip


def write(
    folder: Path, parts: dict[str, Any], config: dict[str, Any] | None, name: str = "config.json"
) -> Path:
    """The net with the first layer in codes, and the file that describes it."""
    torch.manual_seed(0)
    plain = {k: v for k, v in net().state_dict().items() if k != "0.weight"}
    folder.mkdir(exist_ok=True)
    given = {
        f"0.{k}": v if isinstance(v, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(v))
        for k, v in parts.items()
    }
    safetensors.torch.save_file({**plain, **given}, folder / "model.safetensors")
    if config is not None:
        section = {"quantization_config": config} if name == "config.json" else config
        (folder / name).write_text(json.dumps(section))
    return folder / "model.safetensors"
