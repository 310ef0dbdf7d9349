"""The section `search` of a spec: where the spec may vary, what is best, and for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from graphwright.ir.options import Options, Rule

Measure = Literal["file_mb", "latency_ms", "speedup", "cosine", "drop"]
"""Figures of a result. Smaller is better, except for `speedup` and `cosine`."""

_Positive = Annotated[float, Field(gt=0)]
_MINUTES = Field(gt=0, json_schema_extra={"x-graphwright": {"unit": "minutes"}})


class ChoiceSection(Options):
    """Values that a search may give one place of the spec: listed ones, or those of a range."""

    rules = (
        Rule(
            "choices",
            "(choices is None) != (range is None)",
            "give `choices`, a list of values, or `range`, [lowest, highest]",
        ),
        Rule("choices", "choices is None or len(choices) > 0", "an empty list leaves no value"),
        Rule("range", "range is None or range[0] < range[1]", "expected [lowest, highest]"),
        Rule("step", "step is None or range is not None", "step is for a `range`"),
        Rule("step", "step is None or not log", "give step or log, not both"),
        Rule("log", "not log or range is not None", "log is for a `range`"),
        Rule("log", "not log or range[0] > 0", "a logarithmic range starts above 0"),
    )

    choices: tuple[Any, ...] | None = None
    """Values to choose from. For an entry of `passes` or `lower` as a whole: entries as they
    stand there, or `none`, which leaves the entry out."""

    range: tuple[int | float, int | float] | None = None
    """Lowest and highest value, both included. Whole numbers where both are written as such."""

    step: _Positive | None = None
    """Distance between values of a range; absent, 1 for whole numbers, and any value else."""

    log: bool = False
    """Draw from the range on a logarithmic scale."""


class SearchSection(Options):
    """Looks for the best spec: tries other values at places of this one, and keeps the best
    candidate that meets every bound of `require`."""

    rules = (
        Rule("space", "len(space) > 0", "an empty space leaves nothing to search"),
        Rule(
            "objective",
            "len(objective) in (1, 2) and len({*objective}) == len(objective)",
            "give one measure, or two different ones",
        ),
        Rule(
            "strategy",
            "strategy == 'grid' or trials is not None or minutes is not None",
            "{strategy} needs a budget: `trials` or `minutes`",
        ),
    )

    space: dict[str, ChoiceSection]
    """What may vary: by place, as `--set` names it (`passes.1.bits`), the values to try. Places
    lie in `passes`, `lower`, `calibration` or `training`. They are given their values in this
    order; a place in an entry that a candidate does not have is passed over."""

    objective: tuple[Measure, ...]
    """What is best: `file_mb`, the largest artifact in MB; `latency_ms`, median time of a call;
    `speedup` over the original; `cosine` of the outputs with the original's; `drop` of the metric
    of `evaluate`. One measure, or two, of which a search finds the Pareto front."""

    strategy: Literal["grid", "random", "tpe", "nsga2"] = "tpe"
    """Which candidates are tried: `grid`, all of them in order; `random` draws; `tpe`, a
    tree-structured Parzen estimator; `nsga2`, an evolution for two objectives. All but `grid` are
    Optuna's, and need the extra `search`."""

    trials: Annotated[int, Field(ge=1)] | None = None
    """Largest number of candidates that are tried."""

    minutes: Annotated[float, _MINUTES] | None = None
    """Largest time that candidates take together, in minutes."""

    trial_minutes: Annotated[float, _MINUTES] | None = None
    """Time limit of one candidate, in minutes; one that takes longer is stopped, and has failed."""
