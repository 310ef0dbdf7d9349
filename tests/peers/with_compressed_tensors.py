"""Folders written by compressed-tensors, by its own calls; versions 0.6 to the current one."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from peers import tiny
from safetensors.torch import save_file

VERSION = tuple(int(part) for part in version("compressed-tensors").split(".")[:2])
GROUP = 32
TILE = 32


def integers(bits: int, strategy: str = "group", symmetric: bool = False) -> dict[str, Any]:
    """Arguments of integer weights."""
    group = {"group_size": GROUP} if strategy == "group" else {}
    return {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, **group}


def floats(strategy: str) -> dict[str, Any]:
    """Arguments of float8 weights."""
    block = {"block_structure": [TILE, TILE]} if strategy == "block" else {}
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **block}


def inputs(type_: str, strategy: str, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """Arguments of rounded inputs: of a whole tensor by a stored scale, or as they come."""
    return {"num_bits": 8, "type": type_, "strategy": strategy, "symmetric": symmetric,
            "dynamic": strategy != "tensor", **more}  # fmt: skip


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    **{f"pack-quantized, {bits} bits, zero points": ("pack-quantized", integers(bits), None)
       for bits in (2, 3, 4, 5, 6, 7, 8)},
    "pack-quantized, 4 bits, symmetric": ("pack-quantized", integers(4, symmetric=True), None),
    "pack-quantized, 8 bits, a scale per channel": (
        "pack-quantized", integers(8, "channel", True), None),
    "int-quantized, W8A8, scales per token": (
        "int-quantized", integers(8, "channel", True), inputs("int", "token")),
    "int-quantized, W8A8, stored scales, zero points": (
        "int-quantized", integers(8, "channel"), inputs("int", "tensor", False)),
    "naive-quantized, 8 bits, one scale": ("naive-quantized", integers(8, "tensor", True), None),
    "float-quantized, scales per token": (
        "float-quantized", floats("channel"), inputs("float", "token")),
    "float-quantized, stored scales": (
        "float-quantized", floats("tensor"), inputs("float", "tensor")),
    "float-quantized, tiles": ("float-quantized", floats("block"), None),
}  # fmt: skip
"""Format, arguments of the weights, arguments of the inputs, by name."""


def make(name: str, folder: Path) -> tiny.Reference:
    """Quantizes a Llama and saves it as the library does.

    In half precision, where scales are not rounded again; in float32 where inputs are rounded, or
    the last bit of an input decides on its code.
    """
    format_, weights, rounded = CASES[name]
    model = tiny.llama(torch.float16 if rounded is None else torch.float32)
    model.save_pretrained(folder)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": rounded}
    config = QuantizationConfig(
        config_groups={"group_0": group}, format=format_, ignore=["lm_head"],
        quant_method="compressed-tensors",
    )  # fmt: skip
    apply_quantization_config(model, config)
    reference = tiny.Reference()
    for owner, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "weight"):
            reference.weights[owner] = _quantize(module).float()
    # Before 0.11 a scale per token was one per input, over the batch.
    is_token = rounded is not None and rounded["strategy"] == "token"
    if not is_token or VERSION >= (0, 11):
        reference.logits = tiny.logits(model)
    _save(model, folder, format_)
    return reference


def _quantize(module: Any) -> torch.Tensor:
    """Gives a layer scales and zero points; returns the weight on its grid."""
    args, weight = module.quantization_scheme.weights, module.weight.data
    low, high = _range(weight, str(args.strategy))
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    levels = 2**args.num_bits
    if args.type == "float":
        scale, zero = torch.maximum(-low, high) / 448, torch.zeros_like(low)
    elif args.symmetric:
        scale, zero = torch.maximum(-low, high) / ((levels - 1) / 2), torch.zeros_like(low)
    else:
        scale = (high - low) / (levels - 1)
        zero = (-levels / 2 - low / scale).round().clamp(-levels // 2, levels // 2 - 1)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(weight.dtype)
    if hasattr(module, "weight_zero_point"):
        old = module.weight_zero_point
        old.data = zero.reshape(old.shape).to(old.dtype)
    if hasattr(module, "input_scale"):
        module.input_scale.data.fill_(0.02)
    if hasattr(module, "input_zero_point"):
        module.input_zero_point.data.fill_(0 if args.symmetric else 3)
    module.quantization_status = QuantizationStatus.FROZEN
    zero_point = getattr(module, "weight_zero_point", None)
    rounded: torch.Tensor = fake_quantize(weight, module.weight_scale, zero_point, args)
    return rounded.clone()


def _range(weight: torch.Tensor, strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    if strategy == "tensor":
        return weight.amin(), weight.amax()
    if strategy == "block":
        tiles = weight.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE))
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    rows = weight.unflatten(1, (-1, GROUP)) if strategy == "group" else weight.unsqueeze(1)
    return rows.amin(-1), rows.amax(-1)


def _save(model: Any, folder: Path, format_: str) -> None:
    try:
        compressor = ModelCompressor.from_pretrained_model(model, quantization_format=format_)
    except TypeError:
        compressor = ModelCompressor.from_pretrained_model(model, None, format_)
    if hasattr(compressor, "compress"):
        state = compressor.compress(model)
    else:
        compressor.compress_model(model)
        state = model.state_dict()
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    compressor.update_config(str(folder))
    assert json.loads((folder / "config.json").read_text())
