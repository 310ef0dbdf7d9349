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
from graphwright.ir.generation.state_scans import scans_from_states
from graphwright.ir.generation.states import State, state_layer, states_of
from graphwright.ir.signature import Outputs

BATCH, PAST, SEQ = 2, 5, 16
"""Example sizes: all different, and at least 2, below which torch takes a size for fixed."""

CACHES = ("past_key_values", "cache_params")
"""Names of the argument that a model's cache is, and of what it returns."""


class NoCache(Exception):
    """The model keeps no cache that can be an input; the message says why."""


@dataclass(frozen=True)
class DecoderCall:
    """How a decoder is called: `call(model, **inputs)` with the inputs of `Generation`.

    Attributes:
        layers: names of the cache, per layer that keeps keys and values.
        has_mask, has_positions: whether the model takes `attention_mask`, `position_ids`.
        states: of the layers that keep something else.
        cache: name of the model's argument.
    """

    layers: tuple[CachedLayer, ...]
    has_mask: bool = True
    has_positions: bool = True
    states: tuple[State, ...] = ()
    cache: str = CACHES[0]

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
        """`logits`, every layer's `present_key_i`, `present_value_i`, and states."""
        past = [(inputs.pop(layer.past_key), inputs.pop(layer.past_value)) for layer in self.layers]
        given = {state: inputs.pop(state.past) for state in self.states}
        cache = cache_of(past, given)
        with scans_from_states(model):
            found = model(**inputs, **{self.cache: cache}, use_cache=True)
        outputs = {"logits": found.logits}
        own = {state.layer for state in self.states}
        full = [layer for place, layer in enumerate(cache.layers) if place not in own]
        for layer, kept in zip(self.layers, full, strict=True):
            outputs |= {layer.present_key: kept.keys, layer.present_value: kept.values}
        for state in self.states:
            outputs[state.present] = state.read(cache.layers[state.layer])
        return Outputs(outputs)


def cache_of(
    pairs: list[tuple[Tensor, Tensor]], states: Mapping[State, Tensor] | None = None
) -> Any:
    """A cache of transformers over given keys and values (batch, heads, length, head size).

    Layers of states stand in their own places, those of keys and values in the others.
    """
    from transformers.cache_utils import DynamicCache

    own: dict[int, dict[State, Tensor]] = {}
    for state, value in (states or {}).items():
        own.setdefault(state.layer, {})[state] = value
    full = iter(pairs)
    cache = DynamicCache()
    cache.layers = [
        state_layer(own[place]) if place in own else _past_layer()(*next(full))
        for place in range(len(pairs) + len(own))
    ]
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
    name = next((name for name in CACHES if name in takes), None)
    if name is None or "use_cache" not in takes:
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
    full, states = _layers_of(first, name)
    names = cached_layers(len(full))
    # without attention there are no keys that a mask could hide
    has_mask = bool(full) and "attention_mask" in takes
    call = DecoderCall(names, has_mask, "position_ids" in takes, tuple(states), name)
    start = {state.past: torch.zeros_like(value) for state, value in states.items()}
    for layer, kept in zip(names, full, strict=True):
        start |= {layer.past_key: kept.keys[:, :, :0], layer.past_value: kept.values[:, :, :0]}
    before = call(model, **call.tokens(ids[:, :PAST]), **start)
    examples = call.tokens(ids, PAST)
    for layer in names:
        examples[layer.past_key] = before[layer.present_key].clone()
        examples[layer.past_value] = before[layer.present_value].clone()
    for state in states:
        examples[state.past] = before[state.present].clone()
    return Decoder(call, examples, int(first.logits.shape[-1]))


def _layers_of(found: Any, name: str) -> tuple[list[Any], dict[State, Tensor]]:
    """The layers of keys and values, and the states of all others, of a cache behind one token."""
    cache = getattr(found, name, None)
    layers = getattr(cache, "layers", None)
    if cache is None:
        raise NoCache("it returns no cache")
    if not layers:
        kind = type(cache).__name__
        raise NoCache(f"its cache is a {kind}, whose layers are not keys and values")
    full: list[Any] = []
    states: dict[State, Tensor] = {}
    for index, layer in enumerate(layers):
        own = states_of(index, layer)
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if own and (keys is not None or values is not None):
            raise NoCache(f"layer {index} keeps keys, values and a state ({type(layer).__name__})")
        if own:
            states |= {state: state.read(layer) for state in own}
            continue
        if keys is None or values is None or keys.dim() != 4 or values.dim() != 4:
            raise NoCache(f"layer {index} keeps no keys and values ({type(layer).__name__})")
        if keys.shape[:3:2] != (BATCH, 1) or values.shape[:3:2] != (BATCH, 1):
            raise NoCache(f"the cache of layer {index} is not (batch, heads, length, head size)")
        full.append(layer)
    return full, states
