"""Where a description is found, what is refused for want of one, and what is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from models import coded
from models.coded import BLOCK, IN_ORDER

from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model
from graphwright.ir.files.coded.description import description_beside
from graphwright.ir.files.coded.layout import Layout
from graphwright.ir.files.coded.schemes import Groups


def gptq() -> tuple[dict[str, Any], Any]:
    q, scale, zero = coded.sample(4, False)
    return coded.gptq(q, scale, zero, 4, 1, IN_ORDER), coded.value(q, scale, zero, IN_ORDER)


OWN_FILES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "AutoGPTQ": ("quantize_config.json", {"bits": 4, "group_size": BLOCK}, gptq),
    "auto-round": (
        "quantization_config.json",
        {"bits": 4, "group_size": BLOCK, "packing_format": "auto_round:auto_gptq"}, gptq),
    "AutoAWQ": (
        "quant_config.json",
        {"w_bit": 4, "q_group_size": BLOCK, "zero_point": True, "version": "GEMM"},
        lambda: (coded.awq(*coded.sample(4, False)),
                 coded.value(*coded.sample(4, False), IN_ORDER))),
    "modelopt": (
        "hf_quant_config.json",
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
        lambda: ({"weight": torch.ones(32, 64).to(torch.float8_e4m3fn),
                  "weight_scale": np.float32(0.5), "input_scale": np.float32(0.1)},
                 np.full((32, 64), 0.5))),
}  # fmt: skip


@pytest.mark.parametrize("tool", OWN_FILES)
def test_a_description_in_a_file_of_its_own(tool: str, tmp_path: Path) -> None:
    name, config, made = OWN_FILES[tool]
    parts, weight = made()
    parts = {key: value if isinstance(value, torch.Tensor) else np.asarray(value)
             for key, value in parts.items()}  # fmt: skip
    file = coded.write(tmp_path / "m", parts, config, name)
    # A config.json without a description does not hide it.
    (file.parent / "config.json").write_text(json.dumps({"model_type": "none"}))
    module: Any = load_model(file, section=coded.SECTION).module
    torch.testing.assert_close(module[0].weight, torch.as_tensor(weight).float())


@pytest.mark.parametrize("place", ["text_config", "compression_config", "nested"])
def test_older_and_inner_places(place: str, tmp_path: Path) -> None:
    inner = coded.compressed_config(4, True)
    bare = {key: value for key, value in inner.items() if key != "quant_method"}
    config = {
        "text_config": {"text_config": {"quantization_config": inner}},
        "compression_config": {"compression_config": bare},
        "nested": {"compression_config": {"quantization_config": bare}},
    }[place]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert description_beside(tmp_path) == (inner, "config.json")


UNDESCRIBED = {
    "GPTQ": gptq()[0],
    "compressed-tensors": coded.compressed(*coded.sample(4, True)[:2], None, 4),
    "float8": {"weight": torch.ones(32, 64).to(torch.float8_e4m3fn)},
    "int8": {"weight": torch.ones(32, 64, dtype=torch.int8), "SCB": torch.ones(32)},
    "mxfp4": {
        "weight_blocks": np.ones((32, 2, 16), np.uint8),
        "weight_scales": np.ones((32, 2), np.uint8),
    },
    "HQQ": {"W_q": np.ones((32, 32), np.uint8), "scale": np.ones((128, 1), np.float32)},
}


@pytest.mark.parametrize("kind", UNDESCRIBED)
def test_codes_that_nothing_describes_are_refused(kind: str, tmp_path: Path) -> None:
    file = coded.write(tmp_path / "m", UNDESCRIBED[kind], None)
    with pytest.raises(ModelError, match="codes of quantized weights, and nothing says how"):
        load_model(file, section=coded.SECTION)


def test_codes_of_another_kind_than_described_are_refused(tmp_path: Path) -> None:
    parts, _ = gptq()
    file = coded.write(tmp_path / "m", parts, coded.compressed_config(4, True))
    with pytest.raises(ModelError, match="compressed-tensors does not describe them"):
        load_model(file, section=coded.SECTION)


GPTQ = {"quant_method": "gptq", "bits": 4}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "aqlm"}, "'aqlm', which is not read"),
    "AWQ gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv' are not read"),
    "GPTQ marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin' are not read"),
    "another group size": ({**GPTQ, "group_size": 32}, "groups of 32"),
    "another number of bits": (
        {**GPTQ, "bits": 8, "group_size": BLOCK}, "'0': g_idx does not make groups"),
    "no bits": ({"quant_method": "gptq"}, "names no bits"),
    "bits that are no number": ({"quant_method": "awq", "bits": "four"}, "cannot be read"),
    "groups that are none": (
        {"quant_method": "compressed-tensors", "config_groups": {"g": None}}, "cannot be read"),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'NVFP4' are not read"),
    "auto-round mxfp4": (
        {"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "mx_fp weights"),
    "no config_groups": ({"quant_method": "compressed-tensors"}, "without config_groups"),
    "dense": ({**coded.compressed_config(4, True), "format": "dense"}, "the form 'dense'"),
    "nvfp4": (
        {**coded.compressed_config(4, True), "format": "nvfp4-pack-quantized"},
        "'nvfp4-pack-quantized'"),
    "sparse": (
        {**coded.compressed_config(4, True), "sparsity_config": {"format": "sparse-24-bitmask"}},
        "with a sparsity_config"),
    "unknown preset": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "config_groups": {"W1A1": ["Linear"]}}, "the scheme 'W1A1'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused(case: str, tmp_path: Path) -> None:
    config, says = REFUSED[case]
    file = coded.write(tmp_path / "m", gptq()[0], config)
    with pytest.raises(ModelError, match=says):
        load_model(file, section=coded.SECTION)


def test_a_layer_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    file = coded.write(tmp_path / "m", gptq()[0], {**GPTQ, "group_size": BLOCK})
    tensors = safetensors.torch.load_file(file)
    del tensors["0.scales"]
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ModelError, match="'0' are incomplete"):
        load_model(file, section=coded.SECTION)


class Anything(Layout):
    name = "any"

    def read(self, owner: str, parts: Any) -> Any:
        raise NotImplementedError


def test_the_scheme_of_a_layer() -> None:
    """By its whole name, else by a pattern, else by its class; a preset is written out."""
    own = {"targets": ["a.b"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    pattern = {"targets": ["re:.*down$"], "weights": {"num_bits": 3, "type": "int",
               "strategy": "group", "group_size": 64}}  # fmt: skip
    config = {"format": "pack-quantized",
              "config_groups": {"W4A16": ["Linear"], "g1": pattern, "g2": own}}  # fmt: skip
    groups = Groups(config, Anything(config, "here"))
    assert groups.of("a.b").weights.bits == 8
    assert groups.of("x.down").weights.bits == 3
    assert (groups.of("x.up").weights.bits, groups.of("x.up").weights.strategy) == (4, "group")
    with pytest.raises(ModelError, match="no group of layers"):
        Groups({**config, "config_groups": {"g1": pattern}}, Anything(config, "here")).of("x.up")
    presets = {"format": "int-quantized", "config_groups": {"W8A8": ["Linear"]}}
    scheme = Groups(presets, Anything(presets, "here")).of("x")
    assert scheme.inputs is not None
    assert (scheme.weights.strategy, scheme.inputs.strategy) == ("channel", "token")
