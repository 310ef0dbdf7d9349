"""A model that is several programs: an encoder and a decoder, the networks of a pipeline.

Values travel between parts by name: an input of a part that an earlier one has as an output is
that output. What runs the parts, and how often, is the model's own: an encoder once, a decoder
once per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graphwright.ir.errors import ArgumentError

if TYPE_CHECKING:
    from graphwright.ir.program import Program

INDEX = "parts.json"
"""File of a folder with an artifact per part, each in a folder of its name: their order."""


@dataclass(frozen=True)
class Parts(Mapping[str, "Program"]):
    """Programs by name, in the order in which they first run.

    Attributes:
        programs: part by name, an identifier each.
    """

    programs: Mapping[str, Program]

    def __post_init__(self) -> None:
        for name in self.programs:
            if not name.isidentifier():
                raise ArgumentError(f"a part cannot be named {name!r}")

    def __getitem__(self, name: str) -> Program:
        return self.programs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.programs)

    def __len__(self) -> int:
        return len(self.programs)

    def replace(self, **parts: Program) -> Parts:
        """The same with other programs for some of the parts.

        Raises:
            ArgumentError: there is no part of that name.
        """
        unknown = [name for name in parts if name not in self.programs]
        if unknown:
            raise ArgumentError(f"there is no part {unknown[0]!r}; there are {list(self)}")
        return replace(self, programs={**self.programs, **parts})

    def wires(self, name: str) -> dict[str, str]:
        """Inputs of a part that earlier parts give: input to the name of the part."""
        known: dict[str, str] = {}
        for part, program in self.programs.items():
            if part == name:
                wanted = [spec.name for spec in program.signature.inputs]
                return {each: known[each] for each in wanted if each in known}
            known |= {spec.name: part for spec in program.signature.outputs}
        raise ArgumentError(f"there is no part {name!r}; there are {list(self)}")
