"""Texts as token ids: one per sample, or one behind the other and cut into windows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.files.bounds import refuse_special

IGNORED_LABEL = -100
"""Label of a token that no metric counts."""

_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")

TokenRows = list[dict[str, list[int]]]
"""Per text, token ids by input name."""

Tokenize = Callable[[list[str], int | None], TokenRows]
"""Token ids of texts, cut to so many tokens each."""


@dataclass(frozen=True)
class TextSource:
    """Texts and what turns them into token ids.

    Attributes:
        texts: one per sample.
        tokenize: token ids of texts of at most so many tokens each, as the tokenizer cuts them:
            what opens and closes a text ([CLS], [SEP]) stays, and its last tokens go.
        padding: value that each input is filled up with; 0 where none is named.
        whole: the text of the file, for windows.
    """

    texts: list[str]
    tokenize: Tokenize
    padding: dict[str, int]
    whole: str

    def encode(
        self,
        texts: list[str],
        names: Sequence[str],
        limit: int | None,
        fixed: int | None,
        least: int,
    ) -> dict[str, Tensor]:
        """int64 tensors (batch, length) by input name; padded on the right to the longest text."""
        rows = self.tokenize(texts, limit)
        length = fixed or max(least, *(len(row["input_ids"]) for row in rows))
        return _padded(rows, names, length, self.padding)

    def windows(self, length: int, stride: int, where: str) -> Windows:
        """All tokens of the file, in windows.

        Raises:
            ArgumentError: there are fewer than two.
        """
        (row,) = self.tokenize([self.whole], None)
        if len(row["input_ids"]) < 2:
            raise ArgumentError("holds fewer than two tokens", where=where)
        return Windows(row, self.padding, length, stride)


@dataclass(frozen=True)
class Windows:
    """One long text, read in windows of equal length.

    A window begins `stride` tokens behind the one before it; the last ends with the text. So every
    token is predicted once, from all that its window holds before it: labels of tokens that an
    earlier window had already are ignored. A text shorter than a window is one, padded.

    Attributes:
        tokens: of the text, by input name.
        padding: value that each input is filled up with.
        length: tokens of a window.
        stride: tokens between the beginnings of two, at most `length`.

    Source: the sliding window that perplexities of language models are published with (Hugging
    Face, "Perplexity of fixed-length models").
    """

    tokens: dict[str, list[int]]
    padding: dict[str, int]
    length: int
    stride: int

    @cached_property
    def starts(self) -> list[int]:
        """First token of every window."""
        last = max(0, len(self.tokens["input_ids"]) - self.length)
        return [*range(0, last, self.stride), last]

    def take(self, indices: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """Windows, (batch, length) int64 by input name, and their `labels`."""
        rows: TokenRows = []
        for index in indices:
            start = self.starts[index]
            row = {n: v[start : start + self.length] for n, v in self.tokens.items()}
            seen = self.starts[index - 1] + self.length - start if index else 0
            row["labels"] = [IGNORED_LABEL] * seen + row["input_ids"][seen:]
            rows.append(row)
        padding = {**self.padding, "labels": IGNORED_LABEL}
        return _padded(rows, [*names, "labels"], self.length, padding)


def _padded(
    rows: TokenRows, names: Sequence[str], length: int, padding: dict[str, int]
) -> dict[str, Tensor]:
    return {
        name: torch.tensor([r[name] + [padding.get(name, 0)] * (length - len(r[name]))
                            for r in rows])
        for name in names
        if name in rows[0]
    }  # fmt: skip


def open_text(
    path: Path, data: str, tokenizer: str | Path | None, *, chat: bool, asks: bool = False
) -> TextSource:
    """A `.txt` file, one text per line; with `chat`, one conversation per line.

    One that `asks` ends where the model's next answer begins.

    A line of a chat is a JSON list of messages {"role": ..., "content": ...}, or else what a user
    says. The tokenizer's own template makes the text of it.

    Raises:
        ArgumentError: there is no tokenizer, or it has no template, or a package is missing.
    """
    folder = tokenizer_folder(Path(tokenizer) if tokenizer else path.parent, data)
    whole = path.read_text(encoding="utf-8")
    texts = [line for line in whole.splitlines() if line.strip()]
    if not chat:
        tokenize, pad = open_tokenizer(folder, data)
        return TextSource(texts, tokenize, {"input_ids": pad}, whole)
    loaded = _any_tokenizer(folder, data)
    texts = [_conversation(loaded, line, folder, data, asks) for line in texts]
    pad = loaded.pad_token_id or 0
    return TextSource(texts, _calls(loaded, special=False), {"input_ids": pad}, "".join(texts))


def tokenizer_folder(place: Path, data: str) -> Path:
    """The folder of a tokenizer, `place` or the one it is in.

    Raises:
        ArgumentError: it holds none.
    """
    folder = place if place.is_dir() else place.parent
    if not any((folder / name).exists() for name in _FILES):
        raise ArgumentError(
            f"text needs a tokenizer, and {folder} has none",
            where=data,
            fix="Name the folder that holds tokenizer.json under `tokenizer`, or give token ids.",
        )
    return folder


def open_tokenizer(folder: Path, data: str) -> tuple[Tokenize, int]:
    """What makes token ids of texts, of at most so many each; and the id that fills them up.

    Raises:
        ArgumentError: it cannot be read, or a package is missing.
    """
    file = folder / "tokenizer.json"
    if file.exists():
        return _fast_tokenizer(file, data)
    loaded = _any_tokenizer(folder, data)
    return _calls(loaded, special=True), loaded.pad_token_id or 0


def _fast_tokenizer(file: Path, data: str) -> tuple[Tokenize, int]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise _missing("tokenizers", data) from error
    refuse_special(file)
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no type of its own for it
        raise ArgumentError(
            f"the tokenizer {file} cannot be read: {_first_line(error)}", where=data
        ) from error
    loaded.no_padding()

    def tokenize(batch: list[str], limit: int | None) -> TokenRows:
        loaded.no_truncation() if limit is None else loaded.enable_truncation(limit)
        return [
            {"input_ids": e.ids, "attention_mask": e.attention_mask, "token_type_ids": e.type_ids}
            for e in loaded.encode_batch(batch)
        ]

    known = (loaded.token_to_id(token) for token in ("[PAD]", "<pad>", "<|endoftext|>"))
    return tokenize, next((index for index in known if index is not None), 0)


def _any_tokenizer(folder: Path, data: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _missing("transformers", data) from error
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises anything
        raise ArgumentError(
            f"the tokenizer in {folder} cannot be read: {_first_line(error)}", where=data
        ) from error


def _calls(loaded: Any, *, special: bool) -> Tokenize:
    def tokenize(batch: list[str], limit: int | None) -> TokenRows:
        encoded = loaded(
            batch, return_token_type_ids=True, return_attention_mask=True,
            truncation=limit is not None, max_length=limit, add_special_tokens=special,
        )  # fmt: skip
        return [{name: encoded[name][i] for name in encoded} for i in range(len(batch))]

    return tokenize


def _conversation(loaded: Any, line: str, folder: Path, data: str, asks: bool) -> str:
    """A line as the tokenizer's template writes it."""
    if not loaded.chat_template:
        raise ArgumentError(
            f"chat_template: the tokenizer in {folder} has none",
            where=data,
            fix="Leave `chat_template` out, or give the tokenizer of a chat model.",
        )
    messages: Any = [{"role": "user", "content": line}]
    if line.lstrip().startswith("["):
        try:
            messages = json.loads(line)
        except json.JSONDecodeError as error:
            raise ArgumentError(f"a line is no JSON list: {error}", where=data) from error
    try:
        text: str = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # whatever the template does with what it is given
        first = _first_line(error)
        raise ArgumentError(f"the chat template refuses a line: {first}", where=data) from error
    return text


def _missing(package: str, data: str) -> ArgumentError:
    return ArgumentError(
        f"tokenizing text needs {package}", where=data, fix="Install graphwright[hub]."
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
