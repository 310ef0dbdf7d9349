"""Programs between passes, kept so that a killed run goes on after the last finished pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.atomic import write_atomically

if TYPE_CHECKING:
    from graphwright.ir.program import Program


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

        A stale or damaged checkpoint counts as none: it is never worth an error. `warn` is told
        of one that is not stale and cannot be read.
        """
        from graphwright.ir.errors import GraphwrightError
        from graphwright.ir.files.archive import load_program

        manifest = self.folder / "manifest.json"
        try:
            entry = json.loads(manifest.read_text())
            index = keys.index(entry["key"])
            programs = []
            for name, digest in entry["files"]:
                if file_sha256(self.folder / name) != digest:
                    return None
                programs.append(load_program(self.folder / name))
            place = entry["uncompressed"]
            uncompressed = None if place is None else programs[place]
            return index, programs[0], entry["records"], uncompressed
        except GraphwrightError as error:
            warn(f"the checkpoint of an earlier run cannot be read, and is not used: {error}")
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            pass
        return None

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
        write_atomically(self.folder / "manifest.json", json.dumps(entry).encode())
        kept = {name for name, _ in files}
        for old in self.folder.glob("*.pt2"):
            if old.name not in kept:
                old.unlink()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
