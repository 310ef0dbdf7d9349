"""The runner of decoders that append to their cache in place: past and present are one buffer.

A run writes the keys and values of its tokens behind those of each row, and copies nothing else.
The kernel takes several tokens on top of a past in a batch of one only; other batches are divided
into their rows, whose parts of the buffers lie in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from graphwright.backends.onnxruntime.runtime import run_session
from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.concat import ConcatRunner
from graphwright.ir.generation.last_logits import has_all_logits
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.runner import Runner
from graphwright.ir.signature import Signature

CHUNK = 1024
"""Tokens of one run, at most: the kernel's scores take memory by tokens times cache."""

DTYPES = {
    "tensor(float)": (torch.float32, np.float32), "tensor(float16)": (torch.float16, np.float16),
    "tensor(int8)": (torch.int8, np.int8), "tensor(uint8)": (torch.uint8, np.uint8),
}  # fmt: skip


def runner_of(
    session: onnxruntime.InferenceSession,
    signature: Signature,
    record: Generation,
    *,
    shares_cache: bool,
) -> Runner:
    """A runner with a cache of its own over a session.

    Args:
        session: of the decoder.
        signature: of the program that it was made of.
        record: of how it generates.
        shares_cache: whether past and present may be one buffer; else the cache is copied at every
            step.
    """
    has_all = has_all_logits(signature, record)
    if shares_cache:
        return SharedCacheRunner(session, record, has_all)
    run_flat = partial(run_session, session, signature)
    return ConcatRunner(record, signature, run_flat, has_all_logits=has_all)


@dataclass(frozen=True)
class _Buffer:
    """A past and its present in one tensor (batch, heads, capacity, width)."""

    past: str
    present: str
    element: type
    tensor: Tensor


class SharedCacheRunner:
    """`graphwright.ir.generation.runner.Runner` over a session of ONNX Runtime.

    Args:
        session: of a decoder whose every attention is GroupQueryAttention.
        record: of the decoder.
        has_all_logits: whether a run gives the logits behind every token.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, record: Generation, has_all_logits: bool
    ) -> None:
        self.session = session
        self.record = record
        self.has_all_logits = has_all_logits
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self.capacity = 0
        self._inputs = {item.name: item for item in session.get_inputs()}
        self._buffers: list[_Buffer] = []
        self._bound: onnxruntime.IOBinding | None = None
        self._vocabulary = record.vocab_size

    # ---- the cache

    def start(self, batch: int, capacity: int) -> None:
        """Empties the cache: `batch` rows, room for `capacity` tokens each."""
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self._allocate(batch, capacity)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens a row, and keeps what is there."""
        self._take(torch.arange(len(self.lengths)), capacity)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of what row `rows[i]` was."""
        self._take(rows, self.capacity)
        self.lengths = self.lengths[rows]

    def rewind(self, lengths: Tensor) -> None:
        """Forgets each row's tokens behind the first `lengths[row]` ones."""
        if bool((lengths > self.lengths).any()):
            raise ArgumentError("a cache cannot be rewound to more tokens than it has")
        self.lengths = lengths.to(torch.int64).clone()

    def _allocate(self, batch: int, capacity: int) -> None:
        names = self.record.onnx_names()
        pairs = zip(self.record.past, self.record.present, strict=True)
        self._buffers, self.capacity, self._bound = [], capacity, None
        for past, present in pairs:
            item = self._inputs[names[past]]
            dtype, element = DTYPES[item.type]
            shape = (batch, item.shape[1], capacity, item.shape[3])
            tensor = torch.zeros(shape, dtype=dtype)
            self._buffers.append(_Buffer(names[past], names[present], element, tensor))

    def _take(self, rows: Tensor, capacity: int) -> None:
        """The buffers of these rows, in place where their shape stays."""
        used = int(self.lengths.max()) if len(self.lengths) else 0
        old = self._buffers
        if len(rows) != len(self.lengths) or capacity != self.capacity:
            self._allocate(len(rows), capacity)
        for buffer, former in zip(self._buffers, old, strict=True):
            buffer.tensor[:, :, :used] = former.tensor[:, :, :used].index_select(0, rows)

    # ---- runs

    def run(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Appends tokens to the rows; gives the logits behind the last one of each."""
        result = torch.zeros(len(ids), self._vocabulary)
        for start in range(0, max(1, ids.shape[1]), CHUNK):
            part = ids[:, start : start + CHUNK]
            taken = (counts - start).clamp(0, part.shape[1])
            logits = self._append(part, taken)
            last = (taken - 1).clamp(min=0) if self.has_all_logits else torch.zeros_like(taken)
            ends = (taken > 0) & (counts <= start + CHUNK)
            result[ends] = logits[torch.arange(len(ids)), last][ends]
        return result

    def run_all(self, ids: Tensor, counts: Tensor) -> Tensor:
        """As `run`, with the logits behind every token: float32 (batch, tokens, vocabulary)."""
        if not self.has_all_logits:
            raise ArgumentError(
                "the artifact gives the logits of each row's last token only",
                fix="Lower it with `logits: all`.",
            )
        parts = [
            self._append(ids[:, s : s + CHUNK], (counts - s).clamp(0, CHUNK))
            for s in range(0, ids.shape[1], CHUNK)
        ]
        return torch.cat(parts, 1)

    def _append(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Logits (batch, tokens or 1, vocabulary) of one chunk."""
        batch, tokens = ids.shape
        if tokens == 1 or not bool(self.lengths.any()):
            logits = self._step(ids, counts, None)
            self.lengths = self.lengths + counts
            return logits
        width = tokens if self.has_all_logits else 1
        logits = torch.zeros(batch, width, self._vocabulary)
        for row in torch.nonzero(counts)[:, 0].tolist():
            own = ids[row : row + 1, : int(counts[row])]
            found = self._step(own, counts[row : row + 1], row)
            logits[row, : found.shape[1]] = found[0]
        self.lengths = self.lengths + counts
        return logits

    def _step(self, ids: Tensor, counts: Tensor, row: int | None) -> Tensor:
        """One run of the session, on all rows or on one, which keeps `lengths` as they are.

        A row without a token of its own gets one all the same, behind its last, where the next one
        will go.
        """
        before = self.lengths if row is None else self.lengths[row : row + 1]
        after = before + counts.clamp(min=1)
        total = int(after.max()) if bool(before.any()) else ids.shape[1]
        feeds = {self.record.ids: ids.contiguous()}
        if self.record.mask is not None:
            places = torch.arange(total)[None]
            feeds[self.record.mask] = (places < after[:, None]).to(torch.int64)
        if self.record.positions is not None and self.record.positions in self._inputs:
            feeds[self.record.positions] = before[:, None] + torch.arange(ids.shape[1])[None]
        width = ids.shape[1] if self.has_all_logits else 1
        logits = torch.empty(len(ids), width, self._vocabulary)
        binding = self._binding(row)
        for name, tensor in feeds.items():
            binding.bind_input(name, "cpu", 0, np.int64, list(tensor.shape), tensor.data_ptr())
        binding.bind_output(
            self.record.logits, "cpu", 0, np.float32, list(logits.shape), logits.data_ptr()
        )
        self.session.run_with_iobinding(binding)
        return logits

    def _binding(self, row: int | None) -> onnxruntime.IOBinding:
        """The buffers, of all rows or of one, bound as past and as present."""
        if row is None and self._bound is not None:
            return self._bound
        binding = self.session.io_binding()
        for buffer in self._buffers:
            part = buffer.tensor if row is None else buffer.tensor[row : row + 1]
            place = ("cpu", 0, buffer.element, list(part.shape), part.data_ptr())
            binding.bind_input(buffer.past, *place)
            binding.bind_output(buffer.present, *place)
        if row is None:
            self._bound = binding
        return binding
