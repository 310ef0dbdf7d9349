"""Texts as data: cut as tokenizers cut, in windows, in chat templates; padding counts nowhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.evaluation.evaluate import evaluate
from graphwright.ir.data.batches import Batches, load_data
from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import DimRange, Signature, TensorSpec

WORDS = 60
CLOSING = 2


def signature(longest: int | None = None, *, fixed: int | None = None) -> Signature:
    shape = ("batch", fixed or "seq")
    specs = [TensorSpec(n, "int64", shape, (0, 99)) for n in ("input_ids", "attention_mask")]
    dims = {"batch": DimRange()} | ({} if fixed else {"seq": DimRange(1, longest)})
    return Signature(tuple(specs), (), {}, dims)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of 60 words without special tokens, and a text that counts through them."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(3, WORDS))]
    loaded = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[PAD]")
    )
    loaded.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    loaded.save(str(tmp_path / "tokenizer.json"))
    lines = [" ".join(f"w{3 + 10 * row + i}" for i in range(10)) for row in range(5)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def load(folder: Path, of: Signature, **section: Any) -> Batches:
    return load_data({"data": "text.txt", **section}, of, 0, root=folder)


def ids_of(folder: Path) -> list[int]:
    return [int(word[1:]) for word in (folder / "text.txt").read_text().split()]


def oracle(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Knows that the text counts, and is 99% sure of it."""
    logits = torch.full((*input_ids.shape, WORDS), math.log(0.01 / (WORDS - 1)))
    following = (input_ids + 1).clamp(max=WORDS - 1).unsqueeze(-1)
    return {"logits": logits.scatter(-1, following, math.log(0.99))}


@pytest.mark.parametrize(
    "section", [{"max_length": 6}, {"max_length": 64}, {"window": 16}, {"window": 16, "stride": 5}]
)
def test_perplexity_of_an_oracle_is_101_however_a_text_is_cut(
    folder: Path, section: dict[str, int]
) -> None:
    section = {**section, "batch_size": 4}
    data = load(folder, signature(), **section, metric="perplexity")
    found = evaluate(oracle, oracle, data, "perplexity")
    assert found.before == pytest.approx(1 / 0.99, rel=1e-6)


def test_a_text_that_is_cut_keeps_its_own_tokens(folder: Path) -> None:
    (batch,) = load(folder, signature(), max_length=6, batch_size=6)
    assert batch["input_ids"][0].tolist() == ids_of(folder)[:6]


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (7, 3), (50, 50), (80, 9)])
def test_windows_count_every_token_once(folder: Path, window: int, stride: int) -> None:
    ids = ids_of(folder)
    data = load(folder, signature(), window=window, stride=stride, metric="perplexity")
    counted: list[int] = []
    starts = []
    for inputs, labels in data.labelled():
        assert labels is not None
        for row, label in zip(inputs["input_ids"], labels, strict=True):
            length = min(window, len(ids))
            start = ids.index(int(row[0]))
            assert row.tolist()[:length] == ids[start : start + length]
            starts.append(start)
            keeps = label != -100
            assert torch.equal(label[keeps], row[keeps])
            counted += (start + keeps.nonzero().flatten()).tolist()
    assert sorted(counted) == list(range(len(ids)))
    assert starts[:2] == ([0, stride] if window < len(ids) - stride else starts[:2])
    assert "labels" not in next(iter(load(folder, signature(), window=window)))


@pytest.mark.parametrize(
    ("of", "section", "message"),
    [
        (signature(12), {"window": 16}, "window 16: the model takes at most 12 tokens"),
        (signature(fixed=8), {"window": 4}, "window 4: the model takes 8 tokens"),
        (signature(), {"stride": 4}, "stride: give the `window`"),
        (signature(), {"window": 4, "stride": 5}, "stride 5 leaves tokens out"),
        (signature(), {"window": 4, "max_length": 4}, "max_length: the `window` is the length"),
        (signature(), {"chat_template": True}, "chat_template: the tokenizer in .* has none"),
    ],
)
def test_options_of_texts_that_cannot_be(
    folder: Path, of: Signature, section: dict[str, Any], message: str
) -> None:
    if "chat_template" in section:
        pytest.importorskip("transformers")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        )
    with pytest.raises(ArgumentError, match=message):
        load(folder, of, **section)


def test_windows_are_for_texts(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", input_ids=np.ones((2, 3), np.int64))
    with pytest.raises(ArgumentError, match="window is for text"):
        load_data({"data": "d.npz", "window": 4}, signature(), 0, root=tmp_path)


def test_lines_are_conversations(folder: Path) -> None:
    pytest.importorskip("transformers")
    template = (
        "{% for m in messages %}[CLS] {{ 'w3' if m['role'] == 'user' else 'w4' }} "
        "{{ m['content'] }} [SEP] {% endfor %}{% if add_generation_prompt %}w4{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
    )
    turns = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w10 w11"}]
    (folder / "text.txt").write_text("w7 w8\n" + json.dumps(turns) + "\n")
    first, second = load(folder, signature(), chat_template=True, batch_size=1)
    assert first["input_ids"].tolist() == [[1, 3, 7, 8, CLOSING]]
    assert (
        second["input_ids"].tolist()[0][:5]
        == [1, 3, 9, CLOSING, 1][:3] + second["input_ids"].tolist()[0][3:5]
    )
    asked, _ = load(folder, signature(), chat_template=True, batch_size=1, metric="agreement")
    assert asked["input_ids"].tolist() == [[1, 3, 7, 8, CLOSING, 4]]


class Padded(nn.Module):
    """Padding tokens are huge in front of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.fc(self.norm(x) + 50.0 * (1 - attention_mask).unsqueeze(-1))


@pytest.mark.parametrize(
    "given",
    [
        gw.passes.quantize.Adaquant(iterations=20, activation_bits=8),
        gw.passes.quantize.Smoothquant(alpha=0.5),
        gw.passes.quantize.Smoothquant(),
    ],
    ids=lambda given: f"{given.id}-{getattr(given.options, 'alpha', '')}",
)
def test_padding_has_no_part_in_calibration(given: gw.Pass) -> None:
    """Other values at padding tokens give the same program, bit by bit."""
    torch.manual_seed(0)
    net = Padded().eval()
    mask = (torch.arange(6)[None] < torch.tensor([[6], [3], [4]])).float()
    x = torch.randn(3, 6, 16)
    named = {"x": x, "attention_mask": mask}
    program = gw.trace(net, named, dynamic={n: {0: "batch", 1: "seq"} for n in named})
    other = x.where(mask.bool().unsqueeze(-1), 100 * torch.randn(3, 6, 16))
    first, second = (given(program, calibration=[(value, mask)]) for value in (x, other))
    assert first.state.keys() == second.state.keys()
    for name, tensor in first.state.items():
        assert torch.equal(tensor, second.state[name]), name
    assert first.graph.python_code("self").src == second.graph.python_code("self").src
