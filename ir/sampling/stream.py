"""The driver of a stream of frames (P87): ticks, a filter of similar frames, and queues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.record import DENOISED, NEGATIVE, STREAM, Denoiser
from graphwright.ir.sampling.slots import NOISES
from graphwright.ir.signature import Signature

State = dict[str, Tensor]
"""What a tick hands to the next one, by name of the input, and `filled`, how many of the slots hold
a frame."""

FILLED, NEXT = "filled", "next_"
ItemT = TypeVar("ItemT")
MadeT = TypeVar("MadeT")


class Ticking(Protocol):
    """A program that is one tick."""

    @property
    def signature(self) -> Signature:
        """Its inputs and outputs."""

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs it by names."""


class Stream:
    """Frames in, frames out, one call of the network per frame.

    Args:
        record: of a program of sample.stream.
        part: the program.
        noises: [slots, ...] or [slots, batch, ...], standard normal, fixed for the whole stream.
        conditions: of the frames, a row for each of those that enter together.
        negative: what guidance leads away from, by name of the condition, where no number stands
            for it.

    Raises:
        ArgumentError: the program is no tick, noises of another number or shape, or conditions
            that do not fit.
    """

    def __init__(
        self,
        record: Denoiser,
        part: Ticking,
        noises: Tensor,
        conditions: Mapping[str, Tensor] | None = None,
        negative: Mapping[str, Tensor] | None = None,
    ) -> None:
        guidance = record.guidance
        if guidance is None or STREAM not in guidance.settings:
            raise ArgumentError(
                "this program is no stream",
                fix="Put `sample.stream` behind `sample.denoiser` in the spec.",
            )
        self.record, self.part = record, part
        self.parameters = dict(guidance.parameters)
        self.slots = len(guidance.settings[STREAM]["steps"])
        self._specs = {spec.name: spec for spec in part.signature.inputs}
        self.noises = self._noises(noises)
        self.given = self._conditions(conditions or {}, negative or {})

    @property
    def batch(self) -> int:
        """Frames that enter together."""
        return self.noises.shape[1]

    @torch.no_grad()
    def tick(self, frame: Tensor, state: State, **parameters: float) -> tuple[Tensor | None, State]:
        """(frames that are done, state) behind one call.

        Args:
            frame: [batch, ...], data.
            state: empty at first, then what the tick before returned.
            parameters: of the guidance, in the place of the program's.

        Returns:
            the frames that came slots - 1 ticks ago, denoised; None while the slots fill.

        Raises:
            ArgumentError: a frame of another shape, or a parameter that the guidance has not.
        """
        if frame.shape != self.noises.shape[1:]:
            raise ArgumentError(
                f"the frame has the shape {tuple(frame.shape)}, and the noise of a slot "
                f"{tuple(self.noises.shape[1:])}"
            )
        unknown = [name for name in parameters if name not in self.parameters]
        if unknown:
            known = list(self.parameters)
            raise ArgumentError(f"no parameter named {unknown[0]!r}; there are {known}")
        numbers = {n: torch.tensor(float(v)) for n, v in {**self.parameters, **parameters}.items()}
        given = {self.record.sample: frame, NOISES: self.noises, **self.given, **numbers}
        for name, spec in self._specs.items():
            if name not in given:  # a state: slots that hold no frame yet are zeros
                held = state.get(name)
                given[name] = torch.zeros_like(self.noises[1:]) if held is None else held
            given[name] = given[name].to(getattr(torch, spec.dtype))
        found = self.part(given)
        filled = min(int(state.get(FILLED, torch.tensor(0))) + 1, self.slots)
        after = {n.removeprefix(NEXT): t for n, t in found.items() if n.startswith(NEXT)}
        after[FILLED] = torch.tensor(filled)
        return (found[DENOISED] if filled >= self.slots else None), after

    def run(
        self,
        frames: Iterable[Any],
        *,
        before: Callable[[Any], Tensor] | None = None,
        after: Callable[[Tensor | None], Any] | None = None,
        similar: SimilarityFilter | None = None,
        seed: int = 0,
        ahead: int = 4,
    ) -> Iterator[Any]:
        """One result per frame, the newest picture that is done; None while the slots fill.

        Reading and preparing frames, the network, and what is done with pictures each have a
        thread, so that none of them waits for another.

        Args:
            frames: what is streamed, such as a camera; may never end.
            before: makes a frame [batch, ...] of an item.
            after: is given every result.
            similar: leaves frames out that are like the last one: their result is the picture
                before.
            seed: of what the filter draws.
            ahead: items at most that wait between two threads.
        """
        prepared = in_thread(before or _same, frames, ahead)
        ticked = in_thread(_same, self._ticked(prepared, similar, seed), ahead)
        return in_thread(after or _same, ticked, ahead)

    def _ticked(
        self, frames: Iterable[Tensor], similar: SimilarityFilter | None, seed: int
    ) -> Iterator[Tensor | None]:
        state: State = {}
        shown: Tensor | None = None
        generator = torch.Generator().manual_seed(seed)
        for frame in frames:
            draw = float(torch.rand((), generator=generator))
            if similar is None or not similar.skips(frame, draw):
                done, state = self.tick(frame, state)
                shown = shown if done is None else done
            yield shown

    def _noises(self, noises: Tensor) -> Tensor:
        """[slots, batch, ...]."""
        spec = self._specs[NOISES]
        if noises.dim() == len(spec.shape) - 1:
            noises = noises[:, None]
        fits = noises.dim() == len(spec.shape) and all(
            isinstance(wanted, str) or wanted == size
            for wanted, size in zip(spec.shape, noises.shape, strict=True)
        )
        if not fits:
            raise ArgumentError(
                f"the noise has the shape {tuple(noises.shape)}, and the stream takes "
                f"{spec.shape}: {self.slots} slots"
            )
        return noises

    def _conditions(
        self, conditions: Mapping[str, Tensor], negative: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        assert self.record.guidance is not None
        wanted = [*self.record.conditions, *self.record.guidance.negatives]
        given = {**conditions, **{NEGATIVE + name: tensor for name, tensor in negative.items()}}
        missing = [name for name in wanted if name not in given]
        unknown = [name for name in given if name not in wanted]
        if missing or unknown:
            raise ArgumentError(
                f"the stream takes {wanted}: missing {missing}, unknown {unknown}",
                fix="Names with `negative_` are given as `negative={name: tensor}`.",
            )
        for name, tensor in given.items():
            if tensor.shape[0] != self.batch:
                raise ArgumentError(
                    f"the condition {name!r} has {tensor.shape[0]} rows, and {self.batch} frames "
                    "enter together"
                )
        return given


class SimilarityFilter:
    """Skips frames that are like the last one that was processed, with a growing probability.

    Args:
        threshold: cosine up to which no frame is skipped.
        most: frames skipped in a row at most (the released code counts all that it ever skipped).

    Raises:
        ArgumentError: a threshold that is no cosine, or a negative number of frames.

    Source: P87, section 3.5.
    """

    def __init__(self, threshold: float = 0.98, most: int = 10) -> None:
        if not -1 <= threshold <= 1 or most < 0:
            raise ArgumentError(
                f"a threshold of {threshold} and {most} frames: a cosine is -1 to 1, and frames "
                "are counted from 0"
            )
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


def in_thread(
    function: Callable[[ItemT], MadeT], items: Iterable[ItemT], ahead: int
) -> Iterator[MadeT]:
    """`map` in a thread of its own, at most `ahead` results before they are asked for."""
    source = iter(items)
    ended = object()

    def one() -> Any:
        item = next(source, ended)
        return ended if item is ended else function(item)  # type: ignore[arg-type]  # no end

    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(one) for _ in range(max(ahead, 1)))
        while (made := waiting.popleft().result()) is not ended:
            waiting.append(pool.submit(one))
            yield made


def _same(item: Any) -> Any:
    return item
