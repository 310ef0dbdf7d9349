"""Bundles: the compiled programs of one denoiser, with what the driver goes by, in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from graphwright.backends.base import Artifact, Compiled, find_backend
from graphwright.ir.atomic import write_atomically
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program, bind_inputs
from graphwright.ir.sampling.inversion import inverted
from graphwright.ir.sampling.record import Denoiser
from graphwright.ir.sampling.sampler import Part, Sampler
from graphwright.ir.sampling.stream import Stream
from graphwright.ir.sampling.variants import BESIDE, FULL, variants, whole
from graphwright.ir.signature import rebuild

FILE = "program.json"
SHARED = "weights.bin"
"""Weights of all programs, where the backend stores them once."""

VERSION = 1


class Bundle(Compiled):
    """A denoiser, compiled: its programs share their weights.

    Attributes:
        record: what is known of the denoiser.
        parts: compiled programs by name; `full` is the whole one.
    """

    def __init__(self, record: Denoiser, parts: Mapping[str, Compiled]) -> None:
        main = parts[FULL]
        notes = {**main.notes, "programs": {n: dict(p.notes) for n, p in parts.items()}}
        super().__init__(notes)
        self.record, self.parts = record, dict(parts)
        self.signature = whole(record, {n: p.signature for n, p in self.parts.items()})

    @property
    def made_by(self) -> str:
        """Name of the backend of its programs."""
        return self.parts[FULL].backend

    @cached_property
    def sampler(self) -> Sampler:
        """The driver."""
        parts = {n: Part(p.signature, p.run_flat) for n, p in self.parts.items()}
        return Sampler(self.record, parts)

    def sample(self, noise: torch.Tensor, conditions: Any = None, **settings: Any) -> torch.Tensor:
        """Samples; see `Sampler.sample`."""
        return self.sampler.sample(noise, conditions, **settings)

    def invert(self, data: torch.Tensor, conditions: Any = None, **settings: Any) -> torch.Tensor:
        """The noise that samples come from; see `graphwright.ir.sampling.inversion.inverted`."""
        return inverted(self.sampler, data, conditions, **settings)

    def plan(self, batch: int, conditions: Any = None, **settings: Any) -> Any:
        """A checked trajectory for `step`; see `Sampler.plan`."""
        return self.sampler.plan(batch, conditions, **settings)

    def step(self, plan: Any, i: int, x: torch.Tensor, state: Any, noise: Any = ()) -> Any:
        """(sample, state) behind one step; see `Sampler.step`."""
        return self.sampler.step(plan, i, x, state, noise)

    def stream(self, noises: torch.Tensor, conditions: Any = None, negative: Any = None) -> Stream:
        """The driver of a stream (sample.stream); see `Sampler.stream`."""
        return self.sampler.stream(noises, conditions, negative)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """One call of the whole program: D, E and what it carries, by name."""
        flat = bind_inputs(self.signature, inputs, named)
        return rebuild(self.signature.structure, self.run_flat(flat))

    def run_flat(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The whole program on flat inputs, with what was put beside it."""
        names = [spec.name for spec in self.signature.inputs]
        given = dict(zip(names, inputs, strict=True))
        found: tuple[torch.Tensor, ...] = ()
        beside = (BESIDE[name] for name in self.record.settings if name in BESIDE)
        for part in (self.parts[name] for name in (FULL, *beside)):
            values = part.run_flat(tuple(given[s.name] for s in part.signature.inputs))
            found += tuple(
                value for spec, value in zip(part.signature.outputs, values, strict=True)
                if spec.name not in self.record.cached
            )  # fmt: skip
        return found

    def save(self, folder: str | Path) -> Artifact:
        """Writes `program.json`, and the programs with their weights once."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = find_backend(self.made_by).save_together(self.parts, folder)
        document = {
            "graphwright": "sampling",
            "version": VERSION,
            "backend": self.made_by,
            "denoiser": self.record.to_json(),
            "programs": {name: path.as_posix() for name, path in paths.items()},
        }
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        write_atomically(folder / FILE, text.encode())
        files = {folder / FILE}
        for path in paths.values():
            inside = folder / path
            files |= set(inside.iterdir()) if inside.is_dir() else {inside}
        files |= {file for file in (folder / SHARED,) if file.is_file()}
        return Artifact(self.made_by, folder / FILE, sum(f.stat().st_size for f in files))


def lower_program(
    program: Program, backend: str, options: Mapping[str, Any], context: Context
) -> Compiled:
    """Lowers a program; a denoiser becomes a bundle.

    Raises:
        LoweringError: as the backend says.
    """
    record = Denoiser.of(program)
    lowering = find_backend(backend)(**options)
    if record is None:
        return lowering.lower(program, context)
    parts = {
        name: lowering.lower(part, context.replace(scope=(*context.scope, name)))
        for name, part in variants(program).items()
    }
    bundle = Bundle(record, parts)
    bundle.notes["warnings"] = list(
        dict.fromkeys(text for part in parts.values() for text in part.notes.get("warnings", ()))
    )
    return bundle


def open_bundle(path: Path) -> Bundle | None:
    """The bundle in a folder, or of its `program.json`; None where there is none.

    Raises:
        ModelError: the record is damaged, or a program is not there.
    """
    file = path / FILE if path.is_dir() else path
    if file.name != FILE or not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document.get("graphwright") != "sampling":
            return None
        record = Denoiser.from_json(document["denoiser"])
        backend, programs = document["backend"], dict(document["programs"])
        version = document["version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "the record of this bundle is damaged", where=str(file), details=(str(error)[:300],)
        ) from error
    if version != VERSION:
        raise ModelError(f"a bundle of version {version}; this release reads {VERSION}",
                         where=str(file))  # fmt: skip
    parts: dict[str, Compiled] = {}
    for name, place in programs.items():
        inside = file.parent / place
        if Path(place).is_absolute() or ".." in Path(place).parts or not inside.exists():
            raise ModelError(f"its program {name!r} is not in the bundle: {place}",
                             where=str(file))  # fmt: skip
        opened = find_backend(backend).open(inside)
        if opened is None:
            raise ModelError(f"its program {name!r} is none of {backend}", where=str(file))
        parts[name] = opened
    if FULL not in parts:
        raise ModelError(f"it has no program {FULL!r}", where=str(file))
    return Bundle(record, parts)
