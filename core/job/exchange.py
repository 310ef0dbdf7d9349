"""Puts a finished folder in the place of an earlier one, with no moment without either."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

_HERE = -100
"""`AT_FDCWD`: names are relative to the working folder."""
_EXCHANGE = 2
"""`RENAME_EXCHANGE` of Linux's renameat2."""
_WITHOUT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def put_in_place(new: Path, place: Path) -> Path | None:
    """Renames the folder `new` to `place`; returns where the folder that was there is now.

    On Linux the two names are exchanged in one step. Where the system or the file system knows
    no such step, there are two renames, and between them (some microseconds) no `place`.
    """
    if not place.exists():
        new.rename(place)
        return None
    if _exchanged(new, place):
        return new
    aside = new.with_name(f"{new.name}-old")
    place.rename(aside)
    new.rename(place)
    return aside


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two names could be exchanged.

    Raises:
        OSError: they could, were it not for another reason.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _WITHOUT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def carry(files: list[Path], old: Path, new: Path) -> list[str]:
    """Puts files of a folder into another one, under the same names below it.

    As links, so that nothing is moved and a kill loses none; as copies where a file system has no
    links. A name that is taken there gets `.kept` behind it.

    Returns:
        The names there, relative to `new`.
    """
    names = []
    for file in files:
        target = new / file.relative_to(old)
        while os.path.lexists(target):
            target = target.with_name(f"{target.name}.kept")
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink():
            target.symlink_to(file.readlink())
        elif file.is_dir():
            target.mkdir()
        else:
            try:
                os.link(file, target)
            except OSError:
                shutil.copy2(file, target)
        names.append(str(target.relative_to(new)))
    return names
