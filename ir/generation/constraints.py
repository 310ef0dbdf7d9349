"""Tokens that may not come, or must: what models' own defaults ask for, summarizers' most of all.

Each follows transformers' processor of the same name; they come behind the repetition penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from graphwright.ir.options import Options

if TYPE_CHECKING:
    import torch


class Constraints(Options):
    """Which tokens may come next."""

    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """No sequence of so many tokens comes twice in a text, prompt and all; 0 for no such rule."""

    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that may not come."""

    min_length: Annotated[int, Field(ge=0)] = 0
    """No stop token before a text has so many tokens, prompt and all."""

    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """No stop token before so many tokens are generated."""

    suppress_tokens: tuple[int, ...] = ()
    """Tokens that never come."""

    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that do not come first."""

    forced_bos_token_id: int | None = None
    """The token behind a decoder's start token."""

    forced_eos_token_id: int | None = None
    """The token at the end of a text that reaches `max_new_tokens`."""


def constrain(
    scores: torch.Tensor,
    tokens: Sequence[Sequence[int]],
    constraints: Constraints,
    *,
    new: int,
    limit: int,
    stops: Sequence[int],
) -> torch.Tensor:
    """Scores with -inf on every token that may not come.

    Args:
        scores: logits or log-probabilities, float32 [rows, vocabulary].
        tokens: all tokens of each row, prompt and generated.
        constraints: what to keep to.
        new: tokens that each row has generated.
        limit: tokens that a row may generate.
        stops: stop tokens.

    Returns:
        A tensor of the same shape; the given one when nothing changes.
    """
    out = scores.clone()
    for row, held in zip(out, tokens, strict=True):
        banned = [*_ngrams(held, constraints.no_repeat_ngram_size), *constraints.suppress_tokens]
        for word in constraints.bad_words_ids:
            *before, last = word
            if held[len(held) - len(before) :] == before and word not in [(s,) for s in stops]:
                banned.append(last)
        if len(held) < constraints.min_length or new < constraints.min_new_tokens:
            banned += stops
        forced = _forced(constraints, len(held), is_last=new == limit - 1)
        begins = 1 if len(held) - new == 1 and constraints.forced_bos_token_id is not None else 0
        if new == begins:
            banned += constraints.begin_suppress_tokens
        if forced is not None:
            row[:] = -float("inf")
            row[forced] = 0.0
        if banned:
            row[list(banned)] = -float("inf")
    return out


def is_free(constraints: Constraints) -> bool:
    """Whether every token may come."""
    return all(
        getattr(constraints, name) == field.default
        for name, field in Constraints.model_fields.items()
    )


def _forced(constraints: Constraints, length: int, *, is_last: bool) -> int | None:
    if is_last and constraints.forced_eos_token_id is not None:
        return constraints.forced_eos_token_id
    return constraints.forced_bos_token_id if length == 1 else None


def _ngrams(held: Sequence[int], size: int) -> set[int]:
    """Tokens that would end a sequence of `size` tokens that is there already."""
    if size == 0 or len(held) < size:
        return set()
    prefix = list(held[len(held) + 1 - size :])
    windows = (list(held[at : at + size]) for at in range(len(held) - size + 1))
    return {window[-1] for window in windows if window[:-1] == prefix}
