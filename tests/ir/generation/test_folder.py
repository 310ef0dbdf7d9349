"""Files of a tokenizer beside an artifact: copied, converted, or missing and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphwright.ir.generation.folder import with_tokenizer, write_text_files
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.text import Tokenizer


def test_a_tokenizer_of_another_form_is_converted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "hello", "world", "##s"]
    (source / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (source / "config.json").write_text('{"model_type": "bert"}')
    written, notes = write_text_files(source, out, 77)
    assert notes == []
    assert {file.name for file in written} >= {"tokenizer.json", "tokenizer_config.json"}
    assert Tokenizer(out).encode("hello worlds", special=False) == [5, 6, 7]
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["model_max_length"] == 77


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, reason in (
        (None, "its folder is not known"),
        (tmp_path / "gone", "gone is gone"),
        (tmp_path / "empty", "empty holds no tokenizer"),
    ):
        written, (note,) = write_text_files(source, tmp_path, None)
        assert written == []
        assert note.startswith("no text interface: ")
        assert reason in note
    (tmp_path / "empty" / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    _, (note,) = write_text_files(tmp_path / "empty", tmp_path, None)
    assert "cannot be converted" in note


def test_an_artifacts_tokenizer_is_the_one_beside_it(tmp_path: Path) -> None:
    record = Generation("decoder", tokenizer="/somewhere/else")
    assert with_tokenizer(record, tmp_path).tokenizer is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert with_tokenizer(record, tmp_path).tokenizer == str(tmp_path)
