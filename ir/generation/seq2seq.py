"""An encoder-decoder of transformers as two functions of tensors.

The encoder runs once per text: it gives its hidden states and, for every layer of the decoder, the
keys and values that cross-attention reads. They are taken from the cache that one call of the
decoder fills, so that no projection has to be known by name; the rest of that call is dead code.
The decoder runs once per token, over its own past and over what the encoder gave.
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
from graphwright.ir.generation.decoder import BATCH, PAST, SEQ, NoCache, cache_of
from graphwright.ir.generation.record import CachedLayer, cached_layers
from graphwright.ir.signature import Outputs

SOURCE = 7
"""Example length of the encoder's input: unlike all other sizes of the trace."""

HIDDEN, SOURCE_MASK = "encoder_hidden_states", "encoder_attention_mask"


@dataclass(frozen=True)
class EncoderCall:
    """How an encoder is called: `call(model, **inputs)`.

    Attributes:
        main: name of its input: `input_ids`, `input_features`.
        has_mask: whether `attention_mask` (batch, source) hides padding.
        cross: names of the keys and values that it gives, per layer of the decoder.
    """

    main: str
    has_mask: bool
    cross: tuple[tuple[str, str], ...] = ()

    def __call__(self, model: Any, **inputs: Tensor) -> Outputs:
        """`encoder_hidden_states`, and `cross_key_i`, `cross_value_i` of every layer."""
        hidden = model.get_encoder()(**inputs).last_hidden_state
        outputs = {HIDDEN: hidden}
        layers = cross_layers(model, hidden, inputs.get("attention_mask"))
        for (key, value), layer in zip(self.cross, layers, strict=True):
            outputs |= {key: layer.keys, value: layer.values}
        return Outputs(outputs)


def cross_layers(model: Any, hidden: Tensor, mask: Tensor | None) -> list[Any]:
    """What a decoder's cross-attention keeps of an encoder's hidden states, per layer."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    token = torch.zeros((hidden.shape[0], 1), dtype=torch.int64, device=hidden.device)
    more = {} if mask is None else {"attention_mask": mask}
    model(
        encoder_outputs=(hidden,), decoder_input_ids=token, past_key_values=cache, use_cache=True,
        **more,
    )  # fmt: skip
    return list(cache.cross_attention_cache.layers)


@dataclass(frozen=True)
class CrossDecoderCall:
    """How a decoder that looks at an encoder is called: `call(model, **inputs)`.

    Attributes:
        layers: names of its own cache, per layer.
        cross: names of the keys and values that the encoder gave, per layer.
        width: of the encoder's hidden states.
        has_mask: whether `encoder_attention_mask` (batch, source) hides the source's padding.
    """

    layers: tuple[CachedLayer, ...]
    cross: tuple[tuple[str, str], ...]
    width: int
    has_mask: bool

    def __call__(self, model: Any, **inputs: Tensor) -> Outputs:
        """`logits` and every layer's `present_key_i`, `present_value_i`."""
        from transformers.cache_utils import EncoderDecoderCache

        own = cache_of([(inputs[x.past_key], inputs[x.past_value]) for x in self.layers])
        given = [(inputs[key], inputs[value]) for key, value in self.cross]
        cache = EncoderDecoderCache(own, cache_of(given))
        cache.is_updated = dict.fromkeys(range(len(self.layers)), True)
        first = given[0][0]
        # Nothing reads the hidden states: they only tell the model that there is an encoder.
        hidden = first.new_zeros(first.shape[0], first.shape[2], self.width)
        more = {"attention_mask": inputs[SOURCE_MASK]} if self.has_mask else {}
        found = model(
            encoder_outputs=(hidden,), decoder_input_ids=inputs["input_ids"],
            past_key_values=cache, use_cache=True, **more,
        )  # fmt: skip
        outputs = {"logits": found.logits}
        for layer, kept in zip(self.layers, own.layers, strict=True):
            outputs |= {layer.present_key: kept.keys, layer.present_value: kept.values}
        return Outputs(outputs)


@dataclass(frozen=True)
class Seq2Seq:
    """The two halves of an encoder-decoder, ready to be traced.

    Attributes:
        encoder, decoder: how they are called.
        source: an input of the encoder by name each.
        examples: an input of the decoder by name each.
        vocabulary: size of the logits.
    """

    encoder: EncoderCall
    decoder: CrossDecoderCall
    source: Mapping[str, Tensor]
    examples: Mapping[str, Tensor]
    vocabulary: int


@torch.no_grad()
def examine(model: Any, seed: int = 0) -> Seq2Seq:
    """Runs an encoder, and a decoder behind it, and takes the caches that are made.

    Args:
        model: an encoder-decoder of transformers.
        seed: of the example inputs.

    Raises:
        NoCache: the decoder keeps no cache of keys and values.
        ModelError: the model does not run.
    """
    takes = inspect.signature(model.forward).parameters
    if not {"past_key_values", "use_cache", "decoder_input_ids", "encoder_outputs"} <= set(takes):
        raise NoCache("its forward takes no decoder_input_ids with a cache")
    generator = torch.Generator().manual_seed(seed)
    source = source_of(model, generator)
    has_mask = "attention_mask" in source
    try:
        hidden = model.get_encoder()(**source).last_hidden_state
        kept = cross_layers(model, hidden, source.get("attention_mask"))
        _refuse_other_layers(kept, hidden)
    except NoCache:
        raise
    except Exception as error:  # models raise anything
        raise ModelError(
            "the model does not run as an encoder and a decoder with `use_cache`",
            details=(innermost(error),),
        ) from error
    cross = tuple((f"cross_key_{i}", f"cross_value_{i}") for i in range(len(kept)))
    encoder = EncoderCall(next(iter(source)), has_mask, cross)
    decoder = CrossDecoderCall(cached_layers(len(kept)), cross, hidden.shape[-1], has_mask)
    given = {n: t for n, t in encoder(model, **source).items() if n != HIDDEN}
    if has_mask:
        given = {SOURCE_MASK: source["attention_mask"], **given}
    rows = model.get_output_embeddings().weight.shape[0]
    ids = torch.randint(0, rows, (BATCH, PAST + SEQ), generator=generator).to(hidden.device)
    empty = {
        name: torch.zeros_like(layer_part[:, :, :0])
        for layer, names in zip(kept, decoder.layers, strict=True)
        for name, layer_part in ((names.past_key, layer.keys), (names.past_value, layer.values))
    }
    before = decoder(model, input_ids=ids[:, :PAST], **empty, **given)
    past = {
        name: before[name.replace("past", "present")].clone() for name in empty
    }  # the names of `cached_layers`
    examples = {"input_ids": ids[:, PAST:].contiguous(), **past, **given}
    return Seq2Seq(encoder, decoder, source, examples, int(before.logits.shape[-1]))


def source_of(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """An input of the encoder of each name, its main one first: token ids and their mask, or
    features of the one size that the model takes.

    Raises:
        ModelError: it is neither.
    """
    main, config = model.main_input_name, model.config
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if main == "input_ids":
        rows = model.get_encoder().get_input_embeddings().num_embeddings
        ids = torch.randint(0, rows, (BATCH, SOURCE), generator=generator)
        return {main: ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    frames = getattr(config, "max_source_positions", None)
    if main == "input_features" and frames:
        encoder = model.get_encoder()
        stride = _stride(encoder)
        shape = (BATCH, config.num_mel_bins, frames * stride)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return {main: torch.randn(shape, generator=generator).to(device, dtype)}
    raise ModelError(
        f"an encoder-decoder whose encoder reads {main!r} is not traced in two parts",
        fix="Trace its encoder and its decoder by themselves.",
    )


def _stride(encoder: nn.Module) -> int:
    """Frames of the features per position of an encoder that begins with convolutions."""
    strides = [m.stride[0] for m in encoder.modules() if isinstance(m, nn.Conv1d)]
    total = 1
    for stride in strides:
        total *= int(stride)
    return total


def _refuse_other_layers(layers: list[Any], hidden: Tensor) -> None:
    for index, layer in enumerate(layers):
        keys = getattr(layer, "keys", None)
        if keys is None or keys.dim() != 4 or keys.shape[::2] != hidden.shape[:2]:
            raise NoCache(f"layer {index} keeps no keys and values of the encoder's positions")
    if not layers:
        raise NoCache("the decoder keeps nothing of the encoder")
