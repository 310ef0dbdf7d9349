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


class PutTogether(nn.Module):
    """A weight that every call makes of others, as reparametrized image models do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.whole = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.whole.weight.data = (self.a.weight.data.clone().detach() * 2).contiguous()
        return self.whole(x)


def test_a_weight_put_together_in_forward_is_computed_in_the_graph() -> None:
    model = PutTogether().eval()
    before = model.whole.weight.detach().clone()
    program = gw.trace(model, (torch.randn(2, 4),), "batch")
    assert torch.equal(model.whole.weight, before)
    assert isinstance(model.whole.weight, nn.Parameter)
    assert "data" not in vars(torch.Tensor)
    x = torch.randn(5, 4)
    torch.testing.assert_close(program(x), model(x))


def test_a_size_that_is_used_as_text_is_fixed() -> None:
    class Text(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * {"16": 2.0}.get(str(x.shape[1]), 3.0)

    x = torch.randn(2, 16, 3)
    with pytest.warns(TraceWarning, match="'t' is fixed at 16: left free, it makes the trace"):
        program = gw.trace(Text(), (x,), {"x": {0: "b", 1: "t"}})
    assert program.signature.inputs[0].shape == ("b", 16, 3)
    torch.testing.assert_close(program(x), x * 2)


def test_dropout_in_eval_mode_is_named() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5)

    with pytest.warns(TraceWarning) as caught:
        gw.trace(Drops(), (torch.randn(2, 3),))
    assert any("node 'dropout' (test_prepare.py:" in str(w.message) for w in caught)


def test_statistics_that_a_call_moves_are_put_back() -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.norm
            return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, training=True)

    model = Moves().eval()
    gw.trace(model, (torch.randn(6, 3),), "batch")
    assert torch.equal(model.norm.running_mean, torch.zeros(3))
    assert torch.equal(model.norm.running_var, torch.ones(3))


def test_the_line_of_a_condition_in_the_graph_is_named() -> None:
    class Chooses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    with pytest.raises(ModelError, match="runs on a condition") as caught:
        gw.trace(Chooses(), (torch.randn(2, 3),))
    assert str(caught.value.where).startswith("test_prepare.py:")
