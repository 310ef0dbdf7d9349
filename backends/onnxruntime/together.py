"""Several models in one folder whose weights lie in one file, every tensor once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx

from graphwright.backends.onnxruntime.compiled import OnnxCompiled
from graphwright.ir.atomic import replacing, write_atomically

WEIGHTS = "weights.bin"
SMALL = 1024
"""Tensors of fewer bytes stay in the model: shapes, axes, scalars."""

ALIGNMENT = 4096
"""Offsets are multiples, so that the runtime can map the file."""


def save_together(parts: Mapping[str, OnnxCompiled], folder: Path) -> dict[str, Path]:
    """Writes `<name>.onnx` for each and one `weights.bin`; the files by name.

    Tensors are one where type, shape and bytes are the same, whatever their names.
    """
    places: dict[str, int] = {}
    models = {name: _loaded(part) for name, part in parts.items()}
    end = 0
    with replacing(folder / WEIGHTS) as file:
        for model in models.values():
            for tensor in model.graph.initializer:
                data = _bytes(tensor)
                if len(data) < SMALL:
                    continue
                digest = hashlib.sha256(data).hexdigest()
                if digest not in places:
                    padding = b"\0" * (-end % ALIGNMENT)
                    file.write(padding + data)
                    places[digest] = end + len(padding)
                    end += len(padding) + len(data)
                _move_out(tensor, places[digest], len(data))
    if not end:
        (folder / WEIGHTS).unlink()
    for name, model in models.items():
        write_atomically(folder / f"{name}.onnx", model.SerializeToString(deterministic=True))
    return {name: Path(f"{name}.onnx") for name in parts}


def _loaded(part: OnnxCompiled) -> onnx.ModelProto:
    if isinstance(part.model, bytes):
        return onnx.load_from_string(part.model)
    return onnx.load(part.model)


def _bytes(tensor: onnx.TensorProto) -> bytes:
    """The tensor's values as they lie in a file; empty for what has no plain bytes."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return b""
    if not tensor.HasField("raw_data"):
        from onnx.numpy_helper import from_array, to_array

        tensor.CopyFrom(from_array(to_array(tensor), tensor.name))
    return tensor.raw_data


def _move_out(tensor: onnx.TensorProto, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
