"""The environment that the bytes of a result depend on, beside the spec and the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
