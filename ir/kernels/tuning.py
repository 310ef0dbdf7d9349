"""Tile sizes of kernels: measured once on a device, then read from a file.

Every kernel names a few candidates, the best guess first. Without a measurement the first one
runs, so that results are the same on every machine. With `GRAPHWRIGHT_TUNE=1` the first call of
every kind on a CUDA device times the candidates and writes the fastest into the cache, a JSON
file per device in `$GRAPHWRIGHT_CACHE`, else `$XDG_CACHE_HOME/graphwright`, else
`~/.cache/graphwright`. A later run reads it, whether it tunes or not.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

SWITCH = "GRAPHWRIGHT_TUNE"
FOLDER = "GRAPHWRIGHT_CACHE"
VERSION = 1
"""Of the kernels that a cached choice was measured with; raised when they change."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch parameters.

    Attributes:
        block_m: tokens of a tile; 1 for a kernel that handles one.
        block_n: output channels of a tile.
        block_k: columns of the weight in a step of the loop.
        warps, stages: of the program.
        split: parts of the inner dimension; 0 lets the kernel fill the device.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int = 0


Timer = Callable[[Callable[[], Any]], float]
"""Time of a call, in any unit."""


def bucket(m: int) -> int:
    """Token counts up to the next power of two share a choice."""
    return 1 << max(m - 1, 0).bit_length()


def cache_folder() -> Path:
    """The user's cache folder."""
    folder = os.environ.get(FOLDER)
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphwright"


def cache_file(device: str) -> Path:
    """File that keeps the choices of a device."""
    return cache_folder() / f"tiles-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}.json"


class Cache:
    """The choices of one device, in memory and in a file that may be missing or unreadable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.choices = _read(path)

    def find(self, key: str, candidates: Sequence[Tiles]) -> Tiles | None:
        """The choice that was measured, if it is still one of the candidates."""
        found = self.choices.get(key)
        return found if found in candidates else None

    def keep(self, key: str, tiles: Tiles) -> None:
        """Adds a choice; what other processes wrote meanwhile stays. A file that cannot be written
        is left alone: the choice holds for this process."""
        self.choices[key] = tiles
        merged = {**_read(self.path), **self.choices}
        record = {"version": VERSION, "choices": {k: asdict(v) for k, v in sorted(merged.items())}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                json.dump(record, file, indent=1)
            Path(file.name).replace(self.path)
        except OSError:
            return


def _read(path: Path) -> dict[str, Tiles]:
    """Choices of a file; none of a missing, damaged or older one."""
    names = {field.name for field in fields(Tiles)}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            return {}
        found = {}
        for key, sizes in record["choices"].items():
            if set(sizes) == names and all(type(size) is int for size in sizes.values()):
                found[key] = Tiles(**sizes)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def fastest(candidates: Sequence[Tiles], run: Callable[[Tiles], Any], timer: Timer) -> Tiles:
    """The candidate whose call takes the least time; of equal ones the first."""
    times = [timer(functools.partial(run, tiles)) for tiles in candidates]
    return candidates[times.index(min(times))]


def choose(
    kernel: str,
    kind: Sequence[object],
    candidates: Sequence[Tiles],
    run: Callable[[Tiles], Any],
    device: torch.device,
) -> Tiles:
    """The candidate to run.

    Args:
        kernel: its name.
        kind: what the choice depends on: bucket of tokens, sizes, bits, dtype.
        candidates: the first one is the choice where nothing was measured.
        run: launches the kernel with a candidate.
        device: of the tensors. Off CUDA nothing is measured or read.
    """
    if device.type != "cuda":
        return candidates[0]
    cache = _cache(device, os.environ.get(FOLDER))
    key = " ".join(map(str, (kernel, *kind)))
    found = cache.find(key, candidates)
    if found is None and os.environ.get(SWITCH) == "1" and not _is_recording():
        found = fastest(candidates, run, gpu_time)
        cache.keep(key, found)
    return candidates[0] if found is None else found


@functools.cache
def _cache(device: torch.device, folder: str | None) -> Cache:
    """Read once for a device and a folder."""
    return Cache(cache_file(torch.cuda.get_device_name(device)))


def _is_recording() -> bool:
    """While a CUDA graph is captured nothing may be timed."""
    return torch.cuda.is_current_stream_capturing()


def gpu_time(call: Callable[[], Any], repeats: int = 20) -> float:
    """Milliseconds of a call, the best of three rounds after a warm-up that compiles."""
    call()
    best = float("inf")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / repeats)
    return best
