"""What generation asks of a backend: rows of tokens in, logits of the next token out.

A runner owns the cache of keys and values and knows buffers; the driver knows tokens, sampling,
stopping and beams. A row of the cache is compact: its first `lengths[row]` slots hold the tokens
that it has seen, in order, whatever the other rows of the batch hold.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Runner(Protocol):
    """Runs a decoder over its cache.

    Attributes:
        lengths: tokens in the cache of every row, int64 [batch], on the CPU.
        capacity: tokens that a row has room for.
        has_all_logits: whether `run_all` can be called; False where the artifact computes the
            logits of last tokens alone.
    """

    @property
    def lengths(self) -> torch.Tensor: ...

    @property
    def capacity(self) -> int: ...

    @property
    def has_all_logits(self) -> bool: ...

    def start(self, batch: int, capacity: int) -> None:
        """Empties the cache: `batch` rows, room for `capacity` tokens each."""

    def run(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Appends tokens to the rows, and gives the logits behind the last one of each.

        Any number of tokens is taken on top of any past, at any batch size: where a kernel takes
        less, the runner divides the work. A row with count 0 keeps its length and its tokens, and
        its logits are undefined.

        Args:
            ids: int64 [batch, tokens], rows padded on the RIGHT with any valid token.
            counts: real tokens of every row, int64 [batch], 0 to `tokens`. The caller keeps
                `max(lengths) + tokens <= capacity`.

        Returns:
            float32 [batch, vocabulary] on the CPU; the caller may write to it.
        """

    def run_all(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """As `run`, with the logits behind every token: float32 [batch, tokens, vocabulary].

        They are undefined on padding. Called only where `has_all_logits` is true.
        """

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes a copy of what row `rows[i]` was; `rows` (int64) may be longer or shorter
        than the batch, which it makes the new one."""

    def rewind(self, lengths: torch.Tensor) -> None:
        """Forgets each row's tokens behind the first `lengths[row]` ones.

        Raises:
            ArgumentError: the model keeps a state that cannot be taken back to there.
        """

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens a row, and keeps what is there."""
