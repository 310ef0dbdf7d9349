"""Layers that once went through the standard exporter: bags, cells, convolutions without a batch.

The reference is the module itself, run eagerly at sizes that the trace has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import graphwright as gw


class Net(nn.Module):
    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(self, x) if y is None else self.function(self, x, y)


def lowered(net: nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, dict[int, str]]) -> Any:
    compiled = gw.lower(gw.trace(net.eval(), inputs, dynamic=dynamic), "onnxruntime")
    assert compiled.notes["translator"] == "direct"
    return compiled


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, -1])
def test_bags_of_rows(mode: str, padding: int | None) -> None:
    bag = nn.EmbeddingBag(9, 5, mode=mode, padding_idx=padding)
    compiled = lowered(bag, {"input": ids(4, 3)}, {"input": {0: "b", 1: "t"}})
    x = ids(2, 6)
    x[0] = 8  # a bag of nothing but padding
    torch.testing.assert_close(compiled(x), bag(x))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("ends_too", [False, True])
def test_bags_between_offsets_some_empty(mode: str, ends_too: bool) -> None:
    bag = nn.EmbeddingBag(9, 5, mode=mode, include_last_offset=ends_too)
    net = Net(lambda m, x, y: m.bag(x, y), bag=bag)
    example = {"x": ids(6), "y": torch.tensor([0, 2, 2, 6])}
    # Where the last offset is the end, it has to be that.
    compiled = lowered(net, example, {} if ends_too else {"x": {0: "n"}})
    x, y = ids(6 if ends_too else 8), torch.tensor([0, 0, 3, 6])
    torch.testing.assert_close(compiled(x, y), bag(x, y))


def test_a_bag_of_weighted_rows() -> None:
    bag = nn.EmbeddingBag(9, 5, mode="sum")
    net = Net(lambda m, x, y: m.bag(x, per_sample_weights=y), bag=bag)
    example = {"x": ids(4, 3), "y": torch.randn(4, 3)}
    compiled = lowered(net, example, {k: {0: "b", 1: "t"} for k in example})
    x, y = ids(2, 6), torch.randn(2, 6)
    torch.testing.assert_close(compiled(x, y), net(x, y))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_step_by_step(kind: type[nn.RNNCellBase], bias: bool) -> None:
    def steps(m: Any, x: Tensor) -> Tensor:
        state = None
        for part in x.unbind(1):
            state = m.cell(part, state)
        return state  # type: ignore[return-value]

    net = Net(steps, cell=kind(5, 4, bias))
    compiled = lowered(net, {"x": torch.randn(3, 4, 5)}, {"x": {0: "b"}})
    x = torch.randn(7, 4, 5)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)


def test_weights_of_a_recurrent_layer_may_be_computed_from_stored_ones() -> None:
    layer = parametrizations.weight_norm(nn.LSTM(5, 4), "weight_hh_l0")
    parametrize_input = nn.GRU(5, 4, bidirectional=True)
    parametrize.register_parametrization(parametrize_input, "weight_ih_l0", nn.Tanh())
    net = Net(lambda m, x: (m.lstm(x), m.gru(x)), lstm=layer, gru=parametrize_input)
    compiled = lowered(net, {"x": torch.randn(6, 3, 5)}, {"x": {0: "t", 1: "b"}})
    x = torch.randn(9, 2, 5)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 12)),
        (nn.Conv2d(4, 4, 3, groups=2, padding="same"), (4, 6, 7)),
        (nn.Conv3d(2, 3, 2, bias=False), (2, 5, 4, 3)),
        (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 12)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 6, 7)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_convolutions_without_a_batch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    compiled = lowered(layer, {"input": torch.randn(shape)}, {"input": {1: "n"}})
    x = torch.randn(shape[0], shape[1] + 5, *shape[2:])
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "down"),
    [
        (nn.ConvTranspose1d(3, 3, 4, 3, padding=1), nn.Conv1d(3, 3, 4, 3, padding=1)),
        (nn.ConvTranspose2d(3, 3, 3, 2, padding=1, groups=3), nn.Conv2d(3, 3, 3, 2, padding=1)),
        (nn.ConvTranspose2d(3, 3, 2, 2, dilation=2), nn.Conv2d(3, 3, 2, 2, dilation=2)),
    ],
    ids=["stride 3", "grouped", "dilated"],
)
def test_a_transposed_convolution_to_the_size_of_another(layer: Any, down: Any) -> None:
    """As a decoder that gives each level the size that the encoder had there."""
    net = Net(lambda m, x: m.up(m.down(x), output_size=x.shape[2:]), up=layer, down=down)
    rank = len(layer.stride)
    axes = {"x": {i + 2: "hw"[i] for i in range(rank)}}
    compiled = lowered(net, {"x": torch.randn(2, 3, *(13, 12)[:rank])}, axes)
    for size in (12, 14, 21):
        x = torch.randn(2, 3, *(size, size + 1)[:rank])
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)


def test_what_has_no_form_and_follows_from_stored_tensors_is_computed() -> None:
    layer = parametrizations.orthogonal(nn.Linear(5, 5))
    net = Net(lambda m, x: m.layer(x) * torch.lgamma(m.layer.bias.abs() + 1), layer=layer)
    compiled = lowered(net, {"x": torch.randn(4, 5)}, {"x": {0: "n"}})
    x = torch.randn(7, 5)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)
