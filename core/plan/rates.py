"""Rates of this machine: measured once, then read from a file in the user's cache folder.

The folder is `$GRAPHWRIGHT_CACHE`, else `$XDG_CACHE_HOME/graphwright`, else
`~/.cache/graphwright`. A file belongs to a processor, a device, a number of threads, and versions
of Python, torch and Graphwright.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphwright.ir.atomic import write_atomically
from graphwright.ir.work import TIMED, Work

PATIENCE_S = 120
"""Seconds after which measuring is given up."""


@dataclass(frozen=True)
class Lowered:
    """Cost of lowering to a backend.

    Attributes:
        first: seconds of the first time alone (imports).
        node: seconds per node of the graph.
        memory: bytes that the first time takes, of a model of no size.
    """

    first: float
    node: float
    memory: float


@dataclass(frozen=True)
class Rates:
    """Work per second of each kind (`ir.work.Work`).

    Attributes:
        written: bytes per second to disk.
        lowered: by backend.
        seconds: that measuring took.
    """

    macs: float
    moved: float
    calls: float
    factored: float
    decomposed: float
    edited: float
    written: float
    lowered: Mapping[str, Lowered]
    seconds: float

    def time(self, work: Work) -> float:
        """Seconds of some work."""
        spent = sum(getattr(work, kind) / getattr(self, kind) for kind in TIMED)
        return float(spent + work.disk / self.written)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Rates:
        """Rates out of plain data.

        Raises:
            KeyError, TypeError, ValueError: they are not all there, or not positive.
        """
        lowered = {
            name: Lowered(**{key: float(value) for key, value in row.items()})
            for name, row in content["lowered"].items()
        }
        plain = {key: float(content[key]) for key in (*TIMED, "written", "seconds")}
        if not all(0 < value < float("inf") for value in plain.values()):
            raise ValueError("a rate is not positive")
        return cls(lowered=lowered, **plain)


_KNOWN: dict[Path, Rates | None] = {}
"""Measured in this process: parts and candidates ask again, and the file may not be writable."""


def measured_rates(device: str, say: Callable[[str], object] | None = None) -> Rates | None:
    """Rates of this machine, from the file or measured now; None where measuring fails.

    Args:
        device: `cpu` or `cuda`.
        say: told what was measured, or why not.
    """
    key = _key(device)
    path = cache_path(key)
    if path not in _KNOWN:
        _KNOWN[path] = _read(path, key) or _measured_and_kept(device, key, path, say)
    return _KNOWN[path]


def _measured_and_kept(
    device: str, key: Mapping[str, Any], path: Path, say: Callable[[str], object] | None
) -> Rates | None:
    try:
        content = _measured(device)
        found = Rates.of(content)
    except (OSError, subprocess.SubprocessError, KeyError, TypeError, ValueError) as error:
        if say is not None:
            say(
                f"the speed of this machine could not be measured, so nothing is estimated: {error}"
            )
        return None
    if say is not None:
        say(f"measured the speed of this machine for estimates: {found.seconds:.1f} s, once")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": key, "rates": asdict(found)}, indent=1)
        write_atomically(path, text.encode())
    except OSError as error:
        if say is not None:
            say(f"the measured speed could not be kept: {error}")
    return found


def cache_path(key: Mapping[str, Any]) -> Path:
    """File of the rates that belong to this key."""
    from graphwright.ir.kernels.tuning import cache_folder

    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder: Path = cache_folder()
    return folder / f"rates-{digest}.json"


def _read(path: Path, key: Mapping[str, Any]) -> Rates | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Rates.of(content["rates"]) if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(device: str) -> dict[str, Any]:
    import torch

    from graphwright import __version__
    from graphwright.report.build import machine

    facts = machine()
    if device == "cpu":
        facts.pop("gpu", None)
    threads = torch.get_num_threads()
    return {**facts, "device": device, "threads": threads, "torch": torch.__version__,
            "graphwright": __version__}  # fmt: skip


def _measured(device: str) -> dict[str, Any]:
    """What the measuring process prints; it has as many threads as this one."""
    import torch

    threads = str(torch.get_num_threads())
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launched}
    environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    ran = subprocess.run(
        [sys.executable, "-m", "graphwright.plan.measure", device],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise subprocess.SubprocessError(last[:200])
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found
