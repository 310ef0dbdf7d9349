from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.layers.transposed import OPERATOR, sub_pixel


def call(layer: nn.Module) -> torch.fx.Node:
    program = gw.trace(layer.eval(), {"input": torch.randn(2, 4, 5, 6)})
    return next(iter(program.graph.find_nodes(op="call_function", target=OPERATOR)))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": (3, 5), "stride": 3, "padding": (0, 2)},
        {"kernel_size": 3, "padding": 2},
        {"kernel_size": 1, "stride": 2, "output_padding": 1},
    ],
)
def test_the_plain_convolution_gives_the_same(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 3, **options)  # type: ignore[arg-type]
    form = sub_pixel(call(layer))
    assert form is not None
    x = torch.randn(2, 4, 5, 6)
    pad = [taps - 1 for taps in form.taps]
    assert layer.bias is not None
    y = nn.functional.conv2d(x, form.weight(layer.weight), form.channels(layer.bias), padding=pad)
    y = nn.functional.pixel_shuffle(y, form.stride)
    (top, left), (bottom, right) = form.begin, form.end
    y = y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right]
    assert torch.allclose(y, layer(x), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"dilation": 2}, {"stride": (1, 2)},
     {"stride": 4, "output_padding": 3, "kernel_size": 4}],
)  # fmt: skip
def test_others_have_no_such_form(options: dict[str, object]) -> None:
    assert sub_pixel(call(nn.ConvTranspose2d(4, 4, **{"kernel_size": 3, **options}))) is None  # type: ignore[arg-type]
