"""Batches that grow when the noise of their gradient is too large beside the gradient.

The noise is read off the gradients of the batches of one step. Where each of these holds c samples,
the variance of a sample's gradient is c times that of theirs, so that nothing is run sample by
sample: norms over the batch, dropout and fixed batch sizes are all the same to it.

Source: P60 (Lau et al. 2024, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient
Methods"), sections 3 and 4; the tests are of Byrd et al. 2012 and Bollapragada et al. 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune.hooks import Hook
from graphwright.ir.tune.options import BatchSizeOptions, TuneOptions

KEPT = 32
"""Gradients that the tests of inner products keep at least, of so many batches or more each."""


def norm_test(variance: Tensor, mean: Tensor, eta: float) -> float:
    """sum_j Var_j / (eta^2 ||g||^2), the samples that bring the deviation down to eta ||g||.

    Args:
        variance: (d,), unbiased, of the gradient of one sample.
        mean: (d,), g.
        eta: largest share.
    """
    return _ratio(variance.sum(), eta**2 * mean.square().sum())


def coordinate_test(variance: Tensor, mean: Tensor, eta: float) -> float:
    """max_j Var_j / (eta^2 g_j^2); entries without variance ask for nothing."""
    ratios = variance / (eta**2 * mean.square())
    return float(torch.where(variance > 0, ratios, 0.0).max())


def inner_product_test(gradients: Tensor, samples: float, theta: float) -> float:
    """Var_i(<g_i, g>) / (theta^2 ||g||^4).

    Args:
        gradients: (m, d), each the mean over so many samples; m is 2 or more.
        samples: of each.
        theta: largest share.
    """
    mean = gradients.mean(0)
    along = gradients @ mean
    return _ratio(samples * along.var(), theta**2 * mean.square().sum().square())


def orthogonality_test(gradients: Tensor, samples: float, nu: float) -> float:
    """sum_j Var_j(g_i - <g_i, g> / ||g||^2 g) / (nu^2 ||g||^2).

    Args:
        gradients: (m, d), each the mean over so many samples; m is 2 or more.
        samples: of each.
        nu: largest share.
    """
    mean = gradients.mean(0)
    size = mean.square().sum()
    along = gradients @ mean / size.clamp_min(torch.finfo(size.dtype).tiny)
    across = gradients - along[:, None] * mean
    return _ratio(samples * across.var(0).sum(), nu**2 * size)


def _ratio(noise: Tensor, bound: Tensor) -> float:
    noise_, bound_ = float(noise), float(bound)
    if noise_ <= 0:
        return 0.0
    return noise_ / bound_ if bound_ > 0 else math.inf


class Spread:
    """Mean and variance of gradients, one after the other (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, gradient: Tensor) -> None:
        """Takes in the gradient (d,) of a batch."""
        self.count += 1
        off = gradient - self.mean
        self.mean = self.mean + off / self.count
        self.squares = self.squares + off * (gradient - self.mean)

    def wanted(self, options: BatchSizeOptions, samples: float) -> float:
        """Samples that a step should have, where batches have so many."""
        variance = samples * self.squares / (self.count - 1)
        test = norm_test if options.policy == "norm_test" else coordinate_test
        return test(variance, self.mean, options.eta)


class Kept:
    """Gradients of batches, or of as many batches in a row as it takes to keep few."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.group = 1
        self.open: list[Tensor] = []

    def add(self, gradient: Tensor) -> None:
        """Takes in the gradient (d,) of a batch."""
        self.open.append(gradient)
        if len(self.open) < self.group:
            return
        self.rows.append(torch.stack(self.open).mean(0))
        self.open = []
        if len(self.rows) == 2 * KEPT:
            pairs = zip(self.rows[::2], self.rows[1::2], strict=True)
            self.rows = [(first + second) / 2 for first, second in pairs]
            self.group *= 2

    def wanted(self, options: BatchSizeOptions, samples: float) -> float:
        """Samples that a step should have, where batches have so many."""
        gradients = torch.stack(self.rows)
        found = inner_product_test(gradients, samples * self.group, options.theta)
        if options.policy == "augmented":
            across = orthogonality_test(gradients, samples * self.group, options.nu)
            found = max(found, across)
        return found


class BatchSize:
    """The number of batches of a step: constant, or growing by a test of their gradients.

    Attributes:
        batches: of the next step.
        samples: of the steps so far, where a policy counts them.
    """

    def __init__(self, options: BatchSizeOptions | None, batches: int) -> None:
        """
        Args:
            options: of growth; None for a constant number.
            batches: of the first step.
        """
        self.options, self.batches = options, batches
        self.samples: list[int] = []
        self._before: Tensor | None = None
        self._seen: Spread | Kept | None = None
        self._read = 0

    def add(self, parameters: Iterable[nn.Parameter], samples: int, batches: int) -> None:
        """Takes in the gradient of a batch, which has just been added to those of the step.

        Args:
            parameters: in training; their gradients are a share of the step's mean.
            samples: of this batch.
            batches: of the step.
        """
        if self.options is None:
            return
        if self._seen is None:
            by_entry = self.options.policy in ("norm_test", "coordinate")
            self._seen = Spread() if by_entry else Kept()
        sums = torch.cat([_gradient(parameter) for parameter in parameters])
        alone = sums if self._before is None else sums - self._before
        self._seen.add(alone * batches)
        self._before = sums
        self._read += samples

    def close(self, batches: int) -> None:
        """Ends a step of so many batches: the next one has as many or more."""
        if self.options is None or self._seen is None:
            return
        each = self._read / batches
        if batches > 1:  # the last step of a run may be a single one
            wanted = min(self._seen.wanted(self.options, each), float(self.options.max))
            most = max(self.batches, math.floor(self.options.max / each))
            self.batches = min(most, max(self.batches, math.ceil(wanted / each)))
        self.samples.append(self._read)
        self._before, self._seen, self._read = None, None, 0


def make_batch_size(
    options: TuneOptions, recipes: Sequence[Hook], processes: int, rows: int
) -> BatchSize:
    """The number of batches of a step that the options say.

    Args:
        options: of training.
        recipes: that take part in it.
        processes: that train together.
        rows: samples of a batch; 0 where the data says it with each.

    Raises:
        ArgumentError: batches would grow under a recipe that counts on the number of steps, or
            under several processes; or the first step has more samples than allowed.
    """
    counting = [type(hook).__name__ for hook in recipes if hook.counts_steps]
    if options.batch_size is not None and counting:
        raise ArgumentError(
            f"batch_size ends a run in fewer steps, and {counting[0]} is spread over all of them"
        )
    if options.batch_size is not None and processes > 1:
        raise ArgumentError("batch_size grows the batches of one process", fix="Start one.")
    first = rows * options.accumulate
    if options.batch_size is not None and options.batch_size.max < first:
        raise ArgumentError(
            f"batch_size.max {options.batch_size.max} is less than the {first} samples of the "
            "first step",
            fix="Raise it, or lower the data's batch_size.",
        )
    return BatchSize(options.batch_size, options.accumulate)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A copy (n,) in float32 at least."""
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    gradient = parameter.grad.detach().flatten()
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(wide, copy=True)
