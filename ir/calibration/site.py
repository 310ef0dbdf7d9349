"""The data that a walk over a program's layers exchanges with a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, fx

from graphwright.ir.calibration.padding import without_padding
from graphwright.ir.layers.products import Geometry, rows
from graphwright.ir.layers.selectors import Layer


@dataclass(frozen=True)
class Solved:
    """A method's result for one layer.

    Attributes:
        weight: its value from here on, of the layer's own shape; None: as it was.
        bias: likewise; a layer without one must be given none.
        grid: scale, zero point, lowest and highest code that the layer's input is rounded to from
            here on; None: it is not.
        state: tensors that the pass builds the new program from (codes, scales, masks).
        info: figures for the report.
        parts: of a stack of experts, what was found for each; `state` then holds stacks of theirs,
            and `info` means.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    grid: tuple[float, int, int, int] | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, float] = field(default_factory=dict)
    parts: tuple[Solved, ...] = ()


@dataclass(frozen=True)
class Task:
    """One layer to solve; plain data, so that it travels to a worker.

    Attributes:
        name: of the layer.
        geometry: how its rows are made.
        weight: its value before.
        bias: likewise; None where it has none.
        stats: what the method gathered from its input.
        seed: of its own random stream.
    """

    name: str
    geometry: Geometry
    weight: Tensor
    bias: Tensor | None
    stats: Any
    seed: int


@dataclass(frozen=True)
class Site:
    """One activation, and the layers that read it the same way (the q, k and v of attention).

    Attributes:
        layers: to be solved.
        geometry: of the first; all make the same rows.
        node: the activation.
        seed: of its own random stream.
        real: true where a token is real and no padding, (batch, length) booleans of every batch;
            None where nothing tells.
    """

    layers: tuple[Layer, ...]
    geometry: Geometry
    node: fx.Node
    seed: int
    real: Sequence[Tensor | None]
    _values: Callable[[fx.Node], Iterator[Any]]
    _originals: Callable[[], Iterator[Tensor]]

    def inputs(self) -> Iterator[Tensor]:
        """The activation in every batch, as the layers solved so far give it."""
        return self._values(self.node)

    def values(self, node: fx.Node) -> Iterator[Any]:
        """Another value in every batch, that is computed before the layers and read behind."""
        return self._values(node)

    def original_inputs(self) -> Iterator[Tensor]:
        """The activation in every batch, as the program gives it that was passed in."""
        return self._originals()

    def rows(self) -> Iterator[Tensor]:
        """(groups, n, depth) in every batch; padding tokens are left out."""
        return self._rows(self.inputs())

    def original_rows(self) -> Iterator[Tensor]:
        """The same rows of `original_inputs`."""
        return self._rows(self._originals())

    def _rows(self, values: Iterator[Tensor]) -> Iterator[Tensor]:
        for x, real in zip(values, self.real, strict=True):
            yield rows(self.geometry, without_padding(self.geometry, x, real))


class Method(Protocol):
    """A way to solve layers."""

    def gather(self, site: Site) -> Any:
        """Gathers from an activation the data that `solve` needs; called once per activation."""

    def solve(self, task: Task) -> Solved:
        """The new weight of one layer. Runs wherever `Workers` puts it."""
