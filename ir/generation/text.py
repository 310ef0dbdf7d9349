"""A model's tokenizer and the files it comes in; needs the `tokenizers` library, not transformers.

The files are those that transformers writes beside a model: `tokenizer.json` is the tokenizer,
`tokenizer_config.json` and `special_tokens_map.json` name its special tokens, and the chat
template is `chat_template.jinja` or a key of the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.generation.chat_template import ChatTemplate

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, CONFIG, "special_tokens_map.json", TEMPLATE)
"""What an artifact takes over of a model's folder for its text interface."""

LARGEST = 256 * 2**20
"""Bytes of a file that is read; the largest tokenizers of today have some 30 MB."""

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Texts to token ids and back, and conversations to token ids.

    Attributes:
        folder: with the files.
        config: of tokenizer_config.json, with the special tokens of special_tokens_map.json.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ArgumentError(
                "texts need the `tokenizers` library, which is not installed",
                fix="Install it (`pip install tokenizers`), or give token ids.",
            ) from None
        self.folder = folder
        text = _read(folder / TOKENIZER)
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise ModelError(
                "the tokenizer cannot be read", where=str(folder / TOKENIZER),
                details=(innermost(error),),
            ) from None  # fmt: skip
        self._inner.no_padding()
        self._inner.no_truncation()
        named = read_object(folder / "special_tokens_map.json")
        self.config = {**named, **read_object(folder / CONFIG)}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; special tokens in it are taken for such.
            special: whether the tokens that the model expects around a text (as a first `<s>`) go
                around it; a rendered chat template has them already.
        """
        return list(self._inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; special tokens are left out unless `special`."""
        return str(self._inner.decode(list(ids), skip_special_tokens=not special))

    def stream(self) -> TextStream:
        """A decoder of one sequence, token by token."""
        return TextStream(self)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The model's own chat template; None for a model without one.

        Raises:
            ModelError: it is no valid template.
        """
        file = self.folder / TEMPLATE
        source = _read(file) if file.is_file() else self.config.get("chat_template")
        if source is None:
            return None
        if isinstance(source, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            if not isinstance(named.get("default"), str):
                raise ModelError(
                    f"its chat templates are {sorted(map(str, named))}, and none is `default`",
                    where=str(self.folder / CONFIG),
                )
            source = named["default"]
        where = str(file if file.is_file() else self.folder / CONFIG)
        return ChatTemplate(str(source), self.special_tokens, where)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of special tokens by role (`bos_token`), as templates read them."""
        found = {}
        for role, value in self.config.items():
            text = value.get("content") if isinstance(value, Mapping) else value
            if role.endswith("_token") and isinstance(text, str):
                found[role] = text
        return found

    def special_id(self, text: str) -> int | None:
        """The id of a special token by its text; None where no special token reads so."""
        found = self._inner.get_added_tokens_decoder().items()
        return next((i for i, token in found if token.special and token.content == text), None)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the model's next answer begins.

        Args:
            messages: each with `role` (`system`, `user`, `assistant`) and `content`.

        Raises:
            ArgumentError: the model has no chat template, or it refuses the messages.
        """
        if self.template is None:
            raise ArgumentError(
                "this model has no chat template: it continues texts and answers nobody",
                where=str(self.folder),
                fix="Give it a text, or a model that was trained to chat.",
            )
        return self.encode(self.template.render(messages), special=False)


class TextStream:
    """Text of a growing sequence: every `put` gives what its token adds, whole characters only.

    A token may end within a character, and what a token reads as can depend on the one in front of
    it. So the last tokens are decoded together with those behind them, and a text is given out once
    it does not end within a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # of the tokens that are decoded together
        self._given = 0  # tokens whose text was given out

    def put(self, token: int) -> str:
        """The text that becomes known with one more token; often empty."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._start : self._given])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return text[len(before) :]

    def rest(self) -> str:
        """What is held back at the end of the sequence: an unfinished character."""
        before = self._tokenizer.decode(self._ids[self._start : self._given])
        text = self._tokenizer.decode(self._ids[self._start :])
        self._start = self._given = len(self._ids)
        return text[len(before) :]


def open_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None where it holds no tokenizer.json."""
    return Tokenizer(folder) if (folder / TOKENIZER).is_file() else None


def _read(path: Path) -> str:
    if path.stat().st_size > LARGEST:
        raise ModelError(f"the file is larger than {LARGEST >> 20} MB", where=str(path))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelError("the file is no text in UTF-8", where=str(path)) from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a file; empty where there is none.

    Raises:
        ModelError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelError("the file is no JSON", where=str(path), details=(str(error),)) from None
    if not isinstance(value, dict):
        raise ModelError("the file holds no JSON object", where=str(path))
    return value
