"""Zip archives read with suspicion: names, sizes and overlaps checked before any member is used."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from graphwright.ir.errors import ModelError
from graphwright.ir.files.bounds import refuse_special

MAX_RATIO = 100
"""A compressed member may declare at most this many times its packed size."""

MAX_INFLATED = 1 << 30
"""All compressed members together may not unpack to more bytes than this."""

MAX_TEXT = 1 << 30
"""A member that is read whole into memory may not be larger than this."""

DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, LookupError,
    NotImplementedError, OverflowError, RuntimeError,
)  # fmt: skip
"""Whatever `zipfile` raises over a file that is no whole archive."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ZIP_UNIX_LINK = 0xA000


@dataclass(frozen=True)
class Member:
    """A stored or compressed file of the archive; `offset` is where its bytes begin."""

    name: str
    size: int
    offset: int
    stored: bool


class Archive:
    """A checked zip archive, with torch's one top folder taken off the names.

    Attributes:
        path: the file; of an archive inside another one, the outer file.
        root: the top folder that all members share, without the slash; empty when there is none.
        members: by name without the root.
    """

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self.path = path
        self._data = data
        refuse_special(path)
        try:
            with self._open() as file, zipfile.ZipFile(file) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
                _check_infos(infos, path)
                self.root = _common_root([info.filename for info in infos])
                skip = len(self.root) + 1 if self.root else 0
                self.members = {
                    info.filename[skip:]: Member(
                        info.filename, info.file_size, _data_offset(file, info, path),
                        info.compress_type == zipfile.ZIP_STORED,
                    )
                    for info in infos
                }  # fmt: skip
                total = file.seek(0, io.SEEK_END)
        except DAMAGE as error:
            raise ModelError(
                "the zip archive is damaged or cut short",
                where=str(path),
                fix="Copy or download the file again.",
                details=(str(error),),
            ) from error
        _check_overlap(infos, self.members, total, path)

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._data is None else io.BytesIO(self._data)

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def read(self, name: str, most: int = MAX_TEXT) -> bytes:
        """Bytes of a member, its checksum verified.

        Args:
            name: without the root.
            most: bytes that it may have.

        Raises:
            ModelError: no such member, too large to read whole, or damaged.
        """
        member = self.members.get(name)
        if member is None:
            raise ModelError(f"the archive has no member {name!r}", where=str(self.path))
        if member.size > most:
            raise ModelError(f"member {name!r} declares {member.size} bytes", where=str(self.path))
        try:
            with self._open() as file, zipfile.ZipFile(file) as archive:
                return archive.read(member.name)
        except DAMAGE as error:
            raise ModelError(
                f"member {name!r} is damaged",
                where=str(self.path),
                fix="Copy or download the file again.",
                details=(str(error),),
            ) from error

    def check_reads_alike(self) -> None:
        """Torch's own zip reader must see the very members that were checked, and no others.

        Raises:
            ModelError: it sees something else, where code or a pickle is concerned.
        """
        import torch

        with self._open() as file:
            try:
                reader = torch._C.PyTorchFileReader(file)
                alike = set(reader.get_all_records()) == set(self.members) and all(
                    reader.get_record(name) == self.read(name)
                    for name in self.members
                    if name.startswith("code/") or name.endswith("pkl")
                )
            except (RuntimeError, ValueError):
                alike = False
        if not alike:
            raise ModelError("the zip archive reads in two different ways", where=str(self.path))


def _check_infos(infos: list[zipfile.ZipInfo], path: Path) -> None:
    where = str(path)
    if not infos:
        raise ModelError("the zip archive is empty", where=where)
    seen: set[str] = set()
    inflated = 0
    for info in infos:
        name = info.orig_filename
        if name.startswith(("/", "\\")) or ":" in name or "\\" in name or "\0" in name:
            raise ModelError(f"member {name!r} has an absolute or foreign path", where=where)
        if ".." in name.split("/"):
            raise ModelError(f"member {name!r} points outside the archive", where=where)
        if name in seen:
            raise ModelError(f"member {name!r} occurs twice", where=where)
        seen.add(name)
        if info.external_attr >> 16 & 0xF000 == _ZIP_UNIX_LINK:
            raise ModelError(f"member {name!r} is a symbolic link", where=where)
        if info.flag_bits & 0x1:
            raise ModelError(f"member {name!r} is encrypted", where=where)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ModelError(f"member {name!r} is packed in a way torch never does", where=where)
        if info.compress_type != zipfile.ZIP_STORED:
            inflated += info.file_size
            small = info.file_size <= 1 << 20
            if inflated > MAX_INFLATED or (
                not small and info.file_size > MAX_RATIO * max(info.compress_size, 1)
            ):
                raise ModelError(
                    f"member {name!r} unpacks {info.compress_size} bytes to {info.file_size}: "
                    "this looks like a zip bomb",
                    where=where,
                )
        elif info.file_size != info.compress_size:
            raise ModelError(f"member {name!r} has two different sizes", where=where)


def _common_root(names: list[str]) -> str:
    """The one top folder; Keras and plain zips have none."""
    roots = {name.partition("/")[0] if "/" in name else "" for name in names}
    return roots.pop() if len(roots) == 1 else ""


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo, path: Path) -> int:
    """Offset of a member's bytes: behind its local header, which has its own name length."""
    file.seek(info.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    name = file.read(name_length)
    if signature != b"PK\x03\x04" or name != info.orig_filename.encode():
        raise ModelError(
            f"member {info.orig_filename!r} is listed under another name than it has",
            where=str(path),
        )
    return int(info.header_offset + _LOCAL_HEADER.size + name_length + extra_length)


def _check_overlap(
    infos: list[zipfile.ZipInfo], members: dict[str, Member], total: int, path: Path
) -> None:
    """Members share no bytes and end inside the file (overlap is how small bombs get large)."""
    spans = sorted(
        (member.offset, member.offset + info.compress_size)
        for member, info in zip(members.values(), infos, strict=True)
    )
    end = 0
    for start, stop in spans:
        if start < end:
            raise ModelError("members of the zip archive overlap", where=str(path))
        end = stop
    if end > total:
        raise ModelError(
            "the zip archive is cut short", where=str(path), fix="Copy or download it again."
        )
