"""Figures as people read them, and the shapes of the report's bars."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def size_text(count: float | None) -> str:
    """Bytes with a decimal unit: `23.1 MB`."""
    return "-" if count is None else _scaled(count, ("B", "kB", "MB", "GB", "TB"), " ")


def count_text(count: float | None) -> str:
    """A count with a unit: `22.7 M`, `1.2 G`."""
    return "-" if count is None else _scaled(count, ("", "k", "M", "G", "T"), " ")


def _scaled(value: float, units: tuple[str, ...], space: str) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.0f}" if power == 0 or abs(value) >= 99.95 else f"{value:.3g}"
    return f"{digits}{space}{units[power]}".rstrip()


def time_text(seconds: float | None) -> str:
    """Seconds with a fitting unit: `12 ms`, `3.4 s`, `2 min 5 s`."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def error_text(error: dict[str, Any]) -> str:
    """An error in one line: `none`, `relative 0.0031, cosine 0.9999952`, `not comparable`."""
    if error["max_abs"] == 0:
        return "none"
    if error["relative"] is None:
        return "not comparable"
    cosine = error["cosine"]
    tail = "" if cosine is None else f", cosine {figure_text(cosine)}"
    return f"relative {error['relative']:.2g}{tail}"


def metric_text(value: float | None, *, exact: bool) -> str:
    """A metric; one that is no number is said to be exact only where it is known to be."""
    if value is None:
        return "exact" if exact else "not finite"
    return figure_text(value)


def figure_text(value: float | None) -> str:
    """A figure; close below 1 with as many nines as it takes: `0.99999951`."""
    if value is None:
        return "-"
    if 0.99 < value < 1.0:
        return f"{value:.{1 - math.floor(math.log10(1 - value))}f}".rstrip("0")
    return f"{value:.6g}"


def share(value: float | None, values: Iterable[float | None]) -> float:
    """Length of a bar in per cent of the longest; 0 where there is no value."""
    longest = max((abs(v) for v in values if v is not None), default=0.0)
    return 100 * abs(value) / longest if value is not None and longest else 0.0


def log_share(value: float | None, low: float, high: float) -> float:
    """Length of a bar on a logarithmic axis from `low` to `high`, in per cent, at least 2."""
    if not value or not math.isfinite(value):
        return 0.0
    position = (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))
    return 100 * min(1.0, max(0.02, position))


def log_axis(values: Iterable[float | None]) -> tuple[float, float]:
    """Powers of ten around all positive values, a decade at least."""
    positive = [v for v in values if v and math.isfinite(v)]
    if not positive:
        return 1e-8, 1.0
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return 10.0**low, 10.0 ** max(high, low + 1)
