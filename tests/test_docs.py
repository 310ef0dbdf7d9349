"""The docs are true: snippets run, links lead somewhere, generated pages are current."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def _load(path: Path) -> ModuleType:
    """A script of the checkout as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


runner = _load(ROOT / "tests" / "docs_runner.py")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _languages(page: Path) -> list[str]:
    return [s.language for s in runner.snippets(page.read_text(encoding="utf-8"))]


RUNNABLE = [page for page in PAGES if {"python", "bash"} & set(_languages(page))]
name_of = {page: str(page.relative_to(ROOT)) for page in PAGES}.__getitem__


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_snippets_run(page: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docs_runner.py"), str(page)],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("page", [p for p in PAGES if p not in RUNNABLE], ids=name_of)
def test_specs_in_pages_are_valid(page: Path) -> None:
    snippets = [s for s in runner.snippets(page.read_text(encoding="utf-8"))]
    problems = [
        problem
        for snippet in snippets
        if snippet.language == "yaml"
        for problem in runner.spec_problems(snippet.code, f"{page.name}:{snippet.line}")
    ]
    assert problems == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_its_language(page: Path) -> None:
    assert set(_languages(page)) <= runner.RUN | runner.SHOWN


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    local = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    assert [link for link in local if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(
        r"\bmake ([a-z]+)\b`|^make ([a-z]+)$", page.read_text(encoding="utf-8"), re.M
    )
    targets = {first or second for first, second in named}
    assert {t for t in targets if not re.search(rf"^{t}:", makefile, re.M)} == set()


def test_generated_pages_are_current() -> None:
    generated = _load(ROOT / "docs" / "generate.py").outputs()
    stale = [p for p, text in generated.items() if not p.exists() or p.read_text("utf-8") != text]
    assert [str(path.relative_to(ROOT)) for path in stale] == [], "run `make docs`"


def test_no_page_is_left_of_a_pass_that_is_gone() -> None:
    generated = _load(ROOT / "docs" / "generate.py").outputs()
    assert set((ROOT / "docs" / "passes").glob("*.md")) <= set(generated)


def test_readme_lists_every_family_of_passes() -> None:
    named = re.findall(r"^- \*\*(\w+)\*\* ", (ROOT / "README.md").read_text("utf-8"), re.M)
    pages = {p.stem.partition(".")[0] for p in (ROOT / "docs" / "passes").glob("*.*.md")}
    assert sorted(named) == sorted(pages)


def test_demo_spec_is_valid() -> None:
    path = ROOT / "docs" / "demo" / "minilm-int8.yaml"
    assert runner.spec_problems(path.read_text(encoding="utf-8"), path.name) == []


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("```python\nx = 1\n```\n", ["python"]),
        ("a\n```yaml\nversion: 1\n```\nb\n```bash\nls\n```\n", ["yaml", "bash"]),
        ("no code", []),
    ],
)
def test_runner_finds_blocks(text: str, languages: list[str]) -> None:
    assert [snippet.language for snippet in runner.snippets(text)] == languages


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert 1 == 2\n```\n",
        "```bash\nfalse\ntrue\n```\n",
        "```yaml\nversion: 1\npasses:\n  - no.such_pass\n```\n",
    ],
)
def test_runner_fails_on_a_wrong_snippet(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    command = [sys.executable, str(ROOT / "tests" / "docs_runner.py"), str(page)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "page.md" in done.stderr
