"""Runs without room on a disk, without memory, without files: one message, and no bug of ours."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.job import Ended, clear, finish, result, start, wait
from faults.kills import Tally, timed

MIB = 1 << 20


def limited(kind: int, most: int) -> Callable[[], None]:
    """A call for a new process that sets one of its limits."""
    return lambda: resource.setrlimit(kind, (most, most))


def mapped() -> int:
    """Bytes of address space that this process has mapped, which forked ones share."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def small_disk(place: Path, size: str, files: int) -> Iterator[Path]:
    """A file system of a size and a number of files, where mounting is allowed."""
    place.mkdir(exist_ok=True)
    options = f"size={size},nr_inodes={files}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def check(ended: Ended, what: str, tally: Tally) -> None:
    """A run that lacks something ends well all the same, or with exit status 2 and one message."""
    tally.add("runs")
    tally.add("ended well" if ended.status == 0 else "one message")
    errors = [line for line in ended.text.splitlines() if line.startswith("optimize: ")]
    fits = ended.status == 0 or (ended.status == 2 and len(errors) == 1)
    odd = any(
        word in ended.text for word in ("Traceback", "a bug in graphwright", "terminate called")
    )
    tally.check(fits and not odd, f"{what}: {ended}")


def starved(folder: Path, steps: int) -> Tally:
    """Limits on the size of files, on address space and on open files, from next to nothing on."""
    expected, _ = timed(folder)
    tally = Tally()
    largest = max(file.stat().st_size for file in (folder / "out").iterdir())
    limits = [(resource.RLIMIT_FSIZE, largest * n // steps + 1) for n in range(steps)]
    limits += [(resource.RLIMIT_AS, mapped() + n * 64 * MIB // steps) for n in range(1, steps)]
    limits += [(resource.RLIMIT_NOFILE, 4 + n) for n in range(0, 2 * steps, 2)]
    for kind, most in limits:
        clear(folder)
        ended = wait(start(folder, before=limited(kind, most)))
        check(ended, f"limit {kind} at {most}", tally)
        if ended.status == 0:
            tally.check(result(folder) == expected, f"limit {kind} at {most}: other bytes")
        else:
            tally.check(not (folder / "out").exists(), f"limit {kind}: a result is left")
    clear(folder)
    return tally


def full(folder: Path, sizes: tuple[str, ...], files: tuple[int, ...]) -> Tally:
    """Disks that are too small, and too small in number of files."""
    tally = Tally()
    for size, count in [*((size, 0) for size in sizes), *(("64m", count) for count in files)]:
        with small_disk(folder / "disk", size, count) as disk:
            ended = finish(folder, "--out", str(disk / "out"))
            check(ended, f"disk of {size} and {count} files", tally)
            is_there = (disk / "out").exists()
            tally.check(is_there == (ended.status == 0), f"disk of {size}: {os.listdir(disk)}")
    return tally
