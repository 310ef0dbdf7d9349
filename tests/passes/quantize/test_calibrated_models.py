"""GPTQ and AWQ on trained models: both are better than rounding to nearest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import encoder, gpt

import graphwright as gw

Awq, Gptq, Rtn = (getattr(gw.passes.quantize, name) for name in ("Awq", "Gptq", "Rtn"))


@pytest.mark.slow
def test_perplexity_of_the_small_gpt(monkeypatch: pytest.MonkeyPatch) -> None:
    if not gpt.CACHE.exists():
        pytest.skip("the small GPT has not been trained yet: tests/models/gpt.py")
    monkeypatch.setattr(gpt, "HELD_OUT_SEQUENCES", 64)
    program, batches = gpt.program(), gpt.calibration(48)
    options: dict[str, Any] = {"bits": 3, "block": 32, "embeddings": False}
    found = {
        step.__name__: gpt.perplexity(step(**options)(program, calibration=batches, check=False))
        for step in (Rtn, Gptq, Awq)
    }
    exact = gpt.perplexity(program)
    assert exact < found["Gptq"] < found["Awq"] < found["Rtn"]
    assert found["Gptq"] - exact < 0.6 * (found["Rtn"] - exact)


@pytest.mark.slow
def test_meaning_of_the_sentence_encoder() -> None:
    program, held_out = encoder.program(), encoder.held_out()[::8]
    options: dict[str, Any] = {"bits": 4, "block": 32, "embeddings": False}
    reference = encoder.embeddings(program, held_out)
    cosines = {}
    for step in (Rtn, Gptq):
        rounded = step(**options)(program, calibration=encoder.calibration()[::2], check=False)
        cosines[step.__name__] = encoder.mean_cosine(
            reference, encoder.embeddings(rounded, held_out)
        )
    assert torch.isfinite(reference).all()
    assert cosines["Gptq"] > 0.982
    assert 1 - cosines["Gptq"] < 0.6 * (1 - cosines["Rtn"])


@pytest.mark.slow
def test_static_ranges_of_the_sentence_encoder_on_texts_of_mixed_lengths() -> None:
    """Most of such a batch is padding, whose values are of other sizes than those of any token."""
    program, texts = encoder.program(), encoder.sentences()
    mixed, held_out = (encoder.tokens([*part[i::16], *part[i + 8 :: 16]]) for part, i in (
        (texts[0], 0), (texts[1][::4], 0)))  # fmt: skip
    reference = encoder.embeddings(program, held_out)
    padding = torch.cat([(1 - batch["attention_mask"]).flatten() for batch in mixed])
    assert float(padding.double().mean()) > 0.4
    smooth = gw.passes.quantize.Smoothquant()(program, calibration=mixed, check=False)
    int8 = gw.passes.quantize.Int8(activations="static")(smooth, calibration=mixed, check=False)
    found = encoder.mean_cosine(reference, encoder.embeddings(int8, held_out))
    assert found > 0.995
