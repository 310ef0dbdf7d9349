"""Encoder-decoders in two parts: tokens of transformers, the encoder run once, both backends."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from models.seq2seq import model, own_tokens, sources
from torch import Tensor

import graphwright as gw
from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.encoder_decoder import EncoderDecoder
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.seq2seq_trace import trace_encoder_decoder
from graphwright.ir.parts import Parts

pytestmark = pytest.mark.filterwarnings("ignore:.*generation.*")
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "no_repeat_ngram_size": 1}


@cache
def parts(family: str) -> Parts:
    return trace_encoder_decoder(model(family))


def ours(halves: EncoderDecoder, family: str, **options: Any) -> list[list[int]]:
    ids, mask = sources(family)
    found = halves.generate(ids, **mask, **(OPTIONS | options))
    assert isinstance(found, list)
    return [completion.ids for completion in found]


@pytest.mark.parametrize("family", ["t5", "bart", "marian", "whisper"])
def test_tokens_are_those_of_transformers_in_a_ragged_batch(family: str) -> None:
    found = parts(family)
    assert all(program.facts.get("trace") is None for program in found.values())
    assert found["decoder"].signature.dims["past"].min == 0
    assert set(found.wires("decoder")) == {
        n for i in (0, 1) for n in (f"cross_key_{i}", f"cross_value_{i}")
    }
    wanted = own_tokens(family, max_new_tokens=8)
    assert len({token for row in wanted for token in row}) > 6
    assert ours(EncoderDecoder.of(found), family) == wanted


def test_the_encoder_runs_once_and_a_start_may_be_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = EncoderDecoder.of(parts("t5"))
    lengths: list[int] = []
    run = halves._decoder.run_flat
    encoded: list[int] = []
    encode = halves._encoder.run_flat

    def counted(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        lengths.append(inputs[1].shape[2])
        return run(inputs)

    def once(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        encoded.append(len(inputs[0]))
        return encode(inputs)

    monkeypatch.setattr(halves._decoder, "run_flat", counted)
    monkeypatch.setattr(halves._encoder, "run_flat", once)
    ids, mask = sources("t5")
    found = halves.generate(ids, **mask, begin=[0, 5, 9], **OPTIONS)
    assert encoded == [3]
    assert lengths == [0, *range(3, 10)]
    net = model("t5")
    start = torch.tensor([[0, 5, 9]] * 3)
    wanted = net.generate(ids, **mask, decoder_input_ids=start, do_sample=False, **OPTIONS)
    assert [c.ids for c in found] == wanted[:, 3:].tolist()  # type: ignore[union-attr]


def test_beams_are_those_of_transformers() -> None:
    wanted = own_tokens("t5", max_new_tokens=6, num_beams=3)
    found = ours(EncoderDecoder.of(parts("t5")), "t5", max_new_tokens=6, num_beams=3)
    assert found == [row[: len(mine)] for row, mine in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_lowered_parts_generate_the_same(family: str, backend: str) -> None:
    found = parts(family)
    encoder, decoder = (gw.lower(program, backend) for program in found.values())
    records = tuple(Generation.of(program) for program in found.values())
    halves = EncoderDecoder(encoder, decoder, records)  # type: ignore[arg-type]
    assert ours(halves, family) == own_tokens(family, max_new_tokens=8)


def test_rows_that_end_early_leave_the_others_as_they_are() -> None:
    """A row that has ended is run no more, and the others go on as one batch."""
    halves = EncoderDecoder.of(parts("t5"))
    free = ours(halves, "t5")
    stop = free[0][2]
    wanted = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len(wanted[0]) == 3 < max(map(len, wanted))
    assert ours(halves, "t5", stop=[stop]) == wanted


def test_other_sources_are_refused() -> None:
    with pytest.raises(ArgumentError, match="a tensor of features"):
        EncoderDecoder.of(parts("whisper")).generate([1, 2, 3])
    with pytest.raises(ArgumentError, match="token ids, not numbers"):
        EncoderDecoder.of(parts("t5")).generate(torch.randn(1, 4))
    with pytest.raises(ArgumentError, match="no part 'vae'"):
        parts("t5").replace(vae=parts("t5")["encoder"])
