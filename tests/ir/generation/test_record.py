"""The record of a program that generates: JSON and back, names for ONNX files."""

from __future__ import annotations

import json

from graphwright.ir.generation.record import Generation, cached_layers

RECORD = Generation(
    "decoder", positions="position_ids", layers=cached_layers(2), states=(("a", "b"),),
    context_length=64, vocab_size=100, bos=1, eos=(2, 3), pad=0, sliding_window=8,
    sampling={"temperature": 0.6},
)  # fmt: skip


def test_json_and_back():
    assert Generation.from_json(json.loads(json.dumps(RECORD.to_json()))) == RECORD


def test_past_and_present_are_paired():
    assert RECORD.past == ("past_key_0", "past_value_0", "past_key_1", "past_value_1", "a")
    assert RECORD.present[-2:] == ("present_value_1", "b")


def test_names_in_onnx_files():
    names = RECORD.onnx_names()
    assert names["past_value_1"] == "past_key_values.1.value"
    assert names["present_key_0"] == "present.0.key"
    assert "logits" not in names
