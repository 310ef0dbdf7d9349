"""Folders of bitsandbytes, quantized, saved and run by transformers on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from peers import tiny

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "nf4": (tiny.llama, {"bnb_4bit_quant_type": "nf4"}),
    "nf4, scales in codes": (
        tiny.llama, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "fp4": (tiny.llama, {"bnb_4bit_quant_type": "fp4"}),
    "nf4, bytes stored as bfloat16": (
        tiny.llama, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16}),
    "8 bits": (tiny.llama, {}),
    "nf4, GPT-2": (tiny.gpt2, {"bnb_4bit_quant_type": "nf4"}),
    "nf4, vision and language": (tiny.vision_language, {"bnb_4bit_quant_type": "nf4"}),
    "nf4, mixture of experts": (tiny.mixtral, {"bnb_4bit_quant_type": "nf4"}),
}  # fmt: skip
"""The model, and the options of BitsAndBytesConfig."""


def make(name: str, folder: Path) -> tiny.Reference:
    """Saves a model that transformers quantizes as it loads it."""
    build, options = CASES[name]
    plain = folder.parent / "float"
    model = build()
    model.save_pretrained(plain)
    bits = {"load_in_8bit": True} if name == "8 bits" else {"load_in_4bit": True}
    quantized = type(model).from_pretrained(
        plain, dtype=torch.float32, device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(
            **bits, bnb_4bit_compute_dtype=torch.float32, **options),
    )  # fmt: skip
    quantized.save_pretrained(folder)
    reference = tiny.Reference()
    for owner, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            reference.weights[owner] = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, state
            ).float()
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            scale = module.weight.SCB / 127
            reference.weights[owner] = module.weight.data.float() * scale.unsqueeze(1)
    if name != "8 bits":  # its run rounds the inputs too
        reference.logits = tiny.logits(quantized)
    return reference
