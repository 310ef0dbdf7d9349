"""The folders of a run: the output folder, and a work folder beside it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from graphwright.ir.errors import ArgumentError


class OutputPlace:
    """The output folder, and the work folder beside it.

    Attributes:
        out: the output folder. work: the work folder. staging: where the result grows.
        is_main: whether this process writes. Of several that a launcher started on one job, the
            first does; the others read its work folder and only help to train.
    """

    def __init__(self, out: Path) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.is_main = not launched or int(os.environ.get("RANK", "0")) == 0
        self.out = out.absolute()
        self.work = self.out.parent / f".{self.out.name}.graphwright"
        self.staging = self.work / "result"

    def pass_work(self, index: int) -> Path:
        """Folder that the pass at this place of the chain may write, for a resume within it."""
        return self.work / "passes" / f"{index:03d}"

    def drop_pass_work(self) -> None:
        """Removes what passes have written."""
        if self.is_main:
            shutil.rmtree(self.work / "passes", ignore_errors=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time per output folder; refuses to replace a folder that is not ours."""
        if not self.is_main:
            yield
            return
        import fcntl

        if self.out.exists() and not self.out.is_dir():
            raise ArgumentError(f"--out {self.out} is a file", fix="Name a folder.")
        if self.out.is_dir() and any(self.out.iterdir()) and not self._is_ours():
            raise ArgumentError(
                f"--out {self.out} holds other files, which would be lost",
                fix="Name a new folder, or an earlier result.",
            )
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            handle = (self.work / "lock").open("w")
        except OSError as error:
            raise ArgumentError(f"cannot write beside --out {self.out}: {error.strerror}") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ArgumentError(f"another run is writing to {self.out}") from None
            try:
                yield
            finally:
                self._tidy()

    def _is_ours(self) -> bool:
        return (self.out / "report.json").is_file() and (self.out / "spec.lock.yaml").is_file()

    def _tidy(self) -> None:
        """Removes a work folder in which nothing is left that a later run could use."""
        useful = (self.work / "checkpoints", self.work / "passes", self.staging)
        if not any(folder.exists() for folder in useful):
            shutil.rmtree(self.work, ignore_errors=True)

    def fresh_staging(self) -> Path:
        """An empty folder for the result."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        return self.staging

    def publish(self) -> None:
        """Puts the finished result in its place and drops the checkpoints."""
        old = self.work / f"old-{os.getpid()}"
        if self.out.exists():
            self.out.rename(old)
        self.staging.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.work / "checkpoints", ignore_errors=True)
        self.drop_pass_work()
