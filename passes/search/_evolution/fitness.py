"""How far the outputs of a candidate are from the program's own, on a sample of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from graphwright.ir.calibration.padding import real_tokens
from graphwright.ir.context import Batch, Context
from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program
from graphwright.ir.tune.losses import main_output
from graphwright.passes.search._evolution.levels import Levels, Unit

Measure = Literal["kl", "mse"]

ROWS = 256
"""Rows whose divergence is computed at a time, in float64."""


class Database(Protocol):
    """Every unit at every level.

    Attributes:
        units: what gets levels.
        trial: a program that computes what the original does, whose named tensors a level replaces.
    """

    units: list[Unit]
    trial: Program

    def tensors(self, unit: int, level: int) -> Mapping[str, Tensor]:
        """Tensors of `trial` that make a unit what it is at a level."""

    def made(self, levels: Levels) -> Program:
        """The program with every unit at its level."""


class Fitness:
    """Values of candidates, lower being better; the unchanged program has 0.

    Rows of the output (a token of text, else a sample) that are padding do not count.

    Args:
        database: of the levels.
        program: the one to stay near to.
        data: calibration batches.
        measure: `kl`, mean over rows of KL(program || candidate), both as logits over the last
            axis; `mse`, squared error over the squares of the program's outputs.
        context: seed of the samples, device.

    Raises:
        ArgumentError: there is no data.
    """

    def __init__(
        self, database: Database, program: Program, data: Iterable[Batch], measure: Measure,
        context: Context,
    ) -> None:  # fmt: skip
        self.database, self.program, self.measure, self.context = (
            database,
            program,
            measure,
            context,
        )
        self.output = main_output(program.signature)
        self.batches = as_batches(data, program.signature)
        self.kept: list[Mapping[str, Tensor]] = []
        if self.batches.rows is None:
            self.kept = list(self.batches)
        if not (self.batches.samples if self.batches.rows else self.kept):
            raise ArgumentError("the calibration data is empty", fix="Give at least one batch.")
        self.rows = 0
        """Rows that the last sample had: all there are, where more were asked for."""

    def __call__(
        self, candidates: Sequence[Levels], tokens: int | None, where: tuple[int, int] = (0, 0)
    ) -> list[float]:
        """A value per candidate, on one sample of so many rows; on all data for None."""
        sums, scale, left = [0.0] * len(candidates), 0.0, tokens
        self.rows = 0
        for inputs in self._sample(where, in_order=tokens is None):
            batch = tuple(t.to(self.context.device) for t in self.program.bind(**inputs))
            (real,) = real_tokens(self.program, [batch])
            wanted = self._rows(self.program.run_flat(batch)[self.output], real, left)
            for number, levels in enumerate(candidates):
                flat = functional_call(self.database.trial.module, self._tensors(levels), batch)
                sums[number] += self._distance(self._rows(flat[self.output], real, left), wanted)
            scale += len(wanted) if self.measure == "kl" else float(wanted.square().sum())
            self.rows += len(wanted)
            left = None if left is None else left - len(wanted)
            if left == 0:
                break
        return [value / max(scale, 1e-30) for value in sums]

    def of_program(self, program: Program) -> float:
        """The value of a program, on all data."""
        total = scale = 0.0
        for inputs in self._sample((0, 0), in_order=True):
            batch = tuple(t.to(self.context.device) for t in self.program.bind(**inputs))
            (real,) = real_tokens(self.program, [batch])
            with torch.no_grad():
                wanted, found = (self._rows(p.run_flat(batch)[self.output], real, None)
                                 for p in (self.program, program))  # fmt: skip
            total += self._distance(found, wanted)
            scale += len(wanted) if self.measure == "kl" else float(wanted.square().sum())
        return total / max(scale, 1e-30)

    def _sample(self, where: tuple[int, int], *, in_order: bool) -> Iterator[Mapping[str, Tensor]]:
        """Batches in an order drawn for `where`."""
        generator = self.context.generator("sample", *where)
        rows = self.batches.rows
        count = len(self.kept) if rows is None else rows.count
        order = torch.arange(count) if in_order else torch.randperm(count, generator=generator)
        if rows is None:
            yield from (self.kept[i] for i in order.tolist())
            return
        for start in range(0, count, rows.size):
            yield self.batches.at(order[start : start + rows.size].tolist())[0]

    def _tensors(self, levels: Levels) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for unit, level in enumerate(levels):
            found.update(self.database.tensors(unit, level))
        return found

    def _rows(self, output: Tensor, real: Tensor | None, most: int | None) -> Tensor:
        output = output.detach().float()
        if real is not None and output.shape[:2] == real.shape:
            output = output[real]
        if self.measure == "kl":
            flat = output.reshape(-1, output.shape[-1])
        else:
            flat = output.reshape(len(output), -1)
        return flat[:most]

    def _distance(self, found: Tensor, wanted: Tensor) -> float:
        if self.measure == "mse":
            return float((found.double() - wanted.double()).square().sum())
        total = 0.0
        for some, others in zip(found.split(ROWS), wanted.split(ROWS), strict=True):
            p, q = others.double().log_softmax(-1), some.double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
        return total
