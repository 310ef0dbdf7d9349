"""Checkpoints that we write are read by the formats' own libraries as we meant them.

For developers, as test_folders.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TARGETS = {
    "all layers of the blocks": ["model.layers.*"],
    "some layers of the blocks": ["model.layers.*", "!*.mlp.up_proj", "!*.v_proj"],
}
"""What is quantized: the head stays float in both."""


def needs(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: see tests/peers/run.py")


def exported(folder: Path, format_: Any, targets: list[str], **options: Any) -> Any:
    """A quantized Llama, written; returns the program."""
    from peers import tiny

    model = tiny.llama(torch.float32)
    model.save_pretrained(folder.parent / "float")
    tiny.tokenizer(folder.parent / "float")
    program = gw.trace(model, (tiny.IDS,))
    rounded = gw.passes.quantize.Rtn(block=32, targets=targets, **options)(program)
    notes = gw.export_checkpoint(rounded, folder, format_, like=folder.parent / "float")
    assert notes == []
    return rounded


def error(model: Any, program: Any) -> float:
    from peers import tiny

    with torch.no_grad():
        wanted = program(tiny.IDS).logits.float()
    return float((tiny.logits(model) - wanted).norm() / wanted.norm())


def is_current() -> bool:
    """Whether compressed-tensors is one that this transformers takes."""
    version = importlib.metadata.version("compressed-tensors")
    return tuple(map(int, version.split(".")[:2])) >= (0, 20)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors_reads_ours(targets: str, bits: int, tmp_path: Path) -> None:
    needs("compressed_tensors", "transformers", "accelerate")
    if not is_current():
        pytest.skip("transformers asks for a current compressed-tensors")
    import transformers

    program = exported(
        tmp_path / "m", "compressed-tensors", TARGETS[targets], bits=bits, symmetric=True
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert error(loaded, program) < 1e-5


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors_unpacks_our_zero_points(bits: int, tmp_path: Path) -> None:
    """By its own decompression: transformers 5.23 reads no zero points, not even the library's."""
    needs("compressed_tensors")
    if not is_current():
        pytest.skip("decompression takes a scheme since 0.15 only")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    program = exported(
        tmp_path / "m", "compressed-tensors", ["model.layers.*"], bits=bits, symmetric=False
    )
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    config = {key: value for key, value in config.items() if key != "version"}
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    coded = [one for one in layers(program, {"linear"}) if f"{one.name}.weight_packed" in tensors]
    assert len(coded) == 7
    for layer in coded:
        parts = {name.removeprefix(f"{layer.name}."): tensor for name, tensor in tensors.items()
                 if name.startswith(f"{layer.name}.")}  # fmt: skip
        found = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        torch.testing.assert_close(found, weight_value(program, layer))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodel_reads_ours(targets: str, symmetric: bool, bits: int, tmp_path: Path) -> None:
    needs("gptqmodel")
    from gptqmodel import BACKEND, GPTQModel

    program = exported(tmp_path / "m", "gptq", TARGETS[targets], bits=bits, symmetric=symmetric)
    loaded = GPTQModel.load(str(tmp_path / "m"), backend=BACKEND.GPTQ_TORCH, device="cpu",
                            dtype=torch.float16)  # fmt: skip
    assert error(loaded.model, program) < 1e-3  # it runs in half precision only


@pytest.mark.parametrize("targets", TARGETS)
def test_transformers_reads_our_awq(targets: str, tmp_path: Path) -> None:
    """It reads AWQ through GPTQModel's layers."""
    needs("gptqmodel", "transformers", "accelerate")
    import transformers

    program = exported(tmp_path / "m", "awq", TARGETS[targets], bits=4, symmetric=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, device_map="cpu"
    )
    assert error(loaded, program) < 1e-3  # its kernels take half-precision scales


def test_autoawq_unpacks_ours(tmp_path: Path) -> None:
    needs("awq")
    from awq.utils.packing_utils import dequantize_gemm
    from safetensors.torch import load_file

    program = exported(tmp_path / "m", "awq", ["model.layers.*"], bits=4, symmetric=False)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    coded = [layer for layer in layers(program, {"linear"}) if f"{layer.name}.qweight" in tensors]
    assert len(coded) == 7
    for layer in coded:
        parts = [tensors[f"{layer.name}.{part}"] for part in ("qweight", "qzeros", "scales")]
        torch.testing.assert_close(dequantize_gemm(*parts, 4, 32).T, weight_value(program, layer))
