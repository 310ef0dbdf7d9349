"""sample.retrieve: conditions that are the nearest neighbours of a query in an index (P45)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.ir.sampling.beside import put_beside
from graphwright.ir.sampling.record import FACT, Denoiser, refuse_stream
from graphwright.ir.sampling.retrieval import Retriever
from graphwright.ir.sampling.variants import NEIGHBOURS, RETRIEVE, VECTORS
from graphwright.ir.trace.capture import trace
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.sample._form.base import Named, Run, SamplePass
from graphwright.passes.sample._form.guider import GUIDERS


class RetrieveOptions(Options):
    """Options of sample.retrieve."""

    index: Annotated[str, Field(examples=["index.npy"])]
    """File of the vectors of the items, [items, width] floats as numpy saves them (`.npy`)."""

    condition: str | None = None
    """Condition of the network, [batch, neighbours, width], that they are for; its only one of that
    form when absent."""

    neighbours: Annotated[int, Field(ge=1)] = 4
    """Items that a sample is given."""


class Retrieve(SamplePass[RetrieveOptions]):
    """Gives a network its conditions from an index of items instead of from the caller.

    A network that was trained with the vectors of similar pictures as its condition can stay small:
    what it does not know is in the index. A bundle stores the vectors beside the network;
    `queries=` of `sample` are vectors in the same space (of a text, of a picture, the mean of a
    class), and the nearest items become the condition. A condition that is given by hand, such as
    neighbours in another index, goes in as before. For no neighbours guidance takes what
    `unconditional` of sample.denoiser says (the paper's zeros), or `negative`.

    Source: P45. The search of its code by ScaNN is approximate, and this one exact.
    """

    papers = ("P45",)
    behind: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    after: ClassVar[tuple[str, ...]] = (*SamplePass.after, *GUIDERS, "sample.reuse")
    conflicts: ClassVar[tuple[str, ...]] = ("sample.stream", "sample.retrieve")

    def run(self, program: Program, context: Context) -> Result:
        """Puts the table of the index beside the denoiser.

        Raises:
            ArgumentError: no such file or table, or fewer items than neighbours.
            ModelError: the network has no condition of this form.
        """
        record = Denoiser.required(program, self.id)
        refuse_stream(record, self.id)
        vectors = _read(context.folder / self.options.index)
        k = self.options.neighbours
        Retriever(vectors, k)
        condition = _condition(program, record, self.options, vectors.shape[1], self.id)
        made = put_beside(program, _table(program, record, vectors, k), RETRIEVE, self.id)
        said = {"condition": condition, "neighbours": k, "items": len(vectors)}
        facts = record.replace(settings={**record.settings, RETRIEVE: said}).to_json()
        text = f"{k} of {len(vectors)} items of {vectors.shape[1]} numbers"
        return Result(
            made.replace(facts={**made.facts, FACT: facts}), (Action(condition, text),),
        )  # fmt: skip

    def expected(self, after: Program, run: Run, given: Named) -> Mapping[str, Any]:
        """The program before, and rows of the table."""
        table = after.state[f"{RETRIEVE}.table"]
        rows = [table[row] for row in given[NEIGHBOURS]]
        return {**run(given), f"{RETRIEVE}_{VECTORS}": torch.stack(rows)}


class _Table(nn.Module):
    """Vectors of items by their numbers."""

    table: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", vectors)

    def forward(self, neighbours: Tensor) -> dict[str, Tensor]:
        """[batch, k] int64 to [batch, k, width]."""
        return {VECTORS: nn.functional.embedding(neighbours, self.table)}


def _table(program: Program, record: Denoiser, vectors: Tensor, k: int) -> Program:
    spec = next(spec for spec in program.signature.inputs if spec.name == record.sample)
    batch = spec.shape[0]
    rows = program.examples[[s.name for s in program.signature.inputs].index(spec.name)].shape[0]
    numbers = torch.arange(rows * k).reshape(rows, k) % len(vectors)
    dynamic = {NEIGHBOURS: {0: batch}} if isinstance(batch, str) else None
    return trace(_Table(vectors), (numbers,), dynamic, ranges={NEIGHBOURS: (0, len(vectors))})


def _condition(
    program: Program, record: Denoiser, options: RetrieveOptions, width: int, by: str
) -> str:
    specs = {spec.name: spec for spec in program.signature.inputs}
    tables = [name for name in record.conditions if len(specs[name].shape) == 3]
    name = options.condition or (tables[0] if len(tables) == 1 else None)
    if name is None or name not in tables:
        raise ModelError(
            f"{by}: neighbours are for a condition [batch, neighbours, width], and the denoiser "
            f"has {tables or 'none'} of that form",
            fix="Name it in `condition`." if len(tables) > 1 else "",
        )
    _, tokens, size = specs[name].shape
    if size != width:
        raise ModelError(f"{by}: the vectors of the index have {width} numbers, and the condition "
                         f"{name!r} takes {size}")  # fmt: skip
    if isinstance(tokens, int) and tokens != options.neighbours:
        raise ModelError(
            f"{by}: the condition {name!r} takes {tokens} neighbours, not {options.neighbours}",
            fix=f"Set `neighbours: {tokens}`, or trace the network with that axis free.",
        )
    return name


def _read(path: Path) -> Tensor:
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"no index can be read: {error}", where=str(path)) from None
    if not isinstance(found, np.ndarray):
        raise ArgumentError("an index is one table, and this file has several", where=str(path))
    if found.ndim != 2 or found.dtype.kind != "f":
        raise ArgumentError(
            f"an index is a table [items, width] of floats, not {found.shape} of {found.dtype}",
            where=str(path),
        )
    return torch.from_numpy(found.astype(np.float32))
