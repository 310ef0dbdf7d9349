"""Folders of float8 in tiles, dequantized by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peers import tiny
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

CASES = {"float8 in tiles of 32": 32, "float8 in tiles of 128": 128}
"""Inputs and outputs of a tile."""


def make(name: str, folder: Path) -> tiny.Reference:
    """Stores a Llama in the documented layout; transformers needs a GPU to do it itself."""
    tile = CASES[name]
    model = tiny.llama()
    model.save_pretrained(folder)
    tensors, reference = load_file(folder / "model.safetensors"), tiny.Reference()
    for key in [k for k in tensors if k.endswith("_proj.weight")]:
        weight = tensors[key]
        rows, columns = (-(-size // tile) for size in weight.shape)
        padded = torch.zeros(rows * tile, columns * tile)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        tiles = padded.unflatten(0, (-1, tile)).unflatten(2, (-1, tile))
        scale = tiles.abs().amax((1, 3)) / 448
        codes = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)
        codes = codes[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn)
        tensors[key] = codes.contiguous()
        tensors[f"{key}_scale_inv"] = scale
        # Not its loader, which cuts a side of 192 into two tiles of 96 where the kernels have one
        # of 128 and one of 64.
        reference.weights[key.removesuffix(".weight")] = _dequantize_fp8_weight(
            tensors[key], scale, [tile, tile], torch.float32
        )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [tile, tile],
        "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return reference
