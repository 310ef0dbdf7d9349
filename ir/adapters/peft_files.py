"""Adapters on disk as Hugging Face PEFT writes them: a config and a safetensors file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.detect import read_json
from graphwright.ir.files.safetensor_files import read_safetensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

MARKS = {
    ".lora_A.weight": "lora_a",
    ".lora_B.weight": "lora_b",
    ".lora_embedding_A": "lora_a",
    ".lora_embedding_B": "lora_b",
    ".lora_magnitude_vector": "magnitude",
    ".ia3_l": "ia3",
    ".lokr_w1": "w1", ".lokr_w1_a": "w1_a", ".lokr_w1_b": "w1_b",
    ".lokr_w2": "w2", ".lokr_w2_a": "w2_a", ".lokr_w2_b": "w2_b",
}  # fmt: skip
"""Ends of the names of tensors, and the part of an adapter that they hold."""

REBASED = ("pissa", "olora", "corda", "loftq")
"""Starts that move a part of the base weight into the adapter: without that residual they mean
nothing."""


@dataclass(frozen=True)
class PeftFolder:
    """A folder of PEFT.

    Attributes:
        kind: its `peft_type`: LORA, IA3 or LOKR.
        config: contents of `adapter_config.json`.
        layers: tensors by layer and part, as they lie in the file.
        saved: whole tensors that were trained beside the adapter (`modules_to_save`), by name.
    """

    kind: str
    config: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Tensor]]
    saved: Mapping[str, Tensor]

    def scale(self, layer: str, rank: int) -> float:
        """Factor of a layer's change: alpha / rank, or alpha / sqrt(rank)."""
        key = "alpha" if self.kind == "LOKR" else "lora_alpha"
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), layer, self.config.get(key, 8)))
        if self.kind == "LOKR":
            listed = _by_pattern(self.config.get("rank_pattern"), layer, self.config.get("r", 8))
            return alpha / float(listed)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_peft(folder: Path) -> PeftFolder:
    """Reads a folder that PEFT wrote.

    Raises:
        ModelError: files are missing or damaged, or hold what has no form here.
    """
    config = _config(folder)
    kind = str(config.get("peft_type"))
    if kind not in ("LORA", "IA3", "LOKR"):
        raise ModelError(f"adapters of the type {kind} are not read", where=str(folder / CONFIG),
                         fix="LORA (DoRA too), IA3 and LOKR are.")  # fmt: skip
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REBASED):
        raise ModelError(
            f"this adapter starts from {start}, and goes with a residual that is not in the file",
            where=str(folder / CONFIG),
            fix="Save it with `path_initial_model_for_weight_conversion`, which converts it.",
        )
    file = folder / TENSORS
    if not file.is_file():
        raise ModelError(f"there is no {TENSORS}", where=str(folder),
                         fix="Save it again with save_pretrained of a current PEFT.")  # fmt: skip
    layers: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for name, tensor in read_safetensors(file).items():
        bare = name.removeprefix(PREFIX)
        owner, part = _part(bare)
        if part:
            layers.setdefault(owner, {})[part] = tensor
        elif re.search(r"\.(lora|lokr|ia3)_", bare):
            raise ModelError(f"the tensor {name!r} has no form here", where=str(file))
        else:
            saved[bare] = tensor
    return PeftFolder(kind, config, layers, saved)


def write_peft(
    folder: Path,
    config: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, Tensor]],
    saved: Mapping[str, Tensor],
) -> None:
    """Writes a folder that PEFT loads.

    Args:
        folder: made when it is not there.
        config: what differs from the defaults of PEFT.
        layers: tensors by layer and by the end of their name, a key of `MARKS`.
        saved: whole tensors by name.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{layer}{mark}": tensor
               for layer, parts in layers.items() for mark, tensor in parts.items()}  # fmt: skip
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}
    plain = {n: t.detach().cpu().contiguous().clone() for n, t in sorted(tensors.items())}
    save_file(plain, folder / TENSORS, {"format": "pt"})
    whole = {"inference_mode": True, "task_type": None, **config}
    (folder / CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n",
                                 encoding="utf-8")  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ModelError(f"there is no {CONFIG}: this is no folder of an adapter",
                         where=str(folder))  # fmt: skip
    found = read_json(folder / CONFIG)
    if not isinstance(found, dict):
        raise ModelError("this is not a description of an adapter", where=str(folder / CONFIG))
    return found


def _part(name: str) -> tuple[str, str]:
    for mark, part in MARKS.items():
        if name.endswith(mark):
            return name.removesuffix(mark), part
    return name, ""


def _by_pattern(table: Any, layer: str, default: Any) -> Any:
    """PEFT's rule: keys are expressions for the end of a name; the first that matches counts."""
    for pattern, value in (table or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return value
    return default


def kronecker_factors(parts: Mapping[str, Tensor], kernel: torch.Size) -> tuple[Tensor, Tensor]:
    """The two factors of a LoKr layer, products of low rank written out.

    Args:
        parts: w1 or w1_a and w1_b; w2 or w2_a and w2_b.
        kernel: of a convolution; empty for a linear layer.
    """
    first = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    second = parts["w2"] if "w2" in parts else parts["w2_a"] @ parts["w2_b"]
    if kernel and second.dim() == 2:
        second = second.reshape(len(second), -1, *kernel)
    return first, second
