"""A metric of the original and of the result: what an evaluation ends in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """A metric of the original and of the result.

    Attributes:
        metric: its name, or `module:function`.
        before: of the original.
        after: of the result.
        higher_is_better: direction of the metric.
        has_drop: whether before - after means anything; not for `snr_db`, where before is
            infinite.
        samples: samples it was taken over.
        what: what exactly was compared, in words.
    """

    metric: str
    before: float
    after: float
    higher_is_better: bool
    has_drop: bool
    samples: int
    what: str

    @property
    def drop(self) -> float | None:
        """Loss in units of the metric, positive when the result is worse; None if undefined."""
        if not self.has_drop:
            return None
        return self.before - self.after if self.higher_is_better else self.after - self.before

    def to_json(self) -> dict[str, Any]:
        """The report's `evaluation`; a figure that is not finite is None, and `exact` says whether
        it is the infinite `snr_db` of equal outputs."""
        return {
            "metric": self.metric,
            "before": _finite(self.before),
            "after": _finite(self.after),
            "drop": _finite(self.drop),
            "higher_is_better": self.higher_is_better,
            "exact": self.after == math.inf,
            "samples": self.samples,
            "what": self.what,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
