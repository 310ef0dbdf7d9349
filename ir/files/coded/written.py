"""The description that a written checkpoint carries, so that other loaders read it right."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.awq import write_awq
from graphwright.ir.files.coded.compressed_tensors import write_compressed_tensors
from graphwright.ir.files.coded.forms import Blocks
from graphwright.ir.files.coded.gptq import write_gptq


@dataclass(frozen=True)
class Written:
    """A checkpoint to be.

    Attributes:
        layers: linear layers in codes, by name; one grid for all.
        floats: names of the linear layers that stay in float.
    """

    layers: Mapping[str, Blocks]
    floats: list[str]

    @property
    def sample(self) -> Blocks:
        """Any of the layers: they share bits and block."""
        return next(iter(self.layers.values()))

    @property
    def group_size(self) -> int:
        """Inputs of a group; -1 for all."""
        return -1 if all(f.block >= f.shape[1] for f in self.layers.values()) else self.sample.block

    @property
    def is_symmetric(self) -> bool:
        """Whether no layer has zero points of its own."""
        return all(form.zero is None for form in self.layers.values())

    def tensors(self, write: Callable[[Blocks], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of the layers in codes, by name."""
        found: dict[str, Tensor] = {}
        for owner, form in self.layers.items():
            try:
                parts = write(form)
            except ModelError as error:
                raise ModelError(error.message, where=owner, fix=error.fix) from None
            found |= {f"{owner}.{part}": tensor for part, tensor in parts.items()}
        return found


def gptq(written: Written) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a GPTQ checkpoint.

    Symmetric codes go out in the first version of the format, which every loader knows; others in
    the second, for loaders differ on zero points of 0 in the first. Layers that stay in float are
    named in `dynamic`.
    """
    version = "gptq" if written.is_symmetric else "gptq_v2"
    config = {
        "quant_method": "gptq", "bits": written.sample.bits, "group_size": written.group_size,
        "sym": written.is_symmetric, "checkpoint_format": version,
        "desc_act": any(form.order is not None for form in written.layers.values()),
        "lm_head": "lm_head" in written.layers,
    }  # fmt: skip
    if written.floats:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in written.floats}
    return written.tensors(lambda form: write_gptq(form, version=version)), config


def awq(written: Written) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of an AWQ checkpoint, version gemm.

    Layers that stay in float are named in `modules_to_not_convert`: by the end of their name where
    that tells them from all layers in codes, as AutoAWQ asks, and whole where not.
    """
    config = {"quant_method": "awq", "bits": 4, "group_size": written.group_size,
              "zero_point": True, "version": "gemm",
              "modules_to_not_convert": _short(written.floats, written.layers)}  # fmt: skip
    return written.tensors(write_awq), config


def compressed_tensors(written: Written) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a compressed-tensors checkpoint, pack-quantized.

    Layers that stay in float are named in `ignore`. Codes of 3, 5, 6 and 7 bits lie as strings of
    bits, which version 0.18 began, and the description says that version.
    """
    sample, group = written.sample, written.group_size
    is_string = 32 % sample.bits != 0
    weights = {"num_bits": sample.bits, "type": "int", "symmetric": written.is_symmetric,
               "dynamic": False, "strategy": "channel" if group < 1 else "group",
               "group_size": None if group < 1 else group}  # fmt: skip
    if any(form.order is not None for form in written.layers.values()):
        weights["actorder"] = "group"
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None,
              "output_activations": None}  # fmt: skip
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized",
              "quantization_status": "compressed", "config_groups": {"group_0": scheme},
              "ignore": written.floats, "kv_cache_scheme": None,
              "version": "0.18.0" if is_string else "0.10.0"}  # fmt: skip

    def write(form: Blocks) -> dict[str, Tensor]:
        return write_compressed_tensors(
            form, as_string=is_string, with_zero=not written.is_symmetric
        )

    return written.tensors(write), config


def _short(floats: list[str], layers: Mapping[str, Blocks]) -> list[str]:
    """Names of layers, cut to what follows the number of their block where that is enough."""
    found: dict[str, None] = {}
    for name in floats:
        end = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
        clashes = any(end in other for other in layers)
        found[name if clashes else end] = None
    return list(found)
