"""The runner over buffers that the graph writes in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from graphwright.backends.triton.decoder.buffers import Blocks, Buffers, WholeRows
from graphwright.backends.triton.decoder.captured import CapturedStep
from graphwright.backends.triton.decoder.static_graph import StaticGraph
from graphwright.ir.ops import kernels_enabled

Body = Callable[..., tuple[Tensor]]


class StaticRunner:
    """The `Runner` protocol by static buffers.

    A batch whose rows begin with unlike numbers of tokens lies in blocks, so that short rows take
    little memory; any other one in a contiguous buffer per row. On CUDA a step of one token per
    row is captured as a CUDA graph once per batch and buffers, and replayed: it reads the lengths
    on the device.

    Args:
        last: the graph with the logits of last tokens.
        whole: makes the one with all logits, when they are wanted.
        root: holds the stored tensors.
        device: where they are.
    """

    has_all_logits = True

    def __init__(
        self,
        last: StaticGraph,
        whole: Callable[[], StaticGraph],
        root: torch.nn.Module,
        device: torch.device,
    ) -> None:
        self._make_whole = whole
        self._bodies: dict[bool, Body] = {}
        self._root = root
        self._device = device
        self._graph = last
        self._buffers: Buffers | None = None
        self._captured: CapturedStep | None = None
        self.capacity = 0
        self.lengths = torch.zeros(0, dtype=torch.int64)

    def start(self, batch: int, capacity: int) -> None:
        """See `Runner.start`."""
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self._buffers = self._captured = None

    def run(self, ids: Tensor, counts: Tensor) -> Tensor:
        """See `Runner.run`."""
        return self._append(ids, counts, last=True)[:, 0]

    def run_all(self, ids: Tensor, counts: Tensor) -> Tensor:
        """See `Runner.run_all`."""
        return self._append(ids, counts, last=False)

    def reorder(self, rows: Tensor) -> None:
        """See `Runner.reorder`."""
        self.lengths = self.lengths[rows]
        if self._buffers is not None:
            self._buffers.reorder(rows)
            self._captured = None

    def rewind(self, lengths: Tensor) -> None:
        """See `Runner.rewind`."""
        self.lengths = lengths.clone()

    def grow(self, capacity: int) -> None:
        """See `Runner.grow`."""
        self.capacity = max(capacity, self.capacity)
        if self._buffers is not None:
            self._buffers.grow(self.capacity)
            self._captured = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache's buffers."""
        return 0 if self._buffers is None else self._buffers.nbytes

    # ---- one call

    def _append(self, ids: Tensor, counts: Tensor, *, last: bool) -> Tensor:
        """Runs new tokens on top of the cache; logits (batch, 1 or tokens, vocabulary)."""
        buffers = self._room(counts)
        before = buffers.tensors
        buffers.reserve(self.lengths + counts)
        if buffers.tensors is not before:
            self._captured = None
        given = self._inputs(ids, counts)
        logits = self._logits(given, buffers, last=last)
        self.lengths = self.lengths + counts
        return logits.float().cpu().clone()  # the caller may write to it

    @torch.inference_mode()  # unlike no_grad, it takes no step through the ops' gradients
    def _logits(self, given: list[Tensor], buffers: Buffers, *, last: bool) -> Tensor:
        is_step = last and given[0].shape[1] == 1 and self._device.type == "cuda"
        if is_step and kernels_enabled(self._device):  # the eager face asks for lengths in Python
            if self._captured is None:
                self._captured = CapturedStep(self._body(last), given, buffers)
            return self._captured(given)
        (logits,) = self._body(last)(*given, buffers.table, *buffers.tensors)
        return logits

    def _room(self, counts: Tensor) -> Buffers:
        """The buffers; made for the first tokens."""
        if self._buffers is None:
            is_ragged = len(counts) > 1 and int(counts.min()) < int(counts.max())
            room = (self._graph.buffers, len(counts), self.capacity, self._device)
            self._buffers = Blocks(*room) if is_ragged else WholeRows(*room)
        return self._buffers

    def _inputs(self, ids: Tensor, counts: Tensor) -> list[Tensor]:
        """Ids, positions, lengths and counts on the device."""
        places = self.lengths[:, None] + torch.arange(ids.shape[1])
        given = [ids, *([places] if self._graph.positions else [])]
        given += [self.lengths.to(torch.int32), counts]
        return [tensor.to(self._device) for tensor in given]

    def _body(self, last: bool) -> Body:
        if last not in self._bodies:
            graph = self._graph if last else self._make_whole()
            self._bodies[last] = fx.GraphModule(self._root, graph.graph)
        return self._bodies[last]
