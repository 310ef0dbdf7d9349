"""Large models: weights are streamed into a file, and sessions are opened on it, one at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from models.tiny_decoder import write

import graphwright as gw

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> gw.Program:
    from graphwright.ir.generation.trace import trace_decoder

    model = write(tmp_path_factory.mktemp("decoder"), num_hidden_layers=1)
    return gw.passes.quantize.Rtn(bits=4, block=32)(trace_decoder(model, check=False))


@pytest.mark.parametrize("level", [4, 1])
def test_the_same_model_from_files_with_one_session_at_a_time(
    decoder: gw.Program, level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gw.lower(decoder, "onnxruntime", accuracy_level=level)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    opened: list[tuple[object, int]] = []

    class Counted(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, source: Any, *rest: Any, **named: Any) -> None:
            opened.append((type(source), len(alive)))
            super().__init__(source, *rest, **named)
            alive.add(self)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counted)
    large = gw.lower(decoder, "onnxruntime", accuracy_level=level, external_data_mb=0)
    assert opened
    assert all(found == (str, 0) for found in opened), opened
    assert large.notes["products"] == plain.notes["products"]
    assert large.save(tmp_path).path.with_suffix(".onnx.data").is_file()
    for one, other in zip(*(m.run_flat(decoder.examples) for m in (plain, large)), strict=True):
        assert torch.equal(one, other)
