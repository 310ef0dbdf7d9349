"""Work that a step does, counted from shapes: what a plan makes seconds and bytes of.

A pass says its work in `Pass.cost`, out of the `Load` that it is given. Nothing here is a time:
how fast a machine does each kind of work is measured (`graphwright.plan.rates`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.ir.program import Program

FORWARD, BACKWARD = 1, 2
"""Forward passes that a forward and a backward pass cost."""


@dataclass(frozen=True)
class Work:
    """Counts of each kind of work; sums with `+`, and `times(n)` is doing it n times.

    Attributes:
        macs: multiply-accumulates of matrix products and convolutions.
        moved: bytes read or written by operators that do little more.
        calls: calls of operators in eager mode.
        factored: floating-point operations of Cholesky factors and inverses.
        decomposed: cubes of matrix sizes of singular value and eigenvalue decompositions.
        edited: nodes of a graph that are looked at, and written anew.
        memory: bytes alive at the peak, beyond what the run holds anyway.
        kept: bytes of weights made, which stay alive behind the step.
        disk: bytes written.
    """

    macs: float = 0.0
    moved: float = 0.0
    calls: float = 0.0
    factored: float = 0.0
    decomposed: float = 0.0
    edited: float = 0.0
    memory: float = 0.0
    kept: float = 0.0
    disk: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other: what is alive at the peak is the larger of the two."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Work(**{**sums, "memory": max(self.memory, other.memory)})

    def times(self, count: float) -> Work:
        """The same work `count` times, one after the other; memory, kept and disk stay."""
        scaled = {name: getattr(self, name) * count for name in TIMED}
        return replace(self, **scaled)


TIMED = ("macs", "moved", "calls", "factored", "decomposed", "edited")
"""Kinds of work that take time; each has a rate."""


@dataclass(frozen=True)
class LayerSize:
    """A layer with a weight.

    Attributes:
        name: as selectors know it. kind: as in the table of kinds.
        rows: rows of its matrix product in a run on the examples; 0 for a table.
        inner: values of a row. outer: rows of its weight.
        bytes: of the weight.
    """

    name: str
    kind: str
    rows: float
    inner: int
    outer: int
    bytes: int


@dataclass(frozen=True)
class DataSize:
    """Data that a step reads.

    Attributes:
        samples: how many. batches: in how many batches.
        runs: how many runs on the examples have as many input values as all batches together.
    """

    samples: int
    batches: int
    runs: float


@dataclass(frozen=True)
class Load:
    """Sizes that a pass counts its work from.

    Attributes:
        layers: with weights, in graph order.
        run: one run on the examples. nodes: of the graph. weight_bytes: of all stored tensors.
        checked: runs that a check of a pass amounts to. measured: those whose errors are reported.
        calibration, training: the data; None where the spec has none.
        program: as traced, for passes that look at more than sizes.
    """

    layers: tuple[LayerSize, ...]
    run: Work
    nodes: int
    weight_bytes: int
    checked: DataSize
    measured: DataSize
    program: Program
    calibration: DataSize | None = None
    training: DataSize | None = None

    def forward(self, data: DataSize | None) -> Work:
        """One forward pass over data; nothing where there is none."""
        if data is None:
            return Work()
        whole = self.run.times(data.runs)
        largest = self.run.memory * data.runs / max(data.batches, 1)
        return replace(whole, calls=self.run.calls * data.batches, memory=largest)

    def targeted(self, targets: Sequence[str]) -> tuple[LayerSize, ...]:
        """The layers that selectors choose; all where they match none of this program yet."""
        from graphwright.ir.errors import ModelError
        from graphwright.ir.layers.selectors import select

        try:
            chosen = {layer.name for layer in select(self.program, targets)}
        except ModelError:
            return self.layers
        return tuple(layer for layer in self.layers if layer.name in chosen)

    def rewritten(self, layers: Sequence[LayerSize]) -> Work:
        """Weights read and written, in a new graph."""
        size = sum(layer.bytes for layer in layers)
        return Work(moved=2.0 * size, edited=self.nodes, memory=size, kept=size)

    def training_steps(self, tune: Any, data: DataSize | None) -> Work:
        """Optimizer steps: forward and backward passes, those of a teacher, and the update.

        Args:
            tune: options of training (`TuneOptions`), or None for one epoch.
            data: that is trained on.
        """
        if data is None:
            return Work()
        batches = max(data.batches, 1)
        together = getattr(tune, "accumulate", 1)
        epochs = getattr(tune, "epochs", None) or math.inf
        steps = min(epochs * batches / together, getattr(tune, "steps", None) or math.inf)
        steps = steps if math.isfinite(steps) else batches / together
        whole = self.forward(data)
        step = whole.times(together / batches)
        follows = str(getattr(tune, "loss", "")).startswith("teacher")
        step = step.times(FORWARD + BACKWARD + (FORWARD if follows else 0))
        # read and written by the optimizer: the weights, their gradients, and two moments
        update = Work(moved=8.0 * self.weight_bytes, calls=8.0 * len(self.layers))
        alive = 4.0 * self.weight_bytes + whole.memory * len(self.layers)
        return replace((step + update).times(steps), memory=alive, kept=self.weight_bytes)

    def hessians(self, layers: Sequence[LayerSize]) -> Work:
        """Second moments of every layer's input over the calibration data, and their inverse."""
        if self.calibration is None:
            return Work()
        products = [layer for layer in layers if layer.rows]
        macs = sum(layer.rows * self.calibration.runs * layer.inner**2 for layer in products)
        # a Cholesky factor, its inverse, and the factor of that (Frantar et al. 2022): k^3/3 each
        factored = sum(2.0 * layer.inner**3 for layer in products)
        largest = max((layer.inner for layer in products), default=0)
        return Work(macs=macs, factored=factored, memory=16.0 * largest**2)

    def columns(self, layers: Sequence[LayerSize]) -> Work:
        """Weights solved column by column, each one's error moved to those behind it."""
        products = [layer for layer in layers if layer.rows]
        macs = sum(layer.outer * layer.inner**2 / 2.0 for layer in products)
        return Work(macs=macs, calls=CALLS_OF_A_COLUMN * sum(layer.inner for layer in products))

    def decompositions(self, layers: Sequence[LayerSize]) -> Work:
        """A singular value decomposition of every weight."""
        sizes = [(layer.inner, layer.outer) for layer in layers if layer.rows]
        cubes = sum(float(min(a, b)) ** 2 * max(a, b) for a, b in sizes)
        return Work(decomposed=cubes, memory=max((24.0 * a * b for a, b in sizes), default=0.0))


CALLS_OF_A_COLUMN = 16
"""Operators that quantizing or pruning one column takes."""

STRUCTURAL = 12
"""Times that a structural pass goes through the graph: which channels belong together, sizes
behind every cut, and the comparison with the program whose channels are masked."""

CALLS_OF_A_STEP = 30
"""Operators of a training step of one layer by itself, and of its optimizer."""

ROUNDED = 8.0
"""Bytes moved when a weight is rounded to a grid and back, in those of the weight."""

SEARCHED = 8
"""Roundings that the search for a weight's scales amounts to: most channels end early."""
