"""A weight as indices into codebooks: how it is stored, what it is worth, and its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.ir.ops.codebook import dequantize_codebook, pack_indices, unpack_indices
from graphwright.ir.stored.insert import Insertion, Make

aten = torch.ops.aten

PARTS = ("outlier", "main")
"""Stretches of columns with codebooks of their own, in the order they are stored."""


NARROW = 1e-3
"""Relative error up to which codebooks and scales are stored in float16."""


@dataclass(frozen=True)
class Lookup:
    """One call of `graphwright::dequantize_codebook`.

    Attributes:
        indices: packed, uint8.
        codebooks: (groups, k, v), in the dtype they are stored in.
        rows, columns: of the matrix it rebuilds.
    """

    indices: Tensor
    codebooks: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, index: Tensor, codebooks: Tensor, rows: int) -> Lookup:
        """From indices (ceil(rows / v), columns), one integer each."""
        packed = pack_indices(index, index_bits(codebooks.shape[1]))
        return cls(packed, codebooks, rows, index.shape[1])

    @property
    def bits(self) -> int:
        """Of an index."""
        return index_bits(self.codebooks.shape[1])

    def index(self) -> Tensor:
        """(ceil(rows / v), columns) int32."""
        return unpack_indices(self.indices, self.bits, self.columns)

    def value(self) -> Tensor:
        """(rows, columns) float32."""
        value: Tensor = dequantize_codebook(
            self.indices, self.codebooks.float(), self.bits, self.rows, self.columns
        )
        return value


@dataclass(frozen=True)
class Vectors:
    """A matrix (rows, columns): sums of lookups, side by side, permuted and scaled.

    Attributes:
        parts: for each stretch of columns that there is, its lookups, which are added.
        order: int32 (columns,), place of every column in the stretches; None: as they stand.
        scale, shift: (columns,), the matrix is value * scale + shift; None: it is the value.
    """

    parts: Mapping[str, Sequence[Lookup]]
    order: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def value(self) -> Tensor:
        """The matrix, float32."""
        stretches = []
        for lookups in self.parts.values():
            total = lookups[0].value()
            for lookup in lookups[1:]:
                total = total + lookup.value()
            stretches.append(total)
        value = torch.cat(stretches, 1)
        if self.order is not None:
            value = value.index_select(1, self.order)
        if self.scale is not None and self.shift is not None:
            value = value * self.scale.float() + self.shift.float()
        return value

    def state(self) -> dict[str, Tensor]:
        """Every stored tensor by name."""
        found: dict[str, Tensor] = {}
        for part, lookups in self.parts.items():
            for place, lookup in enumerate(lookups):
                found[f"{part}_indices{place or ''}"] = lookup.indices
                found[f"{part}_codebooks{place or ''}"] = lookup.codebooks
        rest = {"order": self.order, "scale": self.scale, "shift": self.shift}
        return found | {name: tensor for name, tensor in rest.items() if tensor is not None}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], rows: int, widths: Sequence[int]) -> Vectors:
        """Undoes `state`; `widths` are the columns of the stretches, 0 for one there is not."""
        parts: dict[str, list[Lookup]] = {}
        for part, columns in zip(PARTS, widths, strict=True):
            for suffix in ("", "1"):
                if columns and f"{part}_indices{suffix}" in state:
                    indices = state[f"{part}_indices{suffix}"]
                    books = state[f"{part}_codebooks{suffix}"]
                    parts.setdefault(part, []).append(Lookup(indices, books, rows, columns))
        return cls(parts, state.get("order"), state.get("scale"), state.get("shift"))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.state().values())


def narrow(x: Tensor) -> Tensor:
    """`x` in float16 where that keeps it to 0.1%, else as it is."""
    half = x.to(torch.float16)
    error = (half.float() - x).norm()
    return half if bool(error <= NARROW * x.norm()) else x


def index_bits(count: int) -> int:
    """Bits of an index into `count` vectors."""
    return max(1, (count - 1).bit_length())


def rebuild_vectors(matrices: Sequence[Vectors], dtype: torch.dtype) -> Make:
    """Nodes of a weight in codebooks; codebooks and scales are stored narrow and cast first.

    Args:
        matrices: one, or those of a stack of experts, which are laid one below the other.
        dtype: of the weight.
    """

    def make(place: Insertion) -> fx.Node:
        if len(matrices) == 1:
            return one(place, matrices[0], "")
        parts = [one(place, each, f"{index}_") for index, each in enumerate(matrices)]
        return place.call(aten.cat.default, parts, 0)

    def one(place: Insertion, vectors: Vectors, prefix: str) -> fx.Node:
        nodes = _Nodes(place, dtype, vectors.state(), prefix)
        stretches = [nodes.lookups(part, found) for part, found in vectors.parts.items()]
        value = stretches[0]
        if len(stretches) > 1:
            value = place.call(aten.cat.default, stretches, 1)
        if vectors.order is not None:
            value = place.call(aten.index_select.default, value, 1, nodes.stored("order"))
        if vectors.scale is not None:
            value = place.call(aten.mul.Tensor, value, nodes.wide("scale"))
            value = place.call(aten.add.Tensor, value, nodes.wide("shift"))
        return value

    return make


@dataclass(frozen=True)
class _Nodes:
    place: Insertion
    dtype: torch.dtype
    state: Mapping[str, Tensor]
    prefix: str

    def stored(self, name: str) -> fx.Node:
        return self.place.store(self.prefix + name, self.state[name])

    def wide(self, name: str) -> fx.Node:
        node = self.stored(name)
        if self.state[name].dtype == self.dtype:
            return node
        return self.place.call(aten.to.dtype, node, self.dtype)

    def lookups(self, part: str, lookups: Sequence[Lookup]) -> fx.Node:
        total: fx.Node | None = None
        for index, lookup in enumerate(lookups):
            suffix = str(index or "")
            value = self.place.call(
                dequantize_codebook,
                self.stored(f"{part}_indices{suffix}"),
                self.wide(f"{part}_codebooks{suffix}"),
                lookup.bits,
                lookup.rows,
                lookup.columns,
            )
            total = value if total is None else self.place.call(aten.add.Tensor, total, value)
        assert total is not None
        return total
