"""Log-likelihoods that a model gives to the tokens of texts: what language metrics are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from graphwright.ir.check.fidelity import leaves
from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.last_logits import has_all_logits

if TYPE_CHECKING:
    from graphwright.ir.generation.runner import Runner

IGNORED_LABEL = -100
"""Label of a token that does not count, as in torch's cross entropy."""

CHUNK = 1 << 23
"""Logits that are turned into float64 at a time: 64 MiB."""


@dataclass(frozen=True)
class Scores:
    """What a model gives to the next tokens.

    Attributes:
        log_likelihoods: natural logarithm of the probability of the token behind each, float64
            [batch, tokens - 1]; 0 where the label is ignored.
        is_greedy: whether it is the token of the largest logit, bool [batch, tokens - 1]; of
            equal logits the first counts, as in torch. False where the label is ignored.
    """

    log_likelihoods: Tensor
    is_greedy: Tensor


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of `labels` under the logits of the tokens before them; sums are in float64.

    Args:
        logits: [batch, tokens, vocabulary], any floating dtype and device. Those behind the last
            token are not read, and may be missing.
        labels: int64 [batch, tokens], each in the place of the token it is; `IGNORED_LABEL`
            where none counts.
    """
    wanted = labels[:, 1:].cpu().long()
    places = (wanted != IGNORED_LABEL).flatten().nonzero().flatten()
    flat, targets = logits[:, : wanted.shape[1]].flatten(0, 1), wanted.flatten()
    found = torch.zeros(wanted.numel(), dtype=torch.float64)
    greedy = torch.zeros(wanted.numel(), dtype=torch.bool)
    for piece in places.split(max(1, CHUNK // logits.shape[-1])):
        rows, at = flat[piece.to(flat.device)].cpu().double(), targets[piece]
        found[piece] = rows.gather(1, at[:, None])[:, 0] - rows.logsumexp(1)
        # of a row with NaN the largest is the NaN, which names nothing
        greedy[piece] = (rows.argmax(1) == at) & ~rows.isnan().any(1)
    return Scores(found.view(wanted.shape), greedy.view(wanted.shape))


class Scorer(Protocol):
    """Gives the tokens of a batch their scores.

    Attributes:
        how: how it goes through a text, in words; empty where that is the usual way, at once.
    """

    @property
    def how(self) -> str: ...

    def __call__(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Scores:
        """Scores of `labels` (batch, tokens), int64, each in the place of the token it is.

        The inputs may lack the last token, behind which nothing is scored.
        """


def scorer_of(model: Any) -> Scorer:
    """How a model is asked for the scores of texts.

    Args:
        model: a program, a `Compiled`, or any function of inputs by name that gives logits.
    """
    if gives_last_logits(model):
        return TokenByToken(model.runner())
    return AtOnce(model)


def gives_last_logits(model: Any) -> bool:
    """Whether it is an artifact that gives the logits of each row's last token alone."""
    record = getattr(model, "generation", None)
    return record is not None and not has_all_logits(model.signature, record)


@dataclass(frozen=True)
class AtOnce:
    """One call per batch, of a model that gives the logits of every token."""

    model: Callable[..., Any]
    how: str = ""

    def __call__(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Scores:
        """See `Scorer`.

        Raises:
            ArgumentError: its logits are not those of the tokens.
        """
        path, logits = main_output(self.model(**inputs))
        rows, length = labels.shape
        if logits.dim() != 3 or len(logits) != rows or length - logits.shape[1] not in (0, 1):
            raise ArgumentError(
                f"perplexity takes logits (batch, length, vocabulary) and labels (batch, length); "
                f"{path} is {tuple(logits.shape)}, the labels are {tuple(labels.shape)}"
            )
        return scores(logits, labels)


@dataclass(frozen=True)
class TokenByToken:
    """A step per token over the cache, of an artifact that gives the last token's logits alone.

    Exact, and many times slower than one call for the whole text. Texts are padded on the right.
    """

    runner: Runner
    how: str = (
        "token by token through the cache, since the artifact gives the logits of last tokens "
        "alone (lower with `logits: all`, which is faster here)"
    )

    def __call__(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Scores:
        """See `Scorer`.

        Raises:
            ArgumentError: a text is padded on the left.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        lengths = mask.sum(1)
        if not torch.equal(mask != 0, torch.arange(ids.shape[1]) < lengths[:, None]):
            raise ArgumentError("texts have to be padded on the right")
        self.runner.start(len(ids), ids.shape[1])
        # What stands in front of the first label that counts is one call.
        counts = (labels[:, 1:] != IGNORED_LABEL).any(0).nonzero()
        first = int(counts.min()) if len(counts) else 0
        found = [scores(torch.zeros(len(ids), first + 1, 1), labels[:, : first + 1])]
        at = 0
        for end in range(first + 1, labels.shape[1]):
            new = (lengths.clamp_max(end) - at).clamp_min(0)
            logits = self.runner.run(ids[:, at:end], new)
            found.append(scores(logits[:, None].expand(-1, 2, -1), labels[:, end - 1 : end + 1]))
            at = end
        return Scores(
            torch.cat([one.log_likelihoods for one in found], 1),
            torch.cat([one.is_greedy for one in found], 1),
        )


def main_output(outputs: Any) -> tuple[str, Tensor]:
    """The output named `logits`, or else the first floating-point one."""
    found = list(floating(outputs))
    if not found:
        raise ArgumentError("the model has no floating-point output to evaluate")
    named = [(path, value) for path, value in found if path == "logits"]
    path, value = (named or found)[0]
    return path or "the output", value


def floating(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every floating-point output."""
    return ((path, value) for path, value in leaves(outputs) if value.is_floating_point())
