"""Writing checkpoints: what a pass has quantized goes out and comes back; floats are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import coded
from models.coded import IN, IN_ORDER, net
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model
from graphwright.ir.files.export_checkpoint import export_checkpoint
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers


def traced(file: Path) -> gw.Program:
    module = load_model(file, section=coded.SECTION).module
    assert module is not None
    return gw.trace(module, (torch.ones(3, IN),), {"input": {0: "batch"}})


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


SAME: dict[str, Any] = {
    "gptq": lambda q, s, z: (coded.gptq(q, s, z, 4, 1, IN_ORDER), {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq"}),
    "gptq, zero points": lambda q, s, z: (coded.gptq(q, s, z, 4, 0, IN_ORDER), {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"}),
    "gptq, act order": lambda q, s, z: (coded.gptq(q, s, z, 4, 1, coded.REORDERED), {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq"}),
    "awq, zero points": lambda q, s, z: (coded.awq(q, s, z), {
        "quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
    "compressed-tensors": lambda q, s, z: (
        coded.compressed(q, s, None, 4), coded.compressed_config(4, True)),
    "compressed-tensors, zero points": lambda q, s, z: (
        coded.compressed(q, s, z, 4), coded.compressed_config(4, False)),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_written_back_it_is_the_same_file(case: str, tmp_path: Path) -> None:
    parts, config = SAME[case](*coded.sample(4, "zero points" not in case))
    file = coded.write(tmp_path / "m", parts, config)
    format = case.partition(",")[0]
    notes = export_checkpoint(traced(file), tmp_path / "again", format)  # type: ignore[arg-type]
    assert notes == []
    first, second = (
        safetensors.torch.load_file(f) for f in (file, tmp_path / "again" / "model.safetensors")
    )
    second = {n: t.to(first[n].dtype) for n, t in second.items()}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    x = torch.randn(2, IN)
    assert torch.equal(traced(tmp_path / "again" / "model.safetensors")(x), traced(file)(x))
    wanted = {key: config[key] for key in ("checkpoint_format", "version") if key in config}
    again = config_of(tmp_path / "again")
    assert {key: again[key] for key in wanted} == wanted


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_odd_bits_go_out_as_strings(bits: int, tmp_path: Path) -> None:
    q, scale, zero = coded.sample(bits, False)
    parts = coded.compressed(q, scale, zero, bits, coded.string)
    config = coded.compressed_config(bits, False, version="0.18.0")
    file = coded.write(tmp_path / "m", parts, config)
    export_checkpoint(traced(file), tmp_path / "again", "compressed-tensors")
    second = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(torch.as_tensor(parts[key]), second[f"0.{key}"])
               for key in ("weight_packed", "weight_zero_point"))  # fmt: skip
    assert config_of(tmp_path / "again")["version"] == "0.18.0"


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_what_a_pass_has_quantized_goes_out_and_comes_back(format: str, tmp_path: Path) -> None:
    program = gw.trace(net().eval(), (torch.randn(3, IN),), {"input": {0: "batch"}})
    batches = [(torch.randn(40, IN),)]
    first = gw.passes.quantize.Gptq(block=16, targets=["0"])(program, calibration=batches)
    export_checkpoint(first, tmp_path / "m", format)  # type: ignore[arg-type]
    again = traced(tmp_path / "m" / "model.safetensors")
    assert torch.equal(again(batches[0][0]), first(batches[0][0]))
    weights = [weight_value(p, layers(p, {"linear"})[0]) for p in (first, again)]
    assert torch.equal(weights[0], weights[1])


def test_tables_in_codes_are_written_as_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(24, 32), nn.Linear(32, 32)).eval()
    ids = torch.randint(0, 24, (2, 7))
    rounded = gw.passes.quantize.Rtn(block=16)(gw.trace(module, (ids,)))
    assert export_checkpoint(rounded, tmp_path / "m") == ["0.weight is written as floats"]
    stored = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(stored["0.weight"], weight_value(rounded, layers(rounded)[0]))


def test_layers_that_stay_float_are_named(tmp_path: Path) -> None:
    """Each format has a place of its own for them, and tied names count."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(IN, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 8))
    module[3].weight = nn.Parameter(module[2].weight[:8].clone())
    program = gw.trace(module.eval(), (torch.randn(3, IN),))
    rounded = gw.passes.quantize.Rtn(block=16, targets=["0"])(program)
    for format in ("gptq", "awq", "compressed-tensors"):
        export_checkpoint(rounded, tmp_path / format, format)  # type: ignore[arg-type]
    assert config_of(tmp_path / "compressed-tensors")["ignore"] == ["2", "3"]
    assert config_of(tmp_path / "awq")["modules_to_not_convert"] == ["2", "3"]
    gptq = config_of(tmp_path / "gptq")
    assert gptq["dynamic"] == {"-:^2$": {}, "-:^3$": {}}
    assert gptq["lm_head"] is False


@pytest.mark.parametrize(
    "quantize",
    [
        gw.passes.quantize.Rtn(block=16, targets=["0"]),
        gw.passes.quantize.Nf4(block=16, targets=["0"]),
        gw.passes.quantize.Nf4(block=16, double_quantization=False, targets=["0"]),
        gw.passes.quantize.Fp8(activations="none", targets=["0"]),
    ],
    ids=["rtn", "nf4", "nf4 single", "fp8"],
)
def test_safetensors_hold_what_codes_stand_for(quantize: Any, tmp_path: Path) -> None:
    program = quantize(gw.trace(net().eval(), (torch.randn(3, IN),), {"input": {0: "batch"}}))
    export_checkpoint(program, tmp_path, "safetensors")
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert stored.keys() == net().state_dict().keys()
    again, x = net(), torch.randn(5, IN)
    again.load_state_dict(stored)
    torch.testing.assert_close(again(x), program(x))
    assert not (tmp_path / "config.json").exists()


def test_inputs_go_back_to_their_own_order(tmp_path: Path) -> None:
    q, scale, zero = coded.sample(4, False)
    parts = coded.gptq(q, scale, zero, 4, 0, coded.REORDERED)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"}
    program = traced(coded.write(tmp_path / "m", parts, config))
    export_checkpoint(program, tmp_path / "again", "safetensors")
    stored = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    wanted = torch.from_numpy(coded.value(q, scale, zero, coded.REORDERED)).float()
    torch.testing.assert_close(stored["0.weight"].float(), wanted)


def test_rounded_activations_are_said(tmp_path: Path) -> None:
    program = gw.trace(net().eval(), (torch.randn(3, IN),), {"input": {0: "batch"}})
    rounded = gw.passes.quantize.Int8(activations="dynamic")(program)
    notes = export_checkpoint(rounded, tmp_path, "safetensors")
    assert [n for n in notes if "activations is not written" in n]


def test_what_belongs_to_the_model_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    kept = ("tokenizer.json", "generation_config.json", "vocab.txt", "chat_template.jinja")
    for name in (*kept, "modeling_x.py", "pytorch_model.bin", "README.md"):
        (source / name).write_text("{}")
    given = {"model_type": "x", "torch_dtype": "bfloat16", "quantization_config": {"bits": 2}}
    (source / "config.json").write_text(json.dumps(given))
    safetensors.torch.save_file({"0.bias": torch.zeros(7)}, source / "model.safetensors")
    program = gw.trace(net().eval(), (torch.randn(3, IN),))
    notes = export_checkpoint(program, tmp_path / "out", "safetensors", like=source)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
        [*kept, "config.json", "model.safetensors"]
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "x", "dtype": "float32"}
    assert [n for n in notes if "1 tensors have other shapes" in n and "0.bias" in n]


def test_a_tied_head_is_named_by_its_own_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(24, 32), nn.Linear(32, 32)
            self.lm_head = nn.Linear(32, 24, bias=False)
            self.lm_head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.lm_head(self.body(self.table(ids)))
            return found

    program = gw.trace(Tied().eval(), (torch.randint(0, 24, (2, 7)),))
    rounded = gw.passes.quantize.Rtn(block=16, targets=["body"])(program)
    export_checkpoint(rounded, tmp_path, "compressed-tensors")
    assert "lm_head" in config_of(tmp_path)["ignore"]


def test_names_are_cut_where_that_is_enough() -> None:
    """AutoAWQ looks for a part of a layer's name within its block."""
    from graphwright.ir.files.coded.written import _short

    codes: Any = {"model.layers.0.mlp.up": None, "model.layers.1.mlp.up": None}
    floats = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]
    assert _short(floats, codes) == ["mlp.gate", "lm_head"]
    assert _short(["model.layers.2.mlp.up"], codes) == ["model.layers.2.mlp.up"]


def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    program = gw.trace(net().eval(), (torch.randn(3, IN),), {"input": {0: "batch"}})
    with pytest.raises(ModelError, match="no linear layer in codes"):
        export_checkpoint(program, tmp_path)
    batches = [(torch.randn(40, IN) * torch.linspace(0.1, 9, IN),)]
    scaled = gw.passes.quantize.Awq(block=16, targets=["0"])(program, calibration=batches)
    with pytest.raises(ModelError, match=r"quantize.awq put in"):
        export_checkpoint(scaled, tmp_path)
    first = gw.passes.quantize.Rtn(block=16, targets=["0"])(program)
    mixed = gw.passes.quantize.Rtn(block=16, bits=3, targets=["2"])(first)
    with pytest.raises(ModelError, match="layers differ"):
        export_checkpoint(mixed, tmp_path)
    with pytest.raises(ModelError, match="do not fill"):
        export_checkpoint(gw.passes.quantize.Rtn(block=16, bits=3)(program), tmp_path)
