"""Programs between passes, kept so that a killed run goes on after the last finished pass."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.atomic import write_atomically

if TYPE_CHECKING:
    from graphwright.ir.program import Program


MANIFEST = "manifest.json"


class _DamagedError(Exception):
    """A file does not hold what was written; names it."""


def chain_key(previous: str, **parts: Any) -> str:
    """Key of a step: a digest of everything that its result depends on."""
    text = json.dumps([previous, parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoints:
    """A folder with the program of the last finished pass worth keeping, and the uncompressed."""

    folder: Path

    def load(
        self, keys: list[str], warn: Callable[[str], None]
    ) -> tuple[int, Program, list[dict[str, Any]], Program | None] | None:
        """(index, program, records so far, uncompressed) of the stored step among `keys`.

        None if there is none; `uncompressed` is None where it is the program before all passes.

        One of another chain counts as none. So does a damaged one, of which `warn` is told: it
        costs the time that it would have saved, and is never an error.
        """
        from graphwright.ir.errors import GraphwrightError
        from graphwright.ir.files.archive import load_program

        if not (self.folder / MANIFEST).exists():
            return None
        try:
            entry = self._entry()
            if entry["key"] not in keys:
                return None
            programs = []
            for name, digest in entry["files"]:
                if file_sha256(self.folder / name) != digest:
                    raise _DamagedError(name)
                programs.append(load_program(self.folder / name))
            place = entry["uncompressed"]
            uncompressed = None if place is None else programs[place]
            return keys.index(entry["key"]), programs[0], entry["records"], uncompressed
        except _DamagedError as error:
            reason = f"{error} does not hold the bytes that were written"
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
        except GraphwrightError as error:
            reason = str(error)
        warn(f"the checkpoint of an earlier run is damaged, and is not used: {reason}")
        return None

    def _entry(self) -> dict[str, Any]:
        """The manifest: a line with the digest of the JSON behind it.

        Raises:
            _DamagedError: it is not.
        """
        written, _, text = (self.folder / MANIFEST).read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != written:
            raise _DamagedError(MANIFEST)
        return dict(json.loads(text))

    def save(
        self,
        index: int,
        key: str,
        program: Program,
        records: list[dict[str, Any]],
        uncompressed: Program | None,
    ) -> None:
        """Stores a step; the manifest is written last, so a kill leaves the old one or this.

        `uncompressed` is None where it is the program before all passes.
        """
        from graphwright.ir.files.archive import save_program

        self.folder.mkdir(parents=True, exist_ok=True)
        programs = [program]
        if uncompressed is not None and uncompressed is not program:
            programs.append(uncompressed)
        files = []
        for place, each in enumerate(programs):
            file = self.folder / f"{index:03d}-{key[:16]}-{place}.pt2"
            save_program(each, file)
            files.append((file.name, file_sha256(file)))
        place_of = None if uncompressed is None else len(programs) - 1
        entry = {"key": key, "files": files, "uncompressed": place_of, "records": records}
        text = json.dumps(entry).encode()
        signed = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
        write_atomically(self.folder / MANIFEST, signed)
        kept = {name for name, _ in files}
        for old in self.folder.glob("*.pt2"):
            if old.name not in kept:
                old.unlink()


@dataclass(frozen=True)
class SharedCheckpoints:
    """Steps of many chains, each in a folder of its own, so that a chain goes on where another one
    with the same beginning has been. Those used last are kept.

    Attributes:
        folder: where they lie.
        kept: number of them.
    """

    folder: Path
    kept: int = 16

    def load(
        self, keys: list[str], warn: Callable[[str], None]
    ) -> tuple[int, Program, list[dict[str, Any]], Program | None] | None:
        """The latest stored step among `keys`; see `Checkpoints.load`."""
        for index in reversed(range(len(keys))):
            found = self._of(keys[index]).load(keys[: index + 1], warn)
            if found is not None:
                (self._of(keys[index]).folder / MANIFEST).touch()
                return found
        return None

    def save(
        self,
        index: int,
        key: str,
        program: Program,
        records: list[dict[str, Any]],
        uncompressed: Program | None,
    ) -> None:
        """Stores a step; see `Checkpoints.save`."""
        self._of(key).save(index, key, program, records, uncompressed)
        stored = [path.parent for path in self.folder.glob(f"*/{MANIFEST}")]
        stored.sort(key=lambda path: (path / MANIFEST).stat().st_mtime_ns)
        for old in stored[: -self.kept]:
            shutil.rmtree(old, ignore_errors=True)

    def _of(self, key: str) -> Checkpoints:
        return Checkpoints(self.folder / key[:32])


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
