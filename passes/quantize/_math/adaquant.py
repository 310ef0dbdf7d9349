"""The arithmetic of AdaQuant: a quantized layer that learns to compute what the layer computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphwright.ir.layers.products import Geometry, as_matrix, from_matrix, product
from graphwright.ir.stored import grid as grid_math
from graphwright.passes.quantize._math.range_search import Range, search

LEAST_SPAN, LARGEST_SPAN = 1e-6, 1e5
"""Limits of a learned range."""

LOOKS = 10
"""Times that the error over all samples is looked at."""

How = Literal["adam", "nelder_mead"]


@dataclass(frozen=True)
class AdaquantSettings:
    """Settings of a layer's training; rates and counts as in the paper's code.

    Attributes:
        bits: of a weight's code.
        activation_bits: of an input's code; None: inputs stay in float.
        block: weights of a row that share a range.
        symmetric: weight ranges around zero.
        iterations, batch: steps, and samples per step.
        rate, bias_rate, range_rate, input_rate: of Adam for the weight, the bias, the weight's
            ranges, and (as a share of its initial range) the input's range.
        method: `adam`, everything learns; `nelder_mead`, a search for ranges, weights frozen.
    """

    bits: int
    activation_bits: int | None
    block: int
    symmetric: bool
    iterations: int
    batch: int
    rate: float
    bias_rate: float
    range_rate: float
    input_rate: float
    method: How = "adam"


@dataclass(frozen=True)
class Samples:
    """Inputs of one layer.

    Attributes:
        now: parts (samples, ...) as the quantized layers before give them.
        then: the same samples as the float program gives them.
        low, high: extremes of `now`, each the mean over samples.
    """

    now: Sequence[Tensor]
    then: Sequence[Tensor]
    low: float
    high: float


@dataclass(frozen=True)
class Learned:
    """A quantized layer.

    Attributes:
        codes: uint8 (out, columns); scale, zero: (out, groups), zero uint8.
        bias: (out,) or None.
        grid: scale, zero point and code range of the input; None for float inputs.
        before, after: relative error ||y_q - y|| / ||y|| over all samples, as initialized and now.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    grid: tuple[float, int, int, int] | None
    before: float
    after: float


def straight(x: Tensor) -> Tensor:
    """Round half to even, with the gradient of the identity."""
    return x + (x.round() - x).detach()


def parameters(low: Tensor, span: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, both with gradients.

    s = span / (2^b - 1), zero = clamp(round(-low / s)); a symmetric range has its zero in the
    middle. The zero point is a whole number: zero is exactly a code.
    """
    largest = 2**bits - 1
    scale = span.clamp(LEAST_SPAN, LARGEST_SPAN) / largest
    if symmetric:
        return scale, torch.full_like(scale, 2.0 ** (bits - 1))
    return scale, straight(-low / scale).clamp(0, largest)


def fake(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x rounded to the grid, with straight-through gradients to x, scale and zero."""
    codes = straight((x / scale + zero).clamp(0, 2**bits - 1))
    return (codes - zero) * scale


class Student(torch.nn.Module):
    """A layer with learned weight, bias, and ranges of weight and input."""

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor,
        bias: Tensor | None,
        samples: Samples,
        s: AdaquantSettings,
    ) -> None:
        super().__init__()
        self.geometry, self.settings = geometry, s
        self.weight = torch.nn.Parameter(weight.float().clone())
        self.bias = None if bias is None else torch.nn.Parameter(bias.float().clone())
        groups = grid_math.grouped(as_matrix(geometry, weight.float()).flatten(0, 1), s.block)
        high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
        if s.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        span = torch.where(high == low, torch.ones_like(high), high - low)
        self.low, self.span = torch.nn.Parameter(low), torch.nn.Parameter(span)
        width = max(samples.high, 0.0) - min(samples.low, 0.0)
        self.input_low = torch.nn.Parameter(torch.tensor(min(samples.low, 0.0)))
        self.input_span = torch.nn.Parameter(torch.tensor(width if width > 0 else 1.0))

    def weight_grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point (out, groups)."""
        s = self.settings
        return parameters(self.low, self.span, s.bits, s.symmetric)

    def input_grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, scalars."""
        assert self.settings.activation_bits is not None
        return parameters(self.input_low, self.input_span, self.settings.activation_bits, False)

    def ranges(self) -> list[Range]:
        """The ranges that `nelder_mead` scales and shifts."""
        found = [Range(self.low, self.span, not self.settings.symmetric)]
        if self.settings.activation_bits is not None:
            found.append(Range(self.input_low, self.input_span, shifts=True))
        return found

    def rounded(self) -> Tensor:
        """The weight on its grid, in the layer's own shape."""
        g, s = self.geometry, self.settings
        matrix = as_matrix(g, self.weight)
        rows = matrix.flatten(0, 1)
        scale, zero = self.weight_grid()
        value = fake(grid_math.grouped(rows, s.block), scale[..., None], zero[..., None], s.bits)
        return from_matrix(g, value.flatten(1)[:, : rows.shape[1]].reshape(matrix.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(x, self.rounded())

    def output(self, x: Tensor, rounded: Tensor) -> Tensor:
        """The layer's result with a weight that is on its grid already."""
        if self.settings.activation_bits is not None:
            x = fake(x, *self.input_grid(), self.settings.activation_bits)
        return product(self.geometry, x, rounded, self.bias)


def learn(
    geometry: Geometry,
    weight: Tensor,
    bias: Tensor | None,
    samples: Samples,
    settings: AdaquantSettings,
    is_rectified: bool,
    seed: int,
) -> Learned:
    """Minimizes the mean of (f(Q(W), Q(x)) + b - y)^2 over weight, bias and ranges.

    Four Adam optimizers with straight-through rounding (P47, equation 2 and the released code);
    where a ReLU alone reads the layer, both sides go through it. The error over all samples is
    looked at ten times on the way, and the best state is kept: with straight-through gradients
    the last step is not always it. With the method `nelder_mead` only over the ranges, by a search.

    Args:
        geometry, weight, bias: the layer.
        samples: its inputs.
        settings: how to learn.
        is_rectified: a ReLU alone reads the layer.
        seed: of the order of the samples.
    """

    def seen(y: Tensor) -> Tensor:
        return torch.relu(y) if is_rectified else y

    with torch.no_grad():
        targets = [seen(product(geometry, x.float(), weight.float(), bias)) for x in samples.then]
    student = Student(geometry, weight, bias, samples, settings)

    def error() -> float:
        return _error(student, samples.now, targets, seen)

    before = error()
    if settings.method == "nelder_mead":
        after = search(student.ranges(), error, settings.iterations)
    else:
        after = _train(student, samples.now, targets, seen, error, before, seed)
    return _frozen(student, before, after)


def _copy(student: Student) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


def _train(
    student: Student,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    seen: Callable[[Tensor], Tensor],
    error: Callable[[], float],
    before: float,
    seed: int,
) -> float:
    """Trains in place, up to the best of `LOOKS` states; returns its error."""
    settings, best, least = student.settings, _copy(student), before
    groups: list[dict[str, object]] = [
        {"params": [student.weight], "lr": settings.rate},
        {"params": [student.low, student.span], "lr": settings.range_rate},
    ]
    if student.bias is not None:
        groups.append({"params": [student.bias], "lr": settings.bias_rate})
    if settings.activation_bits is not None:
        width = float(student.input_span.detach())
        rate = settings.input_rate * width
        groups.append({"params": [student.input_low, student.input_span], "lr": rate})
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([float(len(part)) for part in inputs])
    looks = {-(-settings.iterations * look // LOOKS) for look in range(1, LOOKS + 1)}
    for step in range(1, settings.iterations + 1):
        part = int(torch.multinomial(sizes, 1, generator=generator))
        x, y = inputs[part], targets[part]
        picked = torch.randperm(len(x), generator=generator)[: settings.batch].to(x.device)
        with torch.enable_grad():
            loss = (seen(student(x[picked].float())) - y[picked]).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if step in looks and (now := error()) < least:
            best, least = _copy(student), now
    student.load_state_dict(best)
    return least


def _error(
    student: Student,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    seen: Callable[[Tensor], Tensor],
) -> float:
    gap = size = 0.0
    with torch.no_grad():
        rounded = student.rounded()
        for x, y in zip(inputs, targets, strict=True):
            gap += float((seen(student.output(x.float(), rounded)) - y).double().square().sum())
            size += float(y.double().square().sum())
    return float((gap / size) ** 0.5) if size > 0 else float(gap**0.5)


def _frozen(student: Student, before: float, after: float) -> Learned:
    s = student.settings
    with torch.no_grad():
        scale, zero = student.weight_grid()
        rows = as_matrix(student.geometry, student.weight).flatten(0, 1)
        codes = (grid_math.grouped(rows, s.block) / scale[..., None] + zero[..., None]).round()
        codes = codes.clamp(0, 2**s.bits - 1).flatten(1)[:, : rows.shape[1]]
        grid = None
        if s.activation_bits is not None:
            step, offset = student.input_grid()
            grid = (float(step), int(offset), 0, 2**s.activation_bits - 1)
        bias = None if student.bias is None else student.bias.detach()
        return Learned(
            codes.to(torch.uint8), scale, zero.to(torch.uint8), bias, grid, before, after
        )
