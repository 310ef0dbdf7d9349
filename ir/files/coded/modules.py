"""Layers whose weight stays in codes; their trace is what the quantize passes make."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize_blocks and its like
from graphwright.ir.files.coded.forms import Blocks, Floats8, Integers
from graphwright.ir.files.coded.layout import Layer
from graphwright.ir.files.coded.rounding import Rounding
from graphwright.ir.ops.blocks import pack_codes
from graphwright.ir.stored.table import SCALE_BLOCK, Table

ours = torch.ops.graphwright


class CodedLinear(nn.Module, ABC):
    """A linear layer, or a table of embeddings, whose weight is codes, rebuilt as the layer runs.

    Scales keep the precision they are stored in: they are widened with the model, never narrowed,
    and the rebuilt weight is cast to the dtype of the layer's inputs, or of the table.

    Attributes:
        row_dtype: of the rows of a table; None for a linear layer.
        row_factor: that the rows of a table are multiplied by.
    """

    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], rounding: Rounding | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.register_parameter("bias", None)
        self.rounding = rounding
        self.row_dtype: torch.dtype | None = None
        self.row_factor = 1.0
        self._scales: dict[str, torch.dtype] = {}

    @abstractmethod
    def rebuilt(self) -> Tensor:
        """(out, in) in the dtype of the scales; inputs in the order they are stored in."""

    @property
    def weight(self) -> Tensor:
        """(out, in), for models that look at it."""
        return self.rebuilt()

    @property
    def num_embeddings(self) -> int:
        """Rows of a table."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Numbers in a row of a table."""
        return self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) of the model's dtype; returns (..., out).

        Of a table: x (...) are numbers of rows; returns (..., in).
        """
        if self.row_dtype is not None:
            rows = nn.functional.embedding(x, self.rebuilt().to(self.row_dtype))
            return rows if self.row_factor == 1 else rows * self.row_factor
        if self.rounding is not None:
            x = self.rounding(x)
        weight = self.rebuilt()
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)

    def twin(self) -> CodedLinear:
        """A layer of its own that shares the tensors of this one's weight."""
        other = copy.copy(self)
        other._buffers, other._parameters = dict(self._buffers), dict(self._parameters)
        return other

    def keep_scale(self, name: str, value: Tensor) -> None:
        """Registers a tensor that is never narrowed below the dtype it is stored in."""
        self._scales[name] = value.dtype
        self.register_buffer(name, value.contiguous())

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        kept = {name: getattr(self, name) for name in self._scales}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            least = self._scales[name]
            if torch.promote_types(after.dtype, least) != after.dtype:
                wide = torch.promote_types(after.dtype, least)
                setattr(self, name, before.to(after.device, wide))
        return self


@functools.lru_cache(maxsize=64)
def block_sums(block: int, columns: int) -> Tensor:
    """(blocks, columns) float32: 1 where a column lies in a block, which sums the blocks of inputs.

    One tensor for all layers of a size, which a trace sees as tied.
    """
    owner = torch.arange(columns) // block
    return (torch.arange(-(-columns // block))[:, None] == owner).float()


class BlocksLinear(CodedLinear):
    """The weight is `Blocks`; inputs are brought in the order of its columns."""

    weight_order: Tensor | None
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_rest: Tensor | None

    def __init__(self, form: Blocks, rounding: Rounding | None) -> None:
        super().__init__(form.shape, rounding)
        blocks = form.scale.shape[1]
        q = nn.functional.pad(form.q, (0, blocks * form.block - self.in_features))
        packed = pack_codes(q.unflatten(1, (blocks, form.block)), form.bits)
        self.register_buffer("weight_codes", packed)
        self.keep_scale("weight_scale", form.scale)
        zero = None if form.zero is None else pack_codes(form.zero, form.bits)
        self.register_buffer("weight_zero_point", zero)
        self.register_buffer("weight_order", form.order)
        self.bits, self.block = form.bits, form.block
        if form.rest is None:
            self.register_buffer("weight_rest", None)
        else:
            self.keep_scale("weight_rest", form.rest)
            self.keep_scale("weight_blocks", block_sums(form.block, self.in_features))

    def rebuilt(self) -> Tensor:
        weight: Tensor = ours.dequantize_blocks(
            self.weight_codes, self.weight_scale, self.weight_zero_point, self.bits, self.block,
            self.in_features,
        )  # fmt: skip
        if self.weight_rest is None:
            return weight
        corrected: Tensor = ours.add_low_rank(
            weight, self.weight_rest, self.get_buffer("weight_blocks")
        )
        return corrected

    @property
    def weight(self) -> Tensor:
        if self.weight_order is None:
            return self.rebuilt()
        return self.rebuilt()[:, torch.argsort(self.weight_order)]

    def forward(self, x: Tensor) -> Tensor:
        """Inputs of a group lie side by side in the codes, so the inputs are brought there too."""
        return super().forward(
            x if self.weight_order is None else x.index_select(-1, self.weight_order)
        )


class IntegersLinear(CodedLinear):
    """The weight is `Integers`."""

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, form: Integers, rounding: Rounding | None) -> None:
        super().__init__(form.shape, rounding)
        self.register_buffer("weight_codes", form.codes.contiguous())
        self.keep_scale("weight_scale", form.scale)
        self.register_buffer("weight_zero_point", form.zero)

    def rebuilt(self) -> Tensor:
        weight: Tensor = ours.dequantize(
            self.weight_codes, self.weight_scale, self.weight_zero_point, 0
        )
        return weight


class Floats8Linear(CodedLinear):
    """The weight is `Floats8`; runs of inputs are rows of the stored codes."""

    weight_codes: Tensor
    weight_scale: Tensor

    def __init__(self, form: Floats8, rounding: Rounding | None) -> None:
        super().__init__(form.shape, rounding)
        runs = form.scale.shape[1] if form.scale.dim() else 1
        self.register_buffer("weight_codes", form.codes.reshape(-1, self.in_features // runs))
        self.keep_scale("weight_scale", form.scale.flatten() if form.scale.dim() else form.scale)
        self.runs = runs

    def rebuilt(self) -> Tensor:
        weight: Tensor = ours.dequantize_float8(self.weight_codes, self.weight_scale, 0)
        return weight if self.runs == 1 else weight.reshape(self.out_features, self.in_features)


class TableLinear(CodedLinear):
    """The weight is codes of a table of levels, as quantize.nf4 stores it."""

    weight_codes: Tensor

    def __init__(self, form: Table, rounding: Rounding | None) -> None:
        super().__init__(form.shape, rounding)
        self.register_buffer("weight_codes", form.codes)
        if form.double is None:
            assert form.scale is not None
            self.keep_scale("weight_scale", form.scale)
        else:
            codes, scale, offset = form.double
            self.register_buffer("weight_scale_codes", codes)
            self.keep_scale("weight_scale_scale", scale)
            self.keep_scale("weight_scale_offset", offset)
        self.table, self.block, self.is_double = form.table, form.block, form.double is not None

    def _scale(self) -> Tensor:
        if not self.is_double:
            return self.get_buffer("weight_scale")
        codes = self.get_buffer("weight_scale_codes")
        rest: Tensor = ours.dequantize_table(
            codes, self.get_buffer("weight_scale_scale"), "dynamic", SCALE_BLOCK, [codes.numel()]
        )
        return rest + self.get_buffer("weight_scale_offset")

    def rebuilt(self) -> Tensor:
        weight: Tensor = ours.dequantize_table(
            self.weight_codes, self._scale(), self.table, self.block,
            [self.out_features, self.in_features],
        )  # fmt: skip
        return weight


def coded_linear(layer: Layer) -> CodedLinear | nn.Linear:
    """A linear layer without a bias whose weight is that of a checkpoint's layer."""
    form, rounding = layer.form, layer.rounding
    if isinstance(form, Blocks):
        return BlocksLinear(form, rounding)
    if isinstance(form, Integers):
        return IntegersLinear(form, rounding)
    if isinstance(form, Floats8):
        return Floats8Linear(form, rounding)
    if isinstance(form, Table):
        return TableLinear(form, rounding)
    out, inputs = form.shape
    plain = nn.Linear(inputs, out, bias=False, device="meta")
    plain.weight = nn.Parameter(form.weight, requires_grad=False)
    return plain
