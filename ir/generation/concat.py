"""A runner over any callable that takes the past as inputs and gives it back, one token longer.

For programs run by PyTorch, and for artifacts whose attention does not write its cache in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.record import Generation
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature

RunFlat = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Flat outputs for one tensor per input."""


def runner_of(program: Program, record: Generation) -> ConcatRunner:
    """A program over a cache, run by PyTorch."""

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(program.running.forward(*inputs))

    return ConcatRunner(record, program.signature, run)


class ConcatRunner:
    """The `Runner` protocol by whole tensors of past keys and values.

    Rows are kept right-aligned: the tokens of a row are the last ones of the cache, and zeros that
    the mask hides stand in front of them. New tokens, padded on the right, so follow directly, and
    distances between tokens are those between slots: what a sliding window counts.

    A model without a mask, or with states of a recurrence, sees padding; wherever its rows differ
    in length, those of one length are run as a batch of their own.

    Args:
        record: which inputs and outputs are the cache.
        signature: of what is run: their order, dtypes and fixed sizes.
        run_flat: runs it; the tensors it gives are kept.
        has_all_logits: whether it gives the logits of every token, and not of last ones alone.
    """

    def __init__(
        self,
        record: Generation,
        signature: Signature,
        run_flat: RunFlat,
        *,
        has_all_logits: bool = True,
    ) -> None:
        self.record = record
        self.has_all_logits = has_all_logits
        self.capacity = 0
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self._inputs = {spec.name: spec for spec in signature.inputs}
        self._outputs = [spec.name for spec in signature.outputs]
        self._run_flat = run_flat
        self._past: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}

    def hold(self, values: Mapping[str, Tensor]) -> None:
        """Inputs that every step reads beside tokens and cache, a row of each per row of the batch:
        what an encoder gave. They stay until others are held."""
        self._held = dict(values)

    def start(self, batch: int, capacity: int) -> None:
        """See `Runner.start`."""
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self._past = {name: self._nothing(name, batch) for name in self.record.past}

    def run(self, ids: Tensor, counts: Tensor) -> Tensor:
        """See `Runner.run`."""
        logits = self._append(ids, counts)
        last = (counts - 1).clamp_min(0) if self.has_all_logits else torch.zeros_like(counts)
        return logits[torch.arange(len(logits)), last]

    def run_all(self, ids: Tensor, counts: Tensor) -> Tensor:
        """See `Runner.run_all`."""
        return self._append(ids, counts)

    def reorder(self, rows: Tensor) -> None:
        """See `Runner.reorder`."""
        self.lengths = self.lengths[rows]
        self._past = {name: past[rows.to(past.device)] for name, past in self._past.items()}
        self._held = {name: value[rows.to(value.device)] for name, value in self._held.items()}

    def rewind(self, lengths: Tensor) -> None:
        """See `Runner.rewind`."""
        if self.record.states and not torch.equal(lengths, self.lengths):
            raise ArgumentError("the model keeps a state, which cannot be taken back")
        front = self._width - self.lengths
        self._past = self._kept(self._past, front, lengths)
        self.lengths = lengths.clone()

    def grow(self, capacity: int) -> None:
        """See `Runner.grow`."""
        self.capacity = capacity

    # ---- one call

    @property
    def _width(self) -> int:
        """Slots of the cache."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    def _append(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Runs new tokens on top of the cache; logits (batch, tokens or 1, vocabulary)."""
        ragged = int(counts.min()) < ids.shape[1] or int(self.lengths.min()) < self._width
        if ragged and (self.record.mask is None or self.record.states):
            return self._in_groups(ids, counts)
        outputs = self._call(ids, counts)
        front = self._width - self.lengths
        lengths = self.lengths + counts
        present = {
            past: outputs[present]
            for past, present in zip(self.record.past, self.record.present, strict=True)
        }
        # With a new token in every row and slot, what came out is right-aligned as it is.
        is_full = bool((counts == ids.shape[1]).all())
        self._past = present if is_full else self._kept(present, front, lengths)
        self.lengths = lengths
        return outputs[self.record.logits].float().cpu()

    def _call(self, ids: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Outputs by name."""
        record, tokens = self.record, ids.shape[1]
        feeds = {record.ids: ids, **self._past, **self._held}
        if record.mask is not None:
            slots = torch.arange(self._width) >= (self._width - self.lengths)[:, None]
            # A row without a token has one to look at even so, and nothing divides by zero.
            new = torch.arange(tokens) < counts.clamp_min(1)[:, None]
            feeds[record.mask] = torch.cat([slots, new], 1)
        if record.positions is not None:
            feeds[record.positions] = self.lengths[:, None] + torch.arange(tokens)
        missing = [name for name in self._inputs if name not in feeds]
        if missing:
            raise ArgumentError(f"nothing is known to feed to {missing} as tokens are generated")
        given = tuple(
            feeds[name].to(getattr(torch, spec.dtype)) for name, spec in self._inputs.items()
        )
        return dict(zip(self._outputs, self._run_flat(given), strict=True))

    def _in_groups(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Rows of one length that take as many tokens are a batch of their own, without padding."""
        lengths, past, held = self.lengths, self._past, self._held
        groups: dict[tuple[int, int], list[int]] = {}
        for row, sizes in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
            groups.setdefault(sizes, []).append(row)
        rows: dict[int, dict[str, Tensor]] = {}
        logits: dict[int, Tensor] = {}
        for (length, count), members in groups.items():
            own = torch.tensor(members)
            self.lengths = lengths[own]
            self._held = {name: value[own.to(value.device)] for name, value in held.items()}
            front = int(lengths.max()) - self.lengths
            taken = {name: tensor[own.to(tensor.device)] for name, tensor in past.items()}
            self._past = self._kept(taken, front, torch.full_like(own, length))
            found = torch.zeros(len(members), 1, 1)
            if count:
                found = self._append(ids[own, :count], counts[own])
                padding = ids.shape[1] - found.shape[1] if self.has_all_logits else 0
                found = torch.nn.functional.pad(found, (0, 0, 0, padding))
            for place, row in enumerate(members):
                logits[row] = found[place]
                rows[row] = {n: tensor[place : place + 1] for n, tensor in self._past.items()}
        self.lengths, self._held = lengths + counts, held
        order = range(len(lengths))
        self._past = {name: self._stacked(name, [rows[row][name] for row in order])
                      for name in past}  # fmt: skip
        shape = max((found.shape for found in logits.values()), key=lambda shape: shape.numel())
        return torch.stack([logits[row].expand(shape) for row in order])

    def _stacked(self, name: str, rows: list[Tensor]) -> Tensor:
        if self._is_state(name):
            return torch.cat(rows)
        pad = torch.nn.functional.pad
        return torch.cat([pad(row, (0, 0, self._width - row.shape[2], 0)) for row in rows])

    def _kept(self, caches: dict[str, Tensor], front: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Of every row the `lengths` slots behind the first `front` ones, right-aligned."""
        width = int(lengths.max())
        slots = torch.arange(width) - (width - lengths)[:, None]
        places = (slots + front[:, None]).clamp_min(0)[:, None, :, None]
        is_token = (slots >= 0)[:, None, :, None]
        kept = {}
        for name, cache in caches.items():
            if self._is_state(name):
                kept[name] = cache
                continue
            rows = cache.gather(
                2, places.to(cache.device).expand(-1, cache.shape[1], -1, cache.shape[3])
            )
            kept[name] = rows.where(is_token.to(cache.device), rows.new_zeros(()))
        return kept

    def _is_state(self, name: str) -> bool:
        return any(name == state for state, _ in self.record.states)

    def _nothing(self, name: str, batch: int) -> Tensor:
        """The past in front of the first token."""
        spec = self._inputs[name]
        free = [axis for axis, size in enumerate(spec.shape) if isinstance(size, str)]
        shape = [size if isinstance(size, int) else 0 for size in spec.shape]
        for axis in free:
            shape[axis] = batch if axis == 0 else 0
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype))
