"""Descriptions of quantized folders that are not read, as their tools write them."""

from __future__ import annotations

from typing import Any

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.description import layout_of

_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
_FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def _compressed(format_: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, **more.pop("group", {})}
    return {"quant_method": "compressed-tensors", "format": format_,
            "config_groups": {"group_0": group}, **more}  # fmt: skip


REFUSED: dict[str, dict[str, Any]] = {
    "GPTQ for Marlin": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
    "AWQ gemv": {"quant_method": "awq", "bits": 4, "version": "gemv"},
    "AWQ gemv_fast": {"quant_method": "awq", "bits": 4, "version": "gemv_fast"},
    "compressed-tensors, nvfp4": _compressed("nvfp4-pack-quantized", _FP4),
    "compressed-tensors, mxfp4": _compressed("mxfp4-pack-quantized", _FP4),
    "compressed-tensors, marlin-24": _compressed("marlin-24", _INT4),
    "compressed-tensors, not compressed": _compressed("dense", _INT4),
    "compressed-tensors, sparse": _compressed(
        "pack-quantized", _INT4, sparsity_config={"format": "sparse-24-bitmask"}),
    "compressed-tensors, rotated": _compressed(
        "pack-quantized", _INT4, transform_config={"config_groups": {"u": {}}}),
    "compressed-tensors, rounded outputs": _compressed(
        "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"},
        group={"output_activations": {"num_bits": 8}}),
    "modelopt, nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "modelopt, int4 AWQ": {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
    "auto-round, mxfp4": {
        "quant_method": "auto-round", "bits": 4, "data_type": "mx_fp", "act_bits": 4,
        "packing_format": "auto_round:llm_compressor"},
    "mxfp4": {"quant_method": "mxfp4"},
    "torchao": {"quant_method": "torchao"},
    "quanto": {"quant_method": "quanto"},
    "AQLM": {"quant_method": "aqlm"},
    "HIGGS": {"quant_method": "higgs"},
    "VPTQ": {"quant_method": "vptq"},
    "SpQR": {"quant_method": "spqr"},
    "EETQ": {"quant_method": "eetq"},
    "BitNet": {"quant_method": "bitnet"},
}  # fmt: skip
"""`quantization_config` by name."""


def words(name: str) -> str:
    """What is said of a description that is not read; empty where it is read."""
    try:
        layout_of(REFUSED[name], "folder")
    except ModelError as error:
        return error.message
    return ""
