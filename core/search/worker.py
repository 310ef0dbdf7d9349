"""The process that candidates are run in: one that hangs or crashes takes only itself down."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir import errors
from graphwright.ir.errors import GraphwrightError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from graphwright.ir.files import LoadedModel
    from graphwright.ir.parts import Parts
    from graphwright.ir.program import Program
    from graphwright.job.run import JobSettings
    from graphwright.specs.spec import Spec


@dataclass(frozen=True)
class Answer:
    """What a candidate gave.

    Attributes:
        figures: see `graphwright.search.trial.figures_of`; None where it failed.
        failed: why; empty where it did not.
        seconds: time that it took.
        is_stopped: whether it failed at its time limit.
    """

    figures: dict[str, Any] | None
    failed: str
    seconds: float
    is_stopped: bool = False


class Bench:
    """Runs candidates on one model, which is loaded and traced once."""

    def __init__(self, source: str | Path, settings: JobSettings, folder: Path) -> None:
        self._source, self._settings, self._folder = source, settings, folder
        self._opened: dict[tuple[bool, ...], tuple[LoadedModel, Program | Parts]] = {}

    def facts(self, spec: Spec) -> dict[str, Any]:
        """Digest of the model, and the elements of its weights."""
        from graphwright.search.proof import weight_elements

        loaded, original = self._open(self._job(spec))
        return {"sha256": loaded.sha256, "elements": weight_elements(original)}

    def figures(self, spec: Spec) -> dict[str, Any]:
        """Compiles a candidate; its files are removed again.

        Raises:
            GraphwrightError: it cannot be compiled.
        """
        from graphwright.search.trial import figures_of

        job = self._job(spec)
        try:
            return figures_of(job.built(*self._open(job)).report)
        finally:
            shutil.rmtree(job.run.place.work, ignore_errors=True)

    def _job(self, spec: Spec) -> Any:
        from graphwright.job.memory import reset_peak
        from graphwright.job.place import OutputPlace
        from graphwright.job.progress import Progress
        from graphwright.job.run import Run
        from graphwright.job.stages import Job

        reset_peak()
        place = OutputPlace(self._folder / "trial")
        return Job(Run(spec, self._settings, place, Progress(quiet=True), time.monotonic()))

    def _open(self, job: Any) -> tuple[LoadedModel, Program | Parts]:
        """The model in the dtype that the candidate takes it in."""
        from graphwright.ir.declarations import EVERY_DTYPE
        from graphwright.job.rules import dtype_refusal

        refusal = dtype_refusal(job.spec)
        key = tuple(bool(refusal(dtype)) for dtype in EVERY_DTYPE)
        if key not in self._opened:
            loaded = job.load(self._source)
            self._opened[key] = loaded, job.trace(loaded)
        return self._opened[key]


def serve(pipe: Connection, source: str | Path, settings: JobSettings, folder: Path,
          threads: int) -> None:  # fmt: skip
    """The body of the process: answers (name of a method of `Bench`, spec) until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the search itself ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from graphwright.ir.lack import lacks_told
    from graphwright.ir.user_code import watched
    from graphwright.job.environment import deterministic

    torch.set_num_threads(threads)
    with deterministic(), watched(no_code=settings.no_code, say=lambda _: None):
        bench = Bench(source, settings, folder)
        with suppress(EOFError):
            while True:
                method, spec = pipe.recv()
                pipe.send(_answered(lacks_told, getattr(bench, method), spec))


def _answered(
    told: Callable[[], Any], method: Callable[[Spec], dict[str, Any]], spec: Spec
) -> tuple[str, Any]:
    try:
        with told():
            return "done", method(spec)
    except GraphwrightError as error:
        return type(error).__name__, (error.message, error.where, error.fix, error.details)
    except Exception as error:  # a candidate that breaks something is one that failed
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return "GraphwrightError", (f"{type(error).__name__}: {first}", "", "", ())


def _end_with_parent() -> None:
    """A search that is killed leaves no process behind that goes on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class Worker:
    """The search's side of the process, which is started again after a crash."""

    def __init__(self, source: str | Path, settings: JobSettings, folder: Path) -> None:
        self._arguments = (source, settings, folder)
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def facts(self, spec: Spec) -> dict[str, Any]:
        """See `Bench.facts`.

        Raises:
            GraphwrightError: the model cannot be opened.
        """
        kind, content = self._ask("facts", spec, None)
        if kind == "done":
            return dict(content)
        message, where, fix, details = content
        raise getattr(errors, kind, GraphwrightError)(
            message, where=where, fix=fix, details=details
        )

    def run(self, spec: Spec, limit: float | None) -> Answer:
        """Compiles a candidate within a time limit in seconds."""
        begin = time.monotonic()
        kind, content = self._ask("figures", spec, limit)
        seconds = time.monotonic() - begin
        if kind == "done":
            return Answer(content, "", seconds)
        message, where, *_ = content
        told = f"{where}: {message}" if where else message
        return Answer(None, told.splitlines()[0], seconds, is_stopped=kind == "stopped")

    def close(self, patience: float = 5.0) -> None:
        """Ends the process: by itself where it waits for work, else by force."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join(patience)
            self._process.kill()
            self._process.join()
            self._process.close()
        self._process = self._pipe = None

    def _ask(self, method: str, spec: Spec, limit: float | None) -> tuple[str, Any]:
        pipe = self._started()
        try:
            pipe.send((method, spec))
            if pipe.poll(limit):
                answer: tuple[str, Any] = pipe.recv()
                return answer
        except (EOFError, BrokenPipeError, ConnectionResetError):
            assert self._process is not None
            self._process.join()
            code = self._process.exitcode
            self.close()
            return "crashed", (f"its process ended with {_ending(code)}", "", "", ())
        self.close(patience=0.0)
        return "stopped", (f"stopped at its time limit of {limit:.3g} s", "", "", ())

    def _started(self) -> Connection:
        if self._pipe is not None:
            return self._pipe
        import torch

        context = multiprocessing.get_context("spawn")  # a fork of threads that hold locks hangs
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, *self._arguments, torch.get_num_threads())
        )
        self._process.start()
        theirs.close()
        return self._pipe


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"status {code}"
    return signal.Signals(-code).name
