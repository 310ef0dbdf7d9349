"""Bounds for every container: what may be opened at all, and how large it may claim to be."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from graphwright.ir.errors import ModelError

if TYPE_CHECKING:
    import torch

MOST_REPEATED = 1 << 28
"""Bytes that a tensor may stand for beyond those of the file, by repeating itself."""

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

P = ParamSpec("P")
R = TypeVar("R")


def refuse_name(path: Path) -> None:
    """Raises ModelError for a name that is no UTF-8: the libraries that map files take no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ModelError(
            "its name is not UTF-8 text, which torch and safetensors cannot open",
            where=ascii(str(path)).strip("'"),
            fix="Rename it, or the folder it is in.",
        ) from None


def refuse_special(path: Path) -> None:
    """Refuses what blocks or never ends when it is read.

    Raises:
        ModelError: a pipe, a device or a socket.
    """
    try:
        kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except (OSError, ValueError):
        return  # whoever opens it says why it cannot be opened
    if kind is not None:
        raise ModelError(
            f"this is {kind}, not a file", where=str(path), fix="Copy it into a file first."
        )


def bounded(function: Callable[P, R]) -> Callable[P, R]:
    """What a reader asks of the stack and of the memory is the file's fault, and one message.

    The first argument of `function` is the path.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (RecursionError, MemoryError, OverflowError) as error:
            what = "is nested too deep" if isinstance(error, RecursionError) else (
                "asks for more memory than there is"
            )  # fmt: skip
            raise ModelError(
                f"the file {what}", where=str(args[0]), details=(type(error).__name__,)
            ) from None

    return call


def refuse_repeated(value: Any, path: Path) -> None:
    """Refuses tensors that claim to be far larger than the file they come from.

    Args:
        value: a loaded checkpoint; tensors are found in mappings, lists and tuples.
        path: its file.

    Raises:
        ModelError: one that repeats its few bytes without end; names it.
    """
    import torch

    most = path.stat().st_size + MOST_REPEATED
    for name, tensor in _tensors(value):
        claimed = tensor.numel() * tensor.element_size()
        if tensor.layout is torch.strided and not tensor.is_meta and claimed > most:
            raise ModelError(
                f"tensor {name!r} of shape {tuple(tensor.shape)} repeats its bytes to {claimed}",
                where=str(path),
                fix="Save the tensor as it is, without expanding it.",
            )


def _tensors(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    pending: list[tuple[str, Any]] = [("", value)]
    seen: set[int] = set()
    while pending:
        name, part = pending.pop()
        if isinstance(part, torch.Tensor):
            yield name, part
        elif isinstance(part, Mapping | list | tuple) and id(part) not in seen:
            seen.add(id(part))
            items = part.items() if isinstance(part, Mapping) else enumerate(part)
            pending += [(f"{name}.{key}" if name else str(key), item) for key, item in items]
