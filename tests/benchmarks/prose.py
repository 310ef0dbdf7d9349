"""English that every machine has: Python's own docstrings, and READMEs of installed packages.

What is held out comes from other modules and other packages than what passes may calibrate on.
"""

from __future__ import annotations

import random
from importlib.metadata import distributions
from pathlib import Path

from benchmarks import docstrings

HELD_OUT = 5
"""One package in so many is held out."""


def readmes() -> dict[str, list[str]]:
    """Paragraphs of prose in the README of every installed package, by the package's name."""
    found: dict[str, list[str]] = {}
    for package in distributions():
        text = package.metadata.get_payload() or package.metadata.get("Description", "")
        blocks = (" ".join(block.split()) for block in str(text).split("\n\n"))
        if prose := [block for block in blocks if _is_prose(block)]:
            found[str(package.metadata["Name"]).lower()] = prose
    return {name: found[name] for name in sorted(found)}


def written(folder: Path, words: int = 14_000) -> tuple[Path, Path]:
    """Writes `calibration.txt` and `held_out.txt`, a paragraph per line; their paths.

    Args:
        folder: where to; made if it is missing.
        words: of the held-out text, half of them from READMEs.
    """
    names = list(packages := readmes())
    random.Random(0).shuffle(names)
    cut = len(names) // HELD_OUT
    learn, test = docstrings.running()
    parts = {
        "held_out.txt": (test.split("\n\n"), [p for n in names[:cut] for p in packages[n]]),
        "calibration.txt": (learn.split("\n\n"), [p for n in names[cut:] for p in packages[n]]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (own, others) in parts.items():
        most = words // 2 if name == "held_out.txt" else 10 * words
        lines = [*_first(own, most), *_first(others, most)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "calibration.txt", folder / "held_out.txt"


def _is_prose(block: str) -> bool:
    plain = not any(mark in block for mark in ("```", "|", "<", "::", "](", ">>>", "http"))
    return plain and block[:1].isupper() and block.endswith(".") and len(block.split()) >= 12


def _first(paragraphs: list[str], words: int) -> list[str]:
    """Paragraphs from the start, up to so many words."""
    taken, count = [], 0
    for paragraph in dict.fromkeys(paragraphs):
        if count >= words:
            break
        taken.append(paragraph)
        count += len(paragraph.split())
    return taken
