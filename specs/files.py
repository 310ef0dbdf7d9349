"""Finds specs and the data that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from graphwright.ir.errors import Problem, SpecError
from graphwright.specs.document import Node, problem_at
from graphwright.specs.nearest import nearest

READY_MADE = Path(__file__).parent
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def ready_made_specs() -> dict[str, str]:
    """Names of the ready-made specs, each with the first line of its comment."""
    found = {}
    for path in sorted(READY_MADE.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.stem] = first.lstrip("# ")
    return found


def find_spec(source: str | Path) -> tuple[Path, Path]:
    """The file of a spec, and the folder its relative paths start from."""
    path = Path(source)
    bare = isinstance(source, str) and re.fullmatch(r"[\w-]+", source)
    if bare and _exists(READY_MADE / f"{source}.yaml"):
        return READY_MADE / f"{source}.yaml", Path()
    if _exists(path):
        return path, path.parent
    if bare:
        names = list(ready_made_specs())
        message = f"neither a file nor a ready-made spec; ready-made are {', '.join(names)}"
        raise SpecError([Problem(str(source), 1, 1, "", message, nearest(str(source), names))])
    near = nearest(path.name, _names_in(path.parent, (".yaml", ".yml")))
    raise SpecError(
        [Problem(str(source), 1, 1, "", "no such file", str(path.with_name(near)) if near else "")]
    )


def missing_files(root: Node, folder: Path) -> Iterator[Problem]:
    """Problems with data and tokenizers that a spec names and that do not exist in `folder`."""
    of_parts = [("parts", e.name, "calibration") for e in root.locate(("parts",))[0].entries or ()]
    for section in (("calibration",), ("training",), ("evaluate",), *of_parts):
        for key in ("data", "tokenizer"):
            path = (*section, key)
            node, holder = root.locate(path)
            if holder is None or holder.name != key or not isinstance(node.value, str):
                continue
            text = node.value
            special = key == "data" and (text == "synthetic" or _FUNCTION.fullmatch(text))
            if special or _exists(folder / text):
                continue
            parent = (folder / text).parent
            names = [str(Path(text).with_name(name)) for name in _names_in(parent)]
            meant = nearest(text, ["synthetic", *names] if key == "data" else names)
            message = f"no file or folder {text!r} in {str(folder.resolve().name)!r}"
            yield problem_at(root, path, message, meant)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def _names_in(folder: Path, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Up to 1000 names in a folder; none when it cannot be read."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except (OSError, ValueError):
        return []
    return [n for n in names[:1000] if not suffixes or n.endswith(suffixes)]
