"""Beam search: the most probable sequences, as transformers searches for them.

Every prompt is searched by itself over the rows that its beams have in a runner. Of the best
continuations of all beams, those that end go among the finished sequences, and the best others
are followed. A prompt is done when no beam could beat its worst finished sequence at the length
it has now, or with `early_stopping` once it has as many finished sequences as beams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

NONE = -1.0e9
"""Score of a sequence that there is none of."""


@dataclass
class Beams:
    """The search of one prompt.

    Attributes:
        width: beams that are followed.
        stops: number of stop tokens; so many more continuations are looked at.
        length_penalty: finished sequences compare by log-probability / length ** this.
        early_stopping: see above.
        sequences: generated tokens of each beam, best first.
        scores: their log-probabilities, float32 [width].
        finished: (score, tokens) of sequences that ended, best first, at most `width`.
        is_done: whether nothing can become better.
    """

    width: int
    stops: int
    length_penalty: float
    early_stopping: bool = False
    sequences: list[list[int]] = field(default_factory=list)
    scores: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    is_done: bool = False

    def __post_init__(self) -> None:
        self.sequences = [[] for _ in range(self.width)]
        # one beam at first, or all would follow the same tokens
        self.scores = torch.full((self.width,), NONE)
        self.scores[0] = 0.0

    def advance(
        self, scores: torch.Tensor, ends: Callable[[Sequence[int]], bool]
    ) -> tuple[list[int], list[int]]:
        """Takes one step.

        Args:
            scores: log-probabilities of the next token, float32 [width, vocabulary].
            ends: whether a sequence of generated tokens is at its end.

        Returns:
            For every beam that is followed now: the beam it comes from, and its new token.
        """
        vocabulary = scores.shape[1]
        total = (scores + self.scores[:, None]).reshape(-1)
        count = min(max(2, 1 + self.stops) * self.width, len(total))
        best, places = torch.topk(total, count)
        parents = (places // vocabulary).tolist()
        tokens = (places % vocabulary).tolist()
        grown = [[*self.sequences[p], t] for p, t in zip(parents, tokens, strict=True)]
        ended = torch.tensor([ends(sequence) for sequence in grown])
        length = len(grown[0])
        self._finish(grown, best / length**self.length_penalty, ended)
        running = best + ended.to(torch.float32) * NONE
        followed = torch.topk(running, self.width).indices
        self.scores = running[followed]
        self.sequences = [grown[i] for i in followed.tolist()]
        self.is_done = self.is_done or self._cannot_improve(length) or bool(ended.all())
        return [parents[i] for i in followed.tolist()], [tokens[i] for i in followed.tolist()]

    def _finish(self, grown: list[list[int]], scores: torch.Tensor, ended: torch.Tensor) -> None:
        """Sequences that ended and are among the `width` best continuations."""
        new = [
            (float(scores[i]), grown[i]) for i in range(self.width) if bool(ended[i])
        ]  # fmt: skip
        # sorted() keeps the earlier one of equal scores in front
        self.finished = sorted([*self.finished, *new], key=lambda f: -f[0])[: self.width]

    def _cannot_improve(self, length: int) -> bool:
        if len(self.finished) < self.width:
            return False
        if self.early_stopping:
            return True
        best_running = float(self.scores[0]) / length**self.length_penalty
        return bool(best_running <= self.finished[-1][0])
