"""Kills at random moments, and bit flips in what they leave: the bytes come out the same."""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from faults.job import Ended, clear, finish, kill_after, result, start, wait, work

INTERRUPTED = "interrupted; the same command goes on from here"


@dataclass
class Tally:
    """Counts of what happened, and a line for everything that was not right."""

    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def check(self, condition: bool, text: str) -> None:
        if not condition:
            self.wrong.append(text)


def timed(folder: Path) -> tuple[dict[str, str], float]:
    """The result of a run that nobody disturbs, and the seconds that it takes."""
    clear(folder)
    begin = time.monotonic()
    ended = finish(folder)
    assert ended.status == 0, ended.text
    return result(folder), time.monotonic() - begin


def kills(folder: Path, sent: signal.Signals, count: int, in_a_row: int, seed: int) -> Tally:
    """Sends a signal `count` times at random moments, some times in a row before a run may end.

    Runs that ended before the signal came do not count.
    """
    expected, seconds = timed(folder)
    draw = random.Random(seed)
    tally = Tally()
    while tally.counts.get("sent", 0) < count:
        clear(folder)
        for _ in range(draw.randint(1, in_a_row)):
            ended = kill_after(folder, draw.uniform(0, seconds), sent)
            if ended.status == 0:
                tally.add("ended before it")
                break
            tally.add("sent")
            _check_end(folder, ended, sent, expected, tally)
            if tally.counts["sent"] >= count:
                break
        if not (folder / "out").exists():
            last = finish(folder)
            tally.check(last.status == 0, f"the run that should end: {last}")
            if "resumed after pass" in last.text:
                tally.add("went on from a checkpoint")
        tally.add("runs to the end")
        tally.check(result(folder) == expected, "other bytes")
        tally.check(not work(folder).exists(), "a work folder is left")
    return tally


def _check_end(
    folder: Path, ended: Ended, sent: signal.Signals, expected: dict[str, str], tally: Tally
) -> None:
    if sent == signal.SIGINT:
        tally.check(ended.status == 130, f"exit status of an interrupted run: {ended}")
        tally.check(INTERRUPTED in ended.text, f"words of an interrupted run: {ended}")
        tally.check("Traceback" not in ended.text, f"words of an interrupted run: {ended}")
    else:
        tally.check(ended.status == -sent, f"exit status: {ended}")
    if (folder / "out").exists():
        tally.check(result(folder) == expected, "a half-written result")


def flips(folder: Path, moments: int, per_file: int, seed: int) -> Tally:
    """Flips bits in every file that runs killed at some moments leave, one at a time."""
    expected, seconds = timed(folder)
    draw = random.Random(seed)
    tally = Tally()
    for moment in range(moments):
        clear(folder)
        kill_after(folder, seconds * (moment + 1) / (moments + 1), signal.SIGKILL)
        if not work(folder).exists():
            continue
        tally.add("moments")
        kept = folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        work(folder).rename(kept)
        for file in sorted(path for path in kept.rglob("*") if path.is_file()):
            tally.add("files")
            for _ in range(per_file):
                _flip(folder, kept, file.relative_to(kept), draw, expected, tally)
    clear(folder)
    return tally


def _flip(
    folder: Path,
    kept: Path,
    name: Path,
    draw: random.Random,
    expected: dict[str, str],
    tally: Tally,
) -> None:
    clear(folder)
    shutil.copytree(kept, work(folder))
    file = work(folder) / name
    content = bytearray(file.read_bytes())
    if not content:
        tally.add("empty files")
        return
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    ended = wait(start(folder))
    tally.check(ended.status == 0, f"{name}, bit {bit} of byte {place}: {ended}")
    told = "damaged" in ended.text
    tally.add("flips told" if told else "flips without effect")
    same = ended.status == 0 and result(folder) == expected
    tally.check(same, f"{name}, bit {bit} of byte {place}: other bytes")
