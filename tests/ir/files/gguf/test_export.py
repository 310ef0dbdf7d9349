"""GGUF files that are written, as llama.cpp's own package and transformers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.gguf_files import tiny, write

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model
from graphwright.ir.files.exports import EXPORTS
from graphwright.ir.files.gguf.export import export_gguf
from graphwright.ir.program import Program

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return found


def traced(module: Any) -> Program:
    dynamic = {"input_ids": {0: "batch", 1: "seq"}}
    return gw.trace(Logits(module), (IDS,), dynamic, ranges={"input_ids": (0, 96)}, check=False)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Entries, and tensors as (type, values)."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type))
               for t in reader.tensors}  # fmt: skip
    return {name: part.contents() for name, part in reader.fields.items()}, tensors


def mixed(name: str) -> str:
    if name.startswith("token"):
        return "Q8_0"
    if "ffn_down" in name:
        return "Q5_1" if "blk.0" in name else "Q5_0"
    return "Q4_1" if "attn" in name else "Q4_0"


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "gemma2"])
def test_a_file_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    source = write(tiny(name), name, tmp_path / "in.gguf", mixed, {"more": 7})
    loaded = load_model(source)
    notes = export_gguf(traced(loaded.module), tmp_path / "out", loaded.folder, "f32")
    before, after = read(source), read(tmp_path / "out" / "model.gguf")
    assert before[1].keys() == after[1].keys()
    for key, (kind, values) in before[1].items():
        assert after[1][key][0] == kind, key
        np.testing.assert_array_equal(after[1][key][1], values)
    assert not [text for text in notes if "rounded" in text]
    added = {"general.file_type", "general.quantization_version"}
    own = {k: v for k, v in after[0].items() if k not in added and not k.startswith("GGUF.")}
    assert own == {k: v for k, v in before[0].items() if not k.startswith("GGUF.")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer of bytes, as a folder of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    place = tmp_path_factory.mktemp("folder")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    first, second = alphabet[40:42]
    vocabulary[first + second] = 93
    tokenizer = Tokenizer(models.BPE(vocabulary, [(first, second)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        chat_template="{{ messages[0].content }}")  # fmt: skip
    wrapped.save_pretrained(place)
    tiny("llama").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return traced(load_model(folder).module)


@pytest.mark.parametrize(
    ("quantize", "kind"),
    [(gw.passes.quantize.Rtn(bits=4, block=64, symmetric=True), "Q4_0"),
     (gw.passes.quantize.Rtn(bits=4, block=32), "Q4_1"),
     (gw.passes.quantize.Rtn(bits=8, block=32, symmetric=True), "Q8_0"),
     (gw.passes.quantize.Rtn(bits=2, block=32), "Q4_0"),
     (None, "F16")],
)  # fmt: skip
def test_a_quantized_folder_is_read_by_others(
    quantize: Any, kind: str, folder: Path, program: Program, tmp_path: Path
) -> None:
    program = program if quantize is None else quantize(program)
    notes = EXPORTS["gguf"]().write(program, tmp_path, folder)
    entries, tensors = read(tmp_path / "gguf" / "model.gguf")
    matrices = ("attn_q.", "ffn_gate", "ffn_up", "ffn_down")
    assert {k for n, (k, _) in tensors.items() if any(part in n for part in matrices)} == {kind}
    assert any("rounded" in text for text in notes)  # scales of float32 in half precision
    assert entries["tokenizer.ggml.pre"] == "gpt-2"
    merge = entries["tokenizer.ggml.merges"][0]
    assert entries["tokenizer.ggml.tokens"][93] == merge.replace(" ", "")
    assert entries["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert entries["tokenizer.ggml.token_type"][94:] == [5, 5]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf"
    )
    with torch.no_grad():
        wanted, found = program(IDS), theirs.eval()(IDS).logits
    assert float((found - wanted).abs().max()) <= 4e-3 * float(wanted.abs().max())
    again = load_model(tmp_path / "gguf" / "model.gguf", section={"dtype": "float32"})
    with torch.no_grad():
        torch.testing.assert_close(again.module(IDS).logits, found)  # type: ignore[misc]
    texts = transformers.AutoTokenizer.from_pretrained(again.folder)
    known = transformers.AutoTokenizer.from_pretrained(folder)
    assert texts("abc hello").input_ids == known("abc hello").input_ids
    assert texts.chat_template == known.chat_template


def test_what_cannot_be_described_is_refused(
    folder: Path, program: Program, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="comes from no folder"):
        export_gguf(program, tmp_path, None, "f16")
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="name for this tokenizer is not known"):
        export_gguf(program, tmp_path, other, "f16")
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "mpt"}))
    with pytest.raises(ModelError, match="'mpt' are written from a GGUF file only"):
        export_gguf(program, tmp_path, other, "f16")
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 160}))
    (other / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="other shapes than the configuration says"):
        export_gguf(program, tmp_path, other, "f16")
