"""Gradient descent on the images that a rescaling pair stores, as modules of forward calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from graphwright.ir.graph.gradient import forward_calls

Norm = Literal["l1", "l2"]
Direction = Literal["gradient", "sign"]
Net = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stored:
    """The values that a stored image may have.

    Attributes:
        low, high: the least and the largest.
        levels: how many there are, evenly spaced; None where every number is one, also outside.
    """

    low: float
    high: float
    levels: int | None

    def inside(self, image: Tensor) -> Tensor:
        """The image, cut off at the ends of the range."""
        return image if self.levels is None else image.clamp(self.low, self.high)

    def nearest(self, image: Tensor) -> Tensor:
        """The image, each value at the nearest that can be stored."""
        if self.levels is None:
            return image
        step = (self.high - self.low) / (self.levels - 1)
        return torch.round((self.inside(image) - self.low) / step) * step + self.low

    def straight_through(self, image: Tensor, *, rounded: bool) -> Tensor:
        """The image cut off, and rounded if asked for, with the gradient of the image itself."""
        if self.levels is None:
            return image
        kept = self.nearest(image) if rounded else self.inside(image)
        return image + (kept - image).detach()


def reconstruction_error(made: Tensor, image: Tensor, norm: Norm) -> Tensor:
    """Sum over every image of |made - image| (l1) or of its square (l2), [batch]."""
    apart = (made - image).flatten(1)
    return (apart.abs() if norm == "l1" else apart * apart).sum(1)


def error_and_gradient(
    reconstruct: Net, at: Tensor, image: Tensor, norm: Norm, tensors: Mapping[str, Tensor]
) -> fx.GraphModule:
    """The error of `reconstruct` and its gradient, as a module of (at, image).

    Args:
        reconstruct: differentiable.
        at: an example of what it is called on, [batch, ...].
        image: one of what it should make, [batch, ...]. Sizes of the two that have nothing to do
            with each other differ.
        norm: of the error.
        tensors: weights that it reads, by name.

    Returns:
        a module that returns the errors [batch] and the gradient, of the shape of `at`.
    """

    def both(at: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        x = at.detach().requires_grad_()
        with torch.enable_grad():
            errors = reconstruction_error(reconstruct(x), image, norm)
            (gradient,) = torch.autograd.grad(errors.sum(), x)
        return errors.detach(), gradient

    # one tensor given twice would be one input in the trace
    return forward_calls(both, (at.clone(), image.clone()), tensors)


class Descent(nn.Module):
    """Steps of gradient descent, each image with a rate of its own.

    Args:
        step: errors and gradient at (at, image).
        steps, rate: how many, and how far along the gradient.
        direction: `gradient`, or its `sign`.
        backtrack: a step that would raise the error of an image is not taken, and the rate of this
            image is halved.
        stored: values that `at` is cut off to; None for no limit.
    """

    def __init__(
        self, step: nn.Module, steps: int, rate: float, direction: Direction, backtrack: bool,
        stored: Stored | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.step = step
        self.steps, self.rate, self.backtrack = steps, rate, backtrack
        self.direction: Direction = direction
        self.stored = stored

    def forward(self, at: Tensor, image: Tensor) -> Tensor:
        """What is left of `at` behind the steps; at [batch, ...], image [batch, ...]."""
        at = at if self.stored is None else self.stored.inside(at)
        error, gradient = self.step(at, image)
        rate = torch.full_like(error, self.rate).reshape(-1, *[1] * (at.dim() - 1))
        for _ in range(self.steps):
            moved = at - rate * (gradient.sign() if self.direction == "sign" else gradient)
            moved = moved if self.stored is None else self.stored.inside(moved)
            found, following = self.step(moved, image)
            if not self.backtrack:
                at, gradient = moved, following
                continue
            good = (found <= error).reshape(rate.shape)
            error = torch.where(found <= error, found, error)
            at = torch.where(good, moved, at)
            gradient = torch.where(good, following, gradient)
            rate = torch.where(good, rate, rate / 2)
        return at


class Encoder(nn.Module):
    """Image to stored image: descent on the image, the downscaler, descent on what it gives.

    Args:
        down: the downscaler.
        high, low: the two descents; None for none.
        stored: values of the result.
    """

    def __init__(
        self, down: nn.Module, high: Descent | None, low: Descent | None, stored: Stored
    ) -> None:
        super().__init__()
        self.down, self.high, self.low, self.stored = down, high, low, stored

    def forward(self, image: Tensor) -> Tensor:
        """The stored image; image [batch, channels, height, width]."""
        better = image if self.high is None else self.high(image, image)
        y: Tensor = self.down(better)[0]
        return self.stored.nearest(y if self.low is None else self.low(y, image))
