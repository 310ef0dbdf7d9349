"""Minority guidance (P79): scores of samples, a classifier of noisy ones, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from graphwright.ir.graph.gradient import forward_calls
from graphwright.ir.sampling.guidance import over


class MinorityClassifier(nn.Module):
    """Logits of how rare a noisy sample is; it is told the levels.

    Convolutions over all axes behind the channels, the first of them at full size and the others at
    half the size of the one before; layers alone for samples without such axes.

    Args:
        channels: of the sample.
        axes: behind the channels, 0 to 3.
        classes: bins of rarity.
        width: channels inside.
        depth: layers behind the first.
    """

    def __init__(self, channels: int, axes: int, classes: int, width: int, depth: int) -> None:
        super().__init__()
        kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        kind = kinds[axes]
        first = {"kernel_size": 3, "padding": 1} if axes else {}
        later = {**first, "stride": 2} if axes else {}
        self.axes = axes
        self.enter = kind(channels, width, **first)
        self.told = nn.Linear(5, width)
        self.layers = nn.ModuleList(kind(width, width, **later) for _ in range(depth))
        self.last = nn.Linear(width, classes)

    def forward(self, sample: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """[batch, classes]; sample [batch, channels, ...] with its levels [batch]."""
        size = (alpha * alpha + sigma * sigma).sqrt().clamp_min(1e-6)
        level = (alpha.clamp_min(1e-6) / sigma.clamp_min(1e-6)).log()
        waves = [level / 4, level.sin(), level.cos(), (level / 3).sin(), (level / 3).cos()]
        told = self.told(torch.stack(waves, 1))
        h = self.enter(sample / over(size, sample))
        h = nn.functional.silu(h + told.reshape(*told.shape, *[1] * self.axes))
        for layer in self.layers:
            h = nn.functional.silu(layer(h))
        logits: Tensor = self.last(h.flatten(2).mean(2) if self.axes else h)
        return logits


def log_probability(logits: Tensor, target: Tensor) -> Tensor:
    """Sum over samples of log p(target); target has no dimension.

    The class is chosen by comparison: `one_hot` cannot be traced.
    """
    own = torch.arange(logits.shape[1], device=logits.device)[None] == target
    logs = logits.log_softmax(1)
    return torch.where(own, logs, torch.zeros_like(logs)).sum()


def gradient_graph(classifier: nn.Module, shape: Sequence[int]) -> fx.GraphModule:
    """The gradient of log p(target | sample) by the sample as a module of forward calls.

    The batch stays free, and parameters keep their names.

    Args:
        classifier: in inference mode; called with sample, alpha and sigma.
        shape: of a sample, [channels, ...].

    Returns:
        a module of (sample, alpha, sigma, target); target has no dimension.
    """
    frozen = {name: t.requires_grad for name, t in classifier.named_parameters()}
    classifier.requires_grad_(False)

    def gradient(sample: Tensor, alpha: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
        x = sample.detach().requires_grad_()
        with torch.enable_grad():
            value = log_probability(classifier(x, alpha, sigma), target)
            return torch.autograd.grad(value, x)[0]

    dtype = next(classifier.parameters()).dtype
    # the batch is a size that the sample has nowhere, for equal ones get one symbol
    rows = next(n for n in range(2, len(shape) + 3) if n not in shape)
    levels = torch.full((rows,), 0.5, dtype=dtype)
    examples = (
        torch.zeros(rows, *shape, dtype=dtype),
        levels,
        levels.clone(),
        levels.new_zeros(()),
    )
    traced = forward_calls(gradient, examples, dict(classifier.named_parameters()))
    for name, parameter in classifier.named_parameters():
        parameter.requires_grad_(frozen[name])
    return fx.GraphModule(classifier, traced.graph)


class TowardsClass(nn.Module):
    """D and E led towards a class by its gradient."""

    def forward(
        self, data: Tensor, noise: Tensor, gradient: Tensor, a: Tensor, s: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(D + scale s^2 / a gradient, E - scale s gradient); x = a D + s E as before."""
        a, s = over(a, data), over(s, data)
        return data + scale * s * s / a * gradient, noise - scale * s * gradient


def minority_scores(
    data: Tensor,
    denoise: Callable[[Tensor, slice], Tensor],
    a: float,
    s: float,
    times: int,
    draw: Callable[[torch.Size], Tensor],
    rows: int = 64,
) -> Tensor:
    """How badly one step from a x0 + s e brings every sample back: mean ||x0 - D||^2, [samples].

    Args:
        data: [samples, ...].
        denoise: D of noisy samples, and which of the data they are.
        a, s: the level.
        times: draws of noise per sample.
        draw: standard normal numbers of a size.
        rows: samples at a time.
    """
    total = torch.zeros(len(data), dtype=torch.float64)
    for _ in range(times):
        for begin in range(0, len(data), rows):
            part = slice(begin, min(begin + rows, len(data)))
            x0 = data[part]
            found = denoise(a * x0 + s * draw(x0.shape).to(x0), part)
            total[part] += (x0 - found).double().flatten(1).square().mean(1)
    return total / times


def quantile_labels(scores: Tensor, classes: int) -> Tensor:
    """Bins of equal size, 0 for the lowest scores, [samples] int64; sizes differ by one at most."""
    order = scores.argsort(stable=True)
    labels = torch.empty(len(scores), dtype=torch.int64)
    labels[order] = torch.arange(len(scores)) * classes // len(scores)
    return labels


@dataclass(frozen=True)
class NoisyBatches:
    """Batches of samples at random levels with their labels, the same at every reading.

    Attributes:
        data: [samples, ...].
        labels: [samples].
        level: (a, s) at a share of the schedule's times.
        batches, size: how many, and of how many samples.
        generator: of the batch with a number.
    """

    data: Tensor
    labels: Tensor
    level: Callable[[float], tuple[float, float]]
    batches: int
    size: int
    generator: Callable[[int], torch.Generator]

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for number in range(self.batches):
            yield self.batch(number)

    def batch(self, number: int) -> Mapping[str, Tensor]:
        """The batch with a number."""
        g = self.generator(number)
        rows = torch.randint(len(self.data), (self.size,), generator=g)
        levels = [self.level(t) for t in torch.rand(self.size, generator=g).tolist()]
        a, s = (torch.tensor(values) for values in zip(*levels, strict=True))
        x0 = self.data[rows]
        noise = torch.randn(x0.shape, generator=g).to(x0)
        return {
            "sample": over(a, x0) * x0 + over(s, x0) * noise,
            "alpha": a, "sigma": s, "labels": self.labels[rows],
        }  # fmt: skip
