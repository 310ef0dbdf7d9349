"""Reads a TorchScript archive before torch does, and names whatever could do more than compute.

Torch runs code of the archive while it loads: `__setstate__`, default values of arguments, values
of constants. The rest runs when the module is called. So every source file is read as tokens:

- no name, wherever it stands, is that of an operator that `operators` refuses. A name that no
  operator has can only be one of the archive's own, however it is reached;
- `ops` is followed by a namespace and an operator that are admitted, `getattr` by a literal name;
- a chain that begins with `__torch__` is a class or a function of the archive's own, not a C++
  class of torch;
- what runs at load is literals and assignments, without a call or a loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from graphwright.ir.files.nesting import measure
from graphwright.ir.files.operators import is_plain, refused_names
from graphwright.ir.files.script_pickles import CLASSES, in_pickle
from graphwright.ir.files.script_start import AT_LOAD, active, assigned, defaults, is_literal
from graphwright.ir.files.script_tokens import Refused, Statement, Token, statements
from graphwright.ir.files.zips import Archive

_MEMBERS = re.compile(
    r"(code/[\w./]+\.py(\.debug_pkl)?|(data|constants|attributes|traced_inputs|bytecode)/\w+"
    r"|(data|constants|traced_inputs|bytecode|mobile_debug_handles)\.pkl"
    r"|version|byteorder|\.format_version|\.storage_alignment|\.data/\w+|extra/.*)",
    re.ASCII | re.DOTALL,
)
"""What torch writes. A `model.json` would make it read the archive in an older way, for example."""

MAX_CODE = 64 << 20
"""Bytes of code and of its debug records."""

MAX_LEVELS = 250
"""Classes and functions that name each other: torch defines one within the other."""


@dataclass
class _Source:
    """A source file of the archive: its member name, statements, and what it defines."""

    member: str
    body: list[Statement]
    defined: set[str] = field(default_factory=set)

    @property
    def module(self) -> str:
        return self.member.removeprefix("code/").removesuffix(".py").replace("/", ".")


def findings(archive: Archive) -> list[str]:
    """What the archive could do beside computing, one line each with its member and line."""
    found = [
        f"{name}: a member that torch does not write"
        for name in archive.members
        if not _MEMBERS.fullmatch(name)
    ]
    if sum(m.size for n, m in archive.members.items() if n.startswith("code/")) > MAX_CODE:
        return [*found, f"code/: more than {MAX_CODE >> 20} MiB"]
    sources = []
    for name in archive.members:
        if name.startswith("code/") and name.endswith(".py"):
            try:
                code = archive.read(name).decode("latin-1")
                sources.append(_Source(name, statements(code)))
            except Refused as error:
                found.append(f"{name}:{error.line}: {error}")
        elif name.endswith("pkl"):
            found += in_pickle(name, archive.read(name))
    for source in sources:
        source.defined = set(_definitions(source))
    known = set().union(*(source.defined for source in sources))
    has_getitem = any(name.endswith(".__getitem__") for name in known)
    for source in sources:
        found += _in_source(source, known, has_getitem)
    levels, _ = measure(_references(sources, known))
    if levels > MAX_LEVELS:
        found.append(f"code/: classes and functions that name each other {levels} levels deep")
    return list(dict.fromkeys(found))


# --- code --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _refused() -> frozenset[str]:
    return refused_names("aten") | refused_names("prim") | {"fork", "awaitable"}


def _definitions(source: _Source) -> Iterator[str]:
    """Qualified names of classes and functions, and of the methods of classes."""
    owner, inside = "", 0
    for statement in source.body:
        words = [token.text for token in statement.tokens[:2]]
        if statement.indent == 0:
            owner = ""
        if words[0] in ("class", "def") and len(words) == 2:
            name = f"{owner or source.module}.{words[1]}"
            if words[0] == "class":
                owner, inside = name, statement.indent
            yield name
        elif statement.indent <= inside:
            owner = ""


def _references(sources: list[_Source], known: set[str]) -> dict[str, set[str]]:
    """Classes and functions of the outermost level by name, with those that they name."""
    found: dict[str, set[str]] = {}
    for source in sources:
        inner: set[str] = set()
        for statement in source.body:
            if statement.indent == 0 and len(statement.tokens) > 1:
                inner = found.setdefault(f"{source.module}.{statement.tokens[1].text}", set())
            for index, token in enumerate(statement.tokens):
                if token.text == "__torch__":
                    inner.update(_heads(_chain(statement.tokens, index), known))
    return found


def _in_source(source: _Source, known: set[str], has_getitem: bool) -> Iterator[str]:
    function = _Function()
    for statement in source.body:
        first = statement.tokens[0]
        where = f"{source.member}:"
        yield from (f"{where}{line}: {what}" for line, what in _in_names(statement.tokens, known))
        if first.text == "def":
            function = _Function(statement.tokens[1].text if len(statement.tokens) > 1 else "",
                                 statement.indent)  # fmt: skip
            at_load = defaults(statement.tokens)
        elif function.holds(statement):
            if function.name != "__setstate__":
                continue
            problem = active(statement.tokens, has_getitem)
            if problem is not None:
                yield f"{where}{problem.line}: {problem.text!r} in __setstate__, which {AT_LOAD}"
            continue
        else:
            function = _Function()
            if first.text in ("class", "import", "op_version_set"):
                continue
            at_load = assigned(statement.tokens)
        odd = next((token for token in at_load if not is_literal(token)), None)
        if odd is not None:
            yield f"{where}{odd.line}: {odd.text!r} in a value that is computed at load"


@dataclass(frozen=True)
class _Function:
    """The function whose body is read; the empty name is none."""

    name: str = ""
    indent: int = 0

    def holds(self, statement: Statement) -> bool:
        return bool(self.name) and statement.indent > self.indent


def _in_names(tokens: list[Token], known: set[str]) -> Iterator[tuple[int, str]]:
    for index, token in enumerate(tokens):
        if token.kind != "name":
            continue
        text, line = token.text, token.line
        if text in _refused() and not _is_keyword(tokens, index):
            yield line, f"operator {_operator_at(tokens, index)}"
        elif text == "ops" and not _follows_dot(tokens, index):
            namespace, name = _names_behind(tokens, index, 2)
            if not name or not is_plain(namespace, name):
                yield line, f"operator {namespace}::{name}" if name else "ops by itself"
        elif text == "getattr":
            yield from ((line, what) for what in _in_getattr(tokens, index))
        elif text == "__torch__":
            chain = _chain(tokens, index)
            if chain.startswith(f"{CLASSES}.") or chain == CLASSES:
                yield line, f"object of class {chain}"
            elif not any(
                chain == name or chain.startswith(f"{name}.") for name in _heads(chain, known)
            ):
                yield line, f"{chain}, which the archive does not define"


def _heads(chain: str, known: set[str]) -> list[str]:
    parts = chain.split(".")
    heads = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return [head for head in heads if head in known]


def _is_keyword(tokens: list[Token], index: int) -> bool:
    """Whether a name is that of an argument, as in `zeros(pin_memory=False)`."""
    around = [token.text for token in tokens[max(index - 1, 0) : index + 2]]
    return len(around) == 3 and around[0] in ("(", ",") and around[2] == "="


def _follows_dot(tokens: list[Token], index: int) -> bool:
    return index > 0 and tokens[index - 1].text == "."


def _operator_at(tokens: list[Token], index: int) -> str:
    """The operator as it reads in torch: with its namespace where that is written."""
    text = tokens[index].text
    if index >= 4 and [t.text for t in tokens[index - 4 : index : 3]] == ["ops", "."]:
        return f"{tokens[index - 2].text}::{text}"
    return f"aten::{text}"


def _chain(tokens: list[Token], index: int) -> str:
    """`a.b.c` from the name at `index` on."""
    names = [tokens[index].text]
    place = index + 1
    while (
        place + 1 < len(tokens) and tokens[place].text == "." and tokens[place + 1].kind == "name"
    ):
        names.append(tokens[place + 1].text)
        place += 2
    return ".".join(names)


def _names_behind(tokens: list[Token], index: int, count: int) -> list[str]:
    names = _chain(tokens, index).split(".")[1 : count + 1]
    return names + [""] * (count - len(names))


def _in_getattr(tokens: list[Token], index: int) -> Iterator[str]:
    """The literal that is looked up may be no refused name, however it is put together."""
    if index + 1 >= len(tokens) or tokens[index + 1].text != "(":
        yield "getattr that is not called"
        return
    depth = tokens[index + 1].depth
    joined, texts = "", list[str]()
    for token in tokens[index + 2 :]:
        if token.depth <= depth:
            break
        if token.kind == "string":
            joined += token.text[1:-1]
            if "\\" in token.text:
                yield f"getattr of {token.text}"
        elif joined:
            texts, joined = [*texts, joined], ""
    yield from (f"operator aten::{text}" for text in [*texts, joined] if text in _refused())
