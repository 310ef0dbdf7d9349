"""The lines of a model at which sizes become numbers, where torch itself does not keep them.

Torch remembers one frame for every size that it fixes. Under a loop over the rows of a tensor, or
an unpacking, that is one of its own; the model's line lies above it on the stack.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.fx.experimental import symbolic_shapes

from graphwright.ir.trace.errors import is_own, is_users


@contextlib.contextmanager
def noted_places(places: dict[str, str]) -> Iterator[None]:
    """Notes for every symbol of a size that becomes a number the model's "path:line" meanwhile."""
    fix = getattr(symbolic_shapes.ShapeEnv, "_set_replacement", None)
    if fix is None:  # private in torch: the places are then told as far as it knows them itself
        yield
        return

    def note(env: Any, symbol: Any, target: Any, *more: Any) -> None:
        if getattr(target, "is_number", False) and (place := _place()):
            places.setdefault(str(symbol), place)
        fix(env, symbol, target, *more)

    with mock.patch.object(symbolic_shapes.ShapeEnv, "_set_replacement", note):
        yield


def _place() -> str:
    """The innermost line of the model's that is being run; empty where it is none's."""
    frame = sys._getframe(2)
    while frame is not None and not is_own(frame.f_code.co_filename):
        if is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
