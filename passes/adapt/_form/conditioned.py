"""A network that makes a matrix for every sample and block out of what is known of the sample."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import set_gw_meta

aten = torch.ops.aten

FREQUENCIES = 64
"""Random frequencies that every number is seen at."""

HIDDEN = 256
"""Values of the layer behind the sines and cosines."""

BLOCK = 64
"""Values that a block of the network is known by."""

SMALL = 1e-5
"""Size of the last weights at the start, so that every matrix is the identity there."""

REST = "rest"
"""Block of layers that are in none."""

_NUMBERED = re.compile(r"(mid_block|[A-Za-z_]\w*\.\d+)(?=\.|$)")


def block_of(layer: str) -> str:
    """The block that a layer is in: its name as far as the first number, or as `mid_block`."""
    found = _NUMBERED.search(layer)
    return layer[: found.end()] if found else REST


def number_blocks(names: Iterable[str]) -> dict[str, int]:
    """Blocks in the order of their first layer, and those in none behind them."""
    blocks = list(dict.fromkeys(block_of(name) for name in names))
    ordered = [b for b in blocks if b != REST] + [b for b in blocks if b == REST]
    return {block: number for number, block in enumerate(ordered)}


@dataclass
class Conditioning:
    """The network of one adapter in a graph under edit.

    Attributes:
        name: of the adapter.
        blocks: number by block.
        rank: of the matrices.
        shared: names of its tensors, by part.
        values: node of the numbers that are known of every sample (batch, count).
    """

    name: str
    blocks: dict[str, int]
    rank: int
    values: fx.Node | None = None
    shared: dict[str, str] = field(default_factory=dict)
    _made: dict[int, fx.Node] = field(default_factory=dict)

    def build(
        self, editor: Editor, values: fx.Node, before: fx.Node, generator: torch.Generator
    ) -> None:
        """Adds the nodes that make all matrices (batch, blocks, rank^2) from `values`."""
        self.values = values
        count, square = int(values.meta["val"].shape[1]), self.rank**2
        dtype = values.meta["val"].dtype

        def call(target: Any, *args: Any) -> fx.Node:
            node = editor.call(target, *args, before=before)
            set_gw_meta(node, adapter=self.name)
            return node

        def stored(part: str, tensor: Tensor, *, trained: bool = True) -> fx.Node:
            tensor = tensor.to(dtype)
            value = nn.Parameter(tensor) if trained else tensor
            self.shared[part] = editor.add_state(f"degradation.{part}.{self.name}", value)
            return editor.get(self.shared[part])

        def weight(out: int, reads: int) -> Tensor:
            return torch.randn(out, reads, generator=generator) * math.sqrt(2 / reads)

        frequencies = torch.randn(FREQUENCIES, generator=generator)
        angles = call(aten.mul.Tensor, call(aten.unsqueeze.default, values, -1),
                      stored("frequencies", frequencies, trained=False))  # fmt: skip
        angles = call(aten.mul.Scalar, angles, 2 * math.pi)
        waves = [call(aten.sin.default, angles), call(aten.cos.default, angles)]
        seen = call(aten.flatten.using_ints, call(aten.cat.default, waves, -1), 1)
        reads = 2 * FREQUENCIES * count
        known = call(aten.linear.default, seen, stored("known", weight(HIDDEN, reads)),
                     stored("known_bias", torch.zeros(HIDDEN)))  # fmt: skip
        known = call(aten.relu.default, known)
        table = torch.randn(len(self.blocks), BLOCK, generator=generator)
        place = call(aten.linear.default, stored("blocks", table),
                     stored("place", weight(BLOCK, BLOCK)),
                     stored("place_bias", torch.zeros(BLOCK)))  # fmt: skip
        place = call(aten.relu.default, place)
        last = SMALL * weight(square, HIDDEN + BLOCK)
        identity = stored("matrix_bias", torch.eye(self.rank).flatten())
        # the product with both side by side, which need not be repeated for each other then
        of_known = call(aten.linear.default, known, stored("matrix_known", last[:, :HIDDEN]),
                        identity)  # fmt: skip
        of_place = call(aten.linear.default, place, stored("matrix_place", last[:, HIDDEN:]))
        every = call(aten.add.Tensor, call(aten.unsqueeze.default, of_known, 1), of_place)
        every = call(aten.unflatten.int, every, -1, [self.rank, self.rank])
        for number in sorted(self.blocks.values()):
            self._made[number] = call(aten.select.int, every, 1, number)

    def matrix(self, layer: str) -> fx.Node:
        """C (batch, rank, rank) of the block that a layer is in."""
        return self._made[self.blocks[block_of(layer)]]


def matrices(shared: dict[str, Tensor], values: Tensor) -> Tensor:
    """C (batch, blocks, rank, rank) for known values (batch, count): what the nodes compute."""
    angles = values[..., None] * shared["frequencies"] * 2 * math.pi
    seen = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    known = torch.nn.functional.linear(seen, shared["known"], shared["known_bias"]).relu()
    place = torch.nn.functional.linear(shared["blocks"], shared["place"], shared["place_bias"])
    both: Tensor = known @ shared["matrix_known"].t() + shared["matrix_bias"]
    every: Tensor = both[:, None] + place.relu() @ shared["matrix_place"].t()
    rank = math.isqrt(every.shape[-1])
    return every.reshape(*every.shape[:2], rank, rank)
