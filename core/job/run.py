"""One run: what was asked for, where it writes, and what is noted on the way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import RequirementError
from graphwright.job.checkpoint import Checkpoints, SharedCheckpoints
from graphwright.job.memory import peak_rss_bytes, reset_peak
from graphwright.job.place import OutputPlace

if TYPE_CHECKING:
    from graphwright.job.progress import Progress
    from graphwright.specs.spec import Spec


@dataclass(frozen=True)
class JobSettings:
    """Settings of a run that do not change its result.

    Attributes:
        out: folder for the results; replaced as a whole when it holds an earlier result.
        allow_pickle: open model files that can run code.
        no_code: refuse code that the spec names, as a factory or a function that gives data.
        device: `cpu` or `cuda`.
        jobs: parallel workers, or `ray`.
        resume: go on after the last finished pass of a killed run.
        quiet: no progress, no summary.
        checkpoint_seconds: work worth saving; quicker passes are repeated on resume.
        shared: folder of checkpoints that the candidates of a search share.
        latency: whether latency is measured.
    """

    out: str | Path = "out"
    allow_pickle: bool = False
    no_code: bool = False
    device: str = "cpu"
    jobs: int | str = 1
    resume: bool = True
    quiet: bool = False
    checkpoint_seconds: float = 2.0
    shared: Path | None = None
    latency: bool = True


def clock() -> tuple[float, float]:
    """Seconds of the clock, and of the processor in this process."""
    return time.monotonic(), time.process_time()


@dataclass
class Run:
    """The state that all stages of a run share.

    Attributes:
        spec: what to do. settings: how. place: where. progress: shown to the user.
        started: `time.monotonic()` at the start.
        peak: largest resident memory seen so far, in bytes.
        warnings: one line each, for the report.
        code: the user's own code that ran, one line each.
        part: name of the part of the model that this run is about; empty where it is one program.
        made: whether data was made of the model in this run.
        search: what a search found whose winner this run builds, for the report.
        stages: name, seconds, processor_seconds and peak_rss_bytes of every stage that has ended.
    """

    spec: Spec
    settings: JobSettings
    place: OutputPlace
    progress: Progress
    started: float
    peak: int = 0
    warnings: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    part: str = ""
    made: bool = False
    search: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def checkpoints(self) -> Checkpoints | SharedCheckpoints:
        """Where programs between passes are kept."""
        if self.settings.shared is not None:
            return SharedCheckpoints(self.settings.shared)
        return Checkpoints(self.place.work / "checkpoints")

    def of_part(self, name: str, spec: Spec) -> Run:
        """The same run on one part of the model, with a place and a spec of its own."""
        return replace(self, part=name, place=self.place.part(name), spec=spec, stages=[])

    def warn(self, text: str) -> None:
        """Notes something the user should know, in the report and on the console; once."""
        text = f"{self.part}: {text}" if self.part else text
        if text in self.warnings:
            return
        self.warnings.append(text)
        self.progress.note(f"warning: {text}")

    def publish(self) -> None:
        """Puts the result in its place; says which of the user's files went with it."""
        mine = self.place.publish()
        if mine:
            self.progress.note(f"kept in {self.place.out}: {', '.join(mine)}")

    def note_peak(self) -> int:
        """Peak resident memory since the last call, in bytes."""
        peak = peak_rss_bytes()
        self.peak = max(self.peak, peak)
        reset_peak()
        return peak

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows `name` while the block runs, and notes its time and its peak of memory."""
        self.note_peak()
        since = clock()
        with self.progress.stage(name):
            yield
        self.note_stage(name, since, self.note_peak())

    def note_stage(self, name: str, since: tuple[float, float], peak: int) -> None:
        """Notes a stage that began at `since`, a reading of `clock`."""
        wall, own = (now - then for now, then in zip(clock(), since, strict=True))
        self.stages.append(
            {"name": name, "seconds": wall, "processor_seconds": own, "peak_rss_bytes": peak}
        )

    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def check_time(self, where: str) -> None:
        """Ends the run when it has taken longer than `require.max_minutes`.

        Raises:
            RequirementError: it has.
        """
        bound = self.spec.require.max_minutes
        minutes = self.seconds() / 60
        if bound is not None and minutes > bound:
            raise RequirementError(
                f"require.max_minutes: {minutes:.3g} minutes after {where}, bound {bound:g}"
            )
