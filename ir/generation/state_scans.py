"""Selective scans that begin from the state that a layer has.

The form of transformers' Mamba layers for several tokens begins from zero, whatever state they
have, and walks step by step over a number of tokens that a trace would hold on to. While a decoder
is called with states, their modules' scan is the op that takes a state and is free in its length.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.ir.ops.selective_scan_state import selective_scan_state

SCAN = "mamba_selective_scan"
"""Name of the function in the modules of transformers."""

_READ: list[Tensor] = []
"""The state that a layer has asked its cache for and not yet scanned from."""


class NotedStates(dict[int, Any]):
    """States of a layer, of which the last one read is noted for the scan that follows."""

    def __getitem__(self, key: int) -> Any:
        value = super().__getitem__(key)
        if value is not None:
            _READ[:] = [value]
        return value


@contextlib.contextmanager
def scans_from_states(model: nn.Module) -> Iterator[None]:
    """Lets the scans of a model's layers begin from the states that they read."""
    modules = {type(part).__module__ for part in model.modules()}
    homes = [home for name in modules if hasattr(home := sys.modules.get(name), SCAN)]
    before = [getattr(home, SCAN) for home in homes]
    for home, original in zip(homes, before, strict=True):
        setattr(home, SCAN, _from_state(original))
    try:
        yield
    finally:
        _READ.clear()
        for home, original in zip(homes, before, strict=True):
            setattr(home, SCAN, original)


def _from_state(original: Any) -> Any:
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **others: Any,
    ) -> Any:
        """x, dt (batch, width, length), B and C (batch, states, length), A (width, states)."""
        if not _READ or not return_last_state:
            return original(
                hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias,
                delta_softplus=delta_softplus, return_last_state=return_last_state, **others,
            )  # fmt: skip
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        if delta_softplus:
            dt = F.softplus(dt)
        turned = (t.transpose(1, 2) for t in (B, C))
        y, last = selective_scan_state(
            hidden_states.transpose(1, 2), dt.transpose(1, 2), A, *turned, _READ.pop()
        )
        y = y.transpose(1, 2)
        if D is not None:
            y = y + hidden_states * D[None, :, None]
        return (y if z is None else y * F.silu(z)), last

    return scan
