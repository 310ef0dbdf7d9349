"""Chat templates: Jinja programs that come with a model, run where they can reach nothing.

A template is another person's code. It runs in Jinja's immutable sandbox, sees messages and the
texts of special tokens, and is stopped when its text or a number in it grows out of proportion.
The names that templates may use (`raise_exception`, `strftime_now`, the filter `tojson`, loop
controls, `{% generation %}`) are those that transformers offers them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ArgumentError, ModelError

LONGEST = 16 * 2**20
"""Characters of a rendered conversation."""


class ChatTemplate:
    """A compiled template.

    Attributes:
        source: its text.
        where: the file it is of.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        self.source = source
        self.where = where
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )  # fmt: skip
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_now, **tokens)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(
                "the chat template is no valid template", where=where, details=(innermost(error),)
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation, up to where the model's next answer begins.

        Raises:
            ArgumentError: a message without role or content, or one that the template refuses.
            ModelError: the template does what it may not, or fails.
        """
        for message in messages:
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise ArgumentError(f"a message needs `role` and `content`, and is {message!r}")
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(
                messages=[dict(m) for m in messages], add_generation_prompt=True,
                tools=None, documents=None,
            ):  # fmt: skip
                parts.append(part)
                length += len(part)
                if length > LONGEST:
                    raise jinja2.exceptions.SecurityError(f"it wrote over {LONGEST} characters")
        except _Refused as error:
            raise ArgumentError(
                f"the chat template refuses this conversation: {error}", where=self.where
            ) from None
        except Exception as error:  # a template fails in any way that Python can
            raise ModelError(
                "the chat template fails", where=self.where, details=(innermost(error),)
            ) from None
        return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which repetition and powers make nothing of any size."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > 10**6 or abs(right) > 64):
            raise jinja2.exceptions.SecurityError("a power that is too large")
        sizes = [len(v) for v in (left, right) if hasattr(v, "__len__")]
        times = [v for v in (left, right) if isinstance(v, int)]
        if operator == "*" and sizes and times and sizes[0] * times[0] > LONGEST:
            raise jinja2.exceptions.SecurityError("a text or list that is too long")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}`: marks an answer for training, and changes nothing here."""

    tags = {"generation"}  # noqa: RUF012  (as the base class has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refused(Exception):
    """What a template says with `raise_exception`."""


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """As transformers': readable characters, no HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
