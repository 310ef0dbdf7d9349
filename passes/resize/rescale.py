"""resize.rescale: a downscaler that looks for the image from which its upscaler does best (P34)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.archive import load_program
from graphwright.ir.graft import graft
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.options import Options, Rule
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result
from graphwright.passes.resize._descent.encoder import (
    Descent,
    Direction,
    Encoder,
    Norm,
    Stored,
    error_and_gradient,
    reconstruction_error,
)

MOST_STEPS = 32
"""Steps of a stage: every one is a copy of the networks in the graph."""

FLAT = {"round", "floor", "ceil", "trunc", "sign", "argmax", "argmin"}
"""Operators whose gradient is zero, or none."""


class RescaleOptions(Options):
    """Options of resize.rescale."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("range", "range[0] < range[1]", "range {range} does not rise"),
        Rule("round_in_loop", "not round_in_loop or levels is not None",
             "there is nothing to round in the loop without levels"),
    )  # fmt: skip

    up: Annotated[str, Field(min_length=1, examples=["up.pt2"])]
    """File of the upscaler: a program saved by `program.save`; relative to the spec's folder."""

    hr_steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 4
    """Steps of gradient descent on the image, before it is downscaled."""

    lr_steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 8
    """Steps on the downscaled image."""

    hr_rate: Annotated[float, Field(gt=0)] = 0.1
    """Size of a step on the image, as a factor of the gradient or of its sign."""

    lr_rate: Annotated[float, Field(gt=0)] = 0.1
    """Size of a step on the downscaled image."""

    norm: Norm = "l2"
    """Error of a reconstruction: the sum over an image of squares, or of absolute values."""

    direction: Direction = "gradient"
    """What a step follows: the gradient itself, or its sign."""

    backtrack: bool = True
    """Do not take a step that raises an image's error, and halve this image's rate. Plain descent
    otherwise."""

    levels: Annotated[int, Field(ge=2)] | None = 256
    """Values that a stored image has, evenly spaced over `range`; 256 are 8 bits. Any number when
    null."""

    range: tuple[float, float] = (0.0, 1.0)
    """The least and the largest value of a stored image."""

    round_in_loop: bool = False
    """Round the downscaled image to what can be stored in every step, not only at the end; the
    gradient goes straight through."""


class Rescale(Pass[RescaleOptions]):
    """Makes a downscaler search for the small image that its upscaler restores best.

    The program is a downscaler d; the file has the upscaler u of the pair. No weight changes, and u
    stays as it is. In front of d the image, and behind it the small image, go through steps of
    gradient descent on how badly u restores the original x:

        x' <- x' - a grad ||u(d(x')) - x||,   y = d(x'),   y <- y - a grad ||u(y) - x||

    The gradients are in the graph as forward calls, unrolled, so that the encoder is exported as
    any other network; it reads one copy of the weights. With `backtrack`, the error before rounding
    never rises. Gains can be lost in the rounding: errors of the example inputs behind it, with and
    without the steps, are in the report, with a warning where nothing was gained.

    Source: P34 (hierarchical collaborative downscaling). Numbers of steps, their size, the norm and
    backtracking are choices made here.
    """

    papers = ("P34",)
    contract: ClassVar[Contract] = "lossy"
    weights: ClassVar[Effect | None] = "kept"
    computes_in = ("float64", "float32")

    def run(self, program: Program, context: Context) -> Result:
        """Puts the steps into the graph.

        Raises:
            ArgumentError: no program can be read from the file.
            ModelError: the two programs are no pair, leave other sizes than the batch free, or have
                no gradient.
        """
        o = self.options
        path = context.folder / o.up
        if not path.is_file():
            raise ArgumentError(f"{self.id}: there is no file of the upscaler", where=str(path))
        up = load_program(path)
        _refuse_pair(program, up, self.id)
        editor = Editor(program, by=self.id)
        names = {f"down.{name}": name for name in program.state}
        names |= {f"up.{name}": editor.add_state(f"up.{name}", t) for name, t in up.state.items()}
        encoder = self._encoder(_frozen(program), _frozen(up), _examples(program))
        (image,) = editor.graph.find_nodes(op="placeholder")
        end = editor.graph.output_node()
        (made,) = graft(editor, encoder, image, name=self.id, before=end,
                        shared=lambda n: names.get(_own(n)))  # fmt: skip
        end.args = ((made,),)
        result = editor.finish(propagate=True)
        return self._reported(program, up, result)

    def _encoder(self, down: fx.GraphModule, up: fx.GraphModule, image: Tensor) -> Encoder:
        o, stored = self.options, Stored(*self.options.range, self.options.levels)
        tensors: dict[str, Tensor] = {f"down.{n}": t for n, t in _tensors(down).items()}
        tensors |= {f"up.{n}": t for n, t in _tensors(up).items()}

        def restored(y: Tensor) -> Tensor:
            return _only(up(stored.straight_through(y, rounded=o.round_in_loop)))

        def traced(net: Any, at: Tensor) -> nn.Module:
            try:
                return error_and_gradient(net, at, image, o.norm, tensors)
            except ModelError as error:
                raise ModelError(f"{self.id}: {error}") from None
            except (RuntimeError, NotImplementedError) as error:
                raise ModelError(
                    f"{self.id}: the pair has no gradient by its image",
                    details=(str(error).splitlines()[0],),
                ) from error

        high = low = None
        if o.hr_steps:
            step = traced(lambda x: restored(_only(down(x))), image)
            high = Descent(step, o.hr_steps, o.hr_rate, o.direction, o.backtrack)
        if o.lr_steps:
            with torch.no_grad():
                small = _only(down(image))
            step = traced(restored, small)
            low = Descent(step, o.lr_steps, o.lr_rate, o.direction, o.backtrack, stored)
        return Encoder(down, high, low, stored)

    def _reported(self, program: Program, up: Program, result: Program) -> Result:
        o, stored = self.options, Stored(*self.options.range, self.options.levels)
        (x,) = program.examples
        with torch.no_grad():
            kept = (stored.nearest(program.run_flat((x,))[0]), result.run_flat((x,))[0])
            plain, found = (
                float(reconstruction_error(up.run_flat((y,))[0], x, o.norm).sum()) for y in kept
            )
        said = f"{o.hr_steps} steps in front of the downscaler, {o.lr_steps} behind it"
        metrics = {"reconstruction error of the pair": plain, "behind the steps": found}
        steps = o.hr_steps + o.lr_steps
        warned = () if found < plain or not steps else (
            f"the steps gain nothing on the example inputs: {plain:.4g} became {found:.4g}",
        )  # fmt: skip
        return Result(result, (Action("downscaler", said),), metrics, warnings=warned)


def _own(name: str) -> str:
    """The name of a weight of one of the two networks, without the part that reads it."""
    return name.removeprefix("high.step.").removeprefix("low.step.")


def _only(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


def _frozen(program: Program) -> fx.GraphModule:
    """The program as a module whose weights take no gradient.

    Tracing puts back what a module holds; `data` keeps that out of the count of writes.
    """
    state = {name: t.data for name, t in program.state.items()}
    module = fx.GraphModule(state, program.graph)
    program.graph.owning_module = None
    return module


def _tensors(module: fx.GraphModule) -> Mapping[str, Tensor]:
    from operator import attrgetter

    names = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    return {name: attrgetter(name)(module) for name in names}


def _examples(program: Program) -> Tensor:
    """An example image whose batch is a size that it has nowhere else."""
    (x,) = program.examples
    rows = next(n for n in range(2, x.dim() + 3) if n not in x.shape[1:])
    return torch.cat([x] * rows)[:rows]


def _refuse_pair(down: Program, up: Program, by: str) -> None:
    for said, program in (("downscaler", down), ("upscaler", up)):
        counts = len(program.signature.inputs), len(program.signature.outputs)
        if counts != (1, 1):
            raise ModelError(
                f"{by}: the {said} has {counts[0]} inputs and {counts[1]} outputs, and takes one "
                "image to another"
            )
        flat = [node.name for node in program.graph.nodes if op_name(node) in FLAT]
        if flat:
            raise ModelError(
                f"{by}: the {said} rounds or chooses, which has no gradient",
                where=flat[0],
                fix="Put this pass in front of quantization.",
            )
    x, y = down.signature.inputs[0], down.signature.outputs[0]
    if any(isinstance(size, str) for size in x.shape[1:]):
        raise ModelError(
            f"{by}: images are {list(x.shape)}, and a pair does not give back every size",
            fix="Trace both networks with the batch alone free.",
        )
    for one, other, text in (
        (y, up.signature.inputs[0], "the upscaler takes"),
        (x, up.signature.outputs[0], "the upscaler returns"),
    ):
        pairs = list(zip(one.shape, other.shape, strict=False))
        fits = len(one.shape) == len(other.shape) and all(
            a == b or isinstance(b, str) for a, b in pairs
        )
        if not fits or one.dtype != other.dtype:
            raise ModelError(
                f"{by}: {text} {other.dtype} {list(other.shape)}, and the downscaler "
                f"{'returns' if one is y else 'takes'} {one.dtype} {list(one.shape)}",
                fix="Trace both for images of the same sizes, with the same of them free.",
            )
    with torch.no_grad():
        made = up.run_flat(down.run_flat(down.examples))[0]
    if made.shape != down.examples[0].shape:
        raise ModelError(
            f"{by}: images of the size {list(down.examples[0].shape)} come back as "
            f"{list(made.shape)}"
        )
