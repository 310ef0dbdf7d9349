"""Work that a killed run leaves for the next: files with their digest in their name.

A file is written whole, beside its place, and renamed. What comes back is what was written, or
nothing: a file that was damaged since is told of and taken away, so that its work is done again.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from graphwright.ir.atomic import replacing

Warn = Callable[[str], None]
_DIGITS = 32
"""Hexadecimal digits of the digest in a name."""


def keep(folder: Path, stem: str, state: Any, what: str, warn: Warn) -> None:
    """Writes tensors, numbers, texts, and lists and dicts of them, in the place of earlier ones.

    A disk that takes no more is no error: the run needs no such file, the next one might.

    Args:
        folder: made where it is missing.
        stem: name of the file, without digest and suffix; letters, digits and hyphens.
        state: what is written.
        what: what it is, for `warn`, as "layer 'fc'".
        warn: told when it could not be written.
    """
    earlier = list(_files(folder, stem))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / f".{stem}.{os.getpid()}"
        with replacing(written) as file:
            torch.save(state, file)
        named = folder / f"{stem}.{_digest(written)}.pt"
        written.replace(named)
    except OSError as error:
        warn(f"{what} is not kept for a later run: {error.strerror}")
        return
    for old in earlier:
        if old != named:
            old.unlink(missing_ok=True)


def kept(folder: Path, stem: str, what: str, warn: Warn) -> Any:
    """The state that `keep` wrote last; None where there is none, or none that is whole."""
    for path in _files(folder, stem):
        try:
            if path.name == f"{stem}.{_digest(path)}.pt":
                # weights_only: a restricted unpickler, which can run no code. An open file, for
                # torch cannot open names that are no UTF-8.
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            reason = "its bytes are not those that were written"
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        warn(f"{what} of an earlier run is damaged and is computed again ({path}: {reason})")
        path.unlink(missing_ok=True)
    return None


def _files(folder: Path, stem: str) -> Iterator[Path]:
    """Files of a stem, the newest first."""
    found = [path for path in folder.glob(f"{stem}.*.pt") if path.is_file()]
    return iter(sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]
