"""A runner without a cache: it runs each row's whole sequence every time, by transformers."""

from __future__ import annotations

import torch


class WholeSequence:
    """Keeps the tokens of its rows; the slow and plain meaning of the protocol of runners."""

    has_all_logits = True

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.rows: list[list[int]] = []
        self.capacity = 0
        self.ran: list[list[int]] = []

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor([len(row) for row in self.rows], dtype=torch.int64)

    def start(self, batch: int, capacity: int) -> None:
        self.rows, self.capacity = [[] for _ in range(batch)], capacity

    def run(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        assert int(self.lengths.max()) + ids.shape[1] <= self.capacity
        self.ran.append(counts.tolist())
        logits = self.run_all(ids, counts)
        last = [all_[max(0, count - 1)] for all_, count in zip(logits, counts, strict=True)]
        return torch.stack(last)

    def run_all(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        out = []
        for row, (new, count) in enumerate(zip(ids.tolist(), counts.tolist(), strict=True)):
            before = len(self.rows[row])
            self.rows[row] += new[:count]
            with torch.inference_mode():
                logits = self.model(torch.tensor([[*self.rows[row], *new[count:]]])).logits
            out.append(logits[0, before:].float())
        return torch.stack(out)

    def reorder(self, rows: torch.Tensor) -> None:
        self.rows = [list(self.rows[row]) for row in rows.tolist()]

    def rewind(self, lengths: torch.Tensor) -> None:
        self.rows = [row[:length] for row, length in zip(self.rows, lengths.tolist(), strict=True)]

    def grow(self, capacity: int) -> None:
        assert capacity > self.capacity
        self.capacity = capacity
