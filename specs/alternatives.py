"""Checks the section `search`: its paths, its numbers, and every alternative, in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from graphwright.ir.errors import Problem, SpecError
from graphwright.specs.check import check_document
from graphwright.specs.document import Node, show
from graphwright.specs.nearest import nearest
from graphwright.specs.schema import Schema
from graphwright.specs.space import SEARCHED, Choice, Picks, Space

Files = Callable[[Node], Iterable[Problem]]
"""Problems with the files that a document names."""


def search_problems(root: Node, schema: Schema, files: Files | None = None) -> list[Problem]:
    """Everything wrong with the search of a document that is right in all other respects.

    Every alternative is checked with the rest of the spec as it is written, and a value below an
    entry that has alternatives in each of them.

    Args:
        root: the document.
        schema: what is valid.
        files: finds problems with the files that a candidate names.
    """
    space = Space.of(root)
    problems = list(_of_measures(root, space))
    for choice in space.choices:
        if (problem := _of_path(choice)) is not None:
            problems.append(problem)
            continue
        problems += _of_choice(space, choice, schema, files or (lambda _: ()))
    return list(dict.fromkeys(problems))


def _at(node: Node, choice: Choice | None, message: str, suggestion: str = "") -> Problem:
    path = "search.objective" if choice is None else f"search.space[{choice.path}]"
    return Problem(node.file, node.line, node.column, path, message, suggestion)


def _of_measures(root: Node, space: Space) -> Iterator[Problem]:
    """Objectives that nothing measures, and ranges that a grid cannot list."""
    section = root.plain()["search"]
    objective = root.locate(("search", "objective"))[0]
    for measure, needed in (("drop", "evaluate"), ("latency_ms", "lower"), ("speedup", "lower")):
        if measure in section["objective"] and not root.plain().get(needed):
            message = f"nothing measures {measure}: there is no '{needed}' section"
            yield _at(objective, None, message)
    if section.get("strategy") != "grid":
        return
    for choice in space.choices:
        if choice.range is not None and choice.range.listed() is None:
            yield _at(choice.node, choice, "a grid needs `step`, or `choices`")


def _of_path(choice: Choice) -> Problem | None:
    section = choice.elements[0] if choice.elements else ""
    if section in SEARCHED:
        return None
    listed = ", ".join(SEARCHED)
    message = f"{show(section)} cannot vary; a search tries values in {listed}"
    return _at(choice.node, choice, message, nearest(section, SEARCHED))


def _of_choice(space: Space, choice: Choice, schema: Schema, files: Files) -> Iterator[Problem]:
    """Problems of each value, in the first context that shows one; none of a context's own."""

    def check(picks: Picks) -> list[Problem]:
        document = space.candidate(picks)
        return [*check_document(document, schema)[0], *files(document)]

    try:
        contexts = [c for c in space.contexts(choice) if space.is_asked(choice, c) and not check(c)]
        if not contexts:
            yield _at(choice.node, choice, "no candidate has this place")
        for value in choice.ends():
            checked = ((context, check((*context, (choice, value)))) for context in contexts)
            context, found = next(((c, f) for c, f in checked if f), ((), []))
            yield from (_placed(problem, choice, value, context) for problem in found)
    except SpecError as error:  # the path leads nowhere
        for problem in error.problems:
            yield _at(choice.node, choice, problem.message, problem.suggestion)


def _placed(problem: Problem, choice: Choice, value: Node, context: Picks) -> Problem:
    """The problem at the value that causes it, with what else was picked."""
    own = problem.line, problem.column
    inside = value is not None and own in set(_places(value))
    line, column = own if inside else (value.line, value.column)
    has_path = problem.path and not inside
    message = f"{problem.path}: {problem.message}" if has_path else problem.message
    for other, picked in context:
        message += f" (where {other.path} is {show(picked.plain())})"
    path = f"search.space[{choice.path}]"
    return Problem(value.file, line, column, path, message, problem.suggestion)


def _places(node: Node) -> Iterator[tuple[int, int]]:
    yield node.line, node.column
    for item in node.items or ():
        yield from _places(item)
    for entry in node.entries or ():
        yield entry.line, entry.column
        yield from _places(entry.node)


def alternatives(space: Space) -> Iterator[Picks]:
    """Every value of every choice once, the ends of a range, each in the first candidate that has
    its place."""
    for choice in space.choices:
        context = next((c for c in space.contexts(choice) if space.is_asked(choice, c)), None)
        if context is not None:
            yield from ((*context, (choice, value)) for value in choice.ends())
