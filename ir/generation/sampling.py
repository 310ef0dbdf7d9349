"""From logits to a token: penalties, the sets that samples are drawn from, and the draw.

The formulas are those of transformers' logits processors, in its order: repetition penalty
(Keskar et al. 2019), temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.ir.errors import ModelError
from graphwright.ir.generation.settings import Settings


def penalize(scores: torch.Tensor, tokens: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """Scores with the repetition penalty on every token that a row holds already.

    Args:
        scores: logits or log-probabilities, float32 [rows, vocabulary].
        tokens: all tokens of each row, prompt and generated.
        penalty: above 1 makes repetition less probable; 1 changes nothing.

    Returns:
        A tensor of the same shape; the given one when nothing changes.
    """
    if penalty == 1.0:
        return scores
    out = scores.clone()
    for row, ids in enumerate(tokens):
        seen = torch.tensor(sorted(set(ids)), dtype=torch.int64)
        old = scores[row, seen]
        out[row, seen] = torch.where(old < 0, old * penalty, old / penalty)
    return out


def candidates(logits: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that a sample may be, and their probabilities.

    Args:
        logits: of one row, float32 [vocabulary].
        settings: with `temperature` above 0.

    Returns:
        Ids, int64 [n], ascending, and their probabilities, float32 [n], which sum to 1.
    """
    scores = logits / settings.temperature
    ids = torch.arange(len(scores))
    if 0 < settings.top_k < len(scores):
        # ties with the k-th stay, so that the set does not depend on an order
        smallest = torch.topk(scores, settings.top_k).values[-1]
        ids = torch.nonzero(scores >= smallest).squeeze(1)
        scores = scores[ids]
    if settings.top_p < 1.0:
        order = torch.argsort(scores)
        below = torch.softmax(scores[order], dim=0).cumsum(0) <= 1 - settings.top_p
        below[-1] = False
        kept = order[~below].sort().values
        ids, scores = ids[kept], scores[kept]
    if settings.min_p > 0.0:
        probabilities = torch.softmax(scores, dim=0)
        kept = probabilities >= settings.min_p * probabilities.amax()
        ids, scores = ids[kept], scores[kept]
    return ids, torch.softmax(scores, dim=0)


def choose(
    logits: torch.Tensor, settings: Settings, streams: Sequence[torch.Generator]
) -> list[int]:
    """One token per row: the most probable one (the lowest id of equal ones), or a sample.

    Args:
        logits: after penalties, float32 [rows, vocabulary].
        settings: how.
        streams: a source of random numbers per row; not read where nothing is sampled.
    """
    if not settings.samples:
        return [int(i) for i in logits.argmax(dim=-1)]
    chosen = []
    for row, stream in zip(logits, streams, strict=True):
        ids, probabilities = candidates(row, settings)
        chosen.append(int(ids[torch.multinomial(probabilities, 1, generator=stream)]))
    return chosen


def streams_of(seed: int, count: int) -> list[torch.Generator]:
    """Sources of random numbers for `count` sequences: what a sequence draws does not depend on
    which others are generated beside it."""
    first = torch.Generator().manual_seed(seed)
    seeds = torch.randint(0, 2**62, (count,), generator=first).tolist()
    return [torch.Generator().manual_seed(each) for each in seeds]


def refuse_broken(logits: torch.Tensor, rows: Sequence[int]) -> None:
    """Logits that no token can be chosen from.

    Raises:
        ModelError: there is a NaN among those of one of `rows`, or all are -inf.
    """
    highest = logits[list(rows)].amax(dim=-1)
    if not bool(torch.isfinite(highest).all()):
        raise ModelError(
            "the model's logits are not finite",
            fix="Look at its weights, or compute in float32 (`model: {dtype: float32}`).",
        )
