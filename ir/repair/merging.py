"""Neuron Merging: every lost channel goes into the one kept channel that it is most like.

Behind a ReLU, a channel whose pre-activation is S > 0 times another's is S times that channel, and
the layers that read it can take S times the other instead. With the filters and the offsets of
`Channels`, batch norm included, let

    S = |X_p| / |X_k|,    B = c_p - S c_k

for a lost channel p and a kept one k: where the filters are parallel, pre-activation p is S times
pre-activation k, plus B. Behind a batch norm the k with the least

    balance (1 - cos(X_p, X_k)) + (1 - balance) u_k

is taken, u_k being |B| / S moved and scaled to [0, 1] over the kept channels. Without one, filter
and offset are one vector, and the k with the largest cosine is taken. Below a cosine nothing is
merged, and the channel is lost.

Source: Kim et al. 2020, "Neuron Merging: Compensating for Pruned Neurons", section 3. In terms of
the batch norms, S = s (gamma_p / sigma_p) / (gamma_k / sigma_k) with s the ratio of the plain
filters' norms, and B = gamma_p / sigma_p (s (mu_k - sigma_k beta_k / gamma_k) - mu_p) + beta_p. The
released code has the two channels the wrong way round there, and takes variances for sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.repair.closed_form import Channels, pruned


def merge(
    channels: Channels, has_norm: bool, balance: float, threshold: float
) -> tuple[Tensor, int]:
    """S (R, N) where a column of a lost channel has one number, or none, and how many have one.

    Kept channels stay as they are, and are compared as they were before any rounding.

    Args:
        channels: before and after.
        has_norm: a batch norm follows the layer.
        balance: how much directions count beside offsets; only with a norm.
        threshold: smallest cosine of two channels that are merged.
    """
    vectors = channels.filters
    if not has_norm:
        vectors = torch.cat([vectors, channels.offsets[:, None]], 1)
    mixture, count = channels.nothing, 0
    norms = vectors.norm(dim=1)
    rows = (norms[channels.kept] > 0).nonzero()[:, 0]
    others = channels.kept[rows]
    for lost in pruned(channels).tolist() if len(rows) else ():
        if norms[lost] == 0:
            continue
        cosine = vectors[others] @ vectors[lost] / (norms[others] * norms[lost])
        scale = norms[lost] / norms[others]
        distance = 1 - cosine
        if has_norm:
            offset = (channels.offsets[lost] / scale - channels.offsets[others]).abs()
            distance = balance * distance + (1 - balance) * _to_unit(offset)
        best = int(distance.argmin())
        if cosine[best] >= threshold:
            mixture[rows[best], lost] = scale[best]
            count += 1
    return mixture, count


def _to_unit(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)
