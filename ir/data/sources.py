"""Sources of data. Nothing here unpickles, and files are mapped, not read whole."""

from __future__ import annotations

import importlib
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.ir.data.texts import TextSource, open_text
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.bounds import refuse_special
from graphwright.ir.user_code import admit

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Column:
    """One named array with samples on its first axis; `read(start, stop)` gives those rows."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]


Table = dict[str, Column]


Stream = Callable[[], Iterable[Any]]


def open_source(
    data: str,
    root: Path,
    *,
    tokenizer: str | Path | None = None,
    chat: bool = False,
    asks: bool = False,
) -> Table | TextSource | Stream:
    """Opens `data`: see `graphwright.ir.data.batches.load_data` for the kinds.

    Raises:
        ArgumentError: it does not exist, is of no known kind, or cannot be read.
    """
    path = root / data
    try:
        refuse_special(path)
    except ModelError as error:
        raise ArgumentError(error.message, where=data, fix=error.fix) from None
    if not path.exists():
        if _FUNCTION.fullmatch(data):
            return _open_function(data, root)
        raise ArgumentError(
            "no such file",
            where=data,
            fix="Data is a file, a folder of .npy files, package.module:function, or synthetic.",
        )
    try:
        if path.is_dir():
            return _open_folder(path, data)
        if path.suffix == ".npz":
            return _open_npz(path, data)
        if path.suffix == ".safetensors":
            return _open_safetensors(path)
        if path.suffix == ".txt":
            return open_text(path, data, tokenizer, chat=chat, asks=asks)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, struct.error) as error:
        raise ArgumentError(f"cannot be read: {_first_line(error)}", where=data) from error
    raise ArgumentError(
        f"files that end in {path.suffix or 'nothing'!r} are not known",
        where=data,
        fix="Use .npz, .safetensors, .txt, or a folder of .npy files.",
    )


# --- arrays ------------------------------------------------------------------------------------


def _open_npz(path: Path, data: str) -> Table:
    table: Table = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                name = member.filename.removesuffix(".npy")
                array = _map_member(path, member)
                if array is None:
                    with archive.open(member) as file:
                        array = np.lib.format.read_array(file, allow_pickle=False)
                table |= _array_column(name, array)
    return _not_empty(table, data)


def _map_member(path: Path, member: zipfile.ZipInfo) -> np.ndarray[Any, Any] | None:
    """The array mapped from inside the archive; None when it is compressed."""
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        # The local header repeats name and extra field, with lengths of its own.
        file.seek(member.header_offset)
        name, extra = struct.unpack("<26xHH", file.read(30))
        file.seek(member.header_offset + 30 + name + extra)
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = header(file)
        if dtype.hasobject:
            raise ValueError("holds Python objects, which would have to be unpickled")
        if 0 in shape or shape == ():
            return None
        return np.memmap(
            path, dtype, "r", offset=file.tell(), shape=shape, order="F" if fortran else "C"
        )


def _open_folder(path: Path, data: str) -> Table:
    table: Table = {}
    for file in sorted(path.glob("*.npy")):
        table |= _array_column(file.stem, np.load(file, mmap_mode="r", allow_pickle=False))
    return _not_empty(table, data)


def _array_column(name: str, array: np.ndarray[Any, Any]) -> Table:
    if array.dtype.kind not in "biufc":
        return {}  # text or dates beside the numbers: never an input

    def read(start: int, stop: int) -> Tensor:
        piece = array[start:stop] if array.ndim else array
        # a copy: rows of a read-only mapping must not be handed out as writable tensors
        return torch.from_numpy(np.array(piece, dtype=array.dtype.newbyteorder("="), order="C"))

    return {name: Column(array.shape, read)}


def _open_safetensors(path: Path) -> Table:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(str(error)) from error

    def column(name: str) -> Column:
        shape = tuple(file.get_slice(name).get_shape())
        if not shape:
            return Column(shape, lambda start, stop: file.get_tensor(name))
        return Column(shape, lambda start, stop: file.get_slice(name)[start:stop])

    return {name: column(name) for name in file.keys()}  # noqa: SIM118  (it is not a mapping)


def _not_empty(table: Table, data: str) -> Table:
    if not table:
        raise ArgumentError("holds no arrays", where=data, fix="Save one array per input.")
    return table


# --- functions ---------------------------------------------------------------------------------


def _open_function(data: str, root: Path) -> Stream:
    value = import_object(data, root, "the data")
    if callable(value):
        return lambda: _iterate(value(), data)
    if iter(value) is value:
        raise ArgumentError(
            "is an iterator, which can be read only once", where=data, fix="Name a function."
        )
    return lambda: _iterate(value, data)


def _iterate(value: Any, data: str) -> Iterable[Any]:
    try:
        batches: Iterable[Any] = iter(value)
        return batches
    except TypeError as error:
        raise ArgumentError(
            f"gives a {type(value).__name__}, not batches", where=data, fix="Return an iterable."
        ) from error


def import_object(name: str, root: str | Path, why: str) -> Any:
    """The object that `package.module:name` refers to; modules in `root` are found too.

    Args:
        name: module and attribute.
        root: folder.
        why: what asks for it, for whoever has to know which code runs.

    Raises:
        ArgumentError: the module cannot be imported or has no such name, or code is not to run.
    """
    admit(name, why)
    module_name, _, attribute = name.partition(":")
    folder = str(Path(root).resolve())
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ArgumentError(
            f"cannot import {module_name}: {type(error).__name__}: {_first_line(error)}", where=name
        ) from error
    finally:
        sys.path.remove(folder)
    if not hasattr(module, attribute):
        raise ArgumentError(f"module {module_name} has no {attribute!r}", where=name)
    return getattr(module, attribute)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
