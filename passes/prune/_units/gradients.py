"""Gradients of a loss on calibration data, batch by batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from graphwright.ir.data.batches import as_batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature
from graphwright.ir.tune.losses import cross_entropy, main_output, next_token, wide

LossName = Literal["auto", "cross_entropy", "next_token", "energy", "projection"]
MEMORY = 1 << 30
"""Bytes of gradients that are held in memory; more of them go to a memory-mapped file."""

Labelled = tuple[Mapping[str, Tensor], Tensor | None]
"""Inputs by name and labels, if there are any."""


def gradients(
    program: Program,
    batches: Iterable[Labelled],
    loss: LossName,
    names: Collection[str] | None = None,
    unlabelled: LossName = "energy",
) -> Iterator[dict[str, Tensor]]:
    """Gradient of the mean loss of every batch, by parameter; zeros where there is none.

    Args:
        program: left as it is; runs in the mode it is in.
        batches: inputs and labels.
        loss: what `loss_value` takes.
        names: parameters, all floating-point ones when None.
        unlabelled: loss that `auto` stands for where there are no labels.

    Raises:
        ModelError: a loss or a gradient is not finite; names the batch.
    """
    trained: dict[str, Tensor] = {
        name: torch.nn.Parameter(p.detach())
        for name, p in program.state.items()
        if p.is_floating_point() and (name in program.parameters() if names is None
                                      else name in names)
    }  # fmt: skip
    twin = program.replace(state={**program.state, **trained})
    for number, (inputs, labels) in enumerate(batches):
        name = unlabelled if loss == "auto" and labels is None else loss
        with torch.enable_grad():
            outputs = twin.run_flat(twin.bind(**inputs))
            value = loss_value(program.signature, outputs, inputs, labels, name, number)
            found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
        if not bool(torch.isfinite(value)):
            raise ModelError(f"the loss of calibration batch {number} is {float(value.detach())}")
        yield {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(trained.items(), found, strict=True)
        }


def loss_value(
    signature: Signature,
    outputs: tuple[Tensor, ...],
    inputs: Mapping[str, Tensor],
    labels: Tensor | None,
    loss: LossName,
    number: int = 0,
) -> Tensor:
    """The loss of one batch.

    Args:
        signature: of the program.
        outputs: its flat outputs.
        inputs: by name.
        labels: of the batch, or None.
        loss: `cross_entropy` of the main output with the labels, `next_token` of a language
            model, `energy`, the sum of the outputs' mean squares; `projection`, the inner product
            of the outputs with random numbers, in units of their norms, whose squared changes are
            on average those of the outputs; `auto` is the first where there are labels, and else
            `energy`.
        number: of the batch, which the random numbers follow from.

    Raises:
        ArgumentError: the loss needs labels, and there are none.
    """
    if loss == "next_token":
        batch = dict(inputs) if labels is None else {**inputs, "labels": labels}
        if labels is None and "input_ids" not in batch:
            raise ArgumentError("the loss next_token needs labels, or an input named input_ids")
        return next_token(wide(outputs[main_output(signature)]), batch)
    if loss == "cross_entropy" and labels is None:
        raise ArgumentError("loss is cross_entropy, and the calibration data has no labels",
                            fix="Add a `labels` column, or use loss: energy.")  # fmt: skip
    if labels is not None and loss in ("auto", "cross_entropy"):
        return cross_entropy(wide(outputs[main_output(signature)]), {"labels": labels})
    floats = [out for out in outputs if out.is_floating_point()]
    if loss == "projection":
        return torch.stack([_projected(out, number) for out in floats]).sum()
    return torch.stack([out.float().square().mean() for out in floats]).sum()


def _projected(output: Tensor, number: int) -> Tensor:
    draw = torch.Generator().manual_seed(number)
    sides = torch.randn(output.shape, generator=draw, dtype=torch.float32).to(output.device)
    size: Tensor = output.detach().float().norm().clamp_min(1e-12)
    return (output.float() * sides).sum() / size


def labelled(calibration: Iterable[Any], signature: Signature) -> Iterator[Labelled]:
    """Batches as they come, with labels where there are any."""
    yield from as_batches(calibration, signature).labelled()


class Draws:
    """Mini-batches of calibration samples in random order, new ones as often as wanted.

    Samples are read where the source can, and else kept in memory. Batches of different shapes, or
    of a program with a fixed batch size, are not mixed: they come whole, in random order.

    Attributes:
        count: mini-batches of one draw: as many as wanted, or what the data is enough for.
        size: samples in each: at most as asked for, and few enough that samples do not repeat.

    Args:
        calibration: re-iterable batches.
        signature: of the program they are for.
        count: mini-batches wanted.
        size: most samples of one.
    """

    def __init__(
        self, calibration: Iterable[Any], signature: Signature, count: int, size: int
    ) -> None:
        data = as_batches(calibration, signature)
        first = signature.inputs[0].shape[:1] if signature.inputs else ()
        dim = first[0] if first else 1
        self.batches: list[Labelled] = []
        self.take: Callable[[list[int]], Labelled] = data.at
        if data.rows is not None and isinstance(dim, str):
            samples = data.rows.count
        else:
            self.batches = list(data.labelled())
            pool = _pool(self.batches) if isinstance(dim, str) else None
            samples = len(self.batches)
            if pool is not None:
                samples, self.take, self.batches = _length(pool), _taker(pool), []
        if self.batches:
            self.size, self.count = _length(self.batches[0]), min(count, samples)
            return
        least = signature.dims[dim].min if isinstance(dim, str) and dim in signature.dims else 1
        self.size = max(1, least, min(size, samples // count))
        self.count = max(1, min(count, samples // self.size))
        self.samples = samples

    def draw(self, generator: torch.Generator) -> Iterator[Labelled]:
        """`count` mini-batches."""
        if self.batches:
            order = torch.randperm(len(self.batches), generator=generator)
            yield from (self.batches[i] for i in order[: self.count].tolist())
            return
        drawn = torch.randperm(self.samples, generator=generator)[: self.count * self.size]
        yield from (self.take(indices.tolist()) for indices in drawn.split(self.size))


def _pool(batches: list[Labelled]) -> Labelled | None:
    """All samples as one batch; None where shapes differ or an input has no samples' axis."""
    labels = [label for _, label in batches if label is not None]
    columns = [list(inputs.values()) + ([] if label is None else [label])
               for inputs, label in batches]  # fmt: skip
    same = {tuple(t.shape[1:] for t in row) for row in columns}
    if len(same) > 1 or any(len({t.shape[:1] for t in row}) > 1 for row in columns):
        return None
    names = batches[0][0]
    pooled = {name: torch.cat([inputs[name] for inputs, _ in batches]) for name in names}
    return pooled, torch.cat(labels) if labels else None


def _taker(pool: Labelled) -> Callable[[list[int]], Labelled]:
    inputs, labels = pool
    return lambda indices: (
        {name: value[indices] for name, value in inputs.items()},
        None if labels is None else labels[indices],
    )


def _length(batch: Labelled) -> int:
    return int(next(iter(batch[0].values())).shape[0])


@contextmanager
def room(count: int, size: int, folder: Path | None) -> Iterator[Tensor]:
    """Room for gradients, (count, size) float32: in memory, or in a file while it is used."""
    if 4 * count * size <= MEMORY:
        yield torch.empty(count, size)
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        file = str(Path(place) / "gradients")
        try:
            flat = torch.from_file(file, shared=True, size=count * size)
        except RuntimeError as error:
            gigabytes = 4 * count * size / 2**30
            raise ArgumentError(
                f"no room for {gigabytes:.1f} GiB of gradients in {place}",
                fix="Lower `gradients`, or narrow `targets`.",
            ) from error
        yield flat.reshape(count, size)
