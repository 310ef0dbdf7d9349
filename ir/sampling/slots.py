"""The slots of a stream (P87): their levels, what the network is asked, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.schedule import SMALLEST, NoiseSchedule
from graphwright.ir.sampling.solvers.first import Lcm

NOISES, WAITING, REFERENCE = "noises", "waiting", "reference"
"""Inputs of a tick: fixed noise of every slot [slots, batch, ...]; the frames behind slot 0, and
the data that residual guidance leads them away from, [slots - 1, batch, ...] each."""

SCALE, DELTA = "guidance_scale", "delta"


@dataclass(frozen=True)
class Slots:
    """The levels that frames go through, and how they are guided there.

    Attributes:
        a, s: factors of data and noise per slot, noisiest first.
        time: what the network is told per slot.
        skip, out: factors of the sample and of the data in what a slot makes of them.
        mode: `none`; `self`, residual guidance by the frame's own noise; `initialize`, by one
            prediction without the condition when a frame enters; `full`, by one in every slot.
    """

    a: tuple[float, ...]
    s: tuple[float, ...]
    time: tuple[float, ...]
    skip: tuple[float, ...]
    out: tuple[float, ...]
    mode: str

    @classmethod
    def of(
        cls, schedule: NoiseSchedule, steps: Sequence[float], mode: str, boundary: bool
    ) -> Slots:
        """The slots at these places of a schedule.

        Raises:
            ArgumentError: a place off the schedule, without data or noise, or the boundary scaling
                of consistency models on no table.
        """
        low, high = schedule.ends()
        off = [step for step in steps if not low <= step <= high]
        if off:
            raise ArgumentError(f"step {off[0]:g} is not on the schedule, {low:g} to {high:g}")
        levels = [schedule.level(step) for step in steps]
        for level in levels:
            if level.a <= SMALLEST or level.s <= SMALLEST:
                missing = "data" if level.a <= SMALLEST else "noise"
                raise ArgumentError(
                    f"a slot at {level.t:g} has no {missing}, and its frames are divided by it",
                    fix="Choose steps inside the schedule.",
                )
        if boundary and schedule.kind != "table":
            raise ArgumentError(
                f"the boundary scaling is of the steps of a table, and the schedule is "
                f"{schedule.kind}",
                fix="Set `boundary: false`.",
            )
        sides = [Lcm().boundary(level.t) if boundary else (0.0, 1.0) for level in levels]
        return cls(
            tuple(level.a for level in levels), tuple(level.s for level in levels),
            tuple(level.time for level in levels), tuple(skip for skip, _ in sides),
            tuple(out for _, out in sides), mode,
        )  # fmt: skip

    @property
    def count(self) -> int:
        """Number of slots: frames that are under way."""
        return len(self.a)

    @property
    def more(self) -> int:
        """Slots that the network is asked about a second time, without the condition."""
        return {"full": self.count, "initialize": 1}.get(self.mode, 0)

    @property
    def residual(self) -> bool:
        """Whether guidance leads away from a residual noise."""
        return self.mode in ("self", "initialize")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Inputs of no dimension."""
        return () if self.mode == "none" else (SCALE, DELTA) if self.residual else (SCALE,)

    @property
    def states(self) -> tuple[str, ...]:
        """Inputs that the outputs of a tick are the next values of."""
        if self.count == 1:
            return ()
        return (WAITING, REFERENCE) if self.residual else (WAITING,)


class Enter(nn.Module):
    """What the network is asked: the frame at the first level, and those on their way."""

    alpha: Tensor
    sigma: Tensor
    time: Tensor

    def __init__(self, slots: Slots, time: torch.dtype | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.slots, self.told = slots, time is not None
        picked = [*range(slots.count), *range(slots.more)]
        self.register_buffer("alpha", torch.tensor([slots.a[k] for k in picked], dtype=dtype))
        self.register_buffer("sigma", torch.tensor([slots.s[k] for k in picked], dtype=dtype))
        if time is not None:
            self.register_buffer("time", torch.tensor([slots.time[k] for k in picked]).to(time))

    def forward(
        self, frame: Tensor, noises: Tensor, waiting: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """(sample, alpha, sigma, and time) of all rows, slot by slot.

        Args:
            frame: [batch, ...], the data that enters.
            noises: [slots, batch, ...].
            waiting: [slots - 1, batch, ...]; None with one slot.
        """
        first = (self.slots.a[0] * frame + self.slots.s[0] * noises[0])[None]
        x = first if waiting is None else torch.cat([first, waiting])
        if self.slots.more:
            x = torch.cat([x, x[: self.slots.more]])
        told = (self.alpha, self.sigma, *((self.time,) if self.told else ()))
        rows = [each[:, None].expand(-1, frame.shape[0]).flatten() for each in told]
        return x.flatten(0, 1), *rows


class Leave(nn.Module):
    """What a tick makes of the network's noise: the frame that is done, and the next state."""

    a: Tensor
    s: Tensor
    skip: Tensor
    out: Tensor

    def __init__(self, slots: Slots, dims: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.slots = slots
        for name in ("a", "s", "skip", "out"):
            values = torch.tensor(getattr(slots, name), dtype=dtype)
            self.register_buffer(name, values.reshape(-1, *[1] * dims))

    def forward(
        self, noise: Tensor, frame: Tensor, noises: Tensor,
        one: Tensor | None = None, two: Tensor | None = None,
        three: Tensor | None = None, four: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """(data that is done, and as many states as come in).

        Args:
            noise: [slots + more, batch, ...], E of all rows.
            frame: [batch, ...].
            noises: [slots, batch, ...].
            one, two, three, four: the states, then the parameters, as many as the mode has.
        """
        slots = self.slots
        rest = [tensor for tensor in (one, two, three, four) if tensor is not None]
        states, numbers = rest[: len(slots.states)], rest[len(slots.states) :]
        first = (slots.a[0] * frame + slots.s[0] * noises[0])[None]
        x = torch.cat([first, states[0]]) if states else first
        reference = torch.cat([frame[None], *states[1:]]) if slots.residual else None
        own, other = noise[: slots.count], noise[slots.count :]
        if slots.mode == "initialize":
            entered = (x[:1] - self.s[:1] * other) / self.a[:1]
            reference = torch.cat([entered, *states[1:]])
        if reference is not None:
            other = numbers[1] * (x - self.a * reference) / self.s
        guided = own if slots.mode == "none" else other + numbers[0] * (own - other)
        data = self.out * ((x - self.s * guided) / self.a) + self.skip * x
        if not states:
            return (data[-1],)
        waiting = self.a[1:] * data[:-1] + self.s[1:] * noises[1:]
        kept = () if reference is None else (reference[:-1],)
        return data[-1], waiting, *kept
