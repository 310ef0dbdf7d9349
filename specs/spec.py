"""The spec as a typed object: read, checked, and ready for the pipeline."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import Problem, SpecError
from graphwright.specs.check import check_document
from graphwright.specs.document import Node, problem_at
from graphwright.specs.document import Path as NodePath
from graphwright.specs.emit import to_yaml
from graphwright.specs.entries import chain_nodes, entry_id
from graphwright.specs.files import find_spec, missing_files
from graphwright.specs.load import read_file, read_text
from graphwright.specs.overrides import apply_override
from graphwright.specs.part_views import part_views
from graphwright.specs.schema import Schema, shipped_schema

if TYPE_CHECKING:
    from graphwright.specs.search import SearchSection
    from graphwright.specs.sections import (
        CalibrationSection,
        EvaluateSection,
        LockSection,
        ModelSection,
        RequireSection,
        TrainingSection,
    )
    from graphwright.specs.space import Picks, Space


@dataclass(frozen=True)
class PassCall:
    """One entry of `passes`: the id, the options as written (no defaults), and its line."""

    id: str
    options: dict[str, Any]
    line: int


@dataclass(frozen=True)
class BackendCall:
    """One entry of `lower`: the backend, the options as written (no defaults), and its line."""

    id: str
    options: dict[str, Any]
    line: int


@dataclass(frozen=True)
class ExportCall:
    """One entry of `export`: the format, the options as written (no defaults), and its line."""

    id: str
    options: dict[str, Any]
    line: int


@dataclass(frozen=True)
class Spec:
    """A checked spec.

    Attributes:
        name: the file or the ready-made spec it was read from.
        folder: where relative paths in it start; for a ready-made spec the working folder.
        model: inputs, factory and its arguments.
        calibration: data that passes may look at, or None.
        training: data that passes learn from, or None.
        evaluate: data and metric of the comparison, or None.
        require: bounds; each may be None.
        seed: seed of the run.
        passes: passes in order.
        parts: of a model that is several programs, by name the spec of a part that has sections of
            its own: this one with those in their place.
        lower: backends.
        export: formats of checkpoints to write.
        search: where the spec may vary, or None where there is nothing to search.
        lock: facts of the run that wrote it, when it is a lock file.
    """

    name: str
    folder: Path
    model: ModelSection
    calibration: CalibrationSection | None
    training: TrainingSection | None
    evaluate: EvaluateSection | None
    require: RequireSection
    seed: int
    passes: tuple[PassCall, ...]
    lower: tuple[BackendCall, ...]
    export: tuple[ExportCall, ...]
    search: SearchSection | None
    lock: LockSection | None
    document: Node = field(repr=False, compare=False)
    schema: Schema = field(repr=False, compare=False)
    parts: Mapping[str, Spec] = field(default_factory=dict)

    @property
    def chains(self) -> tuple[tuple[PassCall, ...], ...]:
        """The passes of the spec, and those of every part that has its own."""
        return (self.passes, *(part.passes for part in self.parts.values()))

    def problem(self, path: NodePath, message: str, suggestion: str = "") -> Problem:
        """A problem with one value of the spec, at its place in the file.

        Args:
            path: keys and indices, as `("passes", 1, "prune.zig", "sparsity")`.
            message: what is wrong with it.
            suggestion: what to write instead.
        """
        return problem_at(self.document, path, message, suggestion)


def load_spec(
    source: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True
) -> Spec:
    """Reads and checks a spec.

    Args:
        source: path of a YAML file, or the name of a ready-made spec.
        overrides: `KEY=VALUE` texts, applied in order; see `graphwright.specs.overrides`.
        check_files: whether data that the spec names has to exist.

    Raises:
        SpecError: everything that is wrong with it, in file order.
    """
    path, folder = find_spec(source)
    root, problems = read_file(path)
    return _build(root, problems, str(source), folder, overrides, check_files)


def parse_spec(
    text: str,
    *,
    name: str = "spec",
    folder: str | Path = ".",
    overrides: Sequence[str] = (),
    check_files: bool = True,
) -> Spec:
    """The same as `load_spec` for a spec that is already in memory."""
    root, problems = read_text(text, name)
    return _build(root, problems, name, Path(folder), overrides, check_files)


def _build(
    root: Node,
    problems: list[Problem],
    name: str,
    folder: Path,
    overrides: Sequence[str],
    check_files: bool,
) -> Spec:
    problems = list(problems)
    for override in overrides if root.is_mapping else ():
        try:
            apply_override(root, override)
        except SpecError as error:
            problems += error.problems
    found, schema = check_document(root, shipped_schema())
    problems += found
    lock = root.locate(("lock", "folder"))[0].value if root.entry("lock") else None
    if isinstance(lock, str):
        folder = folder / lock
    if check_files and root.is_mapping:
        said = {(p.line, p.column) for p in problems}
        missing = missing_files(root, folder)
        problems += [p for p in missing if (p.line, p.column) not in said]
    if not problems and root.entry("search") is not None:
        from graphwright.specs.alternatives import search_problems

        files = partial(missing_files, folder=folder) if check_files else None
        problems += search_problems(root, schema, files)
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))
    return _typed(root, name, folder, schema)


def _typed(root: Node, name: str, folder: Path, schema: Schema) -> Spec:
    from graphwright.specs import search, sections

    document = root.plain()

    def section(key: str, cls: Any, absent: Any = None) -> Any:
        return cls.model_validate_json(json.dumps(document[key])) if key in document else absent

    def calls(key: str, cls: Any) -> tuple[Any, ...]:
        return tuple(
            cls(entry_id(node), (node.plain()[entry_id(node)] or {}) if node.entries else {},
                node.line)
            for node in chain_nodes(root, key)
        )  # fmt: skip

    return Spec(
        name=name,
        folder=folder,
        model=section("model", sections.ModelSection, sections.ModelSection()),
        calibration=section("calibration", sections.CalibrationSection),
        training=section("training", sections.TrainingSection),
        evaluate=section("evaluate", sections.EvaluateSection),
        require=section("require", sections.RequireSection, sections.RequireSection()),
        seed=document.get("seed", 0),
        passes=calls("passes", PassCall),
        lower=calls("lower", BackendCall),
        export=calls("export", ExportCall),
        search=section("search", search.SearchSection),
        lock=section("lock", sections.LockSection),
        document=root,
        schema=schema,
        parts={part: _typed(view, name, folder, schema) for part, view in part_views(root)},
    )


def candidate_spec(spec: Spec, space: Space, picks: Picks) -> Spec:
    """One candidate of a search: the spec with these values, and without the section `search`.

    Raises:
        SpecError: the values do not go together.
    """
    document = space.candidate(picks)
    problems, schema = check_document(document, spec.schema)
    if problems:
        raise SpecError(problems)
    return _typed(document, spec.name, spec.folder, schema)


def resolve(spec: Spec) -> dict[str, Any]:
    """The spec as plain data with every default filled in; without the lock section."""

    def call(item: PassCall | BackendCall | ExportCall) -> Any:
        options = spec.schema.filled(item.id, item.options)
        ordered = {k: options[k] for k in spec.schema.options(item.id) if k in options}
        return {item.id: ordered} if ordered else item.id

    def section(model: Any) -> Any:
        return model.model_dump(mode="json", exclude_none=True)

    def of_part(part: Spec) -> Any:
        own: dict[str, Any] = {"passes": [call(item) for item in part.passes]}
        if part.calibration not in (None, spec.calibration):
            own["calibration"] = section(part.calibration.filled())
        return own

    document: dict[str, Any] = {"version": 1, "model": section(spec.model)}
    if spec.calibration is not None:
        document["calibration"] = section(spec.calibration.filled())
    if spec.training is not None:
        document["training"] = section(spec.training.filled())
    if spec.evaluate is not None:
        document["evaluate"] = section(spec.evaluate)
    document["require"] = section(spec.require)
    document["seed"] = spec.seed
    document["passes"] = [call(item) for item in spec.passes]
    if spec.parts:
        document["parts"] = {name: of_part(part) for name, part in spec.parts.items()}
    document["lower"] = [call(item) for item in spec.lower]
    if spec.export:
        document["export"] = [call(item) for item in spec.export]
    if spec.search is not None:
        document["search"] = section(spec.search)
    return document


def write_lock(
    spec: Spec, extra: Mapping[str, Any], path: str | Path, *, home: str | Path | None = None
) -> None:
    """Writes `spec.lock.yaml`; the same spec and facts give the same bytes.

    Args:
        spec: what was compiled.
        extra: plain facts for the `lock` section: versions, thread count, digests.
        path: the file.
        home: folder the file will be read from, when it is moved later; relative paths in the
            spec keep their meaning there.
    """
    path = Path(path)
    home = Path(home or path.parent).resolve()
    folder = Path(os.path.relpath(spec.folder.resolve(), home)).as_posix()
    lock = {"folder": folder, **{key: extra[key] for key in sorted(extra)}}
    header = (
        "# Written by graphwright: the spec as it was compiled. Compiling from it repeats it.\n"
    )
    path.write_text(header + to_yaml({**resolve(spec), "lock": lock}), encoding="utf-8")
