"""The text interface of an artifact: files of the tokenizer, beside the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from graphwright.ir.atomic import replacing, write_atomically
from graphwright.ir.causes import innermost
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.text import CONFIG, FILES, TOKENIZER, read_object

DEFAULTS = "generation_config.json"
"""The model's own defaults for other clients; ours are in the record."""

OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "source.spm")
"""Files of tokenizers that transformers reads and turns into tokenizer.json."""


def write_text_files(
    source: Path | None, folder: Path, context_length: int | None
) -> tuple[list[Path], list[str]]:
    """Copies a model's tokenizer, chat template and defaults of generation beside an artifact.

    `model_max_length` becomes the context length: other programs cut texts there, and transformers
    often leaves a number there that means nothing.

    Args:
        source: the model's folder; None where it is not known.
        folder: of the artifact.
        context_length: of the model; None where it has no bound.

    Returns:
        The files that were written, and notes: that there is no text interface, and why.
    """
    if source is None or not source.is_dir():
        where = "its folder is not known" if source is None else f"{source} is gone"
        return [], [f"no text interface: the tokenizer was not found ({where})"]
    written = []
    if (source / DEFAULTS).is_file():
        written.append(_copied(source / DEFAULTS, folder))
    if (source / TOKENIZER).is_file():
        return written + _tokenizer_files(source, folder, context_length), []
    if not any((source / name).is_file() for name in OTHER_TOKENIZERS):
        return written, [f"no text interface: {source} holds no tokenizer"]
    try:
        from transformers import AutoTokenizer

        with TemporaryDirectory() as made:
            AutoTokenizer.from_pretrained(
                str(source), local_files_only=True, trust_remote_code=False
            ).save_pretrained(made)
            if (Path(made) / TOKENIZER).is_file():
                return written + _tokenizer_files(Path(made), folder, context_length), []
        reason = "transformers makes no tokenizer.json of it"
    except Exception as error:  # the library raises anything, or is not installed
        reason = innermost(error)
    return written, [f"no text interface: the tokenizer in {source} cannot be converted: {reason}"]


def with_tokenizer(record: Generation, folder: Path) -> Generation:
    """The record of an artifact that lies in a folder, and its tokenizer with it."""
    return replace(record, tokenizer=str(folder) if (folder / TOKENIZER).is_file() else None)


def _tokenizer_files(source: Path, folder: Path, context_length: int | None) -> list[Path]:
    written = [_copied(source / n, folder) for n in FILES if (source / n).is_file() and n != CONFIG]
    config = read_object(source / CONFIG)
    if context_length is not None:
        config["model_max_length"] = context_length
    write_json(folder / CONFIG, config)
    return [*written, folder / CONFIG]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object the same way every time."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def _copied(source: Path, folder: Path) -> Path:
    target = folder / source.name
    if target.exists() and target.samefile(source):
        return target
    with source.open("rb") as old, replacing(target) as new:
        shutil.copyfileobj(old, new, 1 << 20)
    return target
