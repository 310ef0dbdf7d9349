"""Options of prune.otov2, and what they come to in a run of a given length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from graphwright.ir.errors import ArgumentError
from graphwright.ir.options import Bounded, Rule, Selector, only_with
from graphwright.ir.tune import TuneOptions

Steps = Annotated[int, Field(ge=1)]

OWN = {
    "pruning_periods": ("hesso",),
    "score_sign": ("hesso", "hesso_cric"),
    "sampling_steps": ("hesso_cric",),
    "max_cycles": ("hesso_cric",),
    "pruning_steps": ("hesso", "hesso_cric"),
    "tolerance": ("dhspg",),
    "epsilon": ("dhspg",),
    "penalty": ("dhspg",),
    "amplify": ("dhspg",),
    "hat_coefficient": ("dhspg",),
}
"""Methods that an option belongs to; the rest belong to all."""

# Shares of all steps, for lengths that are not given.
START_SHARE = 0.1
PRUNING_SHARE = {"hesso": 0.3, "hesso_cric": 0.25}
SAMPLING_SHARE = 0.02
PENALTY = {"sgd": (1e-3, 2.0, 10.0), "adam": (1e-2, 20.0, 1e3)}
"""lambda, amplification and hat coefficient, by the rule of the update."""


class Otov2Options(Bounded):
    """Options of prune.otov2."""

    rules = (
        *(only_with(name, "method", owners) for name, owners in OWN.items()),
        Rule("tune", "tune.get('patience') is None",
             "patience could end the training before the units are zero"),
        Rule("pruning_steps", "pruning_steps is None or pruning_steps >= pruning_periods",
             "{pruning_steps} pruning_steps cannot be cut into {pruning_periods} pruning_periods"),
    )  # fmt: skip

    method: Literal["hesso", "hesso_cric", "dhspg"] = "hesso"
    """The way units go to zero: `hesso` picks them by a score and lets them decay;
    `hesso_cric` tries that out in cycles first; `dhspg` pulls them by a penalty and projects."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the removable units (zero-invariant groups) that goes."""

    group_divisible: Annotated[int, Field(ge=1)] = 1
    """Each group keeps a multiple of this many units; smaller groups stay whole."""

    start_pruning_step: Annotated[int, Field(ge=0)] | None = None
    """Steps of ordinary training before; a tenth of all steps when absent."""

    pruning_steps: Steps | None = None
    """Steps in which units decay (`hesso`, `hesso_cric`); 30% of all steps, or 25% with
    `hesso_cric`, when absent. The codes' default of 1 prunes at once."""

    pruning_periods: Steps = 1
    """Parts of `pruning_steps`; each picks its share of the units anew (`hesso`)."""

    score_sign: Literal["paper", "hesso_code"] = "paper"
    """Sign of the cosine between a unit and its step in the score: in OTOv2's paper a unit that
    the step shrinks is redundant; in HESSO's code it is important (`hesso`, `hesso_cric`)."""

    sampling_steps: Steps | None = None
    """Steps of a cycle (`hesso_cric`); a fiftieth of all steps when absent."""

    max_cycles: Steps = 10
    """Cycles at most (`hesso_cric`)."""

    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the units by which more than `sparsity` are pulled towards zero (`dhspg`)."""

    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Largest turn of a unit in a step before it is set to zero: where its product with the unit
    before the step is below epsilon times the square (`dhspg`). The default is that of the
    published runs (0.9 for VGG16); the code's own is 0."""

    penalty: Annotated[float, Field(gt=0)] | None = None
    """Smallest coefficient lambda of the penalty (`dhspg`); 1e-3 with `sgd`, else 1e-2, when
    absent."""

    amplify: Annotated[float, Field(ge=1)] | None = None
    """Multiple of the smallest effective lambda that is taken (`dhspg`); 2 with `sgd`, else 20."""

    hat_coefficient: Annotated[float, Field(ge=1)] | None = None
    """Largest lambda as a multiple of `penalty` (`dhspg`); 10 with `sgd`, else 1000."""

    unit: Literal["head", "channel"] = "head"
    """Unit of a channel dimension that is split into heads."""

    norm: Literal["exact", "pin"] = "exact"
    """Channels under a layer norm may go, and it keeps its divisor; or they stay."""

    targets: Selector = ("*",)
    """Layers whose output channels may go: selector patterns over names and kinds. A group that
    holds output channels of another layer stays."""

    tune: TuneOptions = TuneOptions()
    """Options of training. The result is that of the last step, whatever `keep_best` says: an
    earlier one is not sparse yet; for the same reason there is no `patience`."""


@dataclass(frozen=True)
class OtoSettings:
    """Settings of the sparse optimizers: the options of `prune.otov2` with every default filled
    in."""

    method: str
    sparsity: float
    group_divisible: int
    start: int
    steps: int
    periods: int
    tolerance: float
    epsilon: float
    penalty: float
    amplify: float
    hat_coefficient: float
    sampling_steps: int
    max_cycles: int
    compat: bool


def settings(options: Otov2Options, total: int | None, probes: int, rule: str) -> OtoSettings:
    """The options with every default filled in.

    Args:
        options: as given.
        total: steps of the run; None where it is not known.
        probes: steps that the probing of `hesso_cric` takes.
        rule: `sgd`, or `adam` for all the rest.

    Raises:
        ArgumentError: pruning does not end within the run, or a default needs its length.
    """
    kind = options.method

    def share(part: float, name: str) -> int:
        if total is None:
            raise ArgumentError(f"{name} is not given, and neither is the number of steps",
                                fix=f"Give total_steps or {name}.")  # fmt: skip
        return max(1, int(total * part))

    start = options.start_pruning_step
    start = share(START_SHARE, "start_pruning_step") if start is None else start
    steps = sampling = 1
    if kind != "dhspg":
        steps = options.pruning_steps or share(PRUNING_SHARE[kind], "pruning_steps")
    if kind == "hesso_cric":
        sampling = options.sampling_steps or share(SAMPLING_SHARE, "sampling_steps")
    if steps < options.pruning_periods:
        raise ArgumentError(f"{steps} pruning steps cannot be cut into "
                            f"{options.pruning_periods} periods", fix="Train longer.")  # fmt: skip
    trials = probes + options.max_cycles * sampling + 1 if kind == "hesso_cric" else 0
    if total is not None and start + trials + steps > total:
        what = f" + {trials} (probing and cycles)" if trials else ""
        raise ArgumentError(
            f"{start} (before pruning){what} + {steps} (pruning) steps are more than the {total}"
            " of the run",
            fix="Train longer, or lower start_pruning_step, pruning_steps or sampling_steps.",
        )
    penalty, amplify, hat = PENALTY["sgd" if rule == "sgd" else "adam"]
    return OtoSettings(
        kind, options.sparsity, options.group_divisible, start, steps, options.pruning_periods,
        options.tolerance, options.epsilon, options.penalty or penalty, options.amplify or amplify,
        options.hat_coefficient or hat, sampling, options.max_cycles,
        options.score_sign == "hesso_code",
    )  # fmt: skip
