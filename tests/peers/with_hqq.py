"""Folders of HQQ: every layer's own state dict, which HQQ makes for safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peers import tiny
from safetensors.torch import save_file

CASES: dict[str, tuple[int, int]] = {
    **{f"{bits} bits": (bits, 1) for bits in (1, 2, 3, 4, 8)},
    "4 bits, along the outputs": (4, 0),
}
"""Bits and axis."""


def make(name: str, folder: Path) -> tiny.Reference:
    """Quantizes the layers of a Llama and saves them as transformers did."""
    bits, axis = CASES[name]
    model = tiny.llama()
    model.save_pretrained(folder)
    reference, tensors = tiny.Reference(), dict(model.state_dict())
    config = BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
    for owner, linear in list(model.model.layers.named_modules(prefix="model.layers")):
        if not isinstance(linear, torch.nn.Linear):
            continue
        layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu",
                          del_orig=False)  # fmt: skip
        reference.weights[owner] = layer.dequantize().float()
        del tensors[f"{owner}.weight"]
        tensors |= {f"{owner}.{part}": value for part, value in layer.state_dict().items()}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {
        "quant_method": "hqq", "skip_modules": ["lm_head"],
        "quant_config": {"weight_quant_params": config["weight_quant_params"]}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described, default=str))
    return reference
