"""Sub-images: one pixel of every cell of an image to each."""

from __future__ import annotations

import torch
from torch import Tensor


def random_order(image: Tensor, side: int) -> Tensor:
    """An order of the pixels of every cell, drawn for each by itself from torch's generator.

    Args:
        image: (batch, channels, height, width), whose cells are `side` pixels wide and high.
        side: divides height and width.

    Returns:
        (batch, height / side, width / side, side^2): position j holds the number, in reading order,
        of the pixel that sub-image j gets. Channels share it.
    """
    batch, _, height, width = image.shape
    shape = (batch, height // side, width // side, side * side)
    return torch.rand(shape, device=image.device).argsort(-1)


def split(image: Tensor, side: int, order: Tensor | None = None) -> Tensor:
    """All sub-images, as a batch.

    Args:
        image: (batch, channels, height, width).
        side: of a cell; divides height and width.
        order: see `random_order`; in reading order when None, which is pixel-shuffle downsampling.

    Returns:
        (batch * side^2, channels, height / side, width / side): those of one image in a row.
    """
    cells = _cells(image, side)
    if order is not None:
        cells = cells.gather(-1, order[:, None].expand_as(cells))
    return cells.movedim(-1, 1).flatten(0, 1)


def join(parts: Tensor, side: int, order: Tensor | None = None) -> Tensor:
    """The image whose sub-images these are: the inverse of `split`."""
    cells = parts.unflatten(0, (-1, side * side)).movedim(1, -1)
    if order is not None:
        cells = cells.gather(-1, order.argsort(-1)[:, None].expand_as(cells))
    batch, channels, height, width, _ = cells.shape
    whole: Tensor = cells.unflatten(-1, (side, side)).permute(0, 1, 2, 4, 3, 5)
    return whole.reshape(batch, channels, height * side, width * side)


def pick(image: Tensor, side: int, which: Tensor) -> Tensor:
    """One pixel of every cell.

    Args:
        image: (batch, channels, height, width).
        side: of a cell; divides height and width.
        which: (batch, height / side, width / side) numbers of pixels below side^2.

    Returns:
        (batch, channels, height / side, width / side).
    """
    cells = _cells(image, side)
    index = which[:, None, :, :, None].expand(*cells.shape[:-1], 1)
    return cells.gather(-1, index).squeeze(-1)


def _cells(image: Tensor, side: int) -> Tensor:
    """(batch, channels, height / side, width / side, side^2)."""
    batch, channels, height, width = image.shape
    shape = (batch, channels, height // side, side, width // side, side)
    return image.reshape(shape).permute(0, 1, 2, 4, 3, 5).flatten(-2)
