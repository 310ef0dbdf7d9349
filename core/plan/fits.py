"""What of a plan will not fit: into memory, onto the disks, or within the spec's bounds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphwright.plan.estimate import Step, total
from graphwright.report.charts import size_text, time_text

if TYPE_CHECKING:
    from graphwright.specs.sections import RequireSection


def available_memory() -> int | None:
    """Bytes that processes can still take: of the machine, or of the control group's limit."""
    found = [value for value in (_of_machine(), _of_group()) if value is not None]
    return min(found, default=None)


def free_disk(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not be there yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def lacking(
    steps: Sequence[Step], *, held: int, memory: int | None, disk: int, out: Path
) -> list[str]:
    """What the machine lacks for a plan, a line each.

    Args:
        steps: of the plan.
        held: resident bytes of this process now.
        memory: bytes that are available beside them; None where the system does not say.
        disk: free bytes where the result is written. out: that place.
    """
    lines = []
    highest = max(steps, key=lambda step: step.peak_rss_bytes, default=None)
    if highest is not None and memory is not None and highest.peak_rss_bytes > held + memory:
        lines.append(
            f"memory: {_named(highest)} takes about {size_text(highest.peak_rss_bytes)}, and this "
            f"process can have {size_text(held + memory)}"
        )
    written = total(steps)[2]
    if written > disk:
        lines.append(
            f"disk: the run writes up to {size_text(written)} beside {out}, where "
            f"{size_text(disk)} are free"
        )
    return lines


def beyond_bounds(steps: Sequence[Step], seconds: float, require: RequireSection) -> list[str]:
    """Bounds of the spec that the estimate is beyond, a line each.

    Args:
        steps: of the plan. seconds: that the run has taken already.
        require: the bounds.
    """
    lines = []
    took, peak, _ = total(steps)
    minutes = (took + seconds) / 60
    if require.max_minutes is not None and minutes > require.max_minutes:
        lines.append(f"require.max_minutes: about {time_text(minutes * 60)}, bound "
                     f"{require.max_minutes:g} minutes")  # fmt: skip
    if require.max_rss_gb is not None and peak > require.max_rss_gb * 1e9:
        lines.append(f"require.max_rss_gb: about {peak / 1e9:.3g}, bound {require.max_rss_gb:g}")
    return lines


def _named(step: Step) -> str:
    return f"{step.part}: {step.name!r}" if step.part else repr(step.name)


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return None
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_group() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return None if limit == "max" else max(int(limit) - used, 0)
    except (OSError, ValueError):
        return None
