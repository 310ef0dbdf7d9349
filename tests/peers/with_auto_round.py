"""Folders written by auto-round."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from auto_round import AutoRound
from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing
from auto_round.export.export_to_awq.utils import dequantize_gemm
from peers import tiny
from safetensors.torch import load_file

GROUP = 32

CASES: dict[str, dict[str, Any]] = {
    "4 bits, symmetric, as auto_round": {"format": "auto_round", "bits": 4, "sym": True},
    "4 bits, zero points, as auto_round": {"format": "auto_round", "bits": 4, "sym": False},
    "4 bits, zero points, as auto_gptq": {
        "format": "auto_round:auto_gptq", "bits": 4, "sym": False},
    "4 bits, zero points, as auto_awq": {"format": "auto_round:auto_awq", "bits": 4, "sym": False},
    "5 bits, zero points, as auto_round": {"format": "auto_round", "bits": 5, "sym": False},
    "3 bits, zero points, as auto_gptq": {
        "format": "auto_round:auto_gptq", "bits": 3, "sym": False},
    "4 bits, one layer of 8": {
        "format": "auto_round", "bits": 4, "sym": True,
        "layer_config": {"model.layers.0.mlp.down_proj": {"bits": 8}}},
}  # fmt: skip
"""Options of AutoRound and of its saving, by name."""


def make(name: str, folder: Path) -> tiny.Reference:
    """Quantizes a Llama without tuning, and saves it."""
    options = dict(CASES[name])
    format_ = options.pop("format")
    plain = folder.parent / "float"
    tiny.llama(torch.float16).save_pretrained(plain)
    tiny.tokenizer(plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float16)
    tokens = transformers.AutoTokenizer.from_pretrained(plain)
    rounder = AutoRound(model, tokens, iters=0, group_size=GROUP, device_map="cpu",
                        disable_opt_rtn=True, **options)  # fmt: skip
    rounder.quantize_and_save(str(folder.parent / "saved"), format=format_)
    (inner,) = (folder.parent / "saved").iterdir()  # a folder of its own choice
    shutil.move(inner, folder)
    return read(folder)


def read(folder: Path) -> tiny.Reference:
    """What the library's own layers make of the tensors: a matrix of ones through each."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    packing, own = config["packing_format"], config.get("extra_config", {})
    tensors, reference = load_file(folder / "model.safetensors"), tiny.Reference()
    for name in [n for n in tensors if n.endswith(".qweight")]:
        owner = name.removesuffix(".qweight")
        bits = own.get(owner, {}).get("bits", config["bits"])
        parts = {key: tensors[f"{owner}.{key}"] for key in ("qweight", "qzeros", "scales")}
        if "awq" in packing:
            weight = dequantize_gemm(*parts.values(), bits, GROUP)
        else:
            weight = _dequantized(packing, bits, config["sym"], parts)
        reference.weights[owner] = weight.T.float()
    return reference


def _dequantized(packing: str, bits: int, sym: bool, parts: dict[str, torch.Tensor]) -> Any:
    made = dynamic_import_quant_linear_for_packing(packing, bits, GROUP, sym)
    inputs, out = parts["qweight"].shape[0] * 32 // bits, parts["scales"].shape[1]
    layer = made(bits, GROUP, inputs, out, bias=False, weight_dtype=torch.float16)
    layer.bias = None
    for key, value in parts.items():
        setattr(layer, key, value)
    return layer(torch.eye(inputs, dtype=torch.float32))
