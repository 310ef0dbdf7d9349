"""Every failure a user can meet, each with its exit status. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


def printable(text: str) -> str:
    """A text that a terminal shows and does not obey: names in a file may hold anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class GraphwrightError(Exception):
    """A failure with one clear message.

    Attributes:
        message: what is wrong, in one line.
        where: file, line, layer or node it is about; empty when the message says it.
        fix: what the user can do.
        details: further lines, shown below the message.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, where: str = "", fix: str = "", details: tuple[str, ...] = ()
    ) -> None:
        self.message = message
        self.where = where
        self.fix = fix
        self.details = details
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        if self.fix:
            head = f"{head.rstrip('.')}. {self.fix}"
        return "\n".join([head, *(f"    {line}" for line in self.details)])


class ArgumentError(GraphwrightError):
    """The command line or a Python call was given something it cannot use."""

    exit_code = 2


class ResourceError(ArgumentError):
    """The machine lacks memory, room on a disk or a right that the run needs."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a spec."""

    file: str
    line: int
    column: int
    path: str
    """Place in the document, as `passes[1].sparsity`."""
    message: str
    suggestion: str = ""
    """Nearest valid name or value, as it is to be written; empty when there is none."""

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}:{self.column}: "
        text += f"{self.path}: {self.message}" if self.path else self.message
        if not self.suggestion:
            return text
        is_name = self.suggestion[0].isalpha() and self.suggestion not in ("true", "false")
        return f"{text}; did you mean {repr(self.suggestion) if is_name else self.suggestion}?"


class SpecError(GraphwrightError):
    """The spec is wrong; carries every problem found, in file order."""

    exit_code = 2

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems, key=lambda p: (p.file, p.line, p.column))
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ModelError(GraphwrightError):
    """The model cannot be loaded, traced, or take a pass."""

    exit_code = 3


class ContractError(GraphwrightError):
    """A pass changed the function more than it promised or the spec allows."""

    exit_code = 4


class LoweringError(GraphwrightError):
    """A backend cannot lower the program, or its result differs from it."""

    exit_code = 5


class RequirementError(GraphwrightError):
    """A bound of the spec's `require` section was missed."""

    exit_code = 6
