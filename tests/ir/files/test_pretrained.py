"""Folders of transformers and diffusers: nothing invented, nothing dropped in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def llama(folder: Path, *, tied: bool = True, **how: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, **how)  # type: ignore[operator]
    return model


def change(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    tensors = edit(safetensors.torch.load_file(folder / FILE))
    safetensors.torch.save_file(tensors, folder / FILE, metadata={"format": "pt"})


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (without(NORM), ["1 tensor of LlamaForCausalLM missing", f"missing: {NORM}"]),
        (without(TABLE), [f"missing: {TABLE}"]),
        (lambda t: {**without(NORM)(t), "model.norm.gain": t[NORM]},
         [f"missing: {NORM}", "unexpected: model.norm.gain"]),
        (lambda t: {**t, NORM: torch.ones(7)}, [f"{NORM}: (7,) in the folder, (16,) in the model"]),
        (lambda t: {"net." + n: v for n, v in t.items()}, ["{strip_prefix: net.}"]),
    ],
)  # fmt: skip
def test_what_a_folder_lacks_is_an_error(
    edit: Callable[[Tensors], Tensors], says: list[str], tmp_path: Path
) -> None:
    llama(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    for text in says:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "section", "says"),
    [
        (dict, {}, ""),
        (lambda t: {**t, "extra.bias": torch.ones(2)}, {}, "1 of the file): extra.bias"),
        (lambda t: {"module." + n: v for n, v in t.items()}, {}, "'module.' was taken off"),
        (lambda t: {"net." + n: v for n, v in t.items()}, {"strip_prefix": "net."}, "'net.' was"),
    ],
)  # fmt: skip
def test_what_loads_gives_the_same_outputs(
    edit: Callable[[Tensors], Tensors], section: Any, says: str, tmp_path: Path
) -> None:
    model = llama(tmp_path)
    change(tmp_path, edit)
    loaded = load_model(tmp_path, section=section)
    assert loaded.module is not None
    assert torch.equal(loaded.module(IDS).logits, model(IDS).logits)
    assert [w for w in loaded.warnings if says in w] or not says
    assert len(loaded.warnings) == (1 if says else 0)


def test_shards(tmp_path: Path) -> None:
    model = llama(tmp_path, tied=False, max_shard_size="2KB")
    loaded = load_model(tmp_path)
    assert loaded.module is not None
    assert torch.equal(loaded.module(IDS).logits, model(IDS).logits)
    index = tmp_path / f"{FILE}.index.json"
    table = json.loads(index.read_text())["weight_map"]
    shard = tmp_path / table["lm_head.weight"]
    whole = safetensors.torch.load_file(shard)
    safetensors.torch.save_file(without("lm_head.weight")(whole), shard, {"format": "pt"})
    with pytest.raises(ModelError, match="missing: lm_head"):
        load_model(tmp_path)
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name}' is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_a_folder_in_half_precision(stored: str, tmp_path: Path) -> None:
    """It stays as it is where that runs; else the library builds it in float32."""
    llama(tmp_path / "float").to(getattr(torch, stored)).save_pretrained(tmp_path / stored)  # type: ignore[operator]
    kept = load_model(tmp_path / stored).module
    assert kept is not None
    assert {p.dtype for p in kept.parameters()} == {getattr(torch, stored)}
    loaded = load_model(tmp_path / stored, refusal=lambda dtype: f"no {dtype} here")
    wide = type(kept).from_pretrained(tmp_path / stored, dtype=torch.float32)  # type: ignore[attr-defined]
    assert loaded.module is not None
    assert torch.equal(loaded.module(IDS).logits, wide(IDS).logits)
    assert [w for w in loaded.warnings if f"in float32: no {stored} here" in w]
    asked = load_model(tmp_path / stored, section={"dtype": "float32"})
    assert asked.module is not None
    assert torch.equal(asked.module(IDS).logits, wide(IDS).logits)


def test_a_diffusers_folder_that_lacks_a_tensor(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,), decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,), num_decoder_blocks=(1,),
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    name, *_ = tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(without(name)(tensors), file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"missing: {name}"):
        load_model(tmp_path)


def test_a_quantized_folder_that_lacks_a_layer(tmp_path: Path) -> None:
    import graphwright as gw
    from graphwright.ir.files.export_checkpoint import export_checkpoint

    model = llama(tmp_path / "float")
    rounded = gw.passes.quantize.Rtn(block=16, targets=["*_proj"])(gw.trace(model, (IDS,)))
    export_checkpoint(rounded, tmp_path / "coded", "gptq", like=tmp_path / "float")
    assert load_model(tmp_path / "coded").module is not None
    layer = "model.layers.0.mlp.up_proj"
    change(tmp_path / "coded", lambda t: {n: v for n, v in t.items() if layer not in n})
    with pytest.raises(ModelError, match=f"missing: {layer}.weight"):
        load_model(tmp_path / "coded")


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    llama(tmp_path)
    capfd.readouterr()
    load_model(tmp_path)
    assert "".join(capfd.readouterr()) == ""
