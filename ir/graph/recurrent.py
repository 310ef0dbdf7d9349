"""Keeps recurrent layers whole while a graph is traced or its shapes are propagated.

torch gives `aten.lstm`, `aten.gru` and `aten.rnn_*` no shape function: it computes their shapes
by unrolling them over time, which fixes the sequence length. Here the shapes come from formulas.
The context that puts them into torch's own table is closed again right after the trace, because
torch.compile uses the same table for arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _lstm_shape(
    x: Tensor, hx: list[Tensor], params: Any, biases: Any, layers: Any, p: Any, train: Any,
    bidirectional: bool, batch_first: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    width = hx[0].shape[-1] * (2 if bidirectional else 1)
    out = x.new_empty((*x.shape[:-1], width))
    return out, torch.empty_like(hx[0]), torch.empty_like(hx[1])


def _rnn_shape(
    x: Tensor, hx: Tensor, params: Any, biases: Any, layers: Any, p: Any, train: Any,
    bidirectional: bool, batch_first: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    width = hx.shape[-1] * (2 if bidirectional else 1)
    return x.new_empty((*x.shape[:-1], width)), torch.empty_like(hx)


SHAPES = {
    aten.lstm.input: _lstm_shape,
    aten.gru.input: _rnn_shape,
    aten.rnn_tanh.input: _rnn_shape,
    aten.rnn_relu.input: _rnn_shape,
}


def shape_function(target: Any) -> Any:
    """The function to call on fake tensors in place of `target`: itself but for recurrent
    layers."""
    return SHAPES.get(target, target)


@contextmanager
def whole_recurrent_layers() -> Iterator[None]:
    """Within it, fake tensors pass through recurrent layers without unrolling them."""
    keys = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)
    saved = []
    for op, shape in SHAPES.items():
        # Private in torch; without it recurrent layers still trace, with a fixed length.
        table = getattr(op, "py_kernels", None)
        if table is None:
            continue
        saved.append((op, table, dict(table)))
        table.update(dict.fromkeys(keys, shape))
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op, table, kernels in saved:
            table.clear()
            table.update(kernels)
            op._dispatch_cache.clear()
