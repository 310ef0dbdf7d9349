"""Weights stored as their non-zeros and the places of these, where the file gets smaller by it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

INDEX_BYTES = 8
"""A place is an int64 in ONNX: the index into the flattened tensor."""

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def store_sparse(model: onnx.ModelProto) -> dict[str, int]:
    """Moves initializers that are smaller that way to the model's sparse ones, in place.

    ONNX Runtime reads them back as dense weights when it loads the model: in memory and in speed
    nothing changes.

    Returns:
        `weights`, how many were moved, and `bytes_saved`; empty when there were none.
    """
    kept, moved, saved = [], [], 0
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor) if tensor.data_type in FLOATS else None
        size = 0 if value is None else _sparse_bytes(value)
        if value is None or value.ndim == 0 or size == 0 or size >= value.nbytes:
            kept.append(tensor)
            continue
        moved.append(_sparse(tensor.name, value))
        saved += value.nbytes - size
    if not moved:
        return {}
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.sparse_initializer.extend(moved)
    return {"weights": len(moved), "bytes_saved": saved}


def _sparse_bytes(value: np.ndarray) -> int:
    return int(np.count_nonzero(value)) * (value.itemsize + INDEX_BYTES)


def _sparse(name: str, value: np.ndarray) -> onnx.SparseTensorProto:
    flat = value.ravel()
    places = np.flatnonzero(flat).astype(np.int64)
    return onnx.helper.make_sparse_tensor(
        numpy_helper.from_array(flat[places], name), numpy_helper.from_array(places), value.shape
    )
