"""Packed codes: the layout by hand, the round trip, and the weight that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.ir.edit import Editor
from graphwright.ir.layers.selectors import layers
from graphwright.ir.ops.blocks import pack_codes
from graphwright.ir.stored.blocks import BITS, Blocks, pack, unpack
from graphwright.ir.stored.insert import matrix_of, rebuild_blocks, replace_weight


@st.composite
def packable(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int, int]:
    bits = draw(st.sampled_from(BITS))
    out, columns = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    block = draw(st.integers(1, 80))
    blocks = -(-columns // block)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q = torch.randint(0, 2**bits, (out, columns), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (out, blocks), generator=generator, dtype=torch.uint8)
    scale = torch.rand(out, blocks, generator=generator)
    return q, scale, zero if draw(st.booleans()) else None, bits, block


@settings(deadline=None, max_examples=150)
@given(packable())
def test_packing_is_undone(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]) -> None:
    q, scale, zero, bits, block = case
    blocks = pack(q, scale, zero, bits, block)
    codes, scales, zeros = unpack(blocks)
    assert torch.equal(codes, q)
    assert torch.equal(scales, scale)
    middle = torch.full_like(zeros, 2 ** (bits - 1))
    assert torch.equal(zeros, middle if zero is None else zero)
    wanted = torch.empty(q.shape)
    for o in range(q.shape[0]):
        for c in range(q.shape[1]):
            g = c // block
            wanted[o, c] = (float(q[o, c]) - float(zeros[o, g])) * scale[o, g]
    assert torch.equal(blocks.value(), wanted)


def test_the_bytes_by_hand() -> None:
    four = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)
    assert pack_codes(four, 4).tolist() == [[0x21, 0xF3]]
    two = torch.tensor([[1, 2, 3, 0, 3]], dtype=torch.uint8)
    assert pack_codes(two, 2).tolist() == [[0b00111001, 0b00000011]]
    # 3 bits: 5 = 101, 6 = 110, 7 = 111 -> bits 101 011 111 from the lowest on: 0xF5, 0x01
    three = torch.tensor([[5, 6, 7]], dtype=torch.uint8)
    assert pack_codes(three, 3).tolist() == [[0b11110101, 0b00000001]]
    assert pack_codes(torch.tensor([[200]], dtype=torch.uint8), 8).tolist() == [[200]]


def test_zero_points_are_packed_along_a_row() -> None:
    q = torch.zeros(2, 48, dtype=torch.uint8)
    zero = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    blocks = pack(q, torch.ones(2, 3), zero, 4, 16)
    assert blocks.zero_point is not None
    assert blocks.zero_point.tolist() == [[0x21, 0x03], [0x54, 0x06]]
    assert blocks.codes.shape == (2, 3, 8)


@pytest.mark.parametrize(
    ("q", "scale", "bits", "message"),
    [
        (torch.full((1, 4), 16), torch.ones(1, 1), 4, "code 16 does not fit 4 bits"),
        (torch.zeros(1, 4), torch.ones(1, 2), 4, r"scale is \(1, 2\), not \(1, 1\)"),
        (torch.zeros(1, 4), torch.ones(1, 1), 1, "1 bits; 2 to 8 can be packed"),
    ],
)
def test_what_cannot_be_packed(q: torch.Tensor, scale: torch.Tensor, bits: int,
                               message: str) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pack(q.to(torch.uint8), scale, None, bits, 4)


def exact(weight: torch.Tensor, kind: str) -> tuple[Blocks, torch.Tensor]:
    """Eight-bit codes of a weight of whole numbers, which they hold exactly."""
    matrix = matrix_of(kind, weight)
    q = (matrix + 128).to(torch.uint8)
    ones = torch.ones(matrix.shape[0], -(-matrix.shape[1] // 16))
    return pack(q, ones, None, 8, 16), matrix


class Everything(torch.nn.Module):
    """A table tied to a linear layer, a product with a stored matrix, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(20, 24)
        self.head = torch.nn.Linear(24, 20, bias=False)
        self.head.weight = self.table.weight
        self.square = torch.nn.Parameter(torch.randn(24, 10))
        self.conv = torch.nn.Conv1d(2, 4, 3, groups=2)
        for parameter in self.parameters():
            parameter.data = torch.randint(-100, 100, parameter.shape).float()

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.table(ids)
        return self.head(h), h @ self.square, self.conv(x)


def test_every_use_of_a_weight_reads_the_rebuilt_one() -> None:
    inputs = (torch.tensor([[1, 2, 3]]), torch.randn(2, 2, 8))
    program = gw.trace(Everything().eval(), inputs)
    editor = Editor(program, by="quantize.test")
    done: set[str] = set()
    for layer in layers(program):
        if layer.weight not in done:
            done.add(layer.weight)
            blocks, matrix = exact(program.state[layer.weight].detach(), layer.kind)
            assert torch.equal(blocks.value(), matrix)
            replace_weight(editor, layer, rebuild_blocks(blocks))
    result = editor.finish()
    assert len(done) == 3
    for a, b in zip(program(*inputs), result(*inputs), strict=True):
        assert torch.equal(a, b)
    kept = {name for name, tensor in result.state.items() if tensor.is_floating_point()}
    assert not kept & {"table.weight", "head.weight", "square", "conv.weight"}
    assert sum(n.target is torch.ops.graphwright.dequantize_blocks.default
               for n in result.graph.nodes) == 3  # fmt: skip
    before, after = ({layer.name for layer in layers(p)} for p in (program, result))
    assert before == after
