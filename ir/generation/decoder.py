"""A causal language model of transformers with its cache as plain inputs and outputs.

The cache that transformers passes from call to call is an object, which no graph can hold. So the
model is called with a cache made of input tensors, and the tensors that stand in it afterwards are
outputs. Every layer gets a full cache, a windowed one too: the window is in the mask, whereas
transformers' own windowed cache keeps its length as a Python number that a trace would hold on to.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.generation.record import CachedLayer, cached_layers
from graphwright.ir.signature import Outputs

BATCH, PAST, SEQ = 2, 5, 16
"""Example sizes: all different, and at least 2, below which torch takes a size for fixed."""


class NoCache(Exception):
    """The model keeps no cache that can be an input; the message says why."""


@dataclass(frozen=True)
class DecoderCall:
    """How a decoder is called: `call(model, **inputs)` with the inputs of `Generation`.

    Attributes:
        layers: names of the cache, per layer.
        has_mask, has_positions: whether the model takes `attention_mask`, `position_ids`.
    """

    layers: tuple[CachedLayer, ...]
    has_mask: bool = True
    has_positions: bool = True

    def tokens(self, ids: Tensor, past: int = 0) -> dict[str, Tensor]:
        """Inputs for the tokens `ids[:, past:]` (batch, total) behind a past, without padding."""
        inputs = {"input_ids": ids[:, past:]}
        if self.has_mask:
            inputs["attention_mask"] = torch.ones_like(ids)
        if self.has_positions:
            places = torch.arange(past, ids.shape[1], device=ids.device)
            inputs["position_ids"] = places.expand(ids.shape[0], -1).contiguous()
        return inputs

    def __call__(self, model: nn.Module, **inputs: Tensor) -> Outputs:
        """`logits` and every layer's `present_key_i`, `present_value_i`."""
        past = [(inputs.pop(layer.past_key), inputs.pop(layer.past_value)) for layer in self.layers]
        cache = cache_of(past)
        found = model(**inputs, past_key_values=cache, use_cache=True)
        outputs = {"logits": found.logits}
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            outputs |= {layer.present_key: kept.keys, layer.present_value: kept.values}
        return Outputs(outputs)


def cache_of(pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """A cache of transformers over given keys and values (batch, heads, length, head size)."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    cache.layers = [_past_layer()(keys, values) for keys, values in pairs]
    return cache


def _past_layer() -> Any:
    """The class of a layer's cache that is full from the start, of any length, 0 included."""
    from transformers.cache_utils import DynamicLayer

    class PastLayer(DynamicLayer):
        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.keys, self.values = keys, values
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def get_seq_length(self) -> int:
            assert self.keys is not None
            length: int = self.keys.shape[-2]  # not by a test for emptiness, which a trace keeps
            return length

    return PastLayer


@dataclass(frozen=True)
class Decoder:
    """A decoder ready to be traced.

    Attributes:
        call: how it is called.
        examples: an input by name each, in call order.
        vocabulary: size of the logits.
    """

    call: DecoderCall
    examples: Mapping[str, Tensor]
    vocabulary: int


@torch.no_grad()
def examine(model: nn.Module, seed: int = 0) -> Decoder:
    """Runs a decoder over the tokens of a past, and takes the cache that it makes.

    Args:
        model: a causal language model of transformers.
        seed: of the token ids.

    Raises:
        NoCache: it makes none, or one whose layers are no keys and values.
        ModelError: it does not run on token ids.
    """
    takes = inspect.signature(model.forward).parameters
    if "past_key_values" not in takes or "use_cache" not in takes:
        raise NoCache("its forward takes no cache")
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(0, rows, (BATCH, PAST + SEQ), generator=generator).to(device)
    try:
        # one token, for a layer with a window keeps no more than that
        first = model(input_ids=ids[:, :1], use_cache=True)
    except Exception as error:  # models raise anything
        raise ModelError(
            "the model does not run on token ids with `use_cache`", details=(innermost(error),)
        ) from error
    if not hasattr(first, "logits"):
        raise NoCache("it gives no logits")
    empty = [pair[:, :, :0] for layer in _layers_of(first) for pair in (layer.keys, layer.values)]
    names = cached_layers(len(empty) // 2)
    call = DecoderCall(names, "attention_mask" in takes, "position_ids" in takes)
    past = [name for layer in names for name in (layer.past_key, layer.past_value)]
    prompt = call.tokens(ids[:, :PAST]) | dict(zip(past, empty, strict=True))
    before = call(model, **prompt)
    examples = call.tokens(ids, PAST)
    for layer in names:
        examples[layer.past_key] = before[layer.present_key].clone()
        examples[layer.past_value] = before[layer.present_value].clone()
    return Decoder(call, examples, int(first.logits.shape[-1]))


def _layers_of(found: Any) -> list[Any]:
    cache = getattr(found, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if cache is None:
        raise NoCache("it returns no cache")
    if not layers:
        kind = type(cache).__name__
        raise NoCache(f"its cache is a {kind}, whose layers are not keys and values")
    for index, layer in enumerate(layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or values.dim() != 4:
            raise NoCache(f"layer {index} keeps no keys and values ({type(layer).__name__})")
        if keys.shape[:3:2] != (BATCH, 1) or values.shape[:3:2] != (BATCH, 1):
            raise NoCache(f"the cache of layer {index} is not (batch, heads, length, head size)")
    return list(layers)
