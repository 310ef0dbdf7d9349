"""Geometric median: units that the others of their group stand in for."""

from __future__ import annotations

import numpy as np
import torch

from graphwright.ir.channels import ChannelGroup
from graphwright.ir.channels.weights import weight_values


def distances(group: ChannelGroup) -> np.ndarray:
    """Sum of the distances of each unit to all others of its group.

    A unit is the vector of all its slices. Where units have slices of unequal numbers in a tensor,
    that tensor is left out.

    Source: He et al. 2019, "Filter Pruning via Geometric Median", equation 6, over all slices.
    """
    analysis = group.analysis
    weights = weight_values(analysis.program)
    number = {int(c): n for n, c in enumerate(group.classes)}
    products = torch.zeros(group.units, group.units, dtype=torch.float64)
    for member in group.members:
        if member.parameter not in weights:
            continue
        classes = analysis.stored[member.parameter, member.dim]
        places = np.flatnonzero(np.isin(classes, group.classes))
        if len(places) % group.units:
            continue
        order = np.argsort([number[int(c)] for c in classes[places]], kind="stable")
        rows = weights[member.parameter].detach().movedim(member.dim, 0)
        rows = rows[torch.from_numpy(places[order]).to(rows.device)]
        rows = rows.reshape(group.units, -1).double().cpu()
        products += rows @ rows.T
    size = products.diagonal()
    square = (size[:, None] + size[None] - 2 * products).clamp_min(0.0)
    return np.asarray(square.sqrt().sum(1).numpy())
