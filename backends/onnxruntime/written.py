"""Writing a model: its weights in the file, or streamed one by one into a file beside it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    values = (value.const_value for value in model.graph.initializers.values())
    return sum(value.nbytes for value in values if value is not None)


def is_apart(model: ir.Model, external_data_mb: float) -> bool:
    """Whether the weights are too many for the model file."""
    return weight_bytes(model) > external_data_mb * 1e6


def save_apart(model: ir.Model, path: Path, data: str) -> Path:
    """Writes a model to `path` and its weights to a file named `data` beside it; the path.

    Weights are written from where they are, one at a time.
    """
    ir.save(model, path, external_data=data)
    return path


def content_of(model: ir.Model, folder: Path, external_data_mb: float) -> bytes | Path:
    """What a session is opened on for a look inside: bytes, or a file in `folder`."""
    if is_apart(model, external_data_mb):
        return save_apart(model, folder / "inside.onnx", "inside.onnx.data")
    content: bytes = ir.to_proto(model).SerializeToString()
    return content
