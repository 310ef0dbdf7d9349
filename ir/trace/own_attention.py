"""Attention of transformers that ATen's own cannot say, as one call of `graphwright::attention`.

Models with capped scores or sinks run their attention written out, keys repeated over the heads
that share them. Their modules ask a table of functions for the attention by name, and so do their
masks: both get an entry of ours, which such a model uses while it is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.ops.attention import attention

NAME = "graphwright"


@contextlib.contextmanager
def own_attention(model: nn.Module, said: list[str]) -> Iterator[None]:
    """Lets the parts of `model` that would write capped or sinking attention out call the op.

    A part that is asked for its attention weights keeps the written-out form, which gives them.
    What is lost on the way is added to `said`: the op has no dropout for `train()` to put back.
    """
    configs: list[Any] = [
        part.config
        for part in model.modules()
        if _is_written_out(part) and not getattr(part.config, "output_attentions", False)
    ]
    before = {id(config): (config, config._attn_implementation_internal) for config in configs}
    if before:
        _register()
        dropped = max(float(getattr(c, "attention_dropout", 0) or 0) for c, _ in before.values())
        if dropped:
            said.append(f"dropout {dropped:g} of capped attention is not put back in training")
    for config, _ in before.values():
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, name in before.values():
            config._attn_implementation_internal = name


def _is_written_out(part: Any) -> bool:
    """A model whose attention goes through the table, and for which ATen's is no choice."""
    config = getattr(part, "config", None)
    return (
        getattr(config, "_attn_implementation_internal", None) == "eager"
        and getattr(part, "_supports_attention_backend", False)
        and getattr(part, "_supports_sdpa", True) is False
    )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, whole_mask)


def whole_mask(*args: Any, **settings: Any) -> Tensor | None:
    """The boolean mask of ATen's attention, never left out: the op has no causal mode."""
    from transformers.masking_utils import sdpa_mask

    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(*args, **{**settings, **skips})
    return mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: (B, H, S, D) to (B, S, H, W), and no weights.

    Args:
        module: that calls; `num_key_value_groups` heads of queries share a key.
        query, key, value: (B, H, S, D), (B, K, T, D), (B, K, T, W).
        attention_mask: boolean, or added to the scores; stretches to (B, H, S, T).
        dropout: 0 in inference.
        scaling: factor of the scores; one over the root of D when None.
        softcap: bound of the scores.
        s_aux: (H,), the score of a key without a value.
    """
    has_more = others.get("position_bias") is not None or others.get("cache") is not None
    if not (softcap or s_aux is not None) or has_more or dropout:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if softcap or s_aux is not None:
            raise ModelError(
                "its attention has capped scores or sinks, and dropout or a bias of positions "
                "besides, which no op of ours computes"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **others
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    mixed = attention(query, key, value, attention_mask, scale, float(softcap or 0.0), s_aux)
    return mixed.transpose(1, 2).contiguous(), None
