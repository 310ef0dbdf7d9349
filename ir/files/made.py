"""A folder of our own for files that a model is accompanied by, gone when nothing holds it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path


class MadeFolder:
    """A new folder among the temporary files.

    Attributes:
        path: of it; removed with this object, or at the end of the process.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="graphwright-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
