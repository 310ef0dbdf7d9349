"""Noise of a call's own, told where a network is told the time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.graft import graft
from graphwright.ir.sampling.record import LATENT, Denoiser
from graphwright.ir.sampling.surgery import Interface, NewInput
from graphwright.ir.sampling.told import time_layer
from graphwright.ir.signature import TensorSpec

LAYERS = 4
"""Of the network that maps the latent."""

TINY = 1e-8
"""Added to the mean square that the latent is divided by the root of."""


class Mapped(nn.Module):
    """What a layer gives, and a linear map of what a small network makes of the latent.

    The map is zero at first, so that the network gives at first what it gave.

    Source: P85 (Xiao et al. 2022), section 4: the latent divided by its root mean square and four
    layers behind it.
    """

    def __init__(self, size: int, width: int, features: int) -> None:
        super().__init__()
        widths = [size, *[width] * LAYERS]
        self.layers = nn.ModuleList(nn.Linear(widths[i], width) for i in range(LAYERS))
        self.projection = nn.Linear(width, features, bias=False)
        nn.init.zeros_(self.projection.weight)

    def forward(self, latent: Tensor, hidden: Tensor) -> Tensor:
        """latent [batch, size], hidden [batch, features]."""
        latent = latent.to(hidden.dtype)
        h = latent / (latent.square().mean(1, keepdim=True) + TINY).sqrt()
        for layer in self.layers:
            h = F.silu(layer(h))
        told: Tensor = hidden + self.projection(h)
        return told


def tell_latent(edit: Interface, by: str, size: int, width: int) -> None:
    """Adds the input `latent` [batch, size] and what the network makes of it.

    Raises:
        ModelError: the network has no embedding of time with a row per sample.
    """
    at = time_layer(edit.program.replace(graph=edit.editor.graph), by).node
    features = at.meta["val"].shape
    if len(features) != 2:
        raise ModelError(f"{by}: the embedding of time has the shape {tuple(features)}, and a row "
                         "per sample is wanted")  # fmt: skip
    record = Denoiser.required(edit.program, by)
    rows = edit.input(record.sample).meta["val"].shape[0]
    example = edit.example(record.sample)
    drawn = torch.randn(len(example), size, generator=torch.Generator().manual_seed(0))
    spec = TensorSpec(LATENT, "float32", (edit.spec(record.sample).shape[0], size))
    node = edit.add_input(NewInput(spec, drawn), sizes=(rows, size))
    readers, after = list(at.users), at.next
    module = Mapped(size, width, int(features[1])).to(at.meta["val"].dtype)
    (told,) = graft(edit.editor, module, node, at, name=LATENT, before=after)
    for reader in readers:
        reader.replace_input_with(at, told)
