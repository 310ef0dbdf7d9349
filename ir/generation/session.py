"""Rows of tokens over a runner's cache: which of them were run, and which are pending.

A token that was just chosen is not in the cache yet. It is kept with the others, so that going on
runs it first; what is pending is always what a row's tokens are longer than its cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.runner import Runner

BLOCK = 64
"""Slots of the cache come in blocks of so many, so that it seldom grows by little."""


class Session:
    """A batch of token rows and the cache that holds most of each.

    Attributes:
        runner: with the cache.
        context_length: most tokens that a row may have; None is no limit.
        vocab_size: token ids are below it.
        pad: a valid token, fed where a row has no token.
        tokens: of every row, those in the cache and those behind them.
    """

    def __init__(
        self, runner: Runner, *, context_length: int | None, vocab_size: int, pad: int
    ) -> None:
        self.runner = runner
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.pad = pad
        self.tokens: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Begins anew with a row per prompt, and room for `room` tokens behind the longest.

        Raises:
            ArgumentError: a prompt without tokens, with unknown ones, or longer than the context.
        """
        for ids in prompts:
            self._check(ids)
        self.tokens = [list(ids) for ids in prompts]
        self.runner.start(len(prompts), self._capacity(max(map(len, prompts)) + room))

    def append(self, row: int, ids: Sequence[int]) -> None:
        """Puts tokens behind a row's.

        Raises:
            ArgumentError: unknown tokens, or more than the context has room for.
        """
        self._check([*self.tokens[row], *ids])
        self.tokens[row].extend(ids)

    def replace(self, row: int, ids: Sequence[int]) -> None:
        """Makes a row's tokens `ids`; what they begin with as before stays in the cache."""
        self._check(ids)
        old = self.tokens[row]
        common = next(
            (i for i, (a, b) in enumerate(zip(old, ids, strict=False)) if a != b),
            min(len(old), len(ids)),
        )
        self.rewind(row, common)
        self.tokens[row].extend(ids[common:])

    def rewind(self, row: int, length: int) -> None:
        """Forgets a row's tokens behind the first `length`."""
        self.tokens[row] = self.tokens[row][:length]
        lengths = self.runner.lengths.clone()
        if length >= int(lengths[row]):
            return
        lengths[row] = length
        try:
            self.runner.rewind(lengths)
        except ArgumentError:
            # a recurrent state goes one way only: every row is run again
            self.runner.start(len(self.tokens), self.runner.capacity)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of what row `rows[i]` was."""
        self.tokens = [list(self.tokens[row]) for row in rows]
        self.runner.reorder(torch.tensor(rows, dtype=torch.int64))

    def pending(self, row: int) -> list[int]:
        """Tokens of a row that are not in the cache."""
        return self.tokens[row][int(self.runner.lengths[row]) :]

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        """Runs what is pending of some rows.

        Returns:
            Logits behind the last token of each row, float32 [all rows, vocabulary]; undefined for
            rows that are not asked for.
        """
        for row in rows:
            if not self.pending(row):  # after a rewind: the last token's logits are wanted again
                last = self.tokens[row][-1]
                self.rewind(row, len(self.tokens[row]) - 1)
                self.tokens[row].append(last)
        wanted = set(rows)
        pending = [self.pending(row) if row in wanted else [] for row in range(len(self.tokens))]
        longest = max(map(len, pending))
        need = int(self.runner.lengths.max()) + longest
        if need > self.runner.capacity:
            self.runner.grow(self._capacity(max(need, 2 * self.runner.capacity)))
        ids = torch.full((len(pending), longest), self.pad, dtype=torch.int64)
        for row, new in enumerate(pending):
            ids[row, : len(new)] = torch.tensor(new, dtype=torch.int64)
        counts = torch.tensor([len(new) for new in pending], dtype=torch.int64)
        return self.runner.run(ids, counts)

    def room(self) -> int | None:
        """Tokens that the longest row can still take; None is no limit."""
        if self.context_length is None:
            return None
        return self.context_length - max(map(len, self.tokens))

    def _capacity(self, tokens: int) -> int:
        rounded = -(-tokens // BLOCK) * BLOCK
        return rounded if self.context_length is None else min(rounded, self.context_length)

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ArgumentError("a prompt has no token", fix="Give it at least one.")
        if self.context_length is not None and len(ids) > self.context_length:
            raise ArgumentError(
                f"{len(ids)} tokens are more than the model's context length, "
                f"{self.context_length}",
                fix="Shorten the prompt, or forget a part of the conversation.",
            )
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ArgumentError(f"token {wrong} is none of the model's {self.vocab_size}")
