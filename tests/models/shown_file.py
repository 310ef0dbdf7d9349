"""Files that a pass's `CHAIN` names, which other test files run in processes of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def shown_file(name: str, write: Callable[[Path], object]) -> Path:
    """The file of a name, written anew by every process, and there as a whole at any time.

    None is kept from an earlier run: numbers of another version or processor would stay in it.
    """
    path = Path(tempfile.gettempdir()) / f"graphwright-{os.getuid()}-{name}"
    with tempfile.TemporaryDirectory(dir=path.parent) as making:
        part = Path(making) / path.name
        write(part)
        part.replace(path)
    return path
