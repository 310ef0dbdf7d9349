"""Opens what a backend saved: a model, or the bundle of a denoiser."""

from __future__ import annotations

from pathlib import Path

from graphwright.backends.base import Compiled, all_backends
from graphwright.backends.bundle import open_bundle


def open_artifact(path: Path) -> Compiled | None:
    """A saved artifact of whichever backend wrote it; None when it is none of theirs."""
    bundle = open_bundle(path)
    if bundle is not None:
        return bundle
    opened = (backend.open(path) for backend in all_backends().values())
    return next((compiled for compiled in opened if compiled is not None), None)
