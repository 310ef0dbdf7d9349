"""Folders written by GPTQModel, quantized and read back by it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default stops on two cores

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from peers import tiny

CASES: dict[str, dict[str, Any]] = {
    **{f"{bits} bits, symmetric": {"bits": bits, "sym": True} for bits in (3, 4, 8)},
    "4 bits, zero points": {"bits": 4, "sym": False},
    "4 bits, zero points, gptq_v2": {"bits": 4, "sym": False, "format": "gptq_v2"},
    "4 bits, act order": {"bits": 4, "sym": True, "desc_act": True, "act_group_aware": False},
    "5 bits, gptq_p": {"bits": 5, "sym": True, "format": "gptq_p"},
    "3 bits, gptq_p": {"bits": 3, "sym": True, "format": "gptq_p"},
    "4 and 8 bits by dynamic": {
        "bits": 4, "sym": True, "dynamic": {r".*down_proj": {"bits": 8}, r"-:.*up_proj": {}}},
    "4 bits, zero points of 0 that borrow": {"bits": 4, "sym": False},
}  # fmt: skip
"""Options of QuantizeConfig, by name."""


def make(name: str, folder: Path) -> tiny.Reference:
    """Quantizes a tiny model by GPTQ and saves it as the library does."""
    model = tiny.llama(torch.float16)
    if "borrow" in name:
        with torch.no_grad():
            for weight in model.model.layers.parameters():
                weight[: len(weight) // 2].abs_()
    plain = folder.parent / "float"
    model.save_pretrained(plain)
    tiny.tokenizer(plain)
    options = {"group_size": 32, "desc_act": False, **CASES[name]}
    quantized = GPTQModel.load(str(plain), QuantizeConfig(**options), device="cpu")
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)}
               for row in torch.randint(0, tiny.VOCABULARY, (16, 32)).tolist()]  # fmt: skip
    quantized.quantize(samples, batch_size=1)
    quantized.save(str(folder))
    return read(folder)


def read(folder: Path) -> tiny.Reference:
    """The library's own reading of a folder."""
    # In bfloat16, its default here, it rounds the scales.
    loaded = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu",
                            dtype=torch.float16)  # fmt: skip
    weights = {
        owner: module.dequantize_weight().T.float()
        for owner, module in loaded.model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    return tiny.Reference(weights, tiny.logits(loaded.model))
