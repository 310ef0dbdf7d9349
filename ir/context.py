"""The surroundings of a pass: seed, data, device, folders. There is no global state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphwright.ir.errors import ArgumentError

if TYPE_CHECKING:
    from graphwright.ir.program import Program

Batch = Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...]


def _silent(description: str, done: int, total: int) -> None:
    """The progress callback of a run without a bar."""


def _unheard(text: str) -> None:
    """The warning callback of a run without a report."""


@dataclass(frozen=True)
class Context:
    """Surroundings of one pass or one lowering.

    Attributes:
        seed: seed of the run; every unit of work derives its own stream with `generator`.
        calibration: re-iterable batches (input name -> tensor, or a tuple in input order).
        device: where work is done; the program comes back on the device it came on.
        jobs: parallel workers, or `ray`.
        work: folder that may be written; None when there is none.
        progress: called with (description, done, total).
        warn: called with a line that the user should know of.
        scope: place in the run, as (2, "quantize.int8"); part of every derived seed.
        training: labelled batches for passes that train: `ir.data.Batches`, or re-iterable like
            `calibration`, with the labels as one value more.
        teacher: the program that a student is trained to follow; in a run, the one before the
            first pass.
        uncompressed: the program with the weights that compression started from, of the same form
            as those now (norms folded, channels cut, factors in); the teacher when absent.
        folder: where relative names in options start, such as modules of `module:function`.
        key: digest of all that the pass's result depends on; empty when it is not known.
        checkpoint_seconds: work worth saving in `work` while a pass runs.
    """

    seed: int = 0
    calibration: Iterable[Batch] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    jobs: int | str = 1
    work: Path | None = None
    progress: Callable[[str, int, int], None] = _silent
    warn: Callable[[str], None] = _unheard
    scope: tuple[str | int, ...] = ()
    training: Iterable[Any] | None = None
    teacher: Program | None = None
    uncompressed: Program | None = None
    folder: Path = field(default_factory=Path)
    key: str = ""
    checkpoint_seconds: float = 30.0

    def generator(self, *path: str | int) -> torch.Generator:
        """A CPU generator of its own for `path`: adding a pass never reshuffles another."""
        text = repr((self.seed, *self.scope, *path)).encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
        return torch.Generator().manual_seed(seed)

    @property
    def before_compression(self) -> Program | None:
        """`uncompressed`, or the teacher."""
        return self.teacher if self.uncompressed is None else self.uncompressed

    @property
    def batches(self) -> Iterable[Batch]:
        """The calibration batches of a pass that needs some.

        Raises:
            ArgumentError: there are none.
        """
        self.require("calibration", "this needs calibration data")
        assert self.calibration is not None
        return self.calibration

    @property
    def training_data(self) -> Iterable[Any]:
        """The labelled batches of a pass that trains.

        Raises:
            ArgumentError: there are none.
        """
        self.require("training", "this needs training data")
        assert self.training is not None
        return self.training

    def require(self, source: str, message: str) -> None:
        """Raises ArgumentError with `message` where the data `source` is missing."""
        if getattr(self, source) is None:
            fix = f"Give the spec a `{source}` section, or pass {source}=batches."
            raise ArgumentError(message, fix=fix)

    def within(self, *scope: str | int) -> Context:
        """The same surroundings one level down."""
        return replace(self, scope=(*self.scope, *scope))

    def replace(self, **changes: Any) -> Context:
        """The same surroundings with some fields replaced."""
        return replace(self, **changes)
