"""Activations of channel units: how large what the layers behind them read is."""

from __future__ import annotations

import itertools

import numpy as np
from torch import Tensor

from graphwright.ir.calibration.observe import Several, observe
from graphwright.ir.channels.analysis import Analysis
from graphwright.ir.channels.values import Factor, Value
from graphwright.ir.context import Context
from graphwright.ir.data.batches import as_batches
from graphwright.ir.layers.kinds import INPUT_ARGUMENT, PRODUCTS, TRANSPOSED_CONVOLUTIONS
from graphwright.ir.layers.selectors import layers


class _Squares:
    """Mean square of a value by the ids of one of its factors."""

    def __init__(self, factor: Factor) -> None:
        self.dims = factor.dims
        self.total: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor) -> None:
        others = [d for d in range(x.dim()) if d not in self.dims]
        squares = x.detach().double().square()
        mean = squares.mean(others) if others else squares
        rows = 1 if not others else x.shape[others[0]]
        self.total = mean * rows if self.total is None else self.total + mean * rows
        self.count += rows


def mean_squares(analysis: Analysis, context: Context) -> np.ndarray:
    """Root mean square of the activations of every class, as layers with a weight read them.

    Each reading layer counts alike: its values are taken as shares of their mean, since the sizes
    of activations differ from layer to layer. A class that no layer reads has 0.
    """
    program = analysis.program
    watched: dict[str, list[tuple[_Squares, Factor]]] = {}
    for layer in layers(program, (*PRODUCTS, *TRANSPOSED_CONVOLUTIONS)):
        source = layer.node.args[INPUT_ARGUMENT[layer.kind]]
        value = analysis.values.get(getattr(source, "name", ""))
        if not isinstance(value, Value):
            continue
        free = [f for f in value.factors if not analysis.pinned[analysis.class_of[f.ids]].all()]
        watched[getattr(source, "name", "")] = [(_Squares(factor), factor) for factor in free]
    observers = {name: Several(*(seen for seen, _ in found)) for name, found in watched.items()}
    batches = as_batches(context.batches, program.signature)  # without their labels
    observe(program, observers, batches, context.progress)
    total, readers = np.zeros(analysis.count), np.zeros(analysis.count)
    for seen, factor in itertools.chain.from_iterable(watched.values()):
        assert seen.total is not None  # observe saw at least one batch
        classes = analysis.class_of[factor.ids].ravel()
        mean = (seen.total / seen.count).reshape(-1).cpu().numpy()
        size = np.bincount(classes, minlength=analysis.count)
        here = size > 0
        root = np.sqrt(np.bincount(classes, mean, analysis.count)[here] / size[here])
        total[here] += root / max(float(root.mean()), 1e-12)
        readers[here] += 1
    return np.asarray(total / np.maximum(readers, 1))
