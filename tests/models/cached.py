"""A decoder of transformers as a function of its past, which no trace of ours has touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from graphwright.ir.generation.concat import ConcatRunner
from graphwright.ir.generation.record import Generation, cached_layers
from graphwright.ir.signature import DimRange, Signature, TensorSpec


class PastLayer(DynamicLayer):
    """A layer of transformers' cache that starts from tensors."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device


def run_flat(model: Any) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """(ids, mask, positions, *past) to (logits, *present)."""

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids, mask, positions, *past = inputs
        cache = DynamicCache()
        cache.layers = [PastLayer(past[i], past[i + 1]) for i in range(0, len(past), 2)]
        with torch.inference_mode():
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions,
                past_key_values=cache, use_cache=True,
            ).logits  # fmt: skip
        return logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))

    return run


def record_of(model: Any) -> Generation:
    """The record that a program of the model has."""
    config = model.config
    return Generation(
        "decoder",
        positions="position_ids",
        layers=cached_layers(config.num_hidden_layers),
        vocab_size=config.vocab_size,
    )


def signature_of(model: Any) -> Signature:
    """The inputs and outputs of `run_flat`."""
    record, config = record_of(model), model.config
    sizes = (config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    tokens = [
        TensorSpec("input_ids", "int64", ("batch", "seq")),
        TensorSpec("attention_mask", "int64", ("batch", "total")),
        TensorSpec("position_ids", "int64", ("batch", "seq")),
    ]

    def caches(names: tuple[str, ...], length: str) -> list[TensorSpec]:
        shape = ("batch", sizes[0], length, sizes[1])
        return [TensorSpec(name, "float32", shape) for name in names]

    logits = TensorSpec("logits", "float32", ("batch", "seq", config.vocab_size))
    dims = {name: DimRange() for name in ("batch", "seq", "total")} | {"past": DimRange(0)}
    inputs = (*tokens, *caches(record.past, "past"))
    return Signature(inputs, (logits, *caches(record.present, "total")), {}, dims)


def runner_of(model: Any, *, has_all_logits: bool = True) -> ConcatRunner:
    """A runner over transformers; without all logits it gives those of the last tokens."""
    whole = run_flat(model)

    def last(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, *present = whole(inputs)
        mask = inputs[1][:, -inputs[0].shape[1] :]
        at = (mask * torch.arange(mask.shape[1])).max(1).values
        return logits[torch.arange(len(at)), at][:, None], *present

    run = whole if has_all_logits else last
    return ConcatRunner(record_of(model), signature_of(model), run, has_all_logits=has_all_logits)
