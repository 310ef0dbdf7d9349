"""The base class of backends, which lower a program to something that runs and can be saved."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ValidationError

from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.conversation import Conversation
from graphwright.ir.generation.decode import Completion
from graphwright.ir.generation.language_model import LanguageModel
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.runner import Runner
from graphwright.ir.options import EVERY_DTYPE, Options
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a backend wrote.

    Attributes:
        backend: its name.
        path: of the file that is opened.
        file_bytes: of all its files.
        notes: lines for the summary: what could not be written beside it, and why.
    """

    backend: str
    path: Path
    file_bytes: int
    notes: tuple[str, ...] = ()


class Compiled:
    """A lowered program.

    Attributes:
        backend: name of the backend that made it.
        signature: inputs, outputs and structure, as the program's.
        notes: what the backend did: fusions and kernel counts, and what stayed and why; JSON.
            `warnings` in it are lines for the summary: kernels that a pass was for and that were
            lost.
        defaults: tensors of inputs that a call may leave out, by name: those of the program it was
            made of. An artifact that was opened from a file has none.
        generation: what generation knows of a decoder with a cache; None for another model.
    """

    backend: ClassVar[str] = ""
    signature: Signature

    def __init__(self, notes: Mapping[str, Any]) -> None:
        self.notes: dict[str, Any] = dict(notes)
        self.defaults: Mapping[str, torch.Tensor] = {}
        self.generation: Generation | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Runs it: torch tensors in, the model's own output structure out."""
        raise TypeError(f"{type(self).__name__} cannot be called")

    def run_flat(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Flat outputs for one tensor per input, unchecked."""
        raise TypeError(f"{type(self).__name__} cannot be run")

    def save(self, folder: str | Path) -> Artifact:
        """Writes the artifact into `folder` and says what was written."""
        raise TypeError(f"{type(self).__name__} cannot be saved")

    def runner(self) -> Runner:
        """The model over a cache of its own, for one generation or conversation."""
        raise ArgumentError(f"the backend {self.backend!r} runs no decoder over a cache")

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model with its tokenizer and its own defaults of generation.

        Raises:
            ArgumentError: it is no decoder with a cache.
        """
        if self.generation is None:
            raise ArgumentError(
                "this artifact has no cache to generate with",
                fix="Compile the model with `model: {task: generation}`.",
            )
        folder = self.generation.tokenizer
        return LanguageModel(self.generation, self.runner, Path(folder) if folder else None)

    def generate(self, prompts: Any, **options: Any) -> Completion | list[Completion]:
        """Generates behind texts, token ids or messages; see `LanguageModel.generate`."""
        return self.language_model.generate(prompts, **options)

    def conversation(self, system: str | None = None) -> Conversation:
        """A conversation that keeps its cache; see `LanguageModel.conversation`."""
        return self.language_model.conversation(system)


class Backend:
    """Lowers programs; found by its place: class `Lowering` in `backends/<name>/lowering.py`.

    Class attributes:
        name: as in the spec's `lower` section.
        Options: the options it takes.
        summary: one line for the docs.
        computes_in: floating-point dtypes of the programs that it runs.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    Options: ClassVar[type[Options]] = Options
    computes_in: ClassVar[tuple[str, ...]] = EVERY_DTYPE

    def __init__(self, **options: Any) -> None:
        try:
            self.options: Any = self.Options.from_plain(options)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise ArgumentError(f"{self.name}: {'; '.join(lines)}") from None

    def lower(self, program: Program, context: Context) -> Compiled:
        """Lowers `program`, checks the result against it, and hands it over.

        Raises:
            LoweringError: it cannot be lowered, or computes something else.
        """
        raise TypeError(f"{type(self).__name__} defines no lower(program, context)")

    @classmethod
    def save_together(cls, parts: Mapping[str, Any], folder: Path) -> dict[str, Path]:
        """Writes several programs of this backend; what `open` takes, below `folder`, by name.

        Here each has a folder of its own; a backend that can, stores what they share once.
        """
        for name, part in parts.items():
            part.save(folder / name)
        return {name: Path(name) for name in parts}

    @classmethod
    def open(cls, path: Path) -> Compiled | None:
        """The saved artifact at `path`; None when the file is not one of this backend's."""
        return None


def backend_names() -> list[str]:
    """Names of the backends, from their places; imports none."""
    import graphwright.backends as package

    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg)


def find_backend(name: str) -> type[Backend]:
    """The class of a backend: the one `Backend` subclass named `Lowering` in its package.

    Raises:
        ArgumentError: there is none of that name.
    """
    if name not in backend_names():
        raise ArgumentError(f"no backend named {name!r}; there are {', '.join(backend_names())}")
    module = importlib.import_module(f"graphwright.backends.{name}.lowering")
    found: type[Backend] = module.Lowering
    return found


def all_backends() -> dict[str, type[Backend]]:
    """Every backend by name."""
    return {name: find_backend(name) for name in backend_names()}
