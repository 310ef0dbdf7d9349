"""Reads from a pickle's opcodes, without executing any, what unpickling would import and build."""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from graphwright.ir.errors import ModelError
from graphwright.ir.files.nesting import measure

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

MAX_CONTAINERS = 1_000_000
"""Of one pickle, each held in memory while it is followed; a tensor is about six."""

MAX_NESTING = 1000
"""Containers in containers. Hashing a tuple and freeing a list of TorchScript are recursive."""

MAX_PATHS = 10**9
"""Ways through all containers: shared ones, doubled at each level, are hashed as often."""

_UNRESOLVED = "a global whose name is computed"
_TYPED = "torch.jit._pickle.restore_type_tag"
_STRINGS = frozenset(
    {
        "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING",
        "SHORT_BINSTRING",
    }
)  # fmt: skip
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_EMPTY = frozenset({"EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_SET"})
_ATOMS = frozenset(
    opcode.name
    for opcode in pickletools.opcodes
    if not opcode.stack_before and len(opcode.stack_after) == 1
) - (_STRINGS | _GETS | _EMPTY | {"MARK", "GLOBAL", "EXT1", "EXT2", "EXT4"})
"""Opcodes that push a number, bytes or the like."""

_GROWS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})


@dataclass(frozen=True)
class Content:
    """What a pickle names and builds.

    Attributes:
        globals: what it imports, sorted, each as `module.name`.
        strings: all texts in it.
        types: those that TorchScript reads as the type of a container.
        nesting: depth of containers in containers; those that hold themselves count once.
        paths: ways from the outermost container to an innermost one.
    """

    globals: list[str]
    strings: set[str]
    types: set[str]
    nesting: int
    paths: int


_NOTHING: tuple[_Node, ...] = ()


class _Node:
    """A container or an object: what it holds beside atoms, and the last text in it.

    A global is one too; its text is its name.
    """

    __slots__ = ("inner", "text")

    def __init__(self, inner: Sequence[_Node], text: str = "") -> None:
        self.inner: Sequence[_Node] = inner or _NOTHING
        self.text = text

    def grow(self, inner: Sequence[_Node]) -> None:
        """Puts more into the container."""
        if inner:
            held = self.inner if isinstance(self.inner, list) else list(self.inner)
            held.extend(inner)
            self.inner = held


class _Mark:
    """The place on the stack where the items of a container begin."""


_MARK = _Mark()
_Value = _Node | _Mark | str | None
"""On the stack: a container, a mark, a text, or any other atom."""


@dataclass
class _Machine:
    """Follows the stack and the memo of an unpickler, with containers and texts for values."""

    found: set[str] = field(default_factory=set)
    strings: set[str] = field(default_factory=set)
    types: set[str] = field(default_factory=set)
    stack: list[_Value] = field(default_factory=list)
    memo: dict[int, _Value] = field(default_factory=dict)
    nodes: list[_Node] = field(default_factory=list)

    def step(self, opcode: pickletools.OpcodeInfo, arg: object) -> None:
        name = opcode.name
        if name in _STRINGS:
            self.strings.add(str(arg))
            self.stack.append(str(arg))
        elif name in _PUTS:
            self.memo[int(str(arg))] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in _GETS:
            self.stack.append(self.memo[int(str(arg))])
        elif name in _ATOMS:
            self.stack.append(None)
        elif name in _EMPTY:
            self.stack.append(self._node((), []))
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            self._change(opcode, arg)

    def _change(self, opcode: pickletools.OpcodeInfo, arg: object) -> None:
        name = opcode.name
        items = self._taken(opcode)
        texts = [item for item in items if isinstance(item, str)]
        inner = [item for item in items if isinstance(item, _Node)]
        if name in ("GLOBAL", "INST"):
            texts = [str(arg).replace(" ", ".", 1)]
            self.found.add(texts[0])
        elif name == "STACK_GLOBAL":
            self.found.add(".".join(texts) if len(texts) == 2 else _UNRESOLVED)
        elif name.startswith("EXT"):
            self.found.add(f"extension code {arg}")
        elif name == "REDUCE" and len(inner) == 2 and inner[0].text == _TYPED:
            self.types.add(inner[1].text)
        if name in _GROWS:
            target = items[0]
            if isinstance(target, _Node):
                target.grow(inner[1:])
            self.stack.append(target)
        elif opcode.stack_after:
            self.stack.append(self._node(inner, texts))

    def _taken(self, opcode: pickletools.OpcodeInfo) -> list[_Value]:
        """Takes what the opcode consumes from the stack, the lowest first."""
        before = opcode.stack_before
        if pickletools.markobject not in before:
            count = len(before)
            if count > len(self.stack):
                raise IndexError(f"{opcode.name} finds too little on the stack")
            items = self.stack[len(self.stack) - count :]
            del self.stack[len(self.stack) - count :]
            return items
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        below = before.index(pickletools.markobject)
        items += [self.stack.pop() for _ in range(below)]
        return items[::-1]

    def _node(self, inner: Sequence[_Node], texts: list[str]) -> _Node:
        if len(self.nodes) == MAX_CONTAINERS:
            raise ModelError("the pickle in the file has an absurd number of containers")
        node = _Node(inner, texts[-1] if texts else "")
        self.nodes.append(node)
        return node

    def measure(self) -> tuple[int, int]:
        """(nesting, paths) of all containers."""
        inner = {id(n): [id(part) for part in n.inner] for n in self.nodes if n.inner}
        return measure(inner, MAX_PATHS)


def read_content(data: bytes | BinaryIO, count: int = 1) -> Content:
    """What `count` pickles in a row name and build.

    Raises:
        ModelError: the stream is no pickle, is cut short, or is beyond all measure.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    found: set[str] = set()
    strings: set[str] = set()
    types: set[str] = set()
    nesting, paths = 0, 1
    budget = MAX_OPCODES
    try:
        for _ in range(count):
            machine = _Machine()
            for opcode, arg, _position in pickletools.genops(stream):
                machine.step(opcode, arg)
                budget -= 1
                if budget < 0:
                    raise ModelError("the pickle in the file has an absurd number of entries")
            found |= machine.found
            strings |= machine.strings
            types |= machine.types
            deeper, more = machine.measure()
            nesting, paths = max(nesting, deeper), max(paths, more)
    except (ValueError, EOFError, LookupError, OverflowError, MemoryError) as error:
        raise ModelError(
            "the pickle in the file is damaged or cut short",
            fix="Copy or download the file again.",
            details=(str(error).splitlines()[0] if str(error) else type(error).__name__,),
        ) from error
    return Content(sorted(found), strings, types, nesting, paths)


def refuse_absurd(content: Content, where: str) -> None:
    """Refuses what would exhaust the stack or the time of whoever unpickles it.

    Raises:
        ModelError: it is nested too deep, or shares its parts too often.
    """
    if content.nesting > MAX_NESTING:
        what = f"containers nested {content.nesting} deep"
    elif content.paths >= MAX_PATHS:
        what = f"containers that are shared in more than {MAX_PATHS:.0e} ways"
    else:
        return
    raise ModelError(
        f"the pickle in the file holds {what}", where=where, fix="No model needs that."
    )


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
