"""Keys of the steps of a chain: digests of everything that the result of a step depends on."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.job.checkpoint import chain_key, file_sha256
from graphwright.job.environment import environment, own_code
from graphwright.specs.schema import shipped_schema

if TYPE_CHECKING:
    from graphwright.ir.data.batches import Batches
    from graphwright.job.run import Run
    from graphwright.specs.sections import CalibrationSection

_FUNCTION = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")


def chain_keys(
    run: Run, base: str, calibration: Batches | None, training: Batches | None
) -> list[str]:
    """One key per pass; each depends on those before it.

    Args:
        run: its spec names passes, options, seed and data.
        base: digest of the program before the first pass.
        calibration, training: the data that the spec names.
    """
    if not run.spec.passes:
        return []
    folder = Path(run.spec.folder)
    surroundings = {
        "seed": run.spec.seed,
        "device": run.settings.device,
        "environment": environment(),
        "code": own_code(),
        "calibration": _of_data(folder, run.spec.calibration, calibration),
        "training": _of_data(folder, run.spec.training, training),
    }
    keys, key = [], base
    for index, call in enumerate(run.spec.passes):
        read = {k: v for k, v in call.options.items() if not _is_written(call.id, k)}
        key = chain_key(
            key, id=call.id, options=call.options, index=index,
            named=contents_of(folder, read), **surroundings,
        )  # fmt: skip
        keys.append(key)
    return keys


def contents_of(folder: Path, options: Any) -> dict[str, str]:
    """Digests of the files, folders and modules that texts in plain data name, by their names."""
    named = {name: _of_named(folder, name) for name in sorted(set(_texts(options)))}
    return {name: found for name, found in named.items() if found}


def _of_data(folder: Path, section: CalibrationSection | None, batches: Batches | None) -> str:
    """Data is an input like any other: other contents make another run.

    Files are read as they are. What a function gives, and what becomes of texts, is only seen in
    the batches, so they are read once for this.
    """
    if section is None:
        return ""
    settings = section.model_dump(mode="json")
    if section.source is not None or section.data is None:  # made of the model: see the batches
        return chain_key("" if batches is None else _of_batches(batches), **settings)
    path = folder / section.data
    if section.data == "synthetic":  # follows from the seed and the program
        return chain_key("", **settings)
    if path.exists() and path.suffix != ".txt":
        return chain_key(_of_path(path), **settings)
    return chain_key("" if batches is None else _of_batches(batches), **settings)


def _of_path(path: Path) -> str:
    """Digest of a file, or of all files below a folder with their names."""
    if path.is_file():
        return file_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return chain_key("", files=[(str(f.relative_to(path)), file_sha256(f)) for f in files])


def _of_batches(batches: Batches) -> str:
    from graphwright.ir.graph.digest import tensor_digest

    total = hashlib.sha256()
    for inputs, labels in batches.labelled():
        for name, tensor in sorted(inputs.items()):
            total.update(f"{name} {tensor_digest(tensor)}\n".encode())
        total.update(("" if labels is None else tensor_digest(labels)).encode())
        total.update(b"\n")
    return total.hexdigest()


def _is_written(name: str, option: str) -> bool:
    """Whether the option of a pass names a file that the pass itself writes."""
    schema = shipped_schema()
    given = schema.options(name).get(option, {})
    forms = map(schema.resolve, (given, *given.get("anyOf", ())))
    return any(form.get("x-graphwright", {}).get("is") == "output file" for form in forms)


def _texts(options: Any) -> Iterator[str]:
    """All texts in the options of a pass."""
    if isinstance(options, str):
        yield options
    elif isinstance(options, dict | list | tuple):
        for part in options.values() if isinstance(options, dict) else options:
            yield from _texts(part)


def _of_named(folder: Path, text: str) -> str:
    """Digest of the file or the folder that an option names, or of the module of a function; else
    empty."""
    named = _FUNCTION.fullmatch(text)
    if named is not None:
        return _of_module(folder, named.group(1))
    path = folder / text
    try:
        return _of_path(path) if text and path.exists() else ""
    except (OSError, ValueError):  # a text that is no path
        return ""


def _of_module(folder: Path, module: str) -> str:
    """Digest of the source of a module, which is not imported for this."""
    file = folder / Path(*module.split(".")).with_suffix(".py")
    if file.is_file():
        return file_sha256(file)
    try:
        found = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return ""
    origin = None if found is None or found.origin is None else Path(found.origin)
    if origin is None or not origin.is_file():
        return ""
    inner = origin.parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return file_sha256(inner if inner.is_file() else origin)
