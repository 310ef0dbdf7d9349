"""graphwright::expand_2_4: a weight that keeps two of every four entries, stored as those two.

Along a row, entries 4g .. 4g + 3 form group g. `values` holds the two that are kept, in their
order; `places` holds where they lie, two bits each, so a group takes half a byte: bits 0 and 1
say the place of the first, bits 2 and 3 that of the second, and even groups are the low half of
byte g // 2. A weight of float32 shrinks to 53%, one of a half precision to 56%.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.ops.registry import declare


def compress_2_4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Values and places of a weight with at most two non-zeros in every group of four.

    Args:
        w: (rows, columns); 4 divides the columns.

    Returns:
        values (rows, columns / 2) in the dtype of `w`, places uint8 (rows, ceil(columns / 8)).
        `expand_2_4` gives back `w`, bit by bit but for the sign of zeros that were dropped.

    Raises:
        ValueError: a group holds more, or the columns do not divide.
    """
    rows, columns = w.shape
    if columns % 4:
        raise ValueError(f"{columns} columns do not divide into groups of 4")
    groups = w.detach().reshape(rows, columns // 4, 4)
    filled = groups != 0
    if bool((filled.sum(2) > 2).any()):
        raise ValueError("a group of four holds more than two non-zero weights")
    # Non-zeros first, each kind in its order; then the two chosen ones in theirs.
    chosen = torch.sort((~filled).byte(), dim=2, stable=True).indices[:, :, :2].sort(2).values
    values = groups.gather(2, chosen).reshape(rows, columns // 2)
    halves = (chosen[:, :, 0] | chosen[:, :, 1] << 2).to(torch.uint8)
    if halves.shape[1] % 2:
        halves = torch.nn.functional.pad(halves, (0, 1))
    return values, halves[:, 0::2] | halves[:, 1::2] << 4


def _columns(values: Tensor, places: Tensor) -> Tensor:
    """Column of each value, int64, in the shape of `values`."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=places.device)
    inside = ((places.unsqueeze(-1) >> shifts) & 3).flatten(1)[:, : values.shape[1]]
    start = torch.arange(values.shape[1], device=places.device) // 2 * 4
    return start + inside


def _eager(values: Tensor, places: Tensor) -> Tensor:
    dense = values.new_zeros(values.shape[0], 2 * values.shape[1])
    return dense.scatter(1, _columns(values, places), values)


def _meta(values: Tensor, places: Tensor) -> Tensor:
    shape = (values.shape[0], 2 * values.shape[1])
    return torch.empty(shape, dtype=values.dtype, device=values.device)


def onnx_expand(values: Any, places: Any) -> Any:
    """ONNX form: the places are unpacked with shifts, and the values scattered over zeros.

    Nothing of the dense weight's size is stored.
    """
    import onnx
    from onnxscript import opset18 as op

    def bytes_of(numbers: list[int]) -> Any:
        kind = onnx.TensorProto.UINT8
        return op.Constant(value=onnx.helper.make_tensor("b", kind, [len(numbers)], numbers))

    def ints(*numbers: int) -> Any:
        return op.Constant(value_ints=list(numbers))

    rows, kept = (int(size) for size in values.shape)
    last = op.Unsqueeze(places, ints(-1))
    inside = op.BitwiseAnd(
        op.BitShift(last, bytes_of([0, 2, 4, 6]), direction="RIGHT"), bytes_of([3])
    )
    inside = op.Reshape(inside, ints(rows, 4 * int(places.shape[1])))
    inside = op.Slice(inside, ints(0), ints(kept), ints(1))
    inside = op.Cast(inside, to=onnx.TensorProto.INT64)
    number = op.Range(
        op.Constant(value_int=0), op.Constant(value_int=kept), op.Constant(value_int=1)
    )
    start = op.Mul(op.Div(number, op.Constant(value_int=2)), op.Constant(value_int=4))
    zero = op.Cast(op.Constant(value_float=0.0), to=int(values.dtype))
    dense = op.Expand(zero, ints(rows, 2 * kept))
    return op.ScatterElements(dense, op.Add(inside, start), values, axis=1)


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in [(37, 76), (5, 8), (1, 4), (16, 512)]:
        w = torch.randn(rows, columns, generator=generator)
        groups = w.reshape(rows, columns // 4, 4)
        lowest = torch.rand(groups.shape, generator=generator).argsort(2)[:, :, :2]
        yield compress_2_4(groups.scatter(2, lowest, 0.0).reshape(rows, columns))
    yield compress_2_4(torch.zeros(3, 12))


expand_2_4 = declare(
    "expand_2_4(Tensor values, Tensor places) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=onnx_expand,
    kernel="graphwright.ir.kernels.expand_2_4:expand_2_4",
    samples=_samples,
)
"""Weight (rows, columns) from values (rows, columns / 2) and places uint8 (rows, columns / 8,
rounded up)."""
