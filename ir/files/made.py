"""Folders of our own for what a model of one file is accompanied by: configuration and tokenizer.

A program notes where its tokenizer lies, and a resumed run looks there again. So the folder of a
file has the same name in every run, and stays among the user's temporary files.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def made_folder(key: str, fill: Callable[[Path], None]) -> Path:
    """The folder of a key, made and filled where it is not there yet.

    Args:
        key: says the contents: a digest.
        fill: writes the contents into an empty folder.
    """
    base = _own_base()
    place = base / key
    if not place.is_dir():
        making = Path(tempfile.mkdtemp(dir=base))
        try:
            fill(making)
            making.rename(place)
        except OSError:
            shutil.rmtree(making, ignore_errors=True)
            if not place.is_dir():  # else another process was faster
                raise
    return place


def _own_base() -> Path:
    """A folder that nobody else can write to."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    base = Path(tempfile.gettempdir()) / f"graphwright-{user}"
    base.mkdir(mode=0o700, exist_ok=True)
    stat = base.lstat()
    is_own = not hasattr(os, "getuid") or (stat.st_uid == user and not stat.st_mode & 0o077)
    return base if is_own and not base.is_symlink() else Path(tempfile.mkdtemp())
