"""Tells the kind of a model file from its bytes; a suffix proves nothing."""

from __future__ import annotations

import json
import struct
import zipfile
from enum import Enum
from pathlib import Path

from graphwright.ir.errors import ModelError
from graphwright.ir.files.bounds import refuse_name, refuse_special
from graphwright.ir.files.pickles import LEGACY_MAGIC
from graphwright.ir.files.zips import DAMAGE


class Kind(Enum):
    """Kinds of model files that can be loaded; the value reads well in a message."""

    EXPORT = "an export archive (.pt2)"
    EXPORT_OLD = "an export archive of torch 2.7 or before"
    TORCHSCRIPT = "a TorchScript archive"
    CHECKPOINT = "a file written by torch.save"
    CHECKPOINT_OLD = "a file written by torch.save before 1.6"
    PICKLE = "a bare pickle"
    SAFETENSORS = "a safetensors file"
    SAFETENSORS_INDEX = "an index of safetensors shards"
    HUGGING_FACE = "a Hugging Face model folder"
    DIFFUSERS = "a diffusers model folder"
    GGUF = "a GGUF file (llama.cpp)"


_FOREIGN = (
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file (Keras .h5 or the like)"),
    (b"TFL3", 4, "a TensorFlow Lite model"),
    (b"ORTM", 4, "an ONNX Runtime .ort model"),
    (b"\x93NUMPY", 0, "a NumPy array (.npy)"),
    (b"\x7fELF", 0, "a compiled library"),
    (b"\x1f\x8b", 0, "a gzip file"),
    (b"ustar", 257, "a tar file"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive"),
)
MAX_JSON = 64 << 20
_LFS_POINTER = b"version https://git-lfs"
_TAKEN = (
    "Graphwright takes .pt2, TorchScript, torch.save files, safetensors, GGUF and Hugging Face "
    "folders."
)


def detect(path: Path) -> Kind:
    """Kind of the file or folder at `path`.

    Raises:
        ModelError: nothing there, not readable, empty, cut short, or no model file we take;
            names what it is when that can be told.
    """
    refuse_name(path)
    if path.is_dir():
        return _detect_folder(path)
    refuse_special(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except FileNotFoundError:
        raise ModelError("no such file or folder", where=str(path)) from None
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if size == 0:
        raise ModelError("the file is empty", where=str(path))
    if head.startswith(b"PK"):
        return _detect_zip(path)
    by_head = _by_head(head)
    if by_head is not None:
        return by_head
    _refuse_foreign(path, head)
    if head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5:
        return Kind.PICKLE
    if head.lstrip()[:1] == b"{":
        return _detect_json(path)
    if head[:1] in b"(]}c" and b"." in head and _is_old_pickle(head, size):
        return Kind.PICKLE
    if _is_onnx(path, size):
        raise _foreign(path, "an ONNX model")
    raise ModelError("this is no model file we know", where=str(path), fix=_TAKEN)


def _by_head(head: bytes) -> Kind | None:
    """Kind of a file that its first bytes tell."""
    if head.startswith(b"GGUF"):
        return Kind.GGUF
    if head[:1] == b"\x80" and head[2:].startswith(LEGACY_MAGIC):
        return Kind.CHECKPOINT_OLD
    return Kind.SAFETENSORS if _is_safetensors(head) else None


def _foreign(path: Path, what: str) -> ModelError:
    return ModelError(
        f"this is {what}; it cannot be compiled from there",
        where=str(path),
        fix=f"Pass the PyTorch model it was made from. {_TAKEN}",
    )


def _refuse_foreign(path: Path, head: bytes) -> None:
    if head.startswith(_LFS_POINTER):
        raise ModelError(
            "this is a Git LFS pointer, not the model itself",
            where=str(path),
            fix="Run `git lfs pull`, or download the file.",
        )
    for magic, offset, what in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            raise _foreign(path, what)


def _is_safetensors(head: bytes) -> bool:
    if len(head) < 10 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return bool(length < 100 << 20)  # larger headers than safetensors itself accepts: not one


def _is_old_pickle(head: bytes, size: int) -> bool:
    """Protocols 0 and 1 have no magic: read the opcodes, which executes nothing."""
    import pickletools

    if size > len(head):
        return False
    try:
        return sum(1 for _ in pickletools.genops(head)) > 1
    except (ValueError, IndexError, UnicodeDecodeError):
        return False


def _detect_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except DAMAGE as error:
        raise ModelError(
            "the zip archive is damaged or cut short",
            where=str(path),
            fix="Copy or download the file again.",
        ) from error
    inner = {name.partition("/")[2] for name in names}
    if "archive_format" in inner and any(name.startswith("models/") for name in inner):
        return Kind.EXPORT
    if "serialized_exported_program.json" in names:
        return Kind.EXPORT_OLD
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        return Kind.TORCHSCRIPT
    if "data.pkl" in inner:
        return Kind.CHECKPOINT
    if "archive_format" in inner:
        raise ModelError(
            "this export package holds no exported program",
            where=str(path),
            fix="Save the model with torch.export.save.",
        )
    if any(name.endswith(".npy") for name in names):
        raise _foreign(path, "a NumPy archive (.npz)")
    if "model.weights.h5" in names:
        raise _foreign(path, "a Keras model")
    raise ModelError("this zip archive is no model file we know", where=str(path), fix=_TAKEN)


def _detect_json(path: Path) -> Kind:
    data = read_json(path)
    if isinstance(data, dict) and "weight_map" in data:
        return Kind.SAFETENSORS_INDEX
    if isinstance(data, dict) and ("model_type" in data or "architectures" in data):
        raise ModelError(
            "this is a model configuration without the weights",
            where=str(path),
            fix=f"Pass its folder: {path.parent}",
        )
    raise ModelError("this JSON file is no model file we know", where=str(path), fix=_TAKEN)


def _detect_folder(path: Path) -> Kind:
    if (path / "model_index.json").is_file():
        parts = sorted(p.name for p in path.iterdir() if (p / "config.json").is_file())
        raise ModelError(
            "this is a diffusers pipeline of several models",
            where=str(path),
            fix=f"Pass the folder of one of them: {', '.join(parts) or 'none found'}.",
        )
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            "this folder holds an adapter, not a whole model",
            where=str(path),
            fix="Merge it into its base model first, and save that.",
        )
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        is_diffusers = isinstance(config, dict) and "_diffusers_version" in config
        return Kind.DIFFUSERS if is_diffusers else Kind.HUGGING_FACE
    if (path / "saved_model.pb").is_file():
        raise _foreign(path, "a TensorFlow SavedModel")
    files = sorted(p.name for p in path.iterdir() if p.is_file())
    weights = [f for f in files if f.endswith((".pt2", ".pt", ".pth", ".bin", ".safetensors"))]
    fix = f"Pass one of its files: {', '.join(weights[:4])}." if weights else _TAKEN
    raise ModelError("this folder has no config.json", where=str(path), fix=fix)


def read_json(path: Path) -> object:
    """The JSON value in a file.

    Raises:
        ModelError: missing, too large, or no JSON.
    """
    refuse_special(path)
    try:
        if path.stat().st_size > MAX_JSON:
            raise ModelError("this JSON file is larger than 64 MiB", where=str(path))
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except RecursionError as error:
        raise ModelError("this JSON is nested too deep", where=str(path)) from error
    except ValueError as error:
        raise ModelError("this is not valid JSON", where=str(path)) from error


def _is_onnx(path: Path, size: int) -> bool:
    """Walks the top-level protobuf fields: an ONNX model has ir_version (1) and graph (7)."""
    seen: set[tuple[int, int]] = set()
    with path.open("rb") as file:
        position = 0
        while position < size and len(seen) < 32:
            file.seek(position)
            chunk = file.read(24)
            key, used = _varint(chunk)
            field, wire = key >> 3, key & 7
            value, more = _varint(chunk[used:])
            if not used or not more or not 1 <= field <= 32 or wire not in (0, 2):
                return False
            seen.add((field, wire))
            position += used + more + (value if wire == 2 else 0)
    return position == size and {(1, 0), (7, 2)} <= seen


def _varint(data: bytes) -> tuple[int, int]:
    """(value, bytes used); used is 0 when there is no whole number."""
    value = 0
    for index, byte in enumerate(data[:10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, index + 1
    return 0, 0
