"""Real text that every machine has: the docstrings of Python's standard library."""

from __future__ import annotations

import random
import sysconfig
from collections import defaultdict
from pathlib import Path

import _paths  # noqa: F401  puts docs/demo on the path
from prepare import paragraphs

PACKAGES = (
    "asyncio", "distutils", "email", "http", "idlelib", "importlib", "logging", "tkinter",
    "unittest", "xml",
)  # fmt: skip
"""Packages with the most prose; a version of Python that lacks one has a class less."""
MOST = 220
"""Paragraphs of a package at most, so that the classes are about equally large."""
TEST_SHARE = 0.24
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

Labelled = list[tuple[str, int]]


def by_package() -> dict[str, list[str]]:
    """Paragraphs of every top-level package or module, in order, each text once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, dict[str, None]] = defaultdict(dict)
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if SKIPPED & set(place.parts):
            continue
        for text in paragraphs(str(place.with_suffix(""))):
            if text not in seen:
                seen.add(text)
                found[place.parts[0].removesuffix(".py")][text] = None
    return {name: list(texts) for name, texts in found.items()}


def classified() -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """Training and test texts with the number of their package, and the packages' names."""
    everything = by_package()
    names = tuple(name for name in PACKAGES if name in everything)
    train: Labelled = []
    test: Labelled = []
    for label, name in enumerate(names):
        texts = everything[name]
        random.Random(label).shuffle(texts)
        texts = texts[:MOST]
        held_out = round(TEST_SHARE * len(texts))
        test += [(text, label) for text in texts[:held_out]]
        train += [(text, label) for text in texts[held_out:]]
    return train, test, names


def running() -> tuple[str, str]:
    """Text to train a language model on, and text of other modules to test it on."""
    everything = by_package()
    names = sorted(everything)
    random.Random(0).shuffle(names)
    held_out = set(names[: len(names) // 5])
    parts: tuple[list[str], list[str]] = ([], [])
    for name in names:
        parts[name in held_out].extend(everything[name])
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])
