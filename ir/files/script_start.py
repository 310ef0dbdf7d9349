"""What TorchScript runs while it loads: `__setstate__`, default values, constants of classes.

These may be literals and assignments: no call, no loop and no operator, so that loading ends, takes
no memory of its own, and does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from graphwright.ir.files.script_tokens import Token

_LITERALS = frozenset(
    {
        "True", "False", "None", "inf", "nan", "infj", "nanj", "annotate", "unchecked_cast",
        "uninitialized", "torch", "device", "CONSTANTS", "List", "Dict", "Tuple", "Optional",
        "Union", "Final", "Tensor", "Device", "NoneType", "Any", "int", "float", "bool", "str",
        "complex", "number",
    }
)  # fmt: skip
"""Names in values that are computed at load: numbers, types and casts."""

AT_LOAD = "runs when the file is loaded, and may only assign"

_CONSTANT = re.compile(r"c\d+")
_CASTS = frozenset({"annotate", "unchecked_cast", "uninitialized", "isinstance"})
_PASSIVE_SIGNS = frozenset({"=", ",", ".", ":", "(", ")", "[", "]", "->", "-"})
_ACTIVE_WORDS = frozenset({"while", "for", "with", "raise", "assert", "del", "in", "not"})


def defaults(tokens: list[Token]) -> Iterator[Token]:
    """Tokens of the default values in the head of a function."""
    inside = False
    for token in tokens:
        if token.depth == 1 and token.text in (",", "="):
            inside = token.text == "="
        elif token.depth == 0:
            inside = False
        elif inside:
            yield token


def assigned(tokens: list[Token]) -> Iterator[Token]:
    """Tokens of the value that a statement outside of functions assigns; all, if it is none."""
    texts = [token.text for token in tokens if token.depth == 0]
    if tokens[0].text in ("pass", "__annotations__") and "(" not in texts:
        return
    place = next((i for i, t in enumerate(tokens) if t.text == "=" and t.depth == 0), None)
    if place is not None:
        yield from tokens[place + 1 :]
    elif len(texts) < 2 or texts[1] != ":":
        yield from (token for token in tokens if token.kind != "string")


def is_literal(token: Token) -> bool:
    """Whether a token can stand in a value that takes no computing."""
    if token.kind == "name":
        return token.text in _LITERALS or _CONSTANT.fullmatch(token.text) is not None
    return token.kind in ("number", "string") or token.text in _PASSIVE_SIGNS | {"{", "}"}


def active(tokens: list[Token], has_getitem: bool) -> Token | None:
    """The first token that makes a statement more than an assignment."""
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.kind == "sign":
            callee = before is not None and (before.kind == "name" or before.text in (")", "]"))
            if token.text not in _PASSIVE_SIGNS:
                return token
            if token.text == "(" and callee and before is not None and not _is_quiet(before):
                return before
            if token.text == "[" and callee and has_getitem:
                return token  # which may be a call of the archive's own
        elif token.text in _ACTIVE_WORDS:
            return token
    return None


def _is_quiet(token: Token) -> bool:
    """A word in front of a bracket that calls nothing of the archive's."""
    return token.text in _CASTS | {"return", "if", "else", "elif", "is", "and", "or"}
