"""Tokens of TorchScript code, as torch's own lexer (`torch/csrc/jit/frontend/lexer.h`) makes them.

White space, comments and line breaks may stand between any two tokens, so code is judged by its
tokens and never by its text. Whatever torch's printer does not write and the two readers could
disagree about (bytes that are not ASCII, tripled quotes, type comments, backslashes outside of
strings, numbers that run into names) is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_DEPTH = 250
"""Bracket, operators and blocks around one token; torch's parser is recursive and takes more."""

MAX_BRANCHES = 1000
"""`elif` in a class or function at the outermost level: each is nested in the one before."""

MAX_EMPTY_LINES = 1000
"""Lines in a row without a token: torch's lexer calls itself for each."""

_TOKEN = re.compile(
    r"(?P<space>[ \t\r\f\v]+|\#(?!\ type:)[^\n]*)"
    r"|(?P<line>\n)"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?j?(?![\w.]))"
    r"|(?P<name>[A-Za-z_]\w*)"
    r"""|(?P<string>"(?!"")(?:[^"\\\n]|\\[^\n])*"|'(?!'')(?:[^'\\\n]|\\[^\n])*')"""
    r"|(?P<sign>\.\.\.|\*\*=|<<=|>>=|->|\*\*|//|==|!=|<=|>=|<<|>>|[-+*/%|&^]=|[-+*/%@()\[\]:,={}<>.?!&^|~])",
    re.ASCII,
)
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_RESETS = frozenset({",", ":", "="})
"""Behind these, an expression begins anew."""

_GLUED = {"is": "not", "not": "in"}
"""`is not` and `not in` are one token of torch's, whatever letter follows: it reads `not input` as
`not in put`."""

_WORDS = frozenset({"if", "else", "not", "and", "or", "in", "is", "for"})
"""Words inside an expression that nest as operators do."""


class Refused(Exception):
    """Code that is not TorchScript as torch prints it; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Token:
    """A token: `kind` is name, number, string or sign; `depth` counts the brackets around it."""

    kind: str
    text: str
    line: int
    depth: int


@dataclass(frozen=True, slots=True)
class Statement:
    """A logical line: its indentation and its tokens, of which there is at least one."""

    indent: int
    tokens: list[Token]

    @property
    def line(self) -> int:
        return self.tokens[0].line


def statements(code: str) -> list[Statement]:
    """The logical lines of a source file, in order.

    Raises:
        Refused: a character that begins no token, a bracket that closes nothing, or nesting that
            could exhaust the stack of torch's parser.
    """
    reader = _Reader()
    position = 0
    while position < len(code):
        match = _TOKEN.match(code, position)
        if match is None:
            raise Refused(f"characters {code[position : position + 12]!r}", reader.line)
        position = match.end()
        if match.lastgroup == "line":
            reader.end_line(position)
        elif match.lastgroup != "space":
            reader.take(str(match.lastgroup), match.group(), match.start())
    reader.end()
    return reader.found


class _Reader:
    """Puts tokens together into statements, and measures how deep they are nested."""

    def __init__(self) -> None:
        self.found: list[Statement] = []
        self.line = 1
        self._start = 0  # of the line
        self._tokens: list[Token] = []
        self._indent = 0
        self._blocks = [0]
        self._brackets: list[int] = []  # operators in front of each open one
        self._operators = 0
        self._empty = 0
        self._branches = 0

    def take(self, kind: str, text: str, start: int) -> None:
        self._empty = 0
        if not self._tokens:
            self._begin(start - self._start, text)
        elif _is_glued(self._tokens[-1].text, text):
            raise Refused(f"{self._tokens[-1].text} {text}", self.line)
        if text in _CLOSING and kind == "sign":
            if not self._brackets:
                raise Refused(f"a {text!r} that closes nothing", self.line)
            self._operators = self._brackets.pop()
        elif kind == "sign" or text in _WORDS:
            self._operators = 0 if text in _RESETS else self._operators + 1
        self._tokens.append(Token(kind, text, self.line, len(self._brackets)))
        if text in _OPENING and kind == "sign":
            self._brackets.append(self._operators)
            self._operators = 0
        if self._depth() > MAX_DEPTH:
            raise Refused(f"code nested deeper than {MAX_DEPTH} levels", self.line)

    def _begin(self, indent: int, text: str) -> None:
        if indent and not self.found:
            raise Refused("code that begins indented", self.line)
        self._indent = indent
        while self._blocks[-1] > indent:
            self._blocks.pop()
        if self._blocks[-1] < indent:
            self._blocks.append(indent)
        self._branches = self._branches + 1 if text == "elif" else self._branches * (indent > 0)
        if self._branches > MAX_BRANCHES:
            raise Refused(f"more than {MAX_BRANCHES} branches", self.line)

    def _depth(self) -> int:
        return len(self._brackets) + sum(self._brackets) + self._operators + len(self._blocks)

    def end_line(self, position: int) -> None:
        self.line += 1
        self._empty += 1
        if self._empty > MAX_EMPTY_LINES:
            raise Refused("too many empty lines", self.line)
        if not self._brackets:
            self._end_statement()
            self._start = position

    def _end_statement(self) -> None:
        if self._tokens:
            self.found.append(Statement(self._indent, self._tokens))
        self._tokens, self._operators = [], 0

    def end(self) -> None:
        if self._brackets:
            raise Refused("a bracket that is never closed", self.line)
        self._end_statement()


def _is_glued(before: str, text: str) -> bool:
    second = _GLUED.get(before)
    return second is not None and text.startswith(second) and text != second
