"""Streaming observers over a program: what its values look like on calibration data.

An observer sees one tensor per batch and keeps a summary of fixed size; no activation outlives
its batch. `observe` runs the program once and feeds the observers of as many nodes as wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphwright.ir.calibration.padding import real_tokens, real_values
from graphwright.ir.context import Batch
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.program import Program


class Observer(Protocol):
    """Anything that can be shown a tensor, batch by batch."""

    def update(self, x: Tensor) -> None:
        """Takes note of one batch's value."""


class Channels:
    """Extremes per channel of the last axis."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        low, high = rows.amin(0), rows.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


class Rows:
    """The first rows (last axis kept) of every batch, at most `limit` in all."""

    def __init__(self, limit: int, per_batch: int) -> None:
        self.limit = limit
        self.per_batch = per_batch
        self.kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        count = min(self.per_batch, self.limit - sum(len(k) for k in self.kept), len(rows))
        if count > 0:
            # Evenly spread: the first tokens of a sentence are not like the rest.
            index = torch.arange(count) * len(rows) // count
            self.kept.append(rows[index].clone())

    def rows(self) -> Tensor:
        """(rows, channels)."""
        return torch.cat(self.kept)


class Several:
    """Hands the same value to several observers."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def update(self, x: Tensor) -> None:
        for observer in self.observers:
            observer.update(x)


class _Run(fx.Interpreter):
    """Runs the graph, shows values to observers, frees every value after its last use."""

    def __init__(self, program: Program, watch: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(program.module)
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.watch(n, result)
        return result


def bound_batches(program: Program, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, ...]]:
    """Every batch as one tensor per input, checked against the signature."""
    for batch in batches:
        yield program.bind(**batch) if isinstance(batch, Mapping) else program.bind(*batch)


def observe(
    program: Program,
    observers: Mapping[str, Observer],
    batches: Iterable[Batch],
    progress: Callable[[str, int, int], None] | None = None,
    *,
    padding: bool = True,
) -> int:
    """Runs the program on every batch and shows each named node's value to its observer.

    Args:
        program: left as it is.
        observers: node name to observer.
        batches: calibration data.
        progress: called with (description, done, total).
        padding: show what stands at padding tokens too; else real tokens alone, (n, in).

    Returns:
        Number of batches.

    Raises:
        ArgumentError: there is no batch.
        ModelError: an observed value is empty, NaN or infinite; names the node and the batch.
    """
    done = 0
    real: Tensor | None = None

    def watch(node: fx.Node, value: Any) -> None:
        observer = observers.get(node.name)
        if observer is None or not isinstance(value, Tensor):
            return
        if value.numel() == 0 or not bool(torch.isfinite(value).all()):
            what = "an empty tensor" if value.numel() == 0 else "NaN or infinity"
            raise ModelError(
                f"calibration batch {done} gives {what} at {node.name!r}",
                fix="Check the calibration data, and the model on it.",
            )
        observer.update(real_values(value, real))

    total = _length(batches)
    runner = _Run(program, watch)
    with torch.no_grad():
        for inputs in bound_batches(program, batches):
            real = None if padding else real_tokens(program, [inputs])[0]
            if real is not None and not bool(real.any()):
                real = None  # nothing but padding: better than to know nothing
            runner.run(*inputs)
            done += 1
            if progress is not None:
                progress("calibrating", done, max(total, done))
    if done == 0:
        raise ArgumentError("the calibration data is empty", fix="Give at least one batch.")
    return done


def _length(batches: Iterable[Batch]) -> int:
    return len(batches) if isinstance(batches, Sized) else 0
