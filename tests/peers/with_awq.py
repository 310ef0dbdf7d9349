"""Folders in the layout of AutoAWQ, packed and dequantized by its own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from peers import tiny
from safetensors.torch import save_file

GROUP = 32
CASES = ("gemm, described in config.json", "gemm, described in quant_config.json")


def make(name: str, folder: Path) -> tiny.Reference:
    """Rounds a Llama to 4 bits with zero points and packs it as AutoAWQ does."""
    model = tiny.llama(torch.float16)
    model.save_pretrained(folder)
    reference = tiny.Reference()
    for owner, linear in list(model.model.layers.named_modules(prefix="model.layers")):
        if isinstance(linear, torch.nn.Linear):
            packed, reference.weights[owner] = _pack(linear)
            model.set_submodule(owner, packed)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if "quant_config" in name:
        own = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
        (folder / "quant_config.json").write_text(json.dumps(own))
    else:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
            "version": "gemm", "modules_to_not_convert": None}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
    return reference


def _pack(linear: torch.nn.Linear) -> tuple[Any, torch.Tensor]:
    rows = linear.weight.data.float().unflatten(1, (-1, GROUP))
    low, high = rows.amin(-1), rows.amax(-1)
    scale = ((high - low).clamp(min=1e-5) / 15).half()
    zero = (-low / scale).round().clamp(0, 15)
    wide = scale.repeat_interleave(GROUP, 1)
    q = (linear.weight.data / wide + zero.repeat_interleave(GROUP, 1)).round().clamp(0, 15)
    linear.weight.data = ((q - zero.repeat_interleave(GROUP, 1)) * wide).half()
    # Its packing takes scales and zero points (groups, out).
    packed = WQLinear_GEMM.from_linear(linear, 4, GROUP, False, scale.T.contiguous(),
                                       zero.half().T.contiguous())  # fmt: skip
    weight = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP)
    return packed, weight.T.float()
