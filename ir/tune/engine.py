"""The training loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.causes import innermost
from graphwright.ir.context import Context
from graphwright.ir.data.batches import as_batches, batch_size
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.digest import digest
from graphwright.ir.program import Program
from graphwright.ir.signature import rebuild
from graphwright.ir.tune.average import Average
from graphwright.ir.tune.batch_size import make_batch_size
from graphwright.ir.tune.best import Best
from graphwright.ir.tune.checkpoint import Checkpoint, make_key
from graphwright.ir.tune.feed import Feed, Labelled
from graphwright.ir.tune.history import History, Losses, Tuned
from graphwright.ir.tune.hooks import Hook, Hooks, Moment
from graphwright.ir.tune.losses import OF_TEACHER, Flat, Loss, check_teacher, make_loss
from graphwright.ir.tune.mfac import MfacOptimizer
from graphwright.ir.tune.mix import mixed
from graphwright.ir.tune.optimizers import MakeOptimizer, make_optimizer
from graphwright.ir.tune.options import TuneOptions
from graphwright.ir.tune.processes import Processes
from graphwright.ir.tune.schedule import evaluation_interval, lr_factor, total_steps
from graphwright.ir.tune.select import make_score, mean_score
from graphwright.ir.tune.working import Working, choose, frozen, own_random_numbers
from graphwright.ir.tune.zeros import ZeroKeeper, zeros_to_keep

Evaluate = Callable[[Program], float]
"""Measures a program; lower is better. It runs on live tensors: nothing of it may be kept."""

SHOWN_EVERY = 0.2
"""Seconds between two looks at the loss; each waits for the device."""


def tune(
    program: Program,
    data: Iterable[Any],
    options: TuneOptions,
    context: Context,
    *,
    hooks: Sequence[Hook] = (),
    evaluate: Evaluate | None = None,
    teacher: Program | None = None,
    names: Collection[str] | None = None,
    optimizer: MakeOptimizer | None = None,
    masked: Collection[str] | None = None,
    loss: Loss | None = None,
) -> Tuned:
    """Trains a program's parameters.

    The order of the data and every random number follow from `context` and the step, so that a
    run that was killed and started again ends in the same bytes; `context.work` is where it keeps
    its state. Processes that a launcher started together train together: gradients, losses and
    running statistics are averaged, and every process returns the same program.

    Args:
        program: left as it is, tensors included.
        data: `ir.data.batches.Batches`, or a re-iterable of batches; batch sizes are per process.
        options: how to train.
        context: seed, device, work folder, progress.
        hooks: called at their points of the loop, in this order.
        evaluate: evaluation of one's own, in the place of the loss on held-out samples.
        teacher: for the loss `kl`; `context.teacher` when absent.
        names: parameters to train; all trainable ones when None.
        optimizer: makes the optimizer, for a recipe with one of its own.
        masked: parameters whose zeros `keep_zeros` is about; all that are trained when None.
        loss: of a recipe, in the place of that which the options name; held-out samples are
            evaluated by it too.

    Returns:
        The program in inference mode, and the losses.

    Raises:
        ArgumentError: data, loss and options do not go together, or accelerate is missing.
        ModelError: nothing can be trained, or the loss is no longer a finite number.
    """
    loop = _Loop(_Run(program, data, options, context, hooks, evaluate, teacher, names, optimizer,
                      masked, loss))  # fmt: skip
    with own_random_numbers(loop.processes.device):
        return loop.run()


@dataclass(frozen=True)
class _Run:
    """What `tune` was called with."""

    program: Program
    data: Iterable[Any]
    options: TuneOptions
    context: Context
    hooks: Sequence[Hook]
    evaluate: Evaluate | None
    teacher: Program | None
    names: Collection[str] | None
    optimizer: MakeOptimizer | None
    masked: Collection[str] | None
    loss: Loss | None


class _Loop:
    def __init__(self, run: _Run) -> None:
        program, options, context, hooks = run.program, run.options, run.context, run.hooks
        self.options, self.context = options, context
        self.processes = Processes(context.device)
        device = self.processes.device
        batches = as_batches(run.data, program.signature)
        self.feed = Feed(
            batches, self._seed, options.hold_out, self.processes.rank, self.processes.count,
            options.shuffle,
        )  # fmt: skip
        self.mixed = mixed(self.feed, options.mix, context.folder)
        self.total = total_steps(options, self.feed)
        chosen = choose(program, run.names, may_be_none=any(hook.own() for hook in hooks))
        about = chosen if run.masked is None else [n for n in chosen if n in run.masked]
        self.zeros = zeros_to_keep(program, about, options.keep_zeros)
        recipes = list(hooks)
        hooks = [*hooks, ZeroKeeper(self.zeros)] if self.zeros else hooks
        self.hooks = Hooks(hooks)
        self.working = Working(program, chosen, self.hooks, device)
        teacher = (run.teacher or context.teacher) if options.loss in OF_TEACHER else None
        run_teacher = None if teacher is None else _frozen(teacher, program, device)
        parts = (options.loss, batches, context.folder, run_teacher)
        self.loss = run.loss or make_loss(*parts, options.label_smoothing)
        unsmoothed = run.loss or make_loss(*parts)
        self.score = make_score(options.select, unsmoothed, batches.signature, context.folder)
        if options.ema is not None and any(hook.counts_on_last_step for hook in recipes):
            raise ArgumentError("ema averages over steps, and this recipe counts on the last one")
        self.average = None if options.ema is None else Average(self.working, options.ema)
        self.optimizer = (
            make_optimizer(self.working.trained, options, self.zeros)
            if run.optimizer is None
            else run.optimizer(self.working.trained, options)
        )
        self.full_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.evaluate = run.evaluate or (self._held_out_score if options.hold_out else None)
        self.evaluate_every = evaluation_interval(
            options, self.feed, self.total, is_evaluated=self.evaluate is not None
        )
        self.best = Best(options.patience, options.keep_best)
        self.losses = Losses()
        self.step = self.read = 0
        self.budget = self.total * options.accumulate
        rows = 0 if batches.rows is None else batches.rows.size
        self.size = make_batch_size(options, recipes, self.processes.count, rows)
        self.stopped = ""
        self.checkpoint = self._checkpoint(program, teacher, chosen, batches.source, hooks)
        self._shown = time.monotonic()

    def run(self) -> Tuned:
        self._resume()
        # also waits for all: the first checkpoint is written over the one just read
        if self.step != self.processes.from_main(self.step):
            raise ArgumentError(
                "the processes found different states of an earlier run",
                fix="Let them share one work folder, and start again.",
            )
        model = self.processes.wrap(self.working, self.working.trained_names())
        batches = self.mixed.batches(self.read)
        while not self._is_done() and not self.stopped:
            count = min(self.size.batches, self.budget - self.read)
            self._one_step(model, [next(batches) for _ in range(count)])
            self.step, self.read = self.step + 1, self.read + count
            self._look()
            self._evaluate()
            if self.processes.is_main and self.checkpoint.is_due:
                self._save()
        self.losses.finite()
        if self.processes.is_main and self.checkpoint.folder is not None:
            self._save()
        if self.best.tensors:
            self.working.load(self.best.tensors)
            self.hooks.restore_best()
        elif self.average is not None:
            self.working.load(self.average.values)
        history = History(
            tuple(self.losses.finite()), tuple(self.best.evaluations), self.best.step,
            self.stopped, {name: float(zero.float().mean()) for name, zero in self.zeros.items()},
            self.optimizer.window.nbytes if isinstance(self.optimizer, MfacOptimizer) else 0,
            tuple(self.size.samples),
        )  # fmt: skip
        return Tuned(self.working.result(), history)

    # ---- a step

    def _one_step(self, model: torch.nn.Module, batches: list[Labelled]) -> None:
        factor = lr_factor(self.options, self.read / self.options.accumulate, self.total)
        for group, full in zip(self.optimizer.param_groups, self.full_lr, strict=True):
            group["lr"] = full * factor
        self.optimizer.zero_grad()
        losses = []
        for micro, batch in enumerate(batches):
            last = micro == len(batches) - 1
            alone = self.processes.accelerator.no_sync(model)
            with contextlib.nullcontext() if last else alone:
                losses.append(self._backward(model, self._moment(micro), batch, len(batches)))
            rows = batch_size(batch, self.working.base.signature)
            self.size.add(self.working.trained.values(), rows, len(batches))
        self.size.close(len(batches))
        at = self._moment(len(batches) - 1)
        if self.options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(at.parameters.values(), self.options.clip_norm)
        self.hooks.before_step(at)
        self.optimizer.step()
        self.hooks.after_step(at)
        loss = torch.stack(losses).mean()
        self.processes.mean_([loss, *self.working.moving.values()])
        self.losses.append(loss)
        if self.average is not None:
            self.average.update()

    def _backward(self, model: torch.nn.Module, at: Moment, batch: Labelled, count: int) -> Tensor:
        """Adds the gradients of one of `count` batches; returns its loss."""
        device, signature = self.processes.device, self.working.base.signature
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        torch.manual_seed(self._seed("dropout", at.step, at.micro, self.processes.rank))
        self.working.at = at
        try:
            batch = dict(self.hooks.on_batch(at, batch))
            runs = [batch, *self.hooks.also_run(at, batch)]
            with self._precision():
                found = model(*(tuple(run[s.name] for s in signature.inputs) for run in runs))
            loss = self.loss(found[0], batch)
            outputs, *also = (rebuild(signature.structure, flat) for flat in found)
            loss = self.hooks.on_loss(replace(at, also=tuple(also)), loss, outputs, batch)
            del found, outputs, also  # backward keeps what it needs of them
            self.hooks.before_backward(at, loss)
            self.processes.accelerator.backward(loss / count)
        except RuntimeError as error:
            raise ModelError(f"training step {at.step} failed: {innermost(error)}") from error
        self.hooks.after_backward(at)
        return loss.detach()

    def _moment(self, micro: int) -> Moment:
        return Moment(self.step, self.total, micro, self.working.trained, self.optimizer)

    def _precision(self) -> torch.autocast:
        enabled = self.options.precision == "bf16"
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=enabled)

    def _is_done(self) -> bool:
        return self.read >= self.budget

    # ---- evaluation

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        if self.step % self.evaluate_every and not self._is_done():
            return
        self.working.at = replace(self._moment(0), is_training=False)
        averaged = contextlib.nullcontext() if self.average is None else self.average.in_place()
        with torch.no_grad(), averaged:
            value = self.processes.from_main(float(self.evaluate(self.working.in_inference())))
            is_best = self.best.add(self.step, value, self.working.tensors())
        if is_best:
            self.hooks.keep_best()
        if self.best.is_out_of_patience and not self._is_done():
            self.stopped = f"no better evaluation in the last {self.options.patience}"

    def _held_out_score(self, program: Program) -> float:
        with self._precision():
            return mean_score(program, self.feed.held_out(), self.score, self.processes.device)

    # ---- what is seen and kept

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._shown < SHOWN_EVERY and not self._is_done():
            return
        self._shown = now
        loss = self.losses.finite()[-1]
        self.context.progress(f"loss {loss:.4g}", self.read // self.options.accumulate, self.total)

    def _checkpoint(
        self,
        program: Program,
        teacher: Program | None,
        chosen: tuple[str, ...],
        source: str,
        hooks: Sequence[Hook],
    ) -> Checkpoint:
        context = self.context
        if context.work is None:
            return Checkpoint(None, "", "", math.inf, context.warn)
        key = make_key(
            run=context.key, program=digest(program), seed=context.seed, scope=context.scope,
            teacher=None if teacher is None else digest(teacher), names=chosen, data=source,
            options=self.options.model_dump(mode="json"), processes=self.processes.count,
            hooks=[type(hook).__qualname__ for hook in hooks], torch=torch.__version__,
        )  # fmt: skip
        stem = f"tune-{make_key(scope=context.scope)[:12]}"
        return Checkpoint(context.work, stem, key, context.checkpoint_seconds, context.warn)

    def _save(self) -> None:
        self.checkpoint.save(
            {
                "step": self.step,
                "read": self.read,
                "batches": self.size.batches,
                "batch_sizes": self.size.samples,
                "stopped": self.stopped,
                "losses": self.losses.finite(),
                "tensors": dict(self.working.tensors()),
                "optimizer": self.optimizer.state_dict(),
                "hooks": self.hooks.state_dict(),
                "best": self.best.state_dict(),
                "average": {} if self.average is None else self.average.state_dict(),
            }
        )

    def _resume(self) -> None:
        state = self.checkpoint.load()
        if state is None:
            return
        self.step, self.stopped = state["step"], state["stopped"]
        self.read, self.size.batches = state["read"], state["batches"]
        self.size.samples = list(state["batch_sizes"])
        self.losses = Losses(state["losses"])
        self.working.load(state["tensors"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hooks.load_state_dict(state["hooks"])
        self.best.load_state_dict(state["best"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _seed(self, *path: str | int) -> int:
        return self.context.generator("tune", *path).initial_seed()


def _frozen(teacher: Program, student: Program, device: torch.device) -> Callable[[Flat], Flat]:
    """Runs the teacher on the device, without touching its tensors."""
    check_teacher(teacher, student)
    return frozen(teacher, device).run_flat
