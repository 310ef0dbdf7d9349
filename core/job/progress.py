"""Progress of a run on stderr: a bar for what takes longer than a second, nothing for the rest."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from graphwright.ir.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

PATIENCE_S = 1.0
"""Stages shorter than this are not shown."""


class Progress:
    """Stages of a run, one inside another where they nest.

    On a terminal a stage gets a bar once it has taken a second; elsewhere (a log file) it gets
    one line when it ends. Writes to stderr, so that results on stdout stay clean.

    Args:
        quiet: show nothing.
        console: where to write; stderr when None.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self._console = console
        self._bars: Bars | None = None
        self._stages: list[_Stage] = []
        self._lock = threading.RLock()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows `name` while the block runs."""
        if self.quiet:
            yield
            return
        stage = _Stage(name, time.monotonic())
        self._stages.append(stage)
        timer = threading.Timer(PATIENCE_S, self._show, [stage])
        timer.daemon = True
        if self.console.is_terminal:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._end(stage)

    def update(self, description: str, done: int, total: int) -> None:
        """Says how far the innermost stage is; fit for `Context.progress`."""
        if self.quiet or not self._stages:
            return
        stage = self._stages[-1]
        stage.detail, stage.done, stage.total = description, done, total
        with self._lock:
            if self._bars is not None and stage.task is not None:
                self._bars.update(
                    stage.task, description=stage.label, completed=done, total=total or None
                )

    def note(self, text: str) -> None:
        """One line that stays."""
        if not self.quiet:
            self.console.print(printable(text), markup=False, highlight=False)

    @property
    def console(self) -> Console:
        """The console written to."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console

    def _show(self, stage: _Stage) -> None:
        """Gives a stage its bar; runs in the timer's thread."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        with self._lock:
            if stage not in self._stages:
                return  # it ended in this very moment
            if self._bars is None:
                self._bars = Bars(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=30),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    console=self.console,
                    transient=True,
                )
                self._bars.start()
            stage.task = self._bars.add_task(
                stage.label, total=stage.total or None, completed=stage.done
            )

    def _end(self, stage: _Stage) -> None:
        seconds = time.monotonic() - stage.begin
        with self._lock:
            self._stages.remove(stage)
            if self._bars is not None and stage.task is not None:
                self._bars.remove_task(stage.task)
                if not self._bars.task_ids:
                    self._bars.stop()
                    self._bars = None
        if seconds >= PATIENCE_S:
            self.note(f"{stage.name}: {seconds:.1f} s")


class _Stage:
    """One stage that is running."""

    def __init__(self, name: str, begin: float) -> None:
        self.name, self.begin = name, begin
        self.detail, self.done, self.total = "", 0, 0
        self.task: TaskID | None = None

    @property
    def label(self) -> str:
        """The text before the bar."""
        return f"{self.name}: {self.detail}" if self.detail else self.name
