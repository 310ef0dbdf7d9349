"""Model folders of transformers in codes: names that the library changes, and what it merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models.coded import fields

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model
from graphwright.ir.files.coded.modules import BlocksLinear

transformers = pytest.importorskip("transformers")

BLOCK = 16
IDS = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))


def encode(folder: Path, is_coded: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Stores weights of a saved model as 4-bit codes; returns what they stand for, by name."""
    file = folder / "model.safetensors"
    tensors, weights = safetensors.torch.load_file(file), {}
    for name in [n for n in tensors if n.endswith(".weight") and is_coded(n)]:
        weight = tensors.pop(name)
        owner = name.removesuffix(".weight")
        rows = weight.reshape(weight.shape[0], -1).unflatten(1, (-1, BLOCK))
        scale = rows.abs().amax(-1) / 7
        q = (rows / scale.unsqueeze(-1)).round().int().flatten(1) + 8
        value = ((q - 8).unflatten(1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(1)
        weights[owner] = value.to(dtype)
        packed = torch.stack([torch.from_numpy(fields(row.numpy(), 4)) for row in q])
        tensors |= {f"{owner}.weight_packed": packed, f"{owner}.weight_scale": scale,
                    f"{owner}.weight_shape": torch.tensor(q.shape)}  # fmt: skip
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": BLOCK}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def saved(model: Any, folder: Path) -> Any:
    model.eval().save_pretrained(folder)
    return model


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, **options))  # fmt: skip


def replaced(model: Any, weights: dict[str, Any], rename: Any = lambda name: name) -> Any:
    for owner, weight in weights.items():
        module = model.get_submodule(rename(owner))
        module.weight.data = weight.reshape(module.weight.shape)
    return model


def test_linear_layers_stay_codes(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path)
    weights = encode(tmp_path, lambda name: "layers" in name and "proj" in name)
    found = load_model(tmp_path)
    assert found.module is not None
    assert sum(isinstance(m, BlocksLinear) for m in found.module.modules()) == len(weights) == 7
    torch.testing.assert_close(found.module(IDS).logits, replaced(model, weights)(IDS).logits)
    program = gw.trace(found.module, (IDS,))
    ops = [str(node.target) for node in program.graph.nodes]
    assert ops.count("graphwright.dequantize_blocks.default") == 7


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_under_a_name_of_their_tool(sharded: bool, tmp_path: Path) -> None:
    model = saved(llama(), tmp_path)
    weights = encode(tmp_path, lambda name: "layers" in name and "proj" in name)
    file = tmp_path / "model.safetensors"
    if sharded:
        tensors = safetensors.torch.load_file(file)
        shard = "gptq_model-4bit-00001-of-00001.safetensors"
        (tmp_path / "gptq_model-4bit.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)})
        )
        file.rename(tmp_path / shard)
    else:
        file.rename(tmp_path / "gptq_model-4bit-128g.safetensors")
    module = load_model(tmp_path).module
    assert module is not None
    torch.testing.assert_close(module(IDS).logits, replaced(model, weights)(IDS).logits)


def test_a_tied_table_stays_codes_and_tied(tmp_path: Path) -> None:
    model = saved(llama(tie_word_embeddings=True), tmp_path)
    weights = encode(tmp_path, lambda name: "embed" in name)
    found = load_model(tmp_path)
    assert found.module is not None
    assert not [w for w in found.warnings if "held as floats" in w]
    torch.testing.assert_close(found.module(IDS).logits, replaced(model, weights)(IDS).logits)
    program = gw.trace(found.module, (IDS,))
    codes = [names for names in program.aliases.values() if names[0].endswith("weight_codes")]
    assert [set(names) for names in codes] == [
        {"lm_head.weight_codes", "model.embed_tokens.weight_codes"}
    ]
    dense = [tensor for tensor in program.state.values() if tuple(tensor.shape) == (50, 32)]
    assert not dense


def test_experts_that_the_library_merges_become_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = saved(transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, pad_token_id=0)),
        tmp_path)  # fmt: skip
    weights = encode(tmp_path, lambda name: "experts" in name or "proj" in name)
    found = load_model(tmp_path)
    assert found.module is not None
    assert [w for w in found.warnings if w.startswith("6 quantized weights are held as floats")]
    assert sum(isinstance(m, BlocksLinear) for m in found.module.modules()) == 4
    experts: Any = model.model.layers[0].mlp.experts
    head = "model.layers.0.block_sparse_moe.experts"
    with torch.no_grad():
        for i in range(2):
            w1, w2, w3 = (weights.pop(f"{head}.{i}.w{k}") for k in (1, 2, 3))
            experts.gate_up_proj[i] = torch.cat([w1, w3])
            experts.down_proj[i] = w2
    torch.testing.assert_close(found.module(IDS).logits, replaced(model, weights)(IDS).logits)


def test_names_that_the_library_changes(tmp_path: Path) -> None:
    """Vision and language in one folder: tensors have other names than the model's own."""
    torch.manual_seed(0)
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    model = saved(transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision)), tmp_path)  # fmt: skip
    weights = encode(tmp_path, lambda name: "proj" in name and "patch" not in name)
    assert "model.layers.0.mlp.up_proj" in weights  # the model calls it language_model.layers...
    found = load_model(tmp_path)
    assert found.module is not None
    assert sum(isinstance(m, BlocksLinear) for m in found.module.modules()) == len(weights)

    def rename(name: str) -> str:
        inner = name.removeprefix("model.")
        return f"model.{inner}" if inner != name and "visual" in name else (
            f"model.language_model.{inner}" if inner != name else f"model.{name}")  # fmt: skip

    torch.testing.assert_close(
        found.module(IDS).logits, replaced(model, weights, rename)(IDS).logits
    )


def test_layers_that_keep_their_weight_turned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = saved(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32, pad_token_id=0)),
        tmp_path)  # fmt: skip
    file = tmp_path / "model.safetensors"
    turned = {name: t.T.contiguous() if "c_" in name and t.dim() == 2 else t
              for name, t in safetensors.torch.load_file(file).items()}  # fmt: skip
    safetensors.torch.save_file(turned, file)
    weights = encode(tmp_path, lambda name: "c_" in name)
    found = load_model(tmp_path)
    assert found.module is not None
    assert sum(isinstance(m, BlocksLinear) for m in found.module.modules()) == len(weights) == 4
    for owner, weight in weights.items():
        owner = owner if owner.startswith("transformer") else f"transformer.{owner}"
        model.get_submodule(owner).weight.data = weight.T.contiguous()
    torch.testing.assert_close(found.module(IDS).logits, model(IDS).logits)


def test_biases_of_zeros_are_left_out_where_a_layer_has_none(tmp_path: Path) -> None:
    saved(llama(attention_bias=True), tmp_path)
    encode(tmp_path, lambda name: "proj" in name)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    added = "model.layers.0.mlp.up_proj.bias"
    assert not tensors["model.layers.0.self_attn.q_proj.bias"].any()
    safetensors.torch.save_file({**tensors, added: torch.zeros(64)}, file)
    module: Any = load_model(tmp_path).module
    assert module.model.layers[0].mlp.up_proj.bias is None
    assert module.model.layers[0].self_attn.q_proj.bias is not None


def test_a_description_without_codes_is_said(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path)
    encode(tmp_path, lambda name: False)
    found = load_model(tmp_path)
    assert found.module is not None
    assert [w for w in found.warnings if "none of the tensors is in codes" in w]
    torch.testing.assert_close(found.module(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("described", [True, False])
def test_what_the_folder_lacks_is_named(described: bool, tmp_path: Path) -> None:
    saved(llama(), tmp_path)
    encode(tmp_path, lambda name: "proj" in name)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    if described:
        tensors = {name: t for name, t in tensors.items() if "up_proj" not in name}
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    says = (
        "1 tensor of LlamaForCausalLM missing" if described else "nothing says how they are stored"
    )
    with pytest.raises(ModelError, match=says):
        load_model(tmp_path)
