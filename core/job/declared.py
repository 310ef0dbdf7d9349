"""Inputs that a spec declares beside a file that has inputs of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graphwright.ir.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from graphwright.ir.program import Program
    from graphwright.ir.signature import TensorSpec
    from graphwright.specs.sections import InputSection, ModelSection


def check_declared(program: Program, section: ModelSection, source: str) -> None:
    """A saved program is as it is: a spec may repeat its inputs, and change none of them.

    Raises:
        ModelError: the spec declares other inputs, or a state that the program was not traced with.
    """
    found = [*_faults(program, section)]
    if found:
        raise ModelError(
            f"the spec's model section is not that of the saved program: {found[0]}",
            where=source,
            fix="Take it out of the spec; to change inputs, trace the model anew.",
            details=tuple(found[1:]),
        )


def _faults(program: Program, section: ModelSection) -> Iterator[str]:
    specs = {spec.name: spec for spec in program.signature.inputs}
    for name, declared in section.inputs.items():
        if name not in specs:
            yield f"there is no input {name!r}, but {', '.join(specs)}"
        elif declared.pinned is not None:
            yield f"input {name!r} cannot be pinned any more"
        else:
            example = program.examples[list(specs).index(name)]
            yield from _of_input(specs[name], declared, example)
    if section.state == "explicit" and not program.signature.state:
        yield "it was traced with its state frozen"


def _of_input(spec: TensorSpec, declared: InputSection, example: Tensor) -> Iterator[str]:
    if declared.dtype is not None and declared.dtype != spec.dtype:
        yield f"input {spec.name!r} is {spec.dtype}, declared is {declared.dtype}"
    shape = declared.shape
    if shape is not None and not _same_shape(spec.shape, shape):
        yield f"input {spec.name!r} has the shape {_text(spec.shape)}, declared is {_text(shape)}"
    elif declared.example is not None and declared.example != tuple(example.shape):
        yield (
            f"input {spec.name!r} was traced with the sizes {_text(tuple(example.shape))}, "
            f"declared is {_text(declared.example)}"
        )
    if declared.range is not None and spec.range is not None and declared.range != spec.range:
        yield f"input {spec.name!r} has the range {_text(spec.range)}"


def _same_shape(own: tuple[int | str, ...], declared: tuple[int | str, ...]) -> bool:
    """Fixed sizes are equal, and free ones stand at the same places, whatever they are called."""
    fixed = [size if isinstance(size, int) else None for size in own]
    return fixed == [size if isinstance(size, int) else None for size in declared]


def _text(values: tuple[object, ...]) -> str:
    return f"[{', '.join(map(str, values))}]"
