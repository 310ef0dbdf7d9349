"""Operators that move or repeat elements."""

from __future__ import annotations

import torch
from sweep.cases import Theme, ints, real
from torch.nn import functional as F

shapes = Theme("shapes")
shapes.functions(
    {
        "flatten": lambda x: x.flatten(1),
        "unflatten": lambda x: x.flatten(1).unflatten(1, (2, -1)),
        "reshape to one axis": lambda x: x.reshape(-1),
        "view by a computed size": lambda x: x.view(x.shape[0] * 2, 2, 3),
        "view_as_strided blocks": lambda x: x.as_strided((2, 3), (1, 2)),
        "view as another dtype": lambda x: x.view(torch.int32),
        "permute": lambda x: x.permute(2, 0, 1),
        "movedim": lambda x: x.movedim(0, -1),
        "transpose and view": lambda x: x.transpose(0, 1).reshape(4, -1),
        "roll": lambda x: x.roll(2, 0),
        "roll of a constant axis": lambda x: x.roll((1, -1), (1, 2)),
        "roll of all": lambda x: x.roll(1),
        "flip": lambda x: x.flip(0, 2),
        "rot90": lambda x: x.rot90(1, (1, 2)),
        "repeat": lambda x: x.repeat(2, 1, 3),
        "repeat with more axes": lambda x: x.repeat(2, 1, 1, 1),
        "tile": lambda x: x.tile(2),
        "repeat_interleave": lambda x: x.repeat_interleave(3, dim=0),
        "repeat_interleave of all": lambda x: x.repeat_interleave(2),
        "repeat_interleave by a tensor": lambda x: x.repeat_interleave(
            torch.tensor([1, 0, 2, 1]), dim=1
        ),
        "expand": lambda x: x[:, :1].expand(-1, 6, -1),
        "expand to more axes": lambda x: x.expand(3, *x.shape),
        "broadcast_to": lambda x: torch.broadcast_to(x[0], x.shape),
        "broadcast_tensors": lambda x: torch.broadcast_tensors(x[:, :1], x[:1])[0],
        "squeeze": lambda x: x[:, None].squeeze(1),
        "squeeze of several": lambda x: x[:, None, :, None].squeeze((1, 3)),
        "cat of the free axis": lambda x: torch.cat([x, x[:1], x], 0),
        "cat of mixed dtypes": lambda x: torch.cat([x, (x > 0).int()], 1),
        "stack": lambda x: torch.stack([x, x * 2], -1),
        "hstack and vstack": lambda x: torch.hstack([x, x]) + torch.vstack([x[:, :2]] * 1).sum(),
        "split": lambda x: x.split(3, dim=1),
        "split of the free axis": lambda x: x.split([1, x.shape[0] - 1], 0)[1],
        "chunk unevenly": lambda x: x.chunk(3, dim=1),
        "chunk of the free axis": lambda x: x.chunk(2, dim=0)[0],
        "tensor_split": lambda x: x.tensor_split(3, dim=2),
        "tensor_split at places": lambda x: x.tensor_split([1, 2], dim=1),
        "unbind": lambda x: x.unbind(1),
        "unfold": lambda x: x.unfold(1, 2, 1),
        "unfold of the free axis": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)).unfold(0, 3, 2),
        "tril": lambda x: x.tril(1),
        "triu of a free square": lambda x: (x[:, 0] @ x[:, 0].T).triu(1),
        "tril_indices": lambda x: x[:, torch.tril_indices(3, 3)[0], torch.tril_indices(3, 3)[1]],
        "diagonal": lambda x: x.diagonal(dim1=1, dim2=2),
        "diagonal with offset": lambda x: x.diagonal(1, 1, 2),
        "diag_embed": lambda x: torch.diag_embed(x),
        "diag of a row": lambda x: torch.diag(x[0, 0]),
        "block_diag": lambda x: torch.block_diag(x[0], x[0]),
        "kron": lambda x: torch.kron(x[0], x[0]),
        "meshgrid": lambda x: torch.meshgrid(x[:, 0, 0], x[0, 0], indexing="ij"),
        "meshgrid, xy": lambda x: torch.meshgrid(x[:, 0, 0], x[0, 0], indexing="xy"),
        "cartesian_prod": lambda x: torch.cartesian_prod(x[:, 0, 0], x[0, 0]),
        "combinations": lambda x: torch.combinations(x[0, 0]),
        "vander": lambda x: torch.vander(x[:, 0, 0], 3),
        "arange of a size": lambda x: torch.arange(x.shape[0]) * 2,
        "arange of floats": lambda x: torch.arange(0.5, 3.0, 0.4) + x[0, 0, 0],
        "linspace of a size": lambda x: torch.linspace(0, 1, x.shape[0])[:, None, None] * x,
        "eye of a size": lambda x: torch.eye(x.shape[0]) @ x[:, 0],
        "zeros of a size": lambda x: torch.zeros(x.shape[0], 2) + x[:, 0, :1],
        "full of a size": lambda x: x.new_full((x.shape[0],), 3) * torch.ones(x.shape[0]),
        "full_like": lambda x: torch.full_like(x, 2, dtype=torch.int64),
        "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :, None].expand(-1, -1, 2, -1), 2),
        "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[:, None, :, :2], 2),
        "channel_shuffle": lambda x: F.channel_shuffle(x[..., None], 2),
        "cross": lambda x: torch.cross(x, x.flip(1), dim=2),
        "numel and shape as numbers": lambda x: x * x.numel() / x.shape[0],
        "swapaxes and mT": lambda x: x.swapaxes(1, 2).mT,
        "atleast_3d and ravel": lambda x: torch.atleast_3d(x.ravel()),
        "dsplit": lambda x: torch.dsplit(x, 3)[1],
        "column_stack": lambda x: torch.column_stack([x[:, 0], x[:, 1, 0]]),
    },
    x=real("n", 4, 3),
)
shapes.function(
    "repeat_interleave by an input",
    lambda x, r: x.repeat_interleave(r, dim=0),
    x=real("n", 3),
    r=ints(3, "n"),
)

THEMES = (shapes,)
