"""Errors that say that the machine lacks something: memory, room on a disk, a right to write.

They are nobody's mistake in the model or the spec, and no bug: a run says which it was, and what
to do.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from graphwright.ir.causes import chain
from graphwright.ir.errors import GraphwrightError, ResourceError

_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_?alloc"
    r"|bad allocation|failed to allocate memory|failed to map segment|can't start new thread"
    r"|thread creation failed|unable to mmap|could not create a (primitive|memory)",
    re.IGNORECASE,
)
_WRITING = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Read-only file system"
    r"|Input/output error|PytorchStreamWriter failed writing|file write failed"
)
_SPACE = "Free some space, or name an --out elsewhere; the same command goes on from here."
_RIGHT = "Name an --out that can be written."
_FIXES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or name an --out elsewhere.",
    errno.EROFS: _RIGHT,
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.ENAMETOOLONG: "Name a shorter --out.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
}
_MORE_MEMORY = "Give the run more memory, or it less to do: smaller batches, fewer jobs (--jobs)."


def lack(error: BaseException) -> ResourceError | None:
    """What the machine lacks, where that is what an error, or one that it comes from, says."""
    for one in chain(error):
        text = _first_line(one)
        if _is_memory(one):
            said = f" ({text[:200]})" if text else ""
            return ResourceError(f"not enough memory{said}", fix=_MORE_MEMORY)
        if isinstance(one, OSError) and one.errno is not None:
            if one.errno == errno.ENOMEM:
                return ResourceError("not enough memory", fix=_MORE_MEMORY)
            named = [os.fsdecode(f) for f in (one.filename, one.filename2) if _is_name(f)]
            where = " -> ".join(named) if named else "a file could not be read or written"
            return ResourceError(f"{where}: {_reason(one)}", fix=_FIXES.get(one.errno, ""))
        if _WRITING.search(text):
            return ResourceError(f"a file could not be written: {text[:200]}", fix=_SPACE)
    return None


def cannot_write(what: str, path: object, error: OSError) -> ResourceError:
    """The error for a file that could not be written."""
    fix = _FIXES.get(error.errno or 0, "")
    return ResourceError(f"cannot write {what}: {_reason(error)}", where=str(path), fix=fix)


def raise_lack(error: BaseException) -> None:
    """Raises ResourceError where there is a `lack`."""
    found = lack(error)
    if found is not None:
        raise found from error


@contextmanager
def lacks_told() -> Iterator[None]:
    """Raises ResourceError where the block fails for something that the machine lacks."""
    try:
        yield
    except ResourceError:
        raise
    except GraphwrightError as error:
        if any(_is_memory(one) for one in chain(error)[1:]):  # nobody's contract is broken by that
            raise_lack(error)
        raise
    except Exception as error:
        raise_lack(error)
        raise


def _reason(error: OSError) -> str:
    return error.strerror or os.strerror(error.errno or 0)


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(_MEMORY.search(_first_line(error)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _is_name(value: object) -> bool:
    return isinstance(value, str | bytes | os.PathLike)
