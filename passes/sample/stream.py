"""sample.stream: one call of the network moves each of the last n frames one step (P87)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.ir.sampling.record import ALPHA, NEGATIVE, NOISE, SIGMA, Denoiser
from graphwright.ir.sampling.slots import DELTA, NOISES, SCALE, Slots
from graphwright.ir.sampling.tick import ticking
from graphwright.passes.base import Action, Context, Result
from graphwright.passes.sample._form.base import Named, Run, SamplePass, runs_of_rows
from graphwright.passes.sample._form.guider import GUIDERS


class StreamOptions(Options):
    """Options of sample.stream."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("steps", "all(a > b for a, b in zip(steps, steps[1:]))",
             "steps have to fall, from the noisiest to the least noisy"),
    )  # fmt: skip

    steps: Annotated[tuple[float, ...], Field(min_length=1, examples=[[359, 99]])]
    """Places on the schedule of the slots, noisiest first: what the network is asked about. A
    picture that is changed starts in the middle, one that is made from nothing near the end."""

    guidance: Literal["none", "self", "initialize", "full"] = "self"
    """`self` leads away from the frame's own noise, and asks the network nothing more;
    `initialize` away from one prediction without the condition, made when a frame enters; `full` is
    classifier-free guidance, twice the rows."""

    guidance_scale: Annotated[float, Field(ge=0)] = 1.2
    """E = away + scale (E_with - away); 1 is no guidance. Every tick may be given another."""

    delta: Annotated[float, Field(ge=0)] = 1.0
    """Of self and initialize: factor on the noise that is led away from."""

    boundary: bool = True
    """Whether the network is a consistency model, whose data and sample are mixed by its boundary
    scaling; on the steps of a table alone."""


class Stream(SamplePass[StreamOptions]):
    """Makes a denoiser of few steps one tick of a stream.

    Slot k holds the frame that came k ticks ago, at its k-th level; a tick takes a frame in at the
    first level, asks the network once about all slots, hands out the frame of the last one and
    moves the others on. So a frame takes n ticks and the stream gives one per tick. The noise of
    every slot is fixed, so that a still picture stays still.

    A bundle is driven by `bundle.stream(noises, conditions)`, with its filter of similar frames and
    its queues.

    Source: P87, sections 3.1 (stream batch) and 3.2 (residual guidance). The residual noise is the
    paper's definition, v = (x - a x0) / s; the released code tracks it from step to step, which is
    the same but for the boundary scaling, and takes scales up to 1 for no guidance.
    """

    papers = ("P87",)
    behind: ClassVar[tuple[str, ...]] = ("sample.denoiser",)
    conflicts: ClassVar[tuple[str, ...]] = (*GUIDERS, "sample.reuse", "sample.stream")

    def run(self, program: Program, context: Context) -> Result:
        """Puts the slots around the denoiser.

        Raises:
            ArgumentError: a step that the schedule has no place for.
            ModelError: a denoiser that cannot be asked about rows of different levels.
        """
        slots = self._slots(Denoiser.required(program, self.id))
        numbers = {SCALE: self.options.guidance_scale, DELTA: self.options.delta}
        made = ticking(program, slots, self.id, numbers, self.options.steps)
        asked = slots.count + slots.more
        text = f"{slots.count} slots, {asked} rows per frame and call, guidance {slots.mode}"
        return Result(made, (Action("denoiser", text),))

    def expected(self, after: Program, run: Run, given: Named) -> Mapping[str, Any]:
        """Every slot by itself: a run of the denoiser at its level, and the paper's formulas."""
        record = Denoiser.required(after, self.id)
        slots = self._slots(record)
        frame, z = given[record.sample], given[NOISES]
        times = after.state.get(f"{self.id}.enter.time")
        waiting, reference = given.get("waiting"), given.get("reference")
        entering = [slots.a[0] * frame + slots.s[0] * z[0]]
        samples = entering if waiting is None else [*entering, *waiting]
        asked = [*range(slots.count), *range(slots.more)]  # the second part without the condition
        told = [self._told(record, slots, given, k, samples[k], times, place >= slots.count)
                for place, k in enumerate(asked)]  # fmt: skip
        names = (record.sample, ALPHA, SIGMA, record.time, *record.conditions)
        noises = [found[NOISE] for found in runs_of_rows(after, run, told, [n for n in names if n])]
        others = noises[slots.count :]
        done: list[Tensor] = []
        away: list[Tensor] = []
        for k in range(slots.count):
            a, s, skip, out = (_stored(getattr(slots, n)[k], frame)
                               for n in ("a", "s", "skip", "out"))  # fmt: skip
            x, noise = samples[k], noises[k]
            if slots.residual:
                entered = frame if slots.mode == "self" else None
                if k > 0 and reference is not None:
                    entered = reference[k - 1]
                v = (x - a * entered) / s if entered is not None else others[0]
                away.append((x - s * v) / a if entered is None else entered)
                noise = given[DELTA] * v + given[SCALE] * (noise - given[DELTA] * v)
            elif slots.mode == "full":
                noise = others[k] + given[SCALE] * (noise - others[k])
            done.append(out * (x - s * noise) / a + skip * x)
        found = {"denoised": done[-1]}
        if slots.count > 1:
            found["next_waiting"] = torch.stack([
                _stored(slots.a[k], frame) * done[k - 1] + _stored(slots.s[k], frame) * z[k]
                for k in range(1, slots.count)
            ])  # fmt: skip
        if "reference" in slots.states:
            found["next_reference"] = torch.stack(away[:-1])
        return found

    def _slots(self, record: Denoiser) -> Slots:
        options = self.options
        return Slots.of(record.noise_schedule, options.steps, options.guidance, options.boundary)

    def _told(
        self, record: Denoiser, slots: Slots, given: Named, k: int, x: Tensor,
        times: Tensor | None, negative: bool,
    ) -> Named:  # fmt: skip
        """What the denoiser is asked about slot k."""
        rows = x.shape[:1]
        told = {
            record.sample: x,
            ALPHA: torch.full(rows, 1.0, dtype=x.dtype) * _stored(slots.a[k], x),
            SIGMA: torch.full(rows, 1.0, dtype=x.dtype) * _stored(slots.s[k], x),
        }
        if record.time is not None and times is not None:
            told[record.time] = torch.full(rows, slots.time[k]).to(times.dtype)
        for name, fill in record.conditions.items():
            own = given[name]
            if not negative:
                told[name] = own
            elif fill is None:
                told[name] = given[NEGATIVE + name]
            else:
                told[name] = torch.full_like(own, fill)
        return told


def _stored(value: float, like: Tensor) -> Tensor:
    """A level as the program stores it, in float32, in the dtype of a check."""
    return torch.tensor(value, dtype=torch.float32).to(like.dtype)
