"""Forms that prompts come in: texts, conversations, token ids, padded batches of ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import ArgumentError
from graphwright.ir.generation.text import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """Token ids of prompts.

    Attributes:
        ids: of every prompt.
        is_one: whether one prompt was given, and not a list of prompts.
    """

    ids: list[list[int]]
    is_one: bool


def read_prompts(
    given: Any, tokenizer: Tokenizer | None, mask: torch.Tensor | None = None
) -> Prompts:
    """Prompts of any form.

    Args:
        given: a text; token ids (a list, or a tensor [tokens]); messages of one conversation (a
            list of dicts with `role` and `content`); or a list of such; or a tensor
            [batch, tokens].
        tokenizer: of the model, where it has one.
        mask: for a tensor [batch, tokens]: 0 where it holds padding, which may lie on any side.

    Raises:
        ArgumentError: another form, or a text for a model without tokenizer.
    """
    if isinstance(given, torch.Tensor):
        return _of_tensor(given, mask)
    if mask is not None:
        raise ArgumentError("attention_mask belongs to a tensor [batch, tokens] of token ids")
    if isinstance(given, str) or _is_ids(given) or _is_chat(given):
        return Prompts([_one(given, tokenizer)], True)
    if isinstance(given, Sequence) and given:
        return Prompts([_one(each, tokenizer) for each in given], False)
    raise ArgumentError(
        f"a prompt is a text, token ids or messages, or a list of such, and not {_named(given)}"
    )


def _one(given: Any, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(given, torch.Tensor) and given.ndim == 1:
        return _of_tensor(given, None).ids[0]
    if _is_ids(given):
        return list(given)
    if not (isinstance(given, str) or _is_chat(given)):
        raise ArgumentError(f"a prompt is a text, token ids or messages, not {_named(given)}")
    if tokenizer is None:
        raise ArgumentError(
            "the model came without a tokenizer, so it takes token ids and no texts",
            fix="Put tokenizer.json and tokenizer_config.json into its folder.",
        )
    return tokenizer.encode(given) if isinstance(given, str) else tokenizer.encode_chat(given)


def _of_tensor(given: torch.Tensor, mask: torch.Tensor | None) -> Prompts:
    if given.is_floating_point() or given.ndim not in (1, 2):
        raise ArgumentError(
            f"token ids are whole numbers [tokens] or [batch, tokens], not {given.dtype} "
            f"{tuple(given.shape)}"
        )
    rows = given.reshape(1, -1) if given.ndim == 1 else given
    if mask is None:
        return Prompts(rows.tolist(), given.ndim == 1)
    if mask.shape != given.shape:
        raise ArgumentError(
            f"attention_mask {tuple(mask.shape)} has another shape than the ids "
            f"{tuple(given.shape)}"
        )
    masks = mask.reshape(rows.shape)
    return Prompts([r[m != 0].tolist() for r, m in zip(rows, masks, strict=True)], given.ndim == 1)


def _is_ids(given: Any) -> bool:
    return isinstance(given, Sequence) and bool(given) and all(type(i) is int for i in given)


def _is_chat(given: Any) -> bool:
    return isinstance(given, Sequence) and bool(given) and all(
        isinstance(message, Mapping) for message in given
    )  # fmt: skip


def _named(given: Any) -> str:
    return f"an empty {type(given).__name__}" if given in ("", [], ()) else type(given).__name__
