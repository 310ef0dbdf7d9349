"""Questions with choices, one of them right, as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphwright.ir.data.pieces import wanted_samples
from graphwright.ir.data.texts import open_tokenizer, tokenizer_folder
from graphwright.ir.errors import ArgumentError
from graphwright.ir.files.bounds import refuse_special

DEFAULT_BATCH_SIZE = 8

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question in front of each of its choices.

    Attributes:
        pairs: per choice, token ids of what stands in front of it and of the choice itself.
        lengths: characters of each choice.
        answer: index of the right one.
    """

    pairs: tuple[tuple[Ids, Ids], ...]
    lengths: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Questions:
    """Questions of a file.

    Attributes:
        source: where they come from, as the user wrote it.
        rows: the questions.
        batch_size: texts, each a question with a choice, that are run together.
    """

    source: str
    rows: tuple[Question, ...]
    batch_size: int


def load_questions(
    section: Mapping[str, Any], *, root: str | Path = ".", tokenizer: str | Path | None = None
) -> Questions:
    """Opens a `.jsonl` file: per line `question`, `choices` (texts) and `answer` (index from 0).

    A choice stands behind its question and a space. Both are tokenized as one text, and the choice
    is what differs from the tokens of the question alone.

    Args:
        section: `data`, and optionally `samples`, `batch_size`, `tokenizer`.
        root: folder that relative paths start from.
        tokenizer: folder with the tokenizer's files, where the section names none.

    Raises:
        ArgumentError: a line is no such question, or there is no tokenizer.
    """
    data = str(section["data"])
    path = Path(root) / data
    if path.suffix != ".jsonl" or not path.is_file():
        raise ArgumentError(
            "multiple_choice reads a .jsonl file with `question`, `choices` and `answer` per line",
            where=data,
        )
    refuse_special(path)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    count = wanted_samples(data, section.get("samples"), len(lines))
    folder = section.get("tokenizer") or tokenizer or path.parent
    tokenize, _ = open_tokenizer(tokenizer_folder(Path(folder), data), data)

    def ids(text: str) -> Ids:
        (row,) = tokenize([text], None)
        return tuple(row["input_ids"])

    rows = []
    for index, line in enumerate(lines[:count]):
        question, choices, answer = _parsed(line, f"{data}, line {index + 1}")
        alone = ids(question)
        pairs = tuple(_split(alone, ids(f"{question} {choice}")) for choice in choices)
        if any(not front or not own for front, own in pairs):
            raise ArgumentError(
                "a question or a choice has no tokens", where=f"{data}, line {index + 1}"
            )
        rows.append(Question(pairs, tuple(map(len, choices)), answer))
    return Questions(data, tuple(rows), section.get("batch_size") or DEFAULT_BATCH_SIZE)


def _parsed(line: str, where: str) -> tuple[str, list[str], int]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"is no JSON: {error}", where=where) from error
    row = row if isinstance(row, dict) else {}
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    texts = [c for c in choices if isinstance(c, str) and c] if isinstance(choices, list) else []
    if not isinstance(question, str) or len(texts) < 2 or texts != choices:
        raise ArgumentError(
            "needs `question` (text) and `choices` (two texts or more)", where=where
        )
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise ArgumentError(
            f"`answer` is {answer!r}, and has to be the number of a choice, 0 to "
            f"{len(texts) - 1}", where=where,
        )  # fmt: skip
    return question, texts, answer


def _split(alone: Ids, whole: Ids) -> tuple[Ids, Ids]:
    """The tokens of a question with a choice, cut where they cease to be the question's."""
    same = next(
        (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone)
    )
    return whole[:same], whole[same:]
