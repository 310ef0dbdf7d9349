from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.ir.layers.transposed import OPERATOR, OPERATORS, even_sub_pixel, sub_pixel


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
def test_the_even_form_pads_both_ends_alike(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 3, **options)  # type: ignore[arg-type]
    form = even_sub_pixel(call(layer))
    assert form is not None
    x = torch.randn(2, 4, 5, 6)
    pad = [taps - 1 for taps in form.taps]
    assert layer.bias is not None
    y = nn.functional.conv2d(x, form.weight(layer.weight), form.channels(layer.bias), padding=pad)
    y = nn.functional.pixel_shuffle(y, form.stride[0])
    (top, left), (bottom, right) = form.begin, form.end
    y = y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right]
    assert torch.allclose(y, layer(x), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"dilation": 2}, {"stride": (1, 2)},
     {"stride": 4, "output_padding": 3, "kernel_size": 4}],
)  # fmt: skip
def test_others_have_no_even_form(options: dict[str, object]) -> None:
    layer = nn.ConvTranspose2d(4, 4, **{"kernel_size": 3, **options})  # type: ignore[arg-type]
    assert even_sub_pixel(call(layer)) is None


def moved(y: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The phases of every axis where they belong, place by place."""
    batch, channels = y.shape[0], y.shape[1]
    for s in stride:
        channels //= s
    sizes = [size * s for size, s in zip(y.shape[2:], stride, strict=True)]
    out = y.new_zeros(batch, channels, *sizes)
    split = y.reshape(batch, channels, *stride, *y.shape[2:])
    for phases in torch.cartesian_prod(*(torch.arange(s) for s in stride)).reshape(-1, len(stride)):
        places = tuple(slice(int(p), None, s) for p, s in zip(phases, stride, strict=True))
        out[(slice(None), slice(None), *places)] = split[(slice(None), slice(None), *phases)]
    return out


@settings(max_examples=120)
@given(data=st.data(), rank=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]))
def test_every_transposed_convolution_has_a_plain_form(
    data: st.DataObject, rank: int, groups: int
) -> None:
    each = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(rank)]  # noqa: E731
    kernel, stride, dilation = each(1, 5), each(1, 3), each(1, 2)
    padding = each(0, 3)
    more = [data.draw(st.integers(0, max(s, d) - 1))
            for s, d in zip(stride, dilation, strict=True)]  # fmt: skip
    length = each(3, 6)
    given_ = zip(length, stride, padding, dilation, kernel, more, strict=True)
    if any((n - 1) * s - 2 * p + d * (k - 1) + o + 1 < 1 for n, s, p, d, k, o in given_):
        return  # torch has no such layer
    weight = torch.randn(4, 3, *kernel, dtype=torch.float64)
    bias = torch.randn(3 * groups, dtype=torch.float64)
    x = torch.randn(2, 4, *length, dtype=torch.float64)
    target = next(op for op in OPERATORS if f"conv_transpose{rank}d" in str(op))
    expected = target(x, weight, bias, stride, padding, more, groups, dilation)

    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "weight", "bias")]
    nodes[1].meta["val"] = weight
    args = (*nodes, stride, padding, more, groups, dilation)
    form = sub_pixel(graph.call_function(target, args))
    assert form is not None
    pads = [n for axis in reversed(form.axes) for n in axis.pad]
    plain = getattr(nn.functional, f"conv{rank}d")
    y = plain(nn.functional.pad(x, pads), form.weight(weight), form.channels(bias), groups=groups)
    y = moved(y, form.stride)
    for axis, (begin, end) in enumerate(zip(form.begin, form.end, strict=True), start=2):
        y = y.narrow(axis, begin, y.shape[axis] - begin - end)
    assert y.shape == expected.shape
    # float64; sums of at most 500 terms
    assert torch.allclose(y, expected, rtol=0, atol=1e-11)
    assert all(a.taps <= -(-a.dilation * a.kernel // a.stride) + 1 for a in form.axes)
