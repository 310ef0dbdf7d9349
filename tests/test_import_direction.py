"""Imports go one way: ir <- passes, backends <- specs <- core. And some packages stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANK = {"ir": 0, "passes": 1, "backends": 1, "specs": 2, "core": 3}
"""A file may import from its own folder and from folders of a lower rank."""

HEAVY = ("torch", "numpy", "networkx", "onnx", "onnxruntime", "onnxscript", "scipy", "transformers")
LIGHT = ("graphwright", "graphwright.specs", "graphwright.ir.errors")
MODULE_NAME = re.compile(r"^graphwright(\.[A-Za-z_]\w*)+$")


def imported_modules(source: str) -> set[str]:
    """Every module a file names: imports at any depth, and full names in strings (lazy ones)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names.update(f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and MODULE_NAME.match(node.value)
            and _is_a_module(node.value)
        ):
            names.add(node.value)
    return names


def _is_a_module(name: str) -> bool:
    """Whether a dotted text names a package folder or a file of core/ (and no key or file name)."""
    part = name.split(".")[1]
    return part in RANK or (ROOT / "core" / f"{part}.py").exists()


def violations(folder: str, source: str) -> list[str]:
    """What a file in `folder` imports and must not."""
    bad = []
    for module in sorted(imported_modules(source)):
        top, _, rest = module.partition(".")
        target = rest.split(".")[0] if rest.split(".")[0] in RANK else "core"
        if module.startswith(".") or top in RANK:
            bad.append(f"{module}: import by the full name, `graphwright...`")
        elif top == "graphwright" and target != folder and RANK[target] >= RANK[folder]:
            bad.append(f"{module}: {folder}/ must not import {target}/")
    return bad


SOURCES = sorted(path for folder in RANK for path in (ROOT / folder).rglob("*.py"))


def test_imports_go_one_way() -> None:
    wrong = {}
    for path in SOURCES:
        place = path.relative_to(ROOT)
        if found := violations(place.parts[0], path.read_text(encoding="utf-8")):
            wrong[str(place)] = found
    assert wrong == {}


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("ir", "import graphwright"),
        ("ir", "from graphwright import Pass"),
        ("ir", "def f():\n    from graphwright.passes.base import Pass"),
        ("passes", "import graphwright.backends.base"),
        ("backends", "from graphwright import passes"),
        ("specs", "load('graphwright.core.pipeline'); import_module('graphwright.job.pipeline')"),
        ("passes", "from .base import Pass"),
        ("core", "from ir.program import Program"),
    ],
)
def test_the_check_sees_a_wrong_import(folder: str, source: str) -> None:
    assert violations(folder, source)


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("core", "from graphwright.specs import load"),
        ("specs", "from graphwright import passes"),
        ("passes", "from graphwright.ir.program import Program"),
        ("ir", "from graphwright.ir import errors\nimport torch"),
    ],
)
def test_the_check_accepts_a_right_import(folder: str, source: str) -> None:
    assert violations(folder, source) == []


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from graphwright.cli import optimize_main\n"
        "sys.argv = ['optimize', '--help']\n"
        "try:\n    optimize_main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("HEAVY []")
