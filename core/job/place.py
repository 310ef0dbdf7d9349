"""The folders of a run: the output folder, and a work folder beside it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from graphwright.ir.errors import ArgumentError
from graphwright.job.exchange import carry, put_in_place

REPORT, LOCK = "report.json", "spec.lock.yaml"
OWN_FILES = frozenset({REPORT, "report.html", LOCK})
"""Files of every result; the others are listed in its report."""


class OutputPlace:
    """The output folder, and the work folder beside it.

    Attributes:
        out: the output folder; where `--out` is a symbolic link, the folder that it leads to.
        work: the work folder. staging: where the result grows.
        is_main: whether this process writes. Of several that a launcher started on one job, the
            first does; the others read its work folder and only help to train.
    """

    def __init__(self, out: Path) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.is_main = not launched or int(os.environ.get("RANK", "0")) == 0
        self.out = Path(os.path.realpath(out)) if out.is_symlink() else out.absolute()
        self.work = self.out.parent / f".{self.out.name}.graphwright"
        self.staging = self.work / "result"

    def part(self, name: str) -> OutputPlace:
        """The place of one part of a model: a folder of the result, and of the work folder."""
        found = copy.copy(self)
        found.work = self.work / "parts" / name
        found.staging = self.staging / name
        return found

    def pass_work(self, index: int) -> Path:
        """Folder that the pass at this place of the chain may write, for a resume within it."""
        return self.work / "passes" / f"{index:03d}"

    @property
    def data_work(self) -> Path:
        """Folder of data that a run makes, for a resume within it."""
        return self.work / "data"

    @property
    def search_work(self) -> Path:
        """Folder of a search: its log, and what its candidates share."""
        return self.work / "search"

    def drop_data_work(self) -> None:
        """Removes data that an earlier run has made."""
        if self.is_main:
            shutil.rmtree(self.data_work, ignore_errors=True)

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
        self.check()
        with self._lock():
            try:
                yield
            finally:
                self._tidy()

    def check(self) -> None:
        """Raises ArgumentError where the output folder cannot be replaced."""
        try:
            if self.out.exists() and not self.out.is_dir():
                raise ArgumentError(f"--out {self.out} is a file", fix="Name a folder.")
            if os.path.ismount(self.out):
                raise ArgumentError(
                    f"--out {self.out} is a mount point, which cannot be replaced as a whole",
                    fix="Name a folder below it.",
                )
            foreign = self.out.is_dir() and any(self.out.iterdir()) and not self._is_ours()
        except OSError as error:
            raise ArgumentError(f"cannot read --out {self.out}: {error.strerror}") from None
        if foreign:
            raise ArgumentError(
                f"--out {self.out} holds other files, which would be lost",
                fix="Name a new folder, or an earlier result.",
            )

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        import fcntl

        while True:
            with self._opened_lock() as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise ArgumentError(
                        f"another run is writing to {self.out}",
                        fix="Wait for it, or name another --out.",
                    ) from None
                if not self._is_lock(handle):
                    continue  # a run that has just ended took its work folder away
                yield
                return

    def _opened_lock(self) -> IO[str]:
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            return (self.work / "lock").open("w")
        except OSError as error:
            raise ArgumentError(f"cannot write beside --out {self.out}: {error.strerror}") from None

    def _is_lock(self, handle: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(handle.fileno()), (self.work / "lock").stat())
        except FileNotFoundError:
            return False

    def _is_ours(self) -> bool:
        return (self.out / REPORT).is_file() and (self.out / LOCK).is_file()

    def _tidy(self) -> None:
        """Removes a work folder in which nothing is left that a later run could use."""
        names = ("checkpoints", "data", "passes", "parts", "result", "search")
        useful = [self.work / name for name in names]
        if not any(folder.exists() for folder in useful):
            shutil.rmtree(self.work, ignore_errors=True)

    def fresh_staging(self) -> Path:
        """An empty folder for the result."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        return self.staging

    def files(self) -> list[str]:
        """Names of the files of the result, with those that are still to be written."""
        found = (path for path in self.staging.rglob("*") if not path.is_dir())
        return sorted({*OWN_FILES, *(str(path.relative_to(self.staging)) for path in found)})

    def publish(self) -> list[str]:
        """Puts the finished result in its place and drops the checkpoints.

        There is no moment without an output folder (`put_in_place` names the exception). Files
        that the user has put into an earlier result are in the new one too; those whose names the
        new result needs itself get `.kept` behind them.

        Returns:
            Names of the user's files, relative to the output folder.
        """
        known = self._foreign(self.out)
        names = carry([self.out / name for name in known], self.out, self.staging)
        old = put_in_place(self.staging, self.out)
        if old is not None:
            late = [name for name in self._foreign(old) if name not in known]
            names += carry([old / name for name in late], old, self.out)
            shutil.rmtree(old, ignore_errors=True)
        for kept in ("checkpoints", "data", "parts", "search"):
            shutil.rmtree(self.work / kept, ignore_errors=True)
        self.drop_pass_work()
        return names

    def _foreign(self, folder: Path) -> list[str]:
        """Files (and empty folders) in an earlier result that no run has written, by name."""
        if not folder.is_dir():
            return []
        own = _own_files(folder)
        found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
        return [n for n, path in found.items() if n not in own and not _is_parent(path)]


def _is_parent(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and any(path.iterdir())


def _own_files(folder: Path) -> set[str]:
    """Names of the files that a run has written, as its report lists them."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        listed = report.get("files")
        rows = [row["path"] for row in report["result"]["artifacts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return set(OWN_FILES)
    if listed is not None:
        return set(listed)
    return {*OWN_FILES, *rows, *(f"{row}.data" for row in rows)}  # written before files were listed
