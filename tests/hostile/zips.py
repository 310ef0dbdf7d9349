"""Archives taken apart and put together again, with members changed, added or left out."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping

Change = Callable[[str, bytes], bytes | None]


def rewritten(archive: bytes, change: Change, extra: Mapping[str, bytes] | None = None) -> bytes:
    """The zip with every member passed through `change` (None drops it), and further members."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = change(info.filename, old.read(info))
            if content is not None:
                new.writestr(zipfile.ZipInfo(info.filename), content)
        for name, content in (extra or {}).items():
            new.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def kept(name: str, content: bytes) -> bytes | None:
    """The change that leaves every member as it is."""
    return content
