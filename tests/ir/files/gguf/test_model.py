"""Models of GGUF files: what transformers' own model computes, and its own reading of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.gguf_files import KINDS, tiny, write

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model
from graphwright.ir.files.coded.modules import BlocksLinear

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(IDS).logits
    return found


def dequantized(path: Path) -> Any:
    """The model as transformers reads the file."""
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


def rounded(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Values as llama.cpp's own package stores them in blocks, and reads them back."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    blocks = GGMLQuantizationType[kind]
    codes = quantize(values.detach().numpy(), blocks)
    return torch.from_numpy(dequantize(codes, blocks)).view(values.shape)


@pytest.mark.parametrize("name", KINDS)
def test_floats_give_the_model_back(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    found = load_model(write(model, name, tmp_path / "model.gguf"))
    wanted = logits(model)
    assert float((logits(found.module) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert found.warnings == [
        "the file has no tokenizer: the model takes numbers of tokens, not text"
    ]


def mixed(name: str) -> str:
    """Types of matrices as llama.cpp's own recipes mix them."""
    if name.startswith(("token_embd", "output")):
        return "Q8_0"
    return "Q5_0" if "ffn_down" in name else "Q4_1" if "attn" in name else "Q4_0"


@pytest.mark.parametrize("name", ["llama tied", "qwen2"])
def test_codes_are_what_transformers_dequantizes(name: str, tmp_path: Path) -> None:
    path = write(tiny(name), name, tmp_path / "model.gguf", mixed)
    found = load_model(path)
    wanted = logits(dequantized(path).eval())
    assert float((logits(found.module) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    matrices = [m for m in found.module.modules() if isinstance(m, torch.nn.Linear | BlocksLinear)]  # type: ignore[union-attr]
    assert all(isinstance(m, BlocksLinear) for m in matrices)
    assert not [text for text in found.warnings if "floats" in text]


def test_experts_in_codes_become_floats_and_this_is_said(tmp_path: Path) -> None:
    def encode(name: str) -> str:
        return "Q8_0" if "exps" in name or "shexp" in name else "F32"

    model = tiny("qwen2moe")
    found = load_model(write(model, "qwen2moe", tmp_path / "model.gguf", encode))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "experts." in key or "shared_expert." in key:
                value.copy_(rounded(value, "Q8_0"))
    wanted = logits(model)
    assert float((logits(found.module) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    said = [text for text in found.warnings if "held as floats" in text]
    assert said
    assert said[0].startswith("24 quantized weights")
    coded = [m for m in found.module.modules() if isinstance(m, BlocksLinear)]  # type: ignore[union-attr]
    assert len(coded) == 6  # the three of the shared expert, in two layers


def test_a_trace_keeps_the_codes_and_one_tied_table(tmp_path: Path) -> None:
    path = write(tiny("llama tied"), "llama tied", tmp_path / "model.gguf", mixed)
    module = load_model(path).module
    assert module is not None
    program = gw.trace(module, (IDS,))
    tables = [n for n, t in program.state.items() if n.endswith("weight_codes") and len(t) == 96]
    assert len(tables) == 1
    assert sorted(program.aliases[tables[0]]) == [
        "lm_head.weight_codes", "model.embed_tokens.weight_codes",
    ]  # fmt: skip
    assert not [n for n, t in program.state.items() if tuple(t.shape) == (96, 64)]
    with torch.no_grad():
        torch.testing.assert_close(program(IDS).logits, logits(module))


def test_half_precision_stays_where_it_runs(tmp_path: Path) -> None:
    path = write(tiny("qwen2"), "qwen2", tmp_path / "model.gguf", lambda name: "F16")
    found = load_model(path)
    assert found.module is not None
    assert {p.dtype for p in found.module.parameters()} == {torch.float16}
    wide = load_model(path, section={"dtype": "float32"})
    wanted = logits(dequantized(path).eval())
    torch.testing.assert_close(logits(wide.module), wanted, rtol=1e-5, atol=1e-6)


def test_frequencies_of_the_file_divide_the_rotary_ones(tmp_path: Path) -> None:
    import gguf

    model = tiny("llama")
    plain = write(model, "llama", tmp_path / "plain.gguf")
    factors = torch.linspace(1, 4, 8)
    add = gguf.GGUFWriter.write_header_to_file

    def with_factors(writer: Any, *arguments: Any, **named: Any) -> None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
        add(writer, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_factors)
        path = write(model, "llama", tmp_path / "scaled.gguf")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / factors
    torch.testing.assert_close(logits(load_model(path).module), logits(model))
    assert not torch.allclose(logits(load_model(plain).module), logits(model))


def test_scaled_positions_are_transformers_own(tmp_path: Path) -> None:
    import transformers as t

    config = t.LlamaConfig(**_sizes(), rope_parameters={
        "rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})  # fmt: skip
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(config).eval()
    path = write(model, "llama", tmp_path / "model.gguf", more={"rope.scaling.factor": 4.0})
    assert load_model(path).module is not None
    import gguf

    add = gguf.GGUFWriter.write_header_to_file

    def with_type(writer: Any, *arguments: Any, **named: Any) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        add(writer, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_type)
        path = write(model, "llama", tmp_path / "scaled.gguf", more={"rope.scaling.factor": 4.0})
    torch.testing.assert_close(logits(load_model(path).module), logits(model))


def _sizes() -> dict[str, Any]:
    from models.gguf_files import SIZES

    return dict(SIZES)


@pytest.mark.parametrize(
    ("more", "message"),
    [({"expert_count": 4}, "expert_used_count' is missing"),
     ({"expert_count": 4, "expert_used_count": 2}, "ffn_gate.weight' has no place"),
     ({"attention.head_count": 0}, "attention.head_count"),
     ({"attention.head_count": 3}, "transformers builds no model|3 heads"),
     ({"block_count": 3}, "missing"),
     ({"block_count": 10**6}, "num_hidden_layers = 1000000"),
     ({"embedding_length": 10**7}, "asks for a model of more than|no model"),
     ({"feed_forward_length": 129}, "of another shape|129")],
)  # fmt: skip
def test_metadata_that_does_not_fit_is_refused(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tiny("llama"), "llama", tmp_path / "model.gguf", more=more)
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_what_is_no_tensor_of_the_architecture_is_refused(tmp_path: Path) -> None:
    path = write(tiny("llama"), "llama", tmp_path / "model.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_up.werght"))
    with pytest.raises(ModelError, match=r"ffn_up.werght. has no place"):
        load_model(path)
    path.write_bytes(data.replace(b"general.architecture", b"general.architecturf"))
    with pytest.raises(ModelError, match="of the architecture '' are not read"):
        load_model(path)


def test_several_files_are_one_model(tmp_path: Path) -> None:
    model = tiny("llama")
    write(model, "llama", tmp_path / "model.gguf", mixed, split=5)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2
    whole = load_model(write(model, "llama", tmp_path / "whole.gguf", mixed))
    loaded = [load_model(parts[0]), load_model(parts[-1])]
    assert loaded[0].sha256 == loaded[1].sha256
    assert loaded[0].file_bytes == sum(part.stat().st_size for part in parts)
    assert all(torch.equal(logits(m.module), logits(whole.module)) for m in loaded)
    changed = bytearray(parts[-1].read_bytes())
    changed[-1] ^= 1
    parts[-1].write_bytes(changed)
    assert load_model(parts[0]).sha256 != loaded[0].sha256


def test_parts_that_are_no_model_are_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        write(tiny("llama"), "llama", tmp_path / name / "m.gguf", split=5 + 2 * seed)
    first, second, *_ = parts = sorted((tmp_path / "one").iterdir())
    kept = second.read_bytes()
    second.write_bytes(parts[2].read_bytes())
    with pytest.raises(ModelError, match=r"'split.no' is 2, not 1"):
        load_model(first)
    second.write_bytes(next(iter(sorted((tmp_path / "other").iterdir()))).read_bytes())
    with pytest.raises(ModelError, match="part of another model"):
        load_model(first)
    second.unlink()
    with pytest.raises(ModelError, match=f"{second.name} is not beside it"):
        load_model(first)
    second.write_bytes(kept)
    renamed = first.rename(tmp_path / "one" / "first.gguf")
    with pytest.raises(ModelError, match="its name does not say which"):
        load_model(renamed)
