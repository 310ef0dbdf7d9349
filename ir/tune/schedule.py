"""The number of steps, and the course of the learning rate over them."""

from __future__ import annotations

import math

from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune.feed import Feed
from graphwright.ir.tune.options import TuneOptions


def total_steps(options: TuneOptions, feed: Feed) -> int:
    """Optimizer steps that `steps` and `epochs` allow.

    Raises:
        ArgumentError: none, or all of them are warm-up.
    """
    epochs = options.epochs or (None if options.steps else 1)
    bounds = [options.steps] if options.steps else []
    if epochs:
        bounds.append(epochs * feed.epoch_batches() // options.accumulate)
    total = min(bounds)
    if total < 1:
        raise ArgumentError(
            f"{epochs} epochs hold fewer batches than the {options.accumulate} of one step",
            where=feed.data.source,
        )
    if options.warmup >= total:
        raise ArgumentError(f"a warm-up of {options.warmup} steps leaves none of {total} to train")
    return total


def evaluation_interval(options: TuneOptions, feed: Feed, total: int, *, is_evaluated: bool) -> int:
    """Steps between evaluations; 0 where nothing is evaluated.

    Raises:
        ArgumentError: an option asks for evaluations, and there is nothing to evaluate by.
    """
    if not is_evaluated:
        if options.patience or options.evaluate_every:
            given = "patience" if options.patience else "evaluate_every"
            raise ArgumentError(
                f"{given} needs an evaluation", fix="Set hold_out to a share of the samples."
            )
        return 0
    if options.evaluate_every is not None:
        return options.evaluate_every
    if feed.data.rows is None:
        return total
    return max(1, feed.epoch_batches() // options.accumulate)


def lr_factor(options: TuneOptions, step: float, total: int) -> float:
    """Learning rate of a step as a share of `lr`.

    (step + 1) / warmup while warming up. Then, with t from 0 right after the warm-up to 1 at
    `total`: 1; 1 - t or (1 + cos(pi t)) / 2 (Loshchilov & Hutter 2017, without restarts), on the
    way from 1 to min_lr / lr; or gamma to the power of the milestones (or whole `step_share`s) that
    t has reached, no less than min_lr / lr. `step` is a fraction where batches grow: then it is the
    share of the data that has been read, in steps of the first size.
    """
    if step < options.warmup:
        return (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, total - options.warmup)
    least = options.min_lr / options.lr
    if options.schedule == "multistep":
        return max(least, options.gamma ** sum(done >= m for m in options.milestones))
    if options.schedule == "step":
        assert options.step_share is not None  # the options say so
        return max(least, options.gamma ** int(done / options.step_share + 1e-9))
    if options.schedule == "constant":
        return 1.0
    course = 1.0 - done if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return least + (1.0 - least) * course
