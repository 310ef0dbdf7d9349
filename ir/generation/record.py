"""What generation needs to know of a program: which inputs are the past, and which tokens stop it.

It is written by the loader into `program.facts["generation"]`, passes leave it alone, and backends
put it beside the artifact (`generation.json`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from graphwright.ir.program import Program

FACT = "generation"
"""Key of the record among a program's facts."""


@dataclass(frozen=True)
class CachedLayer:
    """Names of one layer's cache: inputs and outputs (batch, kv_heads, length, head_size).

    Attributes:
        past_key, past_value: inputs, of the tokens seen so far.
        present_key, present_value: outputs, the same with the new tokens behind them.
    """

    past_key: str
    past_value: str
    present_key: str
    present_value: str


@dataclass(frozen=True)
class Generation:
    """The record of a program that generates.

    Attributes:
        kind: `decoder`; `encoder` and `cross_decoder` are the two halves of an encoder-decoder.
        ids: input of token ids, int64 (batch, seq).
        mask: input (batch, total), 0 where a slot of the cache or a token is padding; None where
            the model takes none.
        positions: input of position ids, int64 (batch, seq); None where the model takes none.
        logits: output (batch, seq, vocabulary).
        layers: cache of keys and values, in the order of the layers.
        states: (input, output) of every state of fixed size, as a recurrence has.
        cross: (key, value) inputs of a decoder that look at the encoder, or the encoder's outputs
            that they are, per layer.
        cross_mask: input (batch, source) of such a decoder, 0 where the source is padding.
        context_length: most tokens that a row may have; None where the configuration says none.
        vocab_size: size of the logits.
        bos, pad: token ids, where there are any.
        eos: token ids that end a text: the union of what the model's files say.
        decoder_start: token that a decoder with cross-attention starts from.
        sliding_window: tokens that a windowed layer sees, itself included; None where none is.
        padding: on which side a batch may be padded; `right` where rows are compact in the cache.
        tokenizer: folder of the tokenizer's files, as it was given; None where there are none.
        sampling: what the model's makers recommend, as `temperature`, by generation_config.json.
    """

    kind: Literal["decoder", "encoder", "cross_decoder"]
    ids: str = "input_ids"
    mask: str | None = "attention_mask"
    positions: str | None = None
    logits: str = "logits"
    layers: tuple[CachedLayer, ...] = ()
    states: tuple[tuple[str, str], ...] = ()
    cross: tuple[tuple[str, str], ...] = ()
    cross_mask: str | None = None
    context_length: int | None = None
    vocab_size: int = 0
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    decoder_start: int | None = None
    sliding_window: int | None = None
    padding: Literal["any", "left", "right"] = "left"
    tokenizer: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> Generation | None:
        """The record of a program; None where it has no cache."""
        found = program.facts.get(FACT)
        return None if found is None else cls.from_json(found)

    @classmethod
    def of_decoder(cls, program: Program) -> Generation | None:
        """The record of a decoder that runs alone; None for half of an encoder-decoder too."""
        found = cls.of(program)
        return found if found is not None and found.kind == "decoder" else None

    def to_json(self) -> dict[str, Any]:
        """Plain dict for JSON, as it is read back: lists, no tuples."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Generation:
        """Inverse of `to_json` (lists come back as tuples)."""
        pairs = {name: tuple(tuple(pair) for pair in data[name]) for name in ("states", "cross")}
        layers = tuple(CachedLayer(**layer) for layer in data["layers"])
        return cls(**{**data, **pairs, "layers": layers, "eos": tuple(data["eos"])})

    @property
    def past(self) -> tuple[str, ...]:
        """Inputs that a prompt starts without: keys and values layer by layer, then states."""
        cached = [name for layer in self.layers for name in (layer.past_key, layer.past_value)]
        return (*cached, *(name for name, _ in self.states))

    @property
    def present(self) -> tuple[str, ...]:
        """Outputs in the order of `past`, each what that input is at the next step."""
        cached = [n for layer in self.layers for n in (layer.present_key, layer.present_value)]
        return (*cached, *(name for _, name in self.states))

    def onnx_names(self) -> dict[str, str]:
        """Names of inputs and outputs in ONNX files, where they are not the program's own.

        `past_key_values.0.key` and `present.0.value` are what clients of such files look for.
        """
        if self.kind != "decoder":
            return self._crossed_names()
        names: dict[str, str] = {}
        for i, layer in enumerate(self.layers):
            names |= {
                layer.past_key: f"past_key_values.{i}.key",
                layer.past_value: f"past_key_values.{i}.value",
                layer.present_key: f"present.{i}.key",
                layer.present_value: f"present.{i}.value",
            }
        return names

    def _crossed_names(self) -> dict[str, str]:
        """Names that onnxruntime-genai looks for in Whisper's two models, for every pair."""
        crossed = "present" if self.kind == "encoder" else "past"
        names = {"input_features": "audio_features"} if self.ids == "input_features" else {}
        for i, (key, value) in enumerate(self.cross):
            names |= {key: f"{crossed}_key_cross_{i}", value: f"{crossed}_value_cross_{i}"}
        for i, layer in enumerate(self.layers):
            names |= {
                layer.past_key: f"past_key_self_{i}",
                layer.past_value: f"past_value_self_{i}",
                layer.present_key: f"present_key_self_{i}",
                layer.present_value: f"present_value_self_{i}",
            }
        return names


def cached_layers(count: int) -> tuple[CachedLayer, ...]:
    """The names that the loader gives to the caches of `count` layers."""
    return tuple(
        CachedLayer(f"past_key_{i}", f"past_value_{i}", f"present_key_{i}", f"present_value_{i}")
        for i in range(count)
    )
