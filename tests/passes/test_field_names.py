"""Options under the names that the field has for them; other words get an error that names ours."""

from __future__ import annotations

from pathlib import Path

import pytest

import graphwright as gw
from graphwright.ir.errors import ArgumentError, SpecError

BLOCKED = ("rtn", "gptq", "awq", "adaquant")


@pytest.mark.parametrize("name", BLOCKED)
def test_group_size_and_sym_are_block_and_symmetric(name: str) -> None:
    made = getattr(gw.passes.quantize, name.capitalize())
    ours = made(bits=3, block=16, symmetric=True)
    theirs = made(bits=3, group_size=16, sym=True)
    assert theirs.options == ours.options
    assert theirs.resolved_options()["block"] == 16
    with pytest.raises(ArgumentError, match="group_size"):
        made(group_size=16, block=16)


def spec(folder: Path, text: str) -> Path:
    (folder / "spec.yaml").write_text(f"version: 1\npasses:\n  - {text}\n")
    return folder / "spec.yaml"


def test_specs_take_both_names(tmp_path: Path) -> None:
    gw.load_spec(spec(tmp_path, "quantize.rtn: {bits: 4, group_size: 64, sym: true}"))
    gw.load_spec(spec(tmp_path, "quantize.nf4: {group_size: 64}"))
    with pytest.raises(SpecError, match="'block' and 'group_size' as one option"):
        gw.load_spec(spec(tmp_path, "quantize.rtn: {group_size: 64, block: 64}"))
    with pytest.raises(SpecError):
        gw.load_spec(spec(tmp_path, "quantize.nf4: {group_size: 65}"))


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("quantize.gptq: {wbits: 4}", "bits"),
        ("quantize.gptq: {desc_act: true}", "act_order"),
        ("quantize.gptq: {percdamp: 0.01}", "damping"),
        ("quantize.gptq: {blocksize: 32}", "block"),
        ("quantize.awq: {modules: ['*']}", "targets"),
        ("quantize.vptq: {vector_lens: 8}", "vector_length"),
        ("quantize.vptq: {num_centroids: 256}", "centroids"),
        ("quantize.smoothquant: {smoothing_strength: 0.5}", "alpha"),
        ("prune.magnitude: {amount: 0.5}", "sparsity"),
        ("compensate.eora: {r: 8}", "rank"),
        ("adapt.lora: {r: 8}", "rank"),
        ("adapt.lora: {lora_alpha: 16}", "alpha"),
        ("adapt.lora: {target_modules: ['*']}", "targets"),
        ("adapt.lora: {modules_to_save: ['*']}", "also_train"),
        ("tune.finetune: {tune: {learning_rate: 0.1}}", "lr"),
    ],
)
def test_a_word_of_other_tools_is_answered_with_ours(text: str, ours: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        gw.load_spec(spec(tmp_path, text))
    assert f"{ours!r}" in str(caught.value)
