"""The step of PV-Tuning, as a hook of the training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.stored.representation import CodePlace, Representation
from graphwright.ir.tune import Hook, Moment

EPS = 1e-6


@dataclass(frozen=True)
class PvSettings:
    """Settings of the moves of continuous parts and codes; defaults are in the pass's options.

    Attributes:
        betas: of the continuous part's moments.
        code_rate, code_betas: of the buffers that codes are chosen from.
        lamb: whether steps are shares of the norm of what they move.
        most: share of all code groups that may change in a step.
        trust: largest ||change|| / ||weight|| in a step; None: no bound.
        decay: share of the buffer that goes back to the weight after every step.
        codes, continuous: whether they are trained.
    """

    betas: tuple[float, float]
    code_rate: float
    code_betas: tuple[float, float]
    lamb: bool
    most: float
    trust: float | None
    decay: float
    codes: bool
    continuous: bool


Parts = dict[str, dict[str, Tensor]]
"""What a weight is made of: `continuous` and `codes` by name."""


class Moments:
    """Adam's moments of one tensor; with `lamb` the step has the tensor's own norm as its unit."""

    def __init__(self, like: Tensor) -> None:
        self.first, self.second, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def step(
        self, x: Tensor, gradient: Tensor, rate: float, betas: tuple[float, float], lamb: bool
    ) -> Tensor:
        """x after a step.

        u = m / (sqrt(v) + eps), x <- x - rate c r u, with c = sqrt(1 - b2^t) / (1 - b1^t), and the
        trust ratio r = ||x|| / ||u|| of LAMB (You et al. 2020), or 1 for Adam. The trust ratio
        does not see c, as in the released code of PV-Tuning: first steps are smaller than a share
        `rate` of the norm where b1 is 0.
        """
        self.count += 1
        self.first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
        self.second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        update = self.first / (self.second.sqrt() + EPS)
        rate *= math.sqrt(1 - betas[1] ** self.count) / (1 - betas[0] ** self.count)
        if lamb:
            size, length = float(x.norm()), float(update.norm())
            rate *= size / length if size > 0 and length > 0 else 1.0
        return x - rate * update

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, "count": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        self.first, self.second = state["first"], state["second"]
        self.count = int(state["count"])


class Weight:
    """One compressed weight in training."""

    def __init__(self, representation: Representation, settings: PvSettings) -> None:
        self.rep, self.settings = representation, settings
        self.buffer = representation.value().detach().clone()
        self.moments = Moments(self.buffer)
        self.parts = {name: Moments(t) for name, t in representation.continuous.items()}
        self.first = {n: t.clone() for n, t in representation.codes.items()}
        self.changed = self.groups = 0
        """Code groups that the last step changed, and that there are."""
        self.largest_change = 0.0
        """Largest ||change|| / ||weight|| by codes in a step so far."""

    def step(self, gradient: Tensor, rate: float, code_rate: float) -> Tensor:
        """P step, V step; returns the weight."""
        s = self.settings
        if s.continuous and rate > 0:
            found = self.rep.gradients(gradient)
            for name, moments in self.parts.items():
                old = self.rep.continuous[name]
                self.rep.continuous[name] = moments.step(old, found[name], rate, s.betas, s.lamb)
        value = self.rep.value().detach()
        if s.codes and code_rate > 0:
            self.buffer = self.moments.step(self.buffer, gradient, code_rate, s.code_betas, s.lamb)
            value = self._choose(value)
            self.buffer = torch.lerp(self.buffer, value, s.decay) if s.decay else self.buffer
        return value

    def codes_changed(self) -> float:
        """Share of the bytes of codes that differ from the first ones."""
        pairs = [(self.first[n], t) for place in self.rep.places for n, t in
                 ((name, self.rep.codes[name]) for name in place.encoder.codes)]  # fmt: skip
        total = sum(t.numel() for _, t in pairs)
        return sum(int((a != b).sum()) for a, b in pairs) / max(total, 1)

    def _choose(self, value: Tensor) -> Tensor:
        """Encodes the groups anew whose buffers have moved farthest; returns the weight."""
        places = self.rep.local(self.buffer - value)
        sizes = [place.encoder.groups((wanted * factor).square())
                 for place, _, wanted, factor in places]  # fmt: skip
        every = torch.cat(sizes)
        self.groups = len(every)
        count = math.ceil(self.settings.most * self.groups)
        order = every.topk(count).indices
        starts = [0]
        for part in sizes:
            starts.append(starts[-1] + len(part))
        before = dict(self.rep.codes)
        self._encode(places, starts, order)
        new = self.rep.value().detach()
        if self.settings.trust is not None:
            kept = self._within_trust(places, starts, value, new, order)
            if len(kept) < count:
                self.rep.codes.update(before)
                self._encode(places, starts, kept)
                new = self.rep.value().detach()
        size = float(value.norm().clamp_min(1e-30))
        self.largest_change = max(self.largest_change, float((new - value).norm()) / size)
        self.changed = self._count_changes(places, value, new)
        return new

    def _encode(
        self,
        places: list[tuple[CodePlace, Tensor, Tensor, Tensor]],
        starts: list[int],
        order: Tensor,
    ) -> None:
        for (place, here, wanted, _), start, end in zip(places, starts, starts[1:], strict=False):
            chosen = order[(order >= start) & (order < end)] - start
            if len(chosen):
                target = here + wanted
                self.rep.codes.update(place.encoder.encode(self.rep.codes, target, chosen))

    def _within_trust(
        self, places: list[tuple[CodePlace, Tensor, Tensor, Tensor]], starts: list[int],
        old: Tensor, new: Tensor, order: Tensor,
    ) -> Tensor:  # fmt: skip
        """The first groups, one more than stay within the bound together."""
        moved = torch.cat(self._group_changes(places, old, new))[order]
        bound = (float(self.settings.trust or 0.0) * float(old.norm())) ** 2
        inside = int((moved.cumsum(0) <= bound).sum())
        return order[: inside + 1]

    def _group_changes(
        self, places: list[tuple[CodePlace, Tensor, Tensor, Tensor]], old: Tensor, new: Tensor
    ) -> list[Tensor]:
        """||change of the weight||^2 by code group."""
        return [
            place.encoder.groups((wanted * factor).square())
            for place, _, wanted, factor in self.rep.local(new - old)
        ]

    def _count_changes(
        self, places: list[tuple[CodePlace, Tensor, Tensor, Tensor]], old: Tensor, new: Tensor
    ) -> int:
        return sum(int((part > 0).sum()) for part in self._group_changes(places, old, new))

    def state(self) -> dict[str, Any]:
        return {
            "continuous": dict(self.rep.continuous), "codes": dict(self.rep.codes),
            "buffer": self.buffer, "moments": self.moments.state(),
            "parts": {name: part.state() for name, part in self.parts.items()},
            "largest_change": self.largest_change, "first": self.first,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        self.rep.continuous = dict(state["continuous"])
        self.rep.codes = dict(state["codes"])
        self.buffer = state["buffer"]
        self.moments.load(state["moments"])
        for name, part in self.parts.items():
            part.load(state["parts"][name])
        self.largest_change, self.first = float(state["largest_change"]), dict(state["first"])

    def parts_now(self) -> Parts:
        """Scales, codebooks and codes; steps put new tensors in their places."""
        return {"continuous": dict(self.rep.continuous), "codes": dict(self.rep.codes)}

    def put(self, parts: Parts) -> None:
        """Undoes what came behind `parts_now`."""
        self.rep.continuous = dict(parts["continuous"])
        self.rep.codes = dict(parts["codes"])


class PvHook(Hook):
    """Moves compressed weights in the place of the optimizer.

    The loop trains the rebuilt weights as plain parameters; before the optimizer's step this takes
    their gradients, moves what they are made of, and writes them anew.

    Args:
        weights: by name of the parameter.
        base_rate: rate of the optimizer where the schedule is 1.
        rest: settings by which the other parameters move; None leaves them to the optimizer.
    """

    def __init__(
        self, weights: Mapping[str, Weight], base_rate: float, rest: PvSettings | None = None
    ) -> None:
        self.weights, self.base_rate, self.rest = weights, base_rate, rest
        self.others: dict[str, Moments] = {}
        self.best: dict[str, Parts] = {}

    def before_step(self, at: Moment) -> None:
        rate = float(at.optimizer.param_groups[0]["lr"])
        share = rate / self.base_rate  # the schedule holds for codes too
        with torch.no_grad():
            for name, live in at.parameters.items():
                if live.grad is None or (name not in self.weights and self.rest is None):
                    continue
                gradient = live.grad.detach().float().cpu()
                live.copy_(self._moved(name, live, gradient, rate, share))
                live.grad = None  # nothing is left for the optimizer

    def _moved(
        self, name: str, live: Tensor, gradient: Tensor, rate: float, share: float
    ) -> Tensor:
        weight = self.weights.get(name)
        if weight is not None:
            return weight.step(gradient, rate, weight.settings.code_rate * share)
        assert self.rest is not None
        moments = self.others.setdefault(name, Moments(gradient))
        return moments.step(live.float().cpu(), gradient, rate, self.rest.betas, self.rest.lamb)

    def keep_best(self) -> None:
        self.best = {name: weight.parts_now() for name, weight in self.weights.items()}

    def restore_best(self) -> None:
        for name, parts in self.best.items():
            self.weights[name].put(parts)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": {name: weight.state() for name, weight in self.weights.items()},
            "others": {name: moments.state() for name, moments in self.others.items()},
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weight in self.weights.items():
            weight.load(state["weights"][name])
        for name, part in state["others"].items():
            self.others[name] = Moments(part["first"])
            self.others[name].load(part)
        self.best = dict(state["best"])
