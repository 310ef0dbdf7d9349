"""A model that llama.cpp has split into several GGUF files, `NAME-00001-of-00003.gguf` and so on.

The first file holds the metadata of the model; each has the number of files and its own place among
them (`split.count`, `split.no` from 0), and all say how many tensors the model has.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from graphwright.ir.errors import ModelError
from graphwright.ir.files.gguf.reader import GgufFile, Stored, read_gguf_file

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def _parts_of(path: Path) -> list[Path]:
    """The files of the model that a file is of, in order: those its name implies.

    Raises:
        ModelError: one of them is not there.
    """
    found = _NAME.fullmatch(path.name)
    if found is None or int(found[3]) < 2:
        return [path]
    stem, count = found[1], int(found[3])
    parts = []
    for number in range(1, count + 1):  # up to the first that is missing: a name claims any count
        parts.append(path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf"))
        if not parts[-1].is_file():
            raise ModelError(
                f"this is one of {count} files of a model, and {parts[-1].name} is not beside it",
                where=str(path),
                fix="Download all files into one folder.",
            )
    return parts


def read_gguf_parts(path: Path) -> tuple[GgufFile, list[Path]]:
    """A GGUF file; for one of several of a model, the whole model. And the files that were read.

    Raises:
        ModelError: as of `read_gguf_file`; a file is missing, renamed, or of another model.
    """
    file = read_gguf_file(path)
    count = file.entries.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return file, [path]
    paths = _parts_of(path)
    if len(paths) != count:
        raise ModelError(
            f"this is one of {count} files of a model, and its name does not say which",
            where=str(path),
            fix=f"Names of parts end in -00001-of-{count:05d}.gguf; give all files such names.",
        )
    files = [read_gguf_file(part) for part in paths]
    tensors: dict[str, Stored] = {}
    for number, part in enumerate(files):
        _refuse_other(part, number, files[0])
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise ModelError(
                f"{sorted(twice)[0]!r} is in another file of the model too", where=str(part.path)
            )
        tensors |= part.tensors
    wanted = files[0].entries.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise ModelError(
            f"the {count} files hold {len(tensors)} tensors, and the model has {wanted}",
            where=str(files[0].path),
        )
    whole = hashlib.sha256("".join(part.digest for part in files).encode()).hexdigest()
    entries = {k: v for k, v in files[0].entries.items() if not k.startswith("split.")}
    return GgufFile(files[0].path, files[0].version, entries, tensors, whole), paths


def _refuse_other(part: GgufFile, number: int, first: GgufFile) -> None:
    for key, wanted in (
        ("split.no", number),
        ("split.count", first.entries["split.count"]),
        ("split.tensors.count", first.entries.get("split.tensors.count")),
    ):
        if part.entries.get(key) != wanted:
            raise ModelError(
                f"its entry {key!r} is {part.entries.get(key)}, not {wanted}: it is a part of "
                "another model, or another part than its name says",
                where=str(part.path),
                fix="Download the files again.",
            )
