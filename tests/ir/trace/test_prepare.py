"""Ways of a model that no graph can hold: taken out with a word, or refused with what to write."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.trace.capture import TraceWarning

FREE = {"x": {0: "b", 1: "t"}, "pad": {0: "b", 1: "t"}}


class Tagger(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, **options)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.out(self.encoder(x, src_key_padding_mask=pad))


def padded(lengths: list[int], longest: int) -> Tensor:
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("example", [[6, 6], [6, 4]], ids=["whole", "padded"])
def test_an_encoder_with_a_padding_mask_is_traced_without_nested_tensors(
    kind: str, example: list[int]
) -> None:
    def mask(lengths: list[int], longest: int) -> Tensor:
        pad = padded(lengths, longest)
        return pad if kind == "bool" else torch.zeros(pad.shape).masked_fill(pad, -torch.inf)

    torch.manual_seed(0)
    model = Tagger().eval()
    given = {"x": torch.randn(2, 6, 16), "pad": mask(example, 6)}
    with pytest.warns(TraceWarning, match="nn.TransformerEncoder 'encoder' is traced without"):
        program = gw.trace(model, given, FREE)
    assert model.encoder.use_nested_tensor
    for lengths, longest in (([5, 3, 2], 5), ([6, 1], 6)):
        x, pad = torch.randn(len(lengths), longest, 16), padded(lengths, longest)
        with torch.no_grad():
            expected = model(x, mask(lengths, longest))
        found = program(x, mask(lengths, longest))
        torch.testing.assert_close(found[~pad], expected[~pad], rtol=1e-4, atol=1e-5)


def test_an_encoder_without_nested_tensors_needs_no_word() -> None:
    given = {"x": torch.randn(2, 6, 16), "pad": padded([6, 4], 6)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", TraceWarning)
        program = gw.trace(Tagger(enable_nested_tensor=False).eval(), given, FREE)
    assert "trace" not in program.facts


@pytest.mark.parametrize("bidirectional", [True, False])
def test_packed_sequences_are_refused_with_what_to_write(bidirectional: bool) -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 12, batch_first=True, bidirectional=bidirectional)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]

    model = Packs()
    given = {"x": torch.randn(2, 6, 8), "lengths": torch.tensor([6, 3])}
    with pytest.raises(ModelError, match="packed sequences cannot be traced") as caught:
        gw.trace(model, given)
    assert "test_prepare.py" in str(caught.value.where)
    assert "mask what lies behind the lengths" in str(caught.value)
    model(**given)
