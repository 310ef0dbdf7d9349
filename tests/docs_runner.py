"""Run the snippets of one Markdown file, in order, in the current folder.

    python tests/docs_runner.py FILE

- `python` blocks share one namespace; `bash` blocks see this environment's commands first on PATH.
- A `python` or `yaml` block that starts with a comment naming a file (`# clip.py`) is saved there.
- Every `yaml` block is checked as a spec.
- `console`, `text`, `json`, `toml` and `svg` blocks are shown, not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = {"python", "bash", "yaml"}
SHOWN = {"console", "text", "json", "toml", "svg"}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
FILE_COMMENT = re.compile(r"^# ([\w./-]+\.\w+)\s*$")


@dataclass(frozen=True)
class Snippet:
    """A fenced block and the line it starts in."""

    language: str
    code: str
    line: int

    @property
    def saved_as(self) -> str:
        """File the block is saved to; empty when it names none."""
        named = FILE_COMMENT.match(self.code.partition("\n")[0])
        return named.group(1) if named and self.language in {"python", "yaml"} else ""


def snippets(markdown: str) -> Iterator[Snippet]:
    """Every fenced block of a Markdown text."""
    for found in FENCE.finditer(markdown):
        yield Snippet(found[1], found[2], markdown[: found.start(2)].count("\n") + 1)


def spec_problems(text: str, name: str) -> list[str]:
    """What is wrong with a spec; nothing about the data files it names."""
    from graphwright.specs.check import check_document
    from graphwright.specs.load import read_text
    from graphwright.specs.schema import shipped_schema

    root, problems = read_text(text, name)
    return [str(p) for p in [*problems, *check_document(root, shipped_schema())[0]]]


def run(path: Path) -> None:
    """Run every snippet; the first that fails ends the process with its place."""
    namespace: dict[str, Any] = {"__name__": "docs"}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for snippet in snippets(path.read_text(encoding="utf-8")):
        place = f"{path.name}:{snippet.line}"
        if snippet.saved_as:
            Path(snippet.saved_as).parent.mkdir(parents=True, exist_ok=True)
            Path(snippet.saved_as).write_text(snippet.code, encoding="utf-8")
        if snippet.language == "yaml" and (problems := spec_problems(snippet.code, place)):
            raise SystemExit("\n".join(problems))
        if snippet.language == "python" and not snippet.saved_as:
            # Blank lines in front make tracebacks show the line in the Markdown file.
            code = "\n" * (snippet.line - 1) + snippet.code
            exec(compile(code, str(path), "exec"), namespace)
        if snippet.language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", snippet.code]
            done = subprocess.run(command, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"{place}: exit status {done.returncode}")


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    run(Path(sys.argv[1]).resolve())
