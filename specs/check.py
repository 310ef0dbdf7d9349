"""Checks a document against the schema, and finds everything that is wrong in one go.

A misspelt name whose meaning is clear is reported and then taken for what it means. So what stands
below it is checked as well, and one slip gives one problem instead of a trail of others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from graphwright.ir.errors import Problem
from graphwright.specs.between import between_findings
from graphwright.specs.chain import chain_findings
from graphwright.specs.document import Node, Path, problem_at
from graphwright.specs.entries import chain_nodes, entry_id, straighten
from graphwright.specs.part_views import part_views, placed, shell
from graphwright.specs.rules import rule_findings
from graphwright.specs.schema import Schema
from graphwright.specs.translate import Finding, Translator, Violation, is_type

MAX_PROBLEMS = 200
_MAX_ROUNDS = 12


def check_document(root: Node, schema: Schema) -> tuple[list[Problem], Schema]:
    """Everything wrong with a document, and the schema with the passes of other packages in it.

    The tree is changed: what was recognized stands in it under its right name afterwards.
    """
    if root.entries is None:
        return [problem_at(root, (), "a spec is a mapping; start with `version: 1`")], schema
    checker = _Checker(shell(root), schema)
    checker.run()
    problems, schema = checker.problems, checker.schema
    for name, view in part_views(root):
        checker = _Checker(view, schema)
        checker.run()
        found = [placed(problem, name, root) for problem in checker.problems if problem.path]
        problems += [problem for problem in found if problem not in problems]
        schema = checker.schema
    return problems, schema


class _Checker:
    def __init__(self, root: Node, schema: Schema) -> None:
        self.root = root
        self.problems: list[Problem] = []
        self.schema = schema
        self.doubtful: set[Path] = set()

    def run(self) -> None:
        for finding in straighten(self.root, self.schema):
            self._report(finding)
        self._find_own_passes()
        for _ in range(_MAX_ROUNDS):
            findings = self._schema_findings()
            clear = [f for f in findings if self._apply(f)]
            if not clear:
                break
        for finding in findings:
            self._report(finding)
            self.doubtful.add(finding.path)
        self.problems += _more_than_shown(self.problems)
        self.doubtful |= {(p,) for p in _unread_sections(findings)}
        for finding in chain_findings(self.root, self.schema):
            self._report(finding)
        for finding in rule_findings(self.root, self.schema, self._is_sound):
            self._report(finding)
        for finding in between_findings(self.root, self.schema, self._is_sound):
            self._report(finding)

    def _is_sound(self, *path: str | int) -> bool:
        """Whether nothing at, above or below a place is wrong in an unclear way."""
        return not any(
            path[: len(bad)] == bad or bad[: len(path)] == path for bad in self.doubtful if bad
        )

    def _find_own_passes(self) -> None:
        names = [entry_id(node) for node in chain_nodes(self.root, "passes")]
        for index, name in enumerate(names):
            try:
                self.schema = self.schema.with_own_passes([name] if name else [])
            except Exception as error:  # whatever another package does when it is imported
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                message = f"the package that provides {name} cannot be imported: {reason}"
                self._report(Finding(("passes", index), message))

    def _schema_findings(self) -> list[Finding]:
        translator = Translator(self.schema)
        found: list[Finding] = []
        for error in make_validator(self.schema.document).iter_errors(self.root.plain()):
            for finding in translator.translate(Violation.of(error)):
                found.append(finding)
                if len(found) >= MAX_PROBLEMS:
                    return found
        return found

    def _apply(self, finding: Finding) -> bool:
        """Reports a finding whose meaning is clear and puts the tree right."""
        node, holder = self.root.locate(finding.path)
        if finding.rename and holder is not None:
            parent, _ = self.root.locate(finding.path[:-1])
            if parent.entry(finding.rename) is not None:
                return False
            self._report(finding)
            holder.name = finding.rename
            return True
        if finding.has_replacement:
            self._report(finding)
            _put(node, finding.replace)
            return True
        return False

    def _report(self, finding: Finding) -> None:
        problem = problem_at(
            self.root, finding.path, finding.message, finding.suggestion, at_key=finding.at_key
        )
        if problem not in self.problems and len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)


def make_validator(schema: dict[str, Any]) -> Any:
    """A `jsonschema` validator that takes `4.0` for no integer, `1` for no boolean, and no NaN."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    checker = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {name: lambda _, value, name=name: is_type(value, name) for name in ("integer", "number")}
    )
    strict: Any = extend  # has no types
    return strict(Draft202012Validator, type_checker=checker)(schema)


def _put(node: Node, value: Any) -> None:
    """Makes `node` hold a plain value; parts of it get the place of the whole."""

    def part(item: Any) -> Node:
        new = Node(node.file, node.line, node.column)
        _put(new, item)
        return new

    node.value, node.items, node.entries = None, None, None
    if isinstance(value, list):
        node.items = [part(item) for item in value]
    elif isinstance(value, dict):
        node.entries = []
    else:
        node.value = value


def _unread_sections(findings: list[Finding]) -> Iterator[str]:
    """Sections that may be meant by a top-level key that nothing is near."""
    if any(len(f.path) == 1 and f.at_key for f in findings):
        yield from ("calibration", "training", "evaluate", "passes", "lower", "require", "model")


def _more_than_shown(problems: list[Problem]) -> list[Problem]:
    if len(problems) < MAX_PROBLEMS:
        return []
    last = max(problems, key=lambda p: (p.line, p.column))
    message = f"only the first {MAX_PROBLEMS} problems are shown"
    return [Problem(last.file, last.line, last.column, "", message)]
