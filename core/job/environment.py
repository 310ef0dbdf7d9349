"""The environment that the bytes of a result depend on, beside the spec and the model."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions, machine and thread count, as recorded in the lock file."""
    import platform

    import torch

    from graphwright import __version__

    return {
        "graphwright": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def own_code() -> str:
    """Digest of our own source files.

    Two states of a checkout have one version number, and a checkpoint of the one is none of the
    other.
    """
    import graphwright
    from graphwright import backends, ir, passes, specs

    packages = (graphwright, backends, ir, passes, specs)
    return sources_digest(Path(path) for package in packages for path in package.__path__)


def sources_digest(folders: Iterable[Path]) -> str:
    """sha256 (hex) over the Python files below some folders, with their places in them."""
    total = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{file.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels for the run; the caller's setting is put back."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
