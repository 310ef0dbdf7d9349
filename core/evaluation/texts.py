"""Token ids as the inputs of a model, and how likely it finds one text behind another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.evaluation.scoring import IGNORED_LABEL, Scorer
from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import Signature

MASK = "attention_mask"


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids, padded on the right with 0: int64 (rows, longest); and their lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids, lengths


def text_inputs(signature: Signature, ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """A call's inputs by name for texts, int64 (batch, tokens), padded on the right.

    Inputs that a call may leave out, such as an empty past, are left out.

    Raises:
        ArgumentError: the model takes something else than texts, or texts of another size.
    """
    places = torch.arange(ids.shape[1]).expand(*ids.shape)
    known = {
        "input_ids": ids,
        MASK: (places < lengths[:, None]).long(),
        "position_ids": places,
        "token_type_ids": torch.zeros_like(ids),
    }
    inputs = {}
    for spec in signature.inputs:
        if (
            spec.name in known and spec.name != "position_ids"
        ) or spec.name not in signature.defaults:
            if spec.name not in known:
                raise ArgumentError(
                    f"the model takes {spec.name!r} beside a text, and nothing is known to give it"
                )
            inputs[spec.name] = known[spec.name].to(getattr(torch, spec.dtype))
    if "input_ids" not in inputs:
        raise ArgumentError("the model takes no `input_ids`, and so no texts")
    return inputs


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a text behind another.

    Attributes:
        log_likelihood: natural logarithm of its probability.
        is_greedy: whether each of its tokens is the most likely one.
    """

    log_likelihood: float
    is_greedy: bool


def likelihoods(
    scorer: Scorer,
    signature: Signature,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
) -> list[Likelihood]:
    """Of every (context, continuation) the likelihood of the continuation, as token ids.

    Texts of about one length are run together.

    Raises:
        ArgumentError: a context is empty.
    """
    if any(not context for context, _ in pairs):
        raise ArgumentError("a continuation needs a token in front of it")
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    found: dict[int, Likelihood] = {}
    for start in range(0, len(order), batch_size):
        piece = order[start : start + batch_size]
        ids, lengths = padded([[*pairs[i][0], *pairs[i][1]] for i in piece])
        labels = torch.full_like(ids, IGNORED_LABEL)
        for row, i in enumerate(piece):
            own = slice(len(pairs[i][0]), int(lengths[row]))
            labels[row, own] = ids[row, own]
        # What stands behind the last token is not asked.
        given = text_inputs(signature, ids[:, :-1], lengths.clamp_max(ids.shape[1] - 1))
        scores = scorer(given, labels)
        counts = labels[:, 1:] != IGNORED_LABEL
        sums = scores.log_likelihoods.sum(1).tolist()
        greedy = (scores.is_greedy | ~counts).all(1).tolist()
        for i, total, is_greedy in zip(piece, sums, greedy, strict=True):
            found[i] = Likelihood(total, is_greedy)
    return [found[i] for i in range(len(pairs))]
