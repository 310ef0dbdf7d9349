"""A stream of frames (P87): every call of the network moves each of the last n frames one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.record import ALPHA, DENOISED, NOISE, SIGMA
from graphwright.ir.sampling.sampler import Part, Sampler
from graphwright.ir.sampling.schedule import Level
from graphwright.ir.sampling.solvers.first import Lcm
from graphwright.ir.sampling.solvers.table import SOLVERS
from graphwright.ir.sampling.variants import FULL

State = dict[str, Tensor]
"""`waiting`, the frames in slots 1 to n - 1, `reference`, their unguided data, and `filled`, how
many of the slots hold a frame."""


@dataclass(frozen=True)
class StreamSettings:
    """How a stream denoises.

    Attributes:
        steps: places on the schedule of the slots, noisiest first.
        guidance: `none`; `self`, residual guidance by the frame's own noise, without further rows;
            `initialize`, by one prediction without the condition when a frame enters; `full`, by
            one in every slot.
        guidance_scale: of it.
        delta: factor on the residual noise.
        boundary: the scaling of consistency models on the data.
    """

    steps: tuple[float, ...]
    guidance: str = "none"
    guidance_scale: float = 1.2
    delta: float = 1.0
    boundary: bool = True


class Stream:
    """Frames in, frames out, one call of the network per frame.

    Slot k holds the frame that came k ticks ago, at its k-th level. Noises are fixed per slot, so
    that a still picture stays still.

    Args:
        sampler: of a denoiser without guidance, told the time of every row.
        settings: of the stream.
        noises: [slots, ...], standard normal.
        conditions: of the frames, [1, ...] each.
        negative: what guidance leads away from, for `initialize` and `full`; a number of the record
            stands in for those that are not given.

    Raises:
        ArgumentError: guidance in the program already, one time for all rows, noises of another
            number, or a negative that is missing.

    Source: P87, sections 3.1 (stream batch) and 3.2 (residual guidance), with the residual noise by
    its definition v = (x - a x0) / s.
    """

    def __init__(
        self,
        sampler: Sampler,
        settings: StreamSettings,
        noises: Tensor,
        conditions: Mapping[str, Tensor],
        negative: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.record, self.part = sampler.record, sampler.parts[FULL]
        self.settings, self.noises = settings, noises
        _refuse(sampler, settings, noises)
        schedule = self.record.noise_schedule
        self.levels = [schedule.level(step) for step in settings.steps]
        self.given = dict(conditions)
        self.away = dict(conditions) if settings.guidance in ("none", "self") else {
            name: _negative(name, fill, conditions, negative or {})
            for name, fill in self.record.conditions.items()
        }  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows of the network per tick."""
        n = len(self.levels)
        return {"full": 2 * n, "initialize": n + 1}.get(self.settings.guidance, n)

    @torch.no_grad()
    def tick(self, frame: Tensor, state: State) -> tuple[Tensor | None, State]:
        """(frame that is done, state) behind one call.

        Args:
            frame: [1, ...], data.
            state: empty at first, then what the tick before returned.

        Returns:
            the frame that came n - 1 ticks ago, denoised; None while the slots fill.
        """
        n, z = len(self.levels), self.noises
        first = self.levels[0].a * frame + self.levels[0].s * z[:1]
        waiting = state.get("waiting", torch.zeros_like(z[1:]))
        x = torch.cat([first, waiting])
        reference = torch.cat([frame, state.get("reference", torch.zeros_like(z[1:]))])
        a, s = (_column([getattr(v, k) for v in self.levels], x) for k in ("a", "s"))
        noise, reference = self._guided(x, reference, a, s)
        data = (x - s * noise) / a
        if self.settings.boundary:
            skip, out = zip(*(Lcm().boundary(level.t) for level in self.levels), strict=True)
            data = _column(out, x) * data + _column(skip, x) * x
        filled = int(state.get("filled", torch.zeros((), dtype=torch.int64))) + 1
        after = {
            "waiting": a[1:] * data[:-1] + s[1:] * z[1:],
            "reference": reference[:-1],
            "filled": torch.tensor(min(filled, n)),
        }
        return (data[-1:] if filled >= n else None), after

    def _guided(self, x: Tensor, reference: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of every slot, and the data that residual guidance leads away from."""
        mode, n = self.settings.guidance, len(x)
        more = {"full": n, "initialize": 1}.get(mode, 0)
        found = self._ask(torch.cat([x, x[:more]]), [*self.levels, *self.levels[:more]], more)
        own, other = found[:n], found[n:]
        if mode == "none":
            return own, reference
        if mode == "initialize":
            entered = (x[:1] - s[:1] * other) / a[:1]
            reference = torch.cat([entered, reference[1:]])
        if mode != "full":
            other = self.settings.delta * (x - a * reference) / s
        return other + self.settings.guidance_scale * (own - other), reference

    def _ask(self, x: Tensor, levels: Sequence[Level], more: int) -> Tensor:
        """E of every row; the last ones without the condition."""
        rows = len(x)
        given: dict[str, Tensor] = {
            self.record.sample: x,
            ALPHA: torch.tensor([level.a for level in levels]),
            SIGMA: torch.tensor([level.s for level in levels]),
        }
        if self.record.time is not None:
            dtype = next(getattr(torch, spec.dtype) for spec in self.part.signature.inputs
                         if spec.name == self.record.time)  # fmt: skip
            given[self.record.time] = torch.tensor([level.time for level in levels]).to(dtype)
        for name, tensor in self.given.items():
            given[name] = torch.cat([_rows(tensor, rows - more), _rows(self.away[name], more)])
        found = self.part(given)
        assert DENOISED in found
        return found[NOISE]


class SimilarityFilter:
    """Skips frames that are like the last one that was processed, with a growing probability.

    Args:
        threshold: cosine up to which no frame is skipped.
        most: frames skipped in a row at most.

    Source: P87, section 3.5.
    """

    def __init__(self, threshold: float = 0.98, most: int = 10) -> None:
        self.threshold, self.most = threshold, most
        self.last: Tensor | None = None
        self.skipped = 0

    def skips(self, frame: Tensor, draw: float) -> bool:
        """Whether to skip a frame; `draw` is uniform in [0, 1)."""
        chance = 0.0
        if self.last is not None and self.threshold < 1:
            cosine = torch.cosine_similarity(frame.flatten(), self.last.flatten(), dim=0)
            chance = max(0.0, (float(cosine) - self.threshold) / (1 - self.threshold))
        if draw < chance and self.skipped < self.most:
            self.skipped += 1
            return True
        self.last, self.skipped = frame, 0
        return False


def _refuse(sampler: Sampler, settings: StreamSettings, noises: Tensor) -> None:
    record, part = sampler.record, sampler.parts[FULL]
    if record.guidance is not None:
        raise ArgumentError(
            f"a stream guides by itself, and {record.guidance.by} is in the program",
            fix="Lower the denoiser without it, and choose the stream's `guidance`.",
        )
    carried = SOLVERS[record.solver].state
    if carried:
        raise ArgumentError(
            f"a stream steps as consistency models do, every slot by itself, and {record.solver} "
            f"carries {', '.join(carried)} from step to step",
            fix="Say another `solver` in sample.denoiser (lcm, euler).",
        )
    if "push" in record.settings:
        raise ArgumentError(
            "sample.negtome pushes rows away from the first one, and the rows of a stream are "
            "frames at other levels of noise",
            fix="Lower the denoiser without it.",
        )
    if settings.guidance not in ("none", "self", "initialize", "full"):
        raise ArgumentError(f"no guidance of a stream is named {settings.guidance!r}")
    if len(noises) != len(settings.steps):
        raise ArgumentError(f"{len(settings.steps)} slots, and noise for {len(noises)}")
    if record.time is not None and not _time_rows(part, record.time):
        raise ArgumentError("the network is told one time for all rows, and slots have their own",
                            fix="Trace it with a time of shape [batch].")  # fmt: skip


def _time_rows(part: Part, time: str) -> bool:
    (spec,) = (spec for spec in part.signature.inputs if spec.name == time)
    return bool(spec.shape) and isinstance(spec.shape[0], str)


def _negative(
    name: str, fill: float | None, conditions: Mapping[str, Any], negative: Mapping[str, Any]
) -> Tensor:
    if name in negative:
        found: Tensor = negative[name]
        return found
    if fill is None:
        raise ArgumentError(f"guidance of the stream needs `negative` for {name!r}")
    return torch.full_like(conditions[name], fill)


def _rows(tensor: Tensor, count: int) -> Tensor:
    return tensor.expand(count, *tensor.shape[1:])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype).reshape(-1, *[1] * (like.dim() - 1))
