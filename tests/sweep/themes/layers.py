"""Norms, parametrized weights, embeddings, recurrent layers and attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from sweep.cases import Theme, With, bools, ints, positive, real
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

norms = Theme("norms")
IMAGE = {"x": real("b", 6, "h", "w")}


def _seasoned(layer: nn.Module) -> nn.Module:
    """The layer with weights and statistics that do something."""
    for tensor in [*layer.parameters(), *layer.buffers()]:
        if tensor.dtype.is_floating_point:
            tensor.data.uniform_(0.5, 1.5)
    return layer


for _name, _layer in {
    "batch_norm": lambda: nn.BatchNorm2d(6),
    "batch_norm without weights": lambda: nn.BatchNorm2d(6, affine=False),
    "batch_norm without statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "instance_norm": lambda: nn.InstanceNorm2d(6),
    "instance_norm with weights": lambda: nn.InstanceNorm2d(6, affine=True),
    "instance_norm with statistics": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
    "group_norm": lambda: nn.GroupNorm(3, 6),
    "group_norm of one group": lambda: nn.GroupNorm(1, 6),
    "group_norm of every channel": lambda: nn.GroupNorm(6, 6, affine=False),
    "local_response_norm": lambda: nn.LocalResponseNorm(3),
    "batch_norm in training mode": lambda: With(
        lambda m, x: F.batch_norm(x, None, None, m.w, m.w, training=True), w=torch.rand(6)
    ),
    "layer_norm over channels": lambda: With(
        lambda m, x: m.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=nn.LayerNorm(6)
    ),
    "adaptive instance norm": lambda: With(
        lambda m, x: (x - x.mean((2, 3), True)) / x.std((2, 3), keepdim=True) * 2 + 1
    ),
    "global response norm": lambda: With(
        lambda m, x: x * (x.norm(dim=(2, 3), keepdim=True) / x.square().sum((1, 2, 3), True).sqrt())
    ),
}.items():
    norms.module(_name, lambda layer=_layer: _seasoned(layer()), blames=("norm",), **IMAGE)
norms.module("layer_norm", lambda: _seasoned(nn.LayerNorm(5)))
norms.module("layer_norm of two axes", lambda: _seasoned(nn.LayerNorm((3, 5))), x=real("n", 3, 5))
norms.module("layer_norm without bias", lambda: nn.LayerNorm(5, bias=False))
norms.module("rms_norm", lambda: _seasoned(nn.RMSNorm(5)))
norms.module("rms_norm of two axes", lambda: nn.RMSNorm((3, 5), eps=1e-3), x=real("n", 3, 5))
norms.module("batch_norm of rows", lambda: _seasoned(nn.BatchNorm1d(5)))
norms.module("batch_norm of sequences", lambda: _seasoned(nn.BatchNorm1d(5)), x=real("b", 5, "t"))
norms.function("layer_norm of a free size", lambda x: F.layer_norm(x, x.shape[1:]),
               x=real("n", "m"), blames=("layer_norm",))  # fmt: skip
norms.function("instance_norm of sequences", F.instance_norm, x=real("b", 5, "t"),
               sizes={"t": (12, 13, 16, 24, 49, 2)})  # fmt: skip


def _linear(change: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return change(nn.Linear(5, 4)).eval()

    return build


def _parametrized(layer: nn.Module) -> nn.Module:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w[:, :4].triu() + w[:, :4].triu(1).T

    parametrize.register_parametrization(layer, "weight", Symmetric(), unsafe=True)
    return layer


parametrized = Theme("parametrized weights")
for _name, _change in {
    "weight norm, old form": nn.utils.weight_norm,
    "weight norm, old form, over all": lambda m: nn.utils.weight_norm(m, dim=None),
    "weight norm": parametrizations.weight_norm,
    "weight norm over axis 1": lambda m: parametrizations.weight_norm(m, dim=1),
    "spectral norm, old form": nn.utils.spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}.items():
    parametrized.module(_name, _linear(_change))
parametrized.module("symmetric parametrization", _linear(_parametrized), x=real("n", 4))
parametrized.module("weight norm of a convolution",
                    lambda: parametrizations.weight_norm(nn.Conv1d(5, 4, 3)), x=real("b", 5, "t"),
                    sizes={"t": (12, 13, 16, 24, 49, 3)})  # fmt: skip
parametrized.module("weight standardization", lambda: With(
    lambda m, x: F.conv2d(x, (m.w - m.w.mean((1, 2, 3), True)) / m.w.std((1, 2, 3), keepdim=True)),
    w=nn.Parameter(torch.randn(4, 6, 3, 3))), **IMAGE)  # fmt: skip
parametrized.module("pruned weight", lambda: _pruned(nn.Linear(5, 4)))


def _pruned(layer: nn.Module) -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-any-return]


lookup = Theme("embeddings")
IDS = {"x": ints(20, "b", "t")}
for _name, _layer in {
    "embedding": lambda: nn.Embedding(20, 5),
    "embedding with padding": lambda: nn.Embedding(20, 5, padding_idx=0),
    "embedding with max_norm": lambda: nn.Embedding(20, 5, max_norm=1.0),
    "embedding_bag, mean": lambda: nn.EmbeddingBag(20, 5),
    "embedding_bag, sum": lambda: nn.EmbeddingBag(20, 5, mode="sum"),
    "embedding_bag, max": lambda: nn.EmbeddingBag(20, 5, mode="max"),
    "embedding tied to a product": lambda: With(
        lambda m, x: m.e(x) @ m.e.weight.T, e=nn.Embedding(20, 5)
    ),
    "embedding of positions": lambda: With(
        lambda m, x: m.e(x) + m.p(torch.arange(x.shape[1])), e=nn.Embedding(20, 5),
        p=nn.Embedding(60, 5),
    ),
    "embedding of int32": lambda: With(lambda m, x: m.e(x.int()), e=nn.Embedding(20, 5)),
    "embedding, mean of the unpadded": lambda: With(
        lambda m, x: (m.e(x) * (x > 3)[..., None]).sum(1) / (x > 3).sum(1, True).clamp(min=1),
        e=nn.Embedding(20, 5),
    ),
}.items():  # fmt: skip
    lookup.module(_name, _layer, **IDS)
lookup.module("embedding_bag with offsets",
              lambda: With(lambda m, x: m.e(x, torch.tensor([0, 2])), e=nn.EmbeddingBag(20, 5)),
              x=ints(20, "n"), sizes={"n": (6, 7, 16, 40, 25, 3)})  # fmt: skip
lookup.module("embedding_bag with weights", lambda: With(
    lambda m, x, w: m.e(x, per_sample_weights=w), e=nn.EmbeddingBag(20, 5, mode="sum")),
    x=ints(20, "b", "t"), w=positive("b", "t"))  # fmt: skip
lookup.module("bilinear", lambda: nn.Bilinear(5, 4, 3), x=real("n", 5), y=real("n", 4))

recurrent = Theme("recurrent")
SEQUENCE = {"x": real("t", "b", 5)}
for _name, _layer in {
    "lstm": lambda: nn.LSTM(5, 4),
    "lstm, two layers, both ways": lambda: nn.LSTM(5, 4, 2, bidirectional=True),
    "lstm with projection": lambda: nn.LSTM(5, 4, proj_size=3),
    "lstm with projection, two layers, both ways": lambda: nn.LSTM(
        5, 4, 2, proj_size=3, bidirectional=True
    ),
    "lstm, batch first, without bias": lambda: nn.LSTM(5, 4, batch_first=True, bias=False),
    "gru": lambda: nn.GRU(5, 4),
    "gru, two layers, both ways": lambda: nn.GRU(5, 4, 2, bidirectional=True),
    "gru, batch first": lambda: nn.GRU(5, 4, batch_first=True),
    "rnn of tanh": lambda: nn.RNN(5, 4),
    "rnn of relu, both ways": lambda: nn.RNN(5, 4, nonlinearity="relu", bidirectional=True),
    "lstm, last output": lambda: With(lambda m, x: m.r(x)[0][-1], r=nn.LSTM(5, 4)),
    "lstm with dropout": lambda: nn.LSTM(5, 4, 2, dropout=0.3),
}.items():
    recurrent.module(_name, _layer, **SEQUENCE)
recurrent.module("lstm without batch", lambda: nn.LSTM(5, 4), x=real("t", 5))
recurrent.module("gru without batch", lambda: nn.GRU(5, 4), x=real("t", 5))
recurrent.module("lstm with a given state", lambda: With(
    lambda m, x, h: m.r(x, (h, h * 0.5)), r=nn.LSTM(5, 4)), x=real("t", "b", 5),
    h=real(1, "b", 4))  # fmt: skip
recurrent.module("lstm cell", lambda: nn.LSTMCell(5, 4), x=real("b", 5), blames=("lstm",))
recurrent.module("gru cell", lambda: nn.GRUCell(5, 4), x=real("b", 5), blames=("gru",))
recurrent.module("rnn cell", lambda: nn.RNNCell(5, 4), x=real("b", 5), blames=("rnn",))


def _packed(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    lengths = mask.sum(1).clamp(min=1)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(m.r(packed)[0], batch_first=True)[0]


recurrent.module("lstm of a packed sequence",
                 lambda: With(_packed, r=nn.LSTM(5, 4, batch_first=True)),
                 x=real("n", 6, 5), mask=bools("n", 6), blames=("pack",))  # fmt: skip

attention = Theme("attention")
QUERY = {"x": real("b", "t", 8)}
for _name, _build in {
    "multi-head attention": lambda: With(
        lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)
    ),
    "multi-head attention without weights": lambda: With(
        lambda m, x: m.a(x, x, x, need_weights=False)[0],
        a=nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "multi-head attention, bias_k and zero attention": lambda: With(
        lambda m, x: m.a(x, x, x)[0],
        a=nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True),
    ),
    "multi-head attention, other widths": lambda: With(
        lambda m, x: m.a(x, x[..., :6], x[..., :4])[0],
        a=nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=4),
    ),
    "transformer encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "transformer encoder layer, norm first": lambda: nn.TransformerEncoderLayer(
        8, 2, 16, batch_first=True, norm_first=True, activation="gelu"
    ),
    "transformer encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ),
    "transformer decoder layer": lambda: With(
        lambda m, x: m.d(x, x * 0.5), d=nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    ),
    "causal transformer encoder": lambda: With(
        lambda m, x: m.e(x, nn.Transformer.generate_square_subsequent_mask(x.shape[1]),
                         is_causal=True),
        e=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ),
    "scaled_dot_product_attention": lambda: With(
        lambda m, x: F.scaled_dot_product_attention(x, x, x)
    ),
    "scaled_dot_product_attention, causal": lambda: With(
        lambda m, x: F.scaled_dot_product_attention(x, x * 2, x, is_causal=True)
    ),
    "scaled_dot_product_attention, scaled": lambda: With(
        lambda m, x: F.scaled_dot_product_attention(x, x * 2, x, scale=0.7)
    ),
    "scaled_dot_product_attention with grouped heads": lambda: With(
        lambda m, x: F.scaled_dot_product_attention(
            _heads(x, 4), _heads(x[..., :4], 2), _heads(x[..., 4:], 2), enable_gqa=True)
    ),
    "scaled_dot_product_attention, windowed": lambda: With(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=_band(x.shape[1]))
    ),
    "linear attention": lambda: With(
        lambda m, x: F.elu(x) @ (x.softmax(1).mT @ x) / x.shape[1]
    ),
    "relative position bias": lambda: With(
        lambda m, x: (x @ x.mT + m.e(_offsets(x.shape[1]))[..., 0]).softmax(-1) @ x,
        e=nn.Embedding(21, 1),
    ),
}.items():  # fmt: skip
    attention.module(_name, _build, blames=("attention",), **QUERY)


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _band(size: int) -> Tensor:
    places = torch.arange(size)
    return (places[:, None] - places).abs() < 3


def _offsets(size: int) -> Tensor:
    places = torch.arange(size)
    return (places[:, None] - places).clamp(-10, 10) + 10


def _at_least_one(mask: Tensor) -> Tensor:
    """A padding mask (true where padded) that leaves the first token in."""
    return torch.cat([torch.zeros_like(mask[:, :1]), ~mask[:, 1:]], 1)


MASKED = {"x": real("b", "t", 8), "mask": bools("b", "t")}
for _name, _build in {
    "multi-head attention with padding": lambda: With(
        lambda m, x, mask: m.a(x, x, x, key_padding_mask=_at_least_one(mask))[0],
        a=nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "transformer encoder with padding": lambda: With(
        lambda m, x, mask: m.e(x, src_key_padding_mask=_at_least_one(mask)),
        e=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    ),
    "transformer encoder layer with padding": lambda: With(
        lambda m, x, mask: m.e(x, src_key_padding_mask=_at_least_one(mask)),
        e=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ),
    "scaled_dot_product_attention with a mask": lambda: With(
        lambda m, x, mask: F.scaled_dot_product_attention(x, x, x, mask[:, None])
    ),
    "scaled_dot_product_attention with an additive mask": lambda: With(
        lambda m, x, mask: F.scaled_dot_product_attention(x, x, x, mask[:, None].float() * -3)
    ),
}.items():
    attention.module(_name, _build, blames=("attention", "Transformer"), **MASKED)

THEMES = (norms, parametrized, lookup, recurrent, attention)
