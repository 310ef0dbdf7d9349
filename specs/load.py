"""Reads YAML 1.2 into a `Node` tree: bounded, without tags, keeping every place in the file.

PyYAML's own loader follows YAML 1.1: it reads `1e-4` as a string, `off` as False, `010` as 8, and
keeps the last of two equal keys in silence. So only its parser is used, and its events are turned
into values here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from graphwright.ir.errors import Problem, SpecError
from graphwright.specs.document import Entry, Node, Path, Scalar, show, show_path

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 4_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NAMED: dict[str, Scalar] = {"": None, "~": None, ".nan": float("nan")}
_NAMED |= dict.fromkeys(("null", "Null", "NULL"))
_NAMED |= dict.fromkeys(("true", "True", "TRUE"), True)
_NAMED |= dict.fromkeys(("false", "False", "FALSE"), False)
_NAMED |= dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf"))
_NAMED |= dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf"))
_UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def resolve_scalar(text: str) -> Scalar:
    """Value of a plain (unquoted) scalar by the core schema of YAML 1.2.

    Raises:
        ValueError: a number with more than 40 digits, or too large for a float.
    """
    if text in _NAMED:
        return _NAMED[text]
    if _INT.fullmatch(text):
        if len(text) > 40:
            raise ValueError("a number of more than 40 digits")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ValueError("a number too large for a float")
        return number
    return text


def read_file(path: FilePath) -> tuple[Node, list[Problem]]:
    """The document in a file, and what is wrong with it as YAML.

    Raises:
        SpecError: the file cannot be read, is not UTF-8 text, or is not YAML at all.
    """
    name = str(path)
    try:
        if path.is_dir():
            raise SpecError([_at(name, "is a folder; expected a YAML file")])
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError([_at(name, "no such file")]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError([_at(show(name), f"cannot be read: {reason}")]) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(data) <= MAX_BYTES or error.start < MAX_BYTES - 4:
            line, column = _line_column(data[: error.start].decode("utf-8-sig", "ignore"))
            message = f"not UTF-8 text (byte 0x{data[error.start]:02x})"
            raise SpecError([Problem(name, line, column, "", message)]) from None
        text = data[: error.start].decode("utf-8-sig")
    return read_text(text, name)


def read_text(text: str, file: str) -> tuple[Node, list[Problem]]:
    """The document in a string; see `read_file`."""
    if len(text.encode("utf-8", "replace")) > MAX_BYTES or len(text) > MAX_BYTES:
        message = f"larger than {MAX_BYTES // 1024} KiB; data belongs in files of its own"
        raise SpecError([_at(file, message)])
    if bad := _UNPRINTABLE.search(text):
        line, column = _line_column(text[: bad.start()])
        message = f"not a text file (control character {show(bad.group())})"
        raise SpecError([Problem(file, line, column, "", message)])
    builder = _Builder(file)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        raise SpecError([*builder.problems, _syntax_problem(error, text, file)]) from None
    except yaml.YAMLError as error:
        raise SpecError([_at(file, f"not YAML: {show(str(error))}")]) from None
    root = builder.root
    if root is None or (root.value is None and root.items is None and root.entries is None):
        raise SpecError([_at(file, "is empty; a spec starts with `version: 1`")])
    return root, builder.problems


@dataclass
class _Frame:
    """A collection that is still open, and in a mapping the key that waits for its value."""

    node: Node
    anchor: str | None
    seen: dict[str, Entry] = field(default_factory=dict)
    key: Entry | None = None
    key_ignored: bool = False

    def path_element(self) -> str | int:
        if self.node.items is not None:
            return len(self.node.items)
        return self.key.written if self.key else "?"


class _Builder:
    """Turns parser events into nodes; refuses tags, duplicate keys, depth and alias bombs."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self._stack: list[_Frame] = []
        self._anchors: dict[str, Node] = {}
        self._count = 0
        self._documents = 0

    def take(self, event: Any) -> None:
        """One parser event."""
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents == 2:
                self._stop(event, "a second document starts here; a spec is one document")
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            self._open(event)
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            frame = self._stack.pop()
            frame.node.size += sum(n.size for n in frame.node.items or ())
            frame.node.size += sum(e.node.size for e in frame.node.entries or ())
            self._close(frame.node, frame.anchor, event)

    def _open(self, event: Any) -> None:
        self._refuse_tag(event)
        if len(self._stack) >= MAX_DEPTH:
            self._stop(event, f"nested deeper than {MAX_DEPTH} levels")
        node = self._node(event)
        if isinstance(event, yaml.SequenceStartEvent):
            node.items = []
        else:
            node.entries = []
        self._stack.append(_Frame(node, event.anchor))

    def _scalar(self, event: Any) -> None:
        if self._is_key() and not event.tag:
            self._key(event.value, event)
            return
        self._refuse_tag(event)
        node = self._node(event)
        node.value = event.value
        if event.tag and not event.value:
            node.value = event.tag  # `!*.head` without quotes: check it as the text that was meant
        elif event.implicit[0]:
            try:
                node.value = resolve_scalar(event.value)
            except ValueError as error:
                self._problem(event, f"{show(event.value, 30)} is {error}")
        self._close(node, event.anchor, event)

    def _alias(self, event: Any) -> None:
        node = self._anchors.get(event.anchor)
        if node is None:
            name = f"*{event.anchor}"
            message = f"{show(name)} is read as a YAML alias, and nothing has that anchor"
            self._problem(event, f"{message}; put quotes around a text that starts with *")
            node = self._node(event)
            node.value = name
        else:
            self._grow(event, node.size)
        self._close(node, None, event)

    def _close(self, node: Node, anchor: str | None, event: Any) -> None:
        """Hands a finished node to the collection around it."""
        if anchor:
            self._anchors[anchor] = node
        if not self._stack:
            self.root = node
            return
        frame = self._stack[-1]
        if frame.node.items is not None:
            frame.node.items.append(node)
        elif frame.key is not None:
            frame.key.node = node
            if frame.node.entries is not None and not frame.key_ignored:
                frame.node.entries.append(frame.key)
            frame.key = None
        else:
            self._problem(event, "a key must be a name, not a list, mapping or alias", node)
            self._key("?", event, ignored=True)

    def _key(self, text: str, event: Any, *, ignored: bool = False) -> None:
        frame = self._stack[-1]
        mark = event.start_mark
        line, column = mark.line + 1, mark.column + 1
        frame.key = Entry(text, line, column, Node(self.file, line, column))
        twin = None if ignored else frame.seen.get(text)
        frame.key_ignored = ignored or twin is not None
        if twin is not None:
            message = f"the key {show(text)} stands twice; the first is in line {twin.line}"
            self._problem(event, message)
        elif text == "<<" and event.implicit[0]:
            self._problem(event, "merge keys (<<) do not exist in YAML 1.2; write the keys out")
            frame.key_ignored = True
        else:
            frame.seen[text] = frame.key

    def _is_key(self) -> bool:
        return bool(self._stack) and self._stack[-1].node.is_mapping and self._stack[-1].key is None

    def _node(self, event: Any) -> Node:
        self._grow(event, 1)
        return Node(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def _grow(self, event: Any, size: int) -> None:
        self._count += size
        if self._count > MAX_VALUES:
            self._stop(event, f"more than {MAX_VALUES} values; data belongs in files of its own")

    def _refuse_tag(self, event: Any) -> None:
        if event.tag is None:
            return
        text = event.tag.replace("tag:yaml.org,2002:", "!!", 1)
        message = f"{show(text)} is read as a YAML tag, which a spec does not have"
        self._problem(event, f"{message}; put quotes around a text that starts with !")

    def _path(self) -> Path:
        return tuple(frame.path_element() for frame in self._stack)

    def _problem(self, event: Any, message: str, node: Node | None = None) -> None:
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        if node is not None:
            line, column = node.line, node.column
        path = "" if "?" in self._path() else show_path(self._path())
        self.problems.append(Problem(self.file, line, column, path, message))

    def _stop(self, event: Any, message: str) -> None:
        """A problem that makes reading on pointless (or dangerous)."""
        self._problem(event, message)
        raise SpecError(self.problems)


def _syntax_problem(error: yaml.MarkedYAMLError, text: str, file: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    if error.context_mark and re.search("alias|tag", error.context or ""):
        mark = error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    lines = text.splitlines() or [""]
    if line > len(lines):  # the parser's place for the end of the file
        line, column = len(lines), len(lines[-1]) + 1
    here = lines[line - 1][column - 1 :]
    reason, context = error.problem or "", error.context or ""
    if "alias" in context or here.startswith("*"):
        message = "a text that starts with * must stand in quotes"
    elif "tag" in context or here.startswith("!"):
        message = "a text that starts with ! must stand in quotes"
    elif here.startswith("\t"):
        message = "a tab; indent with spaces"
    elif here[:1] in ("@", "`", "%"):
        message = f"a text that starts with {here[0]} must stand in quotes"
    elif "mapping values are not allowed" in reason:
        message = "a ':' where none can stand; check the indentation, or quote the text"
    else:
        message = f"not YAML: {reason}" + (f" ({context})" if context else "")
    return Problem(file, line, column, "", message)


def _at(file: str, message: str) -> Problem:
    return Problem(file, 1, 1, "", message)


def _line_column(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
