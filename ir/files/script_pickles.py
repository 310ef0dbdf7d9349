"""Pickles of a TorchScript archive: what torch's C++ unpickler would make of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from graphwright.ir.errors import ModelError
from graphwright.ir.files.operators import is_plain
from graphwright.ir.files.pickles import read_content, refuse_absurd
from graphwright.ir.files.script_tokens import Refused, statements

CLASSES = "__torch__.torch.classes"
_PICKLED = re.compile(
    r"__torch__(\.\w+)*"
    r"|torch\.(\w+Storage|device|Size)|torch\.storage\.\w+Storage"
    r"|torch\._utils\._rebuild_(tensor|parameter|qtensor|sparse)\w*"
    r"|torch\.jit\._pickle\.(build_\w+|restore_type_tag)"
    r"|collections\.OrderedDict|(__builtin__|builtins)\.complex"
    r"|torch\._tensor\._rebuild_from_type_v2",
    re.ASCII,
)
_QUALIFIED_OPERATOR = re.compile(r"(\w+)::(\w+)(\.\w+)?", re.ASCII)


def in_pickle(member: str, data: bytes) -> Iterator[str]:
    """What is in a pickle beside tensors, plain data and objects of the archive's own classes."""
    try:
        content = read_content(data)
        refuse_absurd(content, member)
    except ModelError as error:
        yield f"{member}: {error.message}"
        return
    for name in content.globals:
        if name.startswith(CLASSES) or not _PICKLED.fullmatch(name):
            yield f"{member}: object of class {name}"
    for text in content.strings:
        if "torch.classes" in text and not member.endswith(".debug_pkl"):
            yield f"{member}: type {text[:80]!r}"
        operator = _QUALIFIED_OPERATOR.fullmatch(text) if member == "bytecode.pkl" else None
        if operator is not None and not is_plain(operator[1], operator[2]):
            yield f"{member}: operator {operator[1]}::{operator[2]}"
    for text in content.types:
        try:
            statements(text)
        except Refused as error:
            yield f"{member}: type {text[:80]!r}: {error}"
