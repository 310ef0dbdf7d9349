"""Reads from a pickle's opcodes, without executing any, the names it would import and call."""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from graphwright.ir.errors import ModelError

HARMLESS = re.compile(
    r"collections\.(OrderedDict|Counter)"
    r"|(__builtin__|builtins)\.(set|frozenset|complex|bytearray)"
    r"|_codecs\.encode"
    r"|torch\.(Size|device|Tensor|nn\.parameter\.(Parameter|Buffer))"
    r"|torch\.(cuda\.)?\w+Storage|torch\.storage\.(Typed|Untyped)Storage"
    r"|torch\._utils\._rebuild_(tensor|parameter|qtensor|sparse|meta|nested|device)\w*"
    r"|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.serialization\._get_layout"
    r"|torch\.(float|bfloat|complex|u?int|quint|qint|bool|bits)\w*"
    r"|torch\.per_(tensor|channel)_\w+"
)
"""Globals that hold data only. What passes here is still opened with `weights_only=True`."""

LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""The start of torch.save's files before 1.6, after the protocol bytes: five pickles in a row."""

MAX_OPCODES = 20_000_000
"""A pickle of more opcodes than this is refused; a checkpoint of 100 000 tensors has 4 million."""

_UNRESOLVED = "a global whose name is computed"
_STRINGS = {
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING",
    "SHORT_BINSTRING",
}  # fmt: skip
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}


@dataclass
class _Reader:
    """Follows strings through the stack and the memo, enough to name what STACK_GLOBAL imports."""

    found: set[str] = field(default_factory=set)
    recent: list[str | None] = field(default_factory=list)
    memo: dict[int, str | None] = field(default_factory=dict)

    def step(self, name: str, arg: object) -> None:
        if name in _STRINGS:
            self.recent.append(str(arg))
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self._top()
        elif name in _PUTS:
            self.memo[int(str(arg))] = self._top()
        elif name in _GETS:
            self.recent.append(self.memo.get(int(str(arg))))
        elif name in ("GLOBAL", "INST"):
            module, _, attribute = str(arg).partition(" ")
            self.found.add(f"{module}.{attribute}")
            self.recent.append(None)
        elif name == "STACK_GLOBAL":
            pair = self.recent[-2:]
            known = [part for part in pair if part is not None]
            self.found.add(".".join(known) if len(known) == 2 else _UNRESOLVED)
            self.recent.append(None)
        elif name in ("EXT1", "EXT2", "EXT4"):
            self.found.add(f"extension code {arg}")
            self.recent.append(None)
        elif name not in ("PROTO", "FRAME"):
            # Anything else pushes or pops values that are not names: forget what lay on top.
            self.recent.append(None)
        del self.recent[:-4]

    def _top(self) -> str | None:
        return self.recent[-1] if self.recent else None


def globals_in(stream: BinaryIO, count: int = 1) -> list[str]:
    """Names that `count` pickles in a row import, sorted, each as `module.name`.

    Raises:
        ModelError: the stream is no pickle, is cut short, or is beyond all measure.
    """
    found: set[str] = set()
    budget = MAX_OPCODES
    try:
        for _ in range(count):
            reader = _Reader()
            for opcode, arg, _position in pickletools.genops(stream):
                reader.step(opcode.name, arg)
                budget -= 1
                if budget < 0:
                    raise ModelError("the pickle in the file has an absurd number of entries")
            found |= reader.found
    except (ValueError, EOFError, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ModelError(
            "the pickle in the file is damaged or cut short",
            fix="Copy or download the file again.",
            details=(str(error).splitlines()[0] if str(error) else type(error).__name__,),
        ) from error
    return sorted(found)


def globals_in_bytes(data: bytes) -> list[str]:
    """`globals_in` for a pickle in memory."""
    return globals_in(io.BytesIO(data))


def unsafe(names: Iterable[str]) -> list[str]:
    """The names that are not plain data: what unpickling would import and could call."""
    return [name for name in names if not HARMLESS.fullmatch(name)]


def is_module(names: Iterable[str]) -> bool:
    """Whether the globals include an `nn.Module` class of torch's own."""
    return any(name.startswith("torch.nn.modules.") for name in names)


def counted(number: int, what: str) -> str:
    """A number and its noun: `1 tensor`, `2 tensors`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def listed(names: Iterable[str], limit: int = 8) -> Iterator[str]:
    """Lines for an error message: the first few names, and how many more there are."""
    names = list(names)
    yield from names[:limit]
    if len(names) > limit:
        yield f"... and {len(names) - limit} more"
