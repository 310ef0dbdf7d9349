"""From options to a running sparse optimizer, and from its zeros to the smaller program."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from graphwright.ir.channels import ChannelGroup, channel_groups, cut
from graphwright.ir.channels.eligible import eligible_groups
from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.ir.tune import Hook, Moment
from graphwright.passes.base import Action
from graphwright.passes.prune._oto.cric import HessoCric, probe_steps
from graphwright.passes.prune._oto.dhspg import Dhspg
from graphwright.passes.prune._oto.hesso import Hesso
from graphwright.passes.prune._oto.options import Otov2Options, settings
from graphwright.passes.prune._oto.shrink import Shrink, check_reachable
from graphwright.passes.prune._oto.units import Units, read_only, untrainable
from graphwright.passes.prune._units.eligible import check_cut

KINDS: dict[str, type[Shrink]] = {"hesso": Hesso, "hesso_cric": HessoCric, "dhspg": Dhspg}


def find_units(
    program: Program, options: Otov2Options, live: Collection[str]
) -> tuple[Units, list[Action]]:
    """The units that training can bring to zero, and why the other groups stay.

    Args:
        program: in inference mode.
        options: `targets`, `unit` and `norm` of them.
        live: names of the parameters in training.

    Raises:
        ModelError: there are none.
    """
    groups = channel_groups(program, unit=options.unit, norm=options.norm)
    eligible, actions = eligible_groups(program, groups, options.targets)
    if eligible:
        analysis = eligible[0].analysis
        names = {owner: alias for alias, owner in analysis.owners.items() if alias in live}
        read = read_only(analysis)
        reasons = {group: untrainable(group, names, read) for group in eligible}
        actions += [Action.left(g.name, reason, "kept") for g, reason in reasons.items() if reason]
        eligible = [g for g in eligible if not reasons[g]]
    if not eligible:
        raise ModelError("no channel group can be pruned by training",
                         fix="`graphwright inspect --groups` says why.")  # fmt: skip
    return Units(eligible, names, read), actions


def make_shrink(
    units: Units, options: Otov2Options, total: int | None, optimizer: torch.optim.Optimizer
) -> Shrink:
    """The sparse optimizer that the options name, around an ordinary one.

    Raises:
        ArgumentError: it does not fit the number of steps, or the sparsity cannot be reached.
    """
    rule = "sgd" if isinstance(optimizer, torch.optim.SGD) else "adam"
    found = settings(options, total, probe_steps(len(units.groups)), rule)
    check_reachable(units, found)
    return KINDS[options.method](units, found)


def learning_rates(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Learning rate by name; 0 for what the optimizer does not move."""
    rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: rates.get(id(p), 0.0) for name, p in parameters.items()}


class ShrinkHook(Hook):
    """A sparse optimizer on the tuning engine."""

    counts_steps = True

    def __init__(self, units: Units, options: Otov2Options) -> None:
        self.units, self.options = units, options
        self.shrink: Shrink | None = None
        self._loaded: dict[str, Any] | None = None
        self._losses: list[torch.Tensor] = []

    def before_backward(self, at: Moment, loss: torch.Tensor) -> None:
        if self.options.method == "hesso_cric":
            self._losses.append(loss.detach())

    def before_step(self, at: Moment) -> None:
        if self.shrink is None:
            self.shrink = make_shrink(self.units, self.options, at.total, at.optimizer)
            if self._loaded is not None:
                self.shrink.load_state_dict(self._loaded)
        self.shrink.before(at.step, at.parameters, self._mean_loss())

    def after_step(self, at: Moment) -> None:
        assert self.shrink is not None  # `before_step` made it
        self.shrink.after(at.step, at.parameters, learning_rates(at.optimizer, at.parameters))

    @property
    def redundant(self) -> torch.Tensor:
        """Flag per unit: on its way to zero. Also where a resumed run had no step left to do."""
        none = torch.zeros(self.units.count, dtype=torch.bool)
        if self.shrink is not None:
            return self.shrink.redundant
        return none if self._loaded is None else torch.as_tensor(self._loaded["redundant"])

    def state_dict(self) -> dict[str, Any]:
        return self.shrink.state_dict() if self.shrink is not None else self._loaded or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state or None

    def _mean_loss(self) -> float | None:
        """Of the step, over batches and processes: all of them must decide alike."""
        if not self._losses:
            return None
        loss = torch.stack(self._losses).mean()
        self._losses = []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        return float(loss)


def remove_zeros(
    sparse: Program, units: Units, zero: torch.Tensor, divisible: int
) -> tuple[Program, dict[ChannelGroup, list[int]], float]:
    """The program without its zero units, which ones these are, and how far the outputs moved.

    Raises:
        ContractError: the smaller program differs from the full sparse one by more than rounding.
    """
    picks = units.picks(zero, divisible)
    smaller = cut(sparse, picks)
    return smaller, picks, check_cut(sparse, smaller, "prune.otov2")


def figures(units: Units, picks: Mapping[ChannelGroup, list[int]]) -> dict[str, float]:
    """Shares that are left after a cut."""
    analysis = units.analysis
    nothing = np.zeros(analysis.count, bool)
    removed = nothing.copy()
    for group, chosen in picks.items():
        removed[group.classes[chosen]] = True
    return {
        "units_removed": float(sum(len(u) for u in picks.values())),
        "group_sparsity": float(removed.sum()) / units.count,
        "parameters_left": analysis.parameters(removed) / max(1, analysis.parameters(nothing)),
        "macs_left": analysis.macs(removed) / max(1.0, analysis.macs(nothing)),
    }
