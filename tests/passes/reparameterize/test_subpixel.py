from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.passes.reparameterize import Subpixel

CHAIN = ("unet", [("reparameterize.subpixel", {})])

aten = torch.ops.aten
LAYERS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def is_transposed(node: torch.fx.Node) -> bool:
    return "conv_transpose" in str(node.target)


def both_ways(model: nn.Module, x: torch.Tensor, free: bool = False) -> list[gw.Program]:
    """The program, with shuffles, and back; float64, so that errors are those of a formula."""
    dims = {"input": {0: "batch", **{n: f"n{n}" for n in range(2, x.dim())}}} if free else None
    program = gw.trace(model.double().eval(), (x.double(),), dims)
    there = Subpixel().execute(program, Context()).program
    back = Subpixel(to="transposed").execute(there, Context()).program
    assert measure(program, there).relative < 1e-10
    assert measure(there, back).relative < 1e-10
    return [program, there, back]


@settings(max_examples=25)
@given(data=st.data(), rank=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]))
def test_any_kernel_stride_padding(data: st.DataObject, rank: int, groups: int) -> None:
    each = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    kernel, stride, dilation, padding = each(1, 5), each(1, 3), each(1, 2), each(0, 2)
    more = tuple(data.draw(st.integers(0, s - 1)) for s in stride)
    sizes = zip(kernel, stride, dilation, padding, more, strict=True)
    if any(3 * s - 2 * p + d * (k - 1) + o + 1 < 1 for k, s, d, p, o in sizes):
        return  # torch has no such layer
    layer = LAYERS[rank](
        4, 4, kernel, stride, padding, more, groups, data.draw(st.booleans()), dilation
    )
    program, there, _ = both_ways(layer, torch.randn(2, 4, *[4] * rank))
    assert any(is_transposed(node) for node in program.graph.nodes)
    assert not any(is_transposed(node) for node in there.graph.nodes)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": 8, "stride": 4, "padding": 2, "groups": 2},
    ],
)
def test_free_sizes_and_back(rank: int, options: dict[str, int]) -> None:
    model = LAYERS[rank](4, 4, **options)  # type: ignore[arg-type]
    program, there, back = both_ways(model, torch.randn(2, 4, *[5] * rank), free=True)
    x = torch.randn(3, 4, *[4] * rank, dtype=torch.float64)
    assert torch.allclose(there(x), program(x), rtol=0, atol=1e-12)  # float64, 100 terms
    assert any(is_transposed(node) for node in back.graph.nodes)
    weight = next(name for name in back.state if "weight" in name)
    assert torch.equal(back.state[weight], program.state["weight"])


def test_a_window_has_no_more_taps_than_it_needs() -> None:
    """Kernel 4, stride 2, padding 1: two taps per axis and phase, not three."""
    _, there, _ = both_ways(nn.ConvTranspose2d(3, 5, 4, 2, 1), torch.randn(1, 3, 4, 4))
    assert there.state["weight"].shape == (20, 3, 2, 2)
    assert len(there.graph.find_nodes(op="call_function", target=aten.pixel_shuffle.default)) == 1


class Espcn(nn.Module):
    """A convolution and a shuffle, as super-resolution nets write it."""

    def __init__(self, kernel: int, padding: int, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, kernel, padding=padding, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pixel_shuffle(self.conv(x), 2)


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), (3, 0), (5, 2), (2, 1)])
def test_a_shuffled_convolution_as_a_transposed_one(kernel: int, padding: int) -> None:
    program = gw.trace(Espcn(kernel, padding).double().eval(), (torch.randn(2, 3, 6, 7).double(),))
    turned = Subpixel(to="transposed").execute(program, Context()).program
    assert measure(program, turned).relative < 1e-12
    assert any(is_transposed(node) for node in turned.graph.nodes)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Espcn(3, 1, bias=True), "its bias differs between the phases of a channel"),
        (Espcn(3, 3), "no transposed convolution has its padding along axis 0"),
    ],
)
def test_what_has_no_transposed_form_stays(model: nn.Module, reason: str) -> None:
    program = gw.trace(model.eval(), (torch.randn(2, 3, 6, 7),))
    result = Subpixel(to="transposed").execute(program, Context())
    assert result.actions == (gw.Action.left("conv", reason),)
    assert [n.target for n in result.program.graph.nodes] == [n.target for n in program.graph.nodes]


def test_a_weight_of_two_layers_changes_for_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(torch.relu(self.up(x)))

    _, there, _ = both_ways(Twice(), torch.randn(2, 3, 4, 4))
    assert not any(is_transposed(node) for node in there.graph.nodes)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_onnx_runtime_gives_the_same(rank: int) -> None:
    up = LAYERS[rank](4, 4, 3, 2, 1, 1)
    dims = {"input": {0: "batch", 2: "n"}}
    program = gw.trace(up.eval(), (torch.randn(2, 4, *[5] * rank),), dims)
    compiled = gw.lower(Subpixel()(program), "onnxruntime")
    x = torch.randn(3, 4, 7, *[5] * (rank - 1))
    assert torch.allclose(compiled(x), program(x), atol=1e-5)  # float32, 100 terms
