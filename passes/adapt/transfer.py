"""adapt.transfer: an adapter of one base model taken over by another, without the task's data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from graphwright.ir.adapters.record import adapters
from graphwright.ir.causes import innermost
from graphwright.ir.data.batches import load_data
from graphwright.ir.data.sources import import_object
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.archive import load_program
from graphwright.ir.options import Bounded
from graphwright.ir.program import Program
from graphwright.ir.tune import TuneOptions, tune
from graphwright.ir.tune.losses import main_output
from graphwright.ir.tune.options import Function
from graphwright.passes.adapt._math.sampling import continued
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.training import training_hooks

Samples = dict[str, Tensor]
Generate = Callable[[int, torch.Generator], Samples]

LEAST = 16
"""Candidates that are drawn at a time at least."""


class TransferOptions(Bounded):
    """Options of adapt.transfer."""

    source: Annotated[str, Field(min_length=1, examples=["source.pt2"])]
    """Program file of the other base model with its adapter, which takes the same inputs and gives
    the same kind of output."""

    seeds: Annotated[str, Field(min_length=1, examples=["seeds.npz"])]
    """A few samples of the task, which new ones are made from: data as in the section
    `calibration`. The paper keeps 5."""

    generator: Literal["base"] | Function = "base"
    """What makes candidates: `base`, the model itself, a language model that goes on from all seeds
    in a row; or `module:function`, a function of the seeds (arrays by input), a count and a
    `torch.Generator` that gives arrays by input."""

    discriminator: str | None = None
    """Program file of a classifier of inputs, trained while the task's data was there: two logits,
    of made and of real ones. Candidates that it takes for made are thrown away; all are kept when
    absent."""

    samples: Annotated[int, Field(ge=1)] = 256
    """Samples to train on; the paper takes as many as the task had."""

    most: Annotated[int, Field(ge=1)] = 20
    """Candidates that are made at most, as a multiple of `samples`."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the drawing of tokens by `base`."""

    batch_size: Annotated[int, Field(ge=1)] = 16
    """Samples of a training batch."""

    tune: TuneOptions = TuneOptions(loss="kl")
    """Options of training; the loss compares with the source: `kl` of logits, which it is where
    none is given, or `teacher_mse`."""

    @field_validator("tune")
    @classmethod
    def _follows_the_source(cls, given: TuneOptions) -> TuneOptions:
        has_loss = "loss" in given.model_fields_set
        return given if has_loss else given.model_copy(update={"loss": "kl"})


class Transfer(Pass[TransferOptions]):
    """Trains the model's adapter to follow another model with an adapter, on made inputs.

    A pass before it puts the adapter in. Candidates are made from a few seeds, a discriminator
    keeps those that it takes for the task's own, the source model with its adapter labels them, and
    the engine trains the new adapter on that. Nothing else of the model changes, and the data of
    the task is not read. Copies of a candidate count once.

    Source: Wang et al. 2024, "Trans-LoRA: towards data-free Transferable Parameter Efficient
    Finetuning", section 3. The paper labels by text that the source writes; here the student
    follows its logits, which is the same for greedy text and serves other outputs too.
    """

    contract = "lossy"
    weights = "kept"
    papers = ("P80",)
    behind = ("adapt.*",)
    computes_in = ("float64", "float32", "bfloat16")

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        own = {name for adapter in adapters(program).values() for name in adapter.tensors()}
        names = [name for name in program.trainable() if name in own]
        if not names:
            raise ModelError(
                f"{self.id}: the model has no adapter to train",
                fix="Put adapt.lora, or another of its family, before it.",
            )
        if options.tune.loss not in ("kl", "teacher_mse"):
            raise ArgumentError(
                f"{self.id}: loss {options.tune.loss} does not follow the source",
                fix="Set tune: {loss: kl} or {loss: teacher_mse}.",
            )
        source = _opened(options.source, context)
        _refuse_other_task(source, program, options.source)
        seeds = self._seeds(program, context)
        judge = None
        if options.discriminator is not None:
            judge = _opened(options.discriminator, context)
        made, candidates = self._made(program, seeds, judge, context)
        size = options.batch_size
        batches = [{name: t[i : i + size] for name, t in made.items()}
                   for i in range(0, options.samples, size)]  # fmt: skip
        tuned = tune(program, batches, options.tune, context, teacher=source, names=names,
                     hooks=training_hooks(program))  # fmt: skip
        losses = tuned.history.losses
        share = options.samples / candidates
        actions = [Action(name, f"follows {options.source} on {options.samples} made samples",
                          "" if judge is None else f"{share:.0%} of the candidates were kept")
                   for name in adapters(program)]  # fmt: skip
        return Result(tuned.program, tuple(actions), {
            "candidates": float(candidates), "kept_share": share, "steps": float(len(losses)),
            "first_loss": losses[0], "last_loss": losses[-1],
        })  # fmt: skip

    def _seeds(self, program: Program, context: Context) -> Samples:
        section = {"data": self.options.seeds, "batch_size": 1}
        found = load_data(section, program.signature, context.seed, root=context.folder)
        parts: dict[str, list[Tensor]] = {spec.name: [] for spec in program.signature.inputs}
        for batch in found:
            for name, rows in batch.items():
                parts[name].append(rows)
        return {name: torch.cat(rows) for name, rows in parts.items()}

    # ---- made samples

    def _made(
        self, program: Program, seeds: Samples, judge: Program | None, context: Context
    ) -> tuple[Samples, int]:
        """As many different samples as are asked for, and how many candidates it took.

        Raises:
            ModelError: too few of the candidates are kept.
        """
        options = self.options
        kept: dict[bytes, Samples] = {}
        candidates, most = 0, options.samples * options.most
        generate = self._generator(program, seeds, context)
        random = context.generator("candidates")
        while len(kept) < options.samples and candidates < most:
            count = min(max(LEAST, options.samples - len(kept)), most - candidates)
            rows = _checked(generate(count, random), seeds, count, options.generator)
            candidates += count
            real = torch.ones(count, dtype=torch.bool) if judge is None else _real(judge, rows)
            for index in real.nonzero().flatten().tolist():
                row = {name: t[index : index + 1] for name, t in rows.items()}
                kept.setdefault(_bytes(row), row)
            context.progress("made samples", len(kept), options.samples)
        if len(kept) < options.samples:
            raise ModelError(
                f"{self.id}: {len(kept)} of {candidates} candidates are different samples that the "
                f"discriminator takes for real, and {options.samples} are asked for",
                fix="Lower `samples`, raise `most`, or train the discriminator against the "
                "generator that is used.",
            )
        chosen = list(kept.values())[: options.samples]
        return {name: torch.cat([row[name] for row in chosen]) for name in seeds}, candidates

    def _generator(self, program: Program, seeds: Samples, context: Context) -> Generate:
        name = self.options.generator
        if name == "base":
            from graphwright.ir.adapters.merging import bare

            base = bare(program)
            return lambda count, random: continued(
                base, seeds, count, self.options.temperature, random
            )
        function: Any = import_object(name, context.folder, "the generator")

        def generate(count: int, random: torch.Generator) -> Samples:
            try:
                return dict(function(dict(seeds), count, random))
            except Exception as error:  # whatever the user's function does
                first = innermost(error)
                raise ArgumentError(f"{type(error).__name__}: {first}", where=name) from error

        return generate


def _opened(path: str, context: Context) -> Program:
    where = Path(path) if Path(path).is_absolute() else context.folder / path
    return load_program(where)


def _refuse_other_task(source: Program, program: Program, path: str) -> None:
    """Raises ModelError where the outputs that are compared have other shapes."""
    shapes = []
    for given in (source, program):
        spec = given.signature.outputs[main_output(given.signature)]
        shapes.append((spec.name, spec.dtype, spec.shape[-1:]))
    if shapes[0][1:] != shapes[1][1:]:
        (name, dtype, size), (own, own_dtype, own_size) = shapes
        raise ModelError(
            f"the source gives {name!r} of {dtype} {list(size)}, and this model {own!r} of "
            f"{own_dtype} {list(own_size)}",
            where=path,
        )


def _checked(rows: Samples, seeds: Samples, count: int, name: str) -> Samples:
    """Rows that a generator gave, in the order of the inputs.

    Raises:
        ArgumentError: inputs are missing, or of another dtype, shape or number.
    """
    for key, seed in seeds.items():
        found = rows.get(key)
        if (
            not isinstance(found, Tensor)
            or found.dtype != seed.dtype
            or len(found) != count
            or (found.shape[1:] != seed.shape[1:])
        ):
            shown = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else found
            raise ArgumentError(
                f"the generator gives {shown} for {key!r}, and {seed.dtype} "
                f"{(count, *seed.shape[1:])} is asked for", where=name,
            )  # fmt: skip
    return {key: rows[key].detach() for key in seeds}


def _real(judge: Program, rows: Samples) -> Tensor:
    """Which candidates a discriminator takes for real."""
    inputs = judge.bind(**{spec.name: rows[spec.name] for spec in judge.signature.inputs
                           if spec.name in rows})  # fmt: skip
    with torch.no_grad():
        logits = judge.run_flat(inputs)[main_output(judge.signature)]
    if logits.dim() != 2 or logits.shape[1] != 2:
        raise ModelError(f"a discriminator gives two logits for each sample, of made and of real "
                         f"ones; this one gives {tuple(logits.shape)}")  # fmt: skip
    return logits[:, 1] > logits[:, 0]


def _bytes(row: Mapping[str, Tensor]) -> bytes:
    def parts() -> Iterator[bytes]:
        for tensor in row.values():
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return b"|".join(parts())
