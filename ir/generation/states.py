"""States of fixed size that a layer carries from token to token, as inputs and outputs.

A recurrence keeps a sum over all tokens before (Mamba), a short convolution the last few of them
(LFM2). Zeros are the state in front of the first token, so that a prompt and a step are one
program. A state has seen every token that was run: rows of different lengths are not padded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.generation.state_scans import NotedStates

CONV, RECURRENT = "conv", "recurrent"
_NAME = re.compile(r"past_state_(\d+)_(conv|recurrent)_?(\d*)")


@dataclass(frozen=True)
class State:
    """One state of one layer.

    Attributes:
        layer: index of the layer in the model's cache.
        kind: `conv` or `recurrent`.
        index: which of the layer's states of that kind.
    """

    layer: int
    kind: str
    index: int = 0

    @property
    def past(self) -> str:
        """Name of the input."""
        return f"past_state_{self.layer}_{self.kind}" + (f"_{self.index}" if self.index else "")

    @property
    def present(self) -> str:
        """Name of the output."""
        return self.past.replace("past", "present", 1)

    @classmethod
    def of(cls, past: str) -> State:
        """The state whose input has this name."""
        found = _NAME.fullmatch(past)
        if found is None:
            raise ValueError(f"{past!r} names no state")
        return cls(int(found[1]), found[2], int(found[3] or 0))

    def read(self, layer: Any) -> Tensor:
        """Its value in a layer of a cache."""
        states = layer.conv_states if self.kind == CONV else layer.recurrent_states
        value: Tensor = states[self.index]
        return value


def states_of(place: int, layer: Any) -> list[State]:
    """The states that a layer of a cache holds; empty for a layer of keys and values."""
    found = []
    for kind, name in ((CONV, "conv_states"), (RECURRENT, "recurrent_states")):
        held: Mapping[int, Tensor | None] = getattr(layer, name, {})
        found += [State(place, kind, i) for i, value in held.items() if value is not None]
    return found


def state_layer(given: Mapping[State, Tensor]) -> Any:
    """A layer of a cache of transformers that starts from given states, and makes new ones."""
    from transformers import cache_utils

    base: Any = cache_utils.LinearAttentionLayer

    class StateLayer(base):  # type: ignore[misc]
        def __init__(self) -> None:
            count = 1 + max(state.index for state in given)
            super().__init__(count)
            self.recurrent_states: NotedStates = NotedStates(dict.fromkeys(range(count)))
            for state, value in given.items():
                # a copy: a step of one token writes into it
                if state.kind == CONV:
                    self.conv_states[state.index] = value.clone()
                    self.conv_kernel_size[state.index] = value.shape[-1]
                    self.is_conv_states_initialized[state.index] = True
                else:
                    self.recurrent_states[state.index] = value.clone()
                    self.is_recurrent_states_initialized[state.index] = True
                self.has_previous_state[state.index] = True
                self.dtype, self.device = value.dtype, value.device

        def update_conv_state(
            self, conv_states: Tensor, state_idx: int = 0, **others: Any
        ) -> Tensor:
            before = self.conv_states[state_idx]
            full = torch.cat([before, conv_states], -1)
            self.conv_states[state_idx] = full[..., full.shape[-1] - before.shape[-1] :]
            return full

        def update_recurrent_state(
            self, recurrent_states: Tensor, state_idx: int = 0, **others: Any
        ) -> Tensor:
            self.recurrent_states[state_idx] = recurrent_states
            return recurrent_states

    return StateLayer()
