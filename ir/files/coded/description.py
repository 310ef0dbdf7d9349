"""Descriptions of quantized checkpoints: the file that holds one, and the layout it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.awq import Awq
from graphwright.ir.files.coded.bitsandbytes import BitsAndBytes
from graphwright.ir.files.coded.compressed_tensors import CompressedTensors
from graphwright.ir.files.coded.float8 import Float8
from graphwright.ir.files.coded.gptq import Gptq
from graphwright.ir.files.coded.hqq import Hqq
from graphwright.ir.files.coded.layout import FLOAT8, Layout
from graphwright.ir.files.detect import read_json
from graphwright.ir.files.nesting import entries
from graphwright.ir.files.pickles import listed

FILES = ("config.json", "quantize_config.json", "quantization_config.json", "quant_config.json",
         "hf_quant_config.json")  # fmt: skip
"""Files that may describe quantized weights, in order of preference: transformers, AutoGPTQ and
GPTQModel, auto-round, AutoAWQ, modelopt."""

LAYOUTS: dict[str, type[Layout]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
    "fp8": Float8,
    "fbgemm_fp8": Float8,
    "modelopt": Float8,
    "hqq": Hqq,
}
"""By `quant_method`; auto-round's is told by its packing_format."""

WIDEST = 64
"""Bits of a code at most."""

NOTHING: Mapping[str, Tensor] = {}

_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|"
    r"weight_global_scale|SCB|W_q|weight\.(absmax|quant_map|quant_state\..*))$"
)
_BYTES = re.compile(r"_(blocks|scales)$")
"""Names of codes where they are bytes: gpt-oss's experts."""


def description_beside(folder: Path) -> tuple[dict[str, Any], str] | None:
    """A folder's description of its quantized weights, and the file that holds it; None without
    one."""
    for name in FILES:
        file = folder / name
        found = read_json(file) if file.is_file() else None
        if not isinstance(found, dict):
            continue
        section = _in_config(found) if name == "config.json" else _of_its_own(name, found)
        if section:
            return section, name
    return None


def _in_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """The section of a config.json: its own, or that of the language model in it."""
    for place in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = place.get("quantization_config")
        if isinstance(found, dict):
            return found
        # compressed-tensors before 0.7.
        old = place.get("compression_config")
        if isinstance(old, dict):
            inner = old.get("quantization_config")
            return {"quant_method": "compressed-tensors", **(inner if inner else old)}
    return None


def _of_its_own(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A file that describes quantized weights and nothing else."""
    if name == "hf_quant_config.json":
        inner = found.get("quantization")
        return {"quant_method": "modelopt", **(inner if isinstance(inner, dict) else found)}
    method = {"quant_config.json": "awq", "quantization_config.json": "auto-round"}.get(
        name, "gptq"
    )
    return {"quant_method": method, **found}


def layout_of(config: Mapping[str, Any], where: str) -> Layout:
    """The layout that a description names.

    Raises:
        ModelError: another method, a form of it that is not read, or a description that is broken.
    """
    _refuse_width(config, where)
    try:
        return _layout_of(config, where)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            "the description of the quantized weights cannot be read",
            where=where,
            details=(f"{type(error).__name__}: {error}",),
        ) from error


def _refuse_width(config: Mapping[str, Any], where: str) -> None:
    """A description at any depth has no code of more bits than a word: tables are made of them."""
    for key, value in entries(config):
        if key.endswith(("bits", "bit")) and _is_number(value) and not 0 <= value <= WIDEST:
            raise ModelError(f"the quantized weights have {value} {key}", where=where)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _layout_of(config: Mapping[str, Any], where: str) -> Layout:
    method = str(config.get("quant_method", config.get("quantization_method", "")))
    if method.removeprefix("intel/") == "auto-round":
        return _auto_round(config, where)
    if method not in LAYOUTS:
        raise ModelError(
            f"the folder's weights are quantized by {method!r}, which is not read",
            where=where,
            fix=f"These are: {', '.join([*LAYOUTS, 'auto-round'])}.",
        )
    return LAYOUTS[method](config, where)


def _auto_round(config: Mapping[str, Any], where: str) -> Layout:
    """auto-round packs as GPTQ or AWQ do; `extra_config` gives some layers grids of their own."""
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq")
    dynamic = {
        name if _is_pattern(name) else f"^{re.escape(name)}$": own
        for name, own in (config.get("extra_config") or {}).items()
    }
    if "awq" in packing:
        return Awq({**config, "version": "gemm"}, where)
    if config.get("data_type", "int") != "int" or int(config.get("act_bits") or 16) <= 8:
        raise ModelError(
            f"auto-round checkpoints of {config.get('data_type')} weights with "
            f"{config.get('act_bits')}-bit inputs, packed as {packing!r}, are not read",
            where=where,
        )
    version = "gptq" if packing.endswith("auto_gptq") else "gptq_v2"
    layout = Gptq({**config, "checkpoint_format": version, "dynamic": dynamic}, where)
    layout.planes = ()
    return layout


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*^$\\")


def undescribed(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor] = NOTHING) -> list[str]:
    """Names of tensors that are codes, or belong to codes, and that the model does not have so."""
    return [
        name
        for name, tensor in tensors.items()
        if (tensor.dtype in FLOAT8 and (name not in known or known[name].dtype != tensor.dtype))
        or (name not in known and _is_named_so(name, tensor))
    ]


def _is_named_so(name: str, tensor: Tensor) -> bool:
    if tensor.dtype == torch.uint8 and _BYTES.search(name):
        return True
    return _NAMES.search(f".{name}") is not None


def refuse_undescribed(
    tensors: Mapping[str, Tensor],
    where: str,
    known: Mapping[str, Tensor] = NOTHING,
    by: str | None = None,
) -> None:
    """Refuses tensors in codes that nothing describes, for they would be taken for floats.

    Args:
        tensors: of the file, less what has been read.
        where: file or folder, for the message.
        known: the model's own tensors by name, where there is a model.
        by: what describes other tensors of the file; None where nothing does.

    Raises:
        ModelError: there are some; names them.
    """
    names = undescribed(tensors, known)
    if not names:
        return
    says = "nothing says how they are stored" if by is None else f"{by} does not describe them"
    raise ModelError(
        f"{len(names)} tensors are codes of quantized weights, and {says}",
        where=where,
        fix=f"Put the checkpoint's own description beside it ({', '.join(FILES)}).",
        details=tuple(listed(names, 5)),
    )
