"""tune.meco: maximum likelihood for a model of unnormalized densities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.signature import TensorSpec
from graphwright.ir.tune import Hook, Moment, OwnLoss, tune
from graphwright.ir.tune.hooks import Values
from graphwright.ir.tune.losses import main_of, main_output, wide
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.training import training_hooks
from graphwright.passes.tune._form.parameters import chosen_parameters, metrics_of

MOST_NUMBERS = 4096
"""Numbers in a sample of which a covariance is made."""

LEAST_EFFECTIVE = 0.05
"""Share of the noise samples that should count: (sum w)^2 / sum w^2 over their number."""

MOST_POOR_STEPS = 0.1
"""Share of the steps in which fewer may count before the report warns."""


class MecoOptions(Bounded):
    """Options of tune.meco."""

    targets: Selector = ("*",)
    """Layers whose parameters are trained: selector patterns over names and kinds. A parameter of
    no layer goes by its own name."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of a batch's estimate in the moving estimate of the partition function."""

    inflation: Annotated[float, Field(ge=1)] = 2.0
    """Factor of the data's covariance in the noise. Noise must reach wherever the model puts
    probability."""

    tune: OwnLoss = OwnLoss(optimizer="adam", lr=1e-3)
    """Options of training; labels are not looked at."""


class Meco(Pass[MecoOptions]):
    """Trains a network f(x), one number per sample, to be the log of a density up to a constant.

    The loss is the negative log-likelihood, -mean f(x) + log Z with Z = E_q exp(f(x~)) / q(x~), for
    noise x~ of a known density q: a normal distribution with the data's mean and its inflated
    covariance. The log around an expectation makes plain estimates of the gradient wrong; here u
    follows Z as a moving average, u <- (1 - gamma) u + gamma mean(w) with w = exp(f(x~)) / q(x~),
    and the gradient of log Z is that of mean(w) over u. It is computed in logs. The report has
    log u as `log_partition`, by which f is normalized, and warns where the noise is too narrow, as
    few samples then carry the estimate.

    Source: P71 ("MECO"); its momentum is the optimizer's. The noise it takes is the user's choice
    there.
    """

    papers = ("P71",)
    contract = "lossy"
    needs = "training"
    before = ("quantize.*",)
    computes_in = ("float64", "float32")

    def run(self, program: Program, context: Context) -> Result:
        """Fits the noise, and trains.

        Raises:
            ModelError: the network has not one input of floating point with fixed sizes and one
                number per sample.
        """
        o = self.options
        spec = _one_input(program, self.id)
        data = as_batches(context.training_data, program.signature)
        noise = fitted((batch[spec.name] for batch in data), o.inflation, self.id)
        chosen = chosen_parameters(program, o.targets, self.id)
        recipe = Likelihood(program, noise, o.gamma)
        tuned = tune(program, data, o.tune, context, names=chosen.names,
                     hooks=[recipe, *training_hooks(program)])  # fmt: skip
        metrics = metrics_of(tuned.history) | {
            "log_partition": recipe.log_partition,
            "effective_samples": recipe.effective / max(1, recipe.batches),
        }
        return Result(tuned.program, tuple(chosen.actions(tuned)), metrics,
                      warnings=recipe.warnings())  # fmt: skip


class Noise:
    """A normal distribution.

    Attributes:
        mean: (numbers,), float64.
        factor: lower triangular (numbers, numbers), whose product with its transpose is the
            covariance.
    """

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        """Takes mean and factor of the covariance."""
        self.mean, self.factor = mean, factor

    def drawn(self, count: int) -> tuple[Tensor, Tensor]:
        """Samples (count, numbers) and their log density (count,), from torch's generator."""
        normal = torch.randn(count, len(self.mean), dtype=torch.float64)
        size = len(self.mean) * math.log(2 * math.pi) / 2 + self.factor.diagonal().log().sum()
        return self.mean + normal @ self.factor.mT, -normal.square().sum(1) / 2 - size


def fitted(batches: Iterable[Tensor], inflation: float, by: str) -> Noise:
    """The normal distribution with the data's mean and `inflation` times its covariance.

    A millionth of the mean variance is added on the diagonal, for data that does not fill its
    space.

    Args:
        batches: (batch, ...).
        inflation: factor.
        by: id of the pass, for messages.

    Raises:
        ArgumentError: there are too few samples, too many numbers in each, or they are all alike.
    """
    count, total, products = 0, torch.zeros(0), torch.zeros(0)
    origin = torch.zeros(0)  # near the mean, so that a mean far from 0 costs no digits
    for batch in batches:
        rows = batch.detach().flatten(1).double().cpu()
        if rows.shape[1] > MOST_NUMBERS:
            raise ArgumentError(f"{by}: samples have {rows.shape[1]} numbers, and noise is fitted "
                                f"to {MOST_NUMBERS} at most")  # fmt: skip
        first = not count
        origin = rows[0] if first else origin
        rows = rows - origin
        total = rows.sum(0) if first else total + rows.sum(0)
        products = rows.mT @ rows if first else products + rows.mT @ rows
        count += len(rows)
    if count < 2:
        raise ArgumentError(f"{by}: {count} samples are too few to fit noise to")
    mean = total / count
    covariance = inflation * (products / count - mean.outer(mean))
    spread = float(covariance.diagonal().mean())
    if spread <= 0:
        raise ArgumentError(f"{by}: all samples of the training data are alike")
    covariance += 1e-6 * spread * torch.eye(len(mean), dtype=torch.float64)
    return Noise(origin + mean, torch.linalg.cholesky(covariance))


class Likelihood(Hook):
    """The negative log-likelihood, with a moving estimate of the partition function.

    Attributes:
        log_partition: log u; minus infinity before the first batch.
        batches: seen so far. poor: with too few samples that count. effective: sum of shares.
    """

    def __init__(self, program: Program, noise: Noise, gamma: float) -> None:
        """Takes the program of f, the noise, and the share of a batch in u."""
        self.signature, self.noise, self.gamma = program.signature, noise, gamma
        self.name = program.signature.inputs[0].name
        self.log_partition = -math.inf
        self.batches, self.poor, self.effective = 0, 0, 0.0
        self._log_density = torch.zeros(0)
        self._best = -math.inf

    def also_run(self, at: Moment, batch: Values) -> Sequence[Values]:
        """Noise, as much as there is data."""
        data = batch[self.name]
        samples, self._log_density = self.noise.drawn(len(data))
        return [{self.name: samples.to(data).reshape(data.shape)}]

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        data, noise = (wide(main_of(self.signature, o)).flatten() for o in (outputs, at.also[0]))
        log_weights = noise - self._log_density.to(noise)
        log_mean = log_weights.logsumexp(0) - math.log(len(log_weights))
        self.log_partition = moved(self.log_partition, float(log_mean.detach()), self.gamma)
        self._count(log_weights.detach())
        return loss + likelihood(data, log_mean, self.log_partition)

    def _count(self, log_weights: Tensor) -> None:
        logs = log_weights.double()
        share = float((2 * logs.logsumexp(0) - (2 * logs).logsumexp(0)).exp()) / len(logs)
        self.batches += 1
        self.effective += share
        self.poor += share < LEAST_EFFECTIVE

    def warnings(self) -> tuple[str, ...]:
        """What is to be said of the noise."""
        if self.poor <= MOST_POOR_STEPS * self.batches:
            return ()
        return (f"in {self.poor} of {self.batches} batches fewer than {LEAST_EFFECTIVE:.0%} of the "
                "noise counted: it is too narrow or too wide for what the model learned, and the "
                "estimate may be off; change `inflation`, or bring the data to one scale",
        )  # fmt: skip

    def keep_best(self) -> None:
        """The estimate belongs to the values that are kept."""
        self._best = self.log_partition

    def restore_best(self) -> None:
        self.log_partition = self._best

    def state_dict(self) -> dict[str, Any]:
        return {"log_partition": self.log_partition, "batches": self.batches, "poor": self.poor,
                "effective": self.effective, "best": self._best}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.log_partition, self.batches = state["log_partition"], state["batches"]
        self.poor, self.effective = state["poor"], state["effective"]
        self._best = state["best"]


def moved(log_u: float, log_mean: float, gamma: float) -> float:
    """log((1 - gamma) u + gamma mean); the mean itself where u is not known yet."""
    if math.isinf(log_u) or gamma == 1:
        return log_mean
    high = max(log_u, log_mean)
    return high + math.log((1 - gamma) * math.exp(log_u - high) + gamma * math.exp(log_mean - high))


def likelihood(data: Tensor, log_mean: Tensor, log_u: float) -> Tensor:
    """-mean f(x) + log u, whose gradient is -grad mean f(x) + grad mean(w) / u.

    Args:
        data: f of the data (batch,).
        log_mean: log mean(w), a scalar.
        log_u: log of the estimate of the partition function.
    """
    ratio = (log_mean - log_u).exp()
    return -data.mean() + log_u + ratio - ratio.detach()


def _one_input(program: Program, by: str) -> TensorSpec:
    """The one input of a network that gives one number per sample."""
    inputs = program.signature.inputs
    output = program.signature.outputs[main_output(program.signature)].shape
    fits = (
        len(inputs) == 1
        and getattr(torch, inputs[0].dtype).is_floating_point
        and len(inputs[0].shape) > 1
        and all(isinstance(size, int) for size in inputs[0].shape[1:])
    )
    if not fits:
        given = ", ".join(f"{spec.name} {list(spec.shape)} {spec.dtype}" for spec in inputs)
        raise ModelError(f"{by} trains networks of one floating-point input (batch, ...) whose "
                         f"other sizes are fixed; this one takes {given}")  # fmt: skip
    if tuple(output[:1]) != tuple(inputs[0].shape[:1]) or any(size != 1 for size in output[1:]):
        raise ModelError(f"{by} wants one number per sample, and the output is {list(output)}")
    return inputs[0]
