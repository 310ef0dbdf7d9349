"""fuse.skip_scale: scales the skips of a U-Net denoiser."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.nodes import set_gw_meta
from graphwright.ir.graph.skips import Skip, find_skips
from graphwright.ir.options import Bounded
from graphwright.ir.program import Program
from graphwright.ir.signature import TensorSpec
from graphwright.passes.base import Action, Context, Pass, Result

aten = torch.ops.aten

INPUT = "rho"


class SkipScaleOptions(Bounded):
    """Options of fuse.skip_scale."""

    rho: Annotated[float, Field(ge=0, le=2, examples=[0.7])]
    """Factor of the deepest skip, next to the bottleneck."""

    rho_top: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Factor of the shallowest skip; those between get factors in even steps."""

    as_input: bool = False
    """Makes the factors an input `rho` (one for every skip, the deepest first), with these as the
    program's default: one artifact then serves any factors, another one at every noise level. An
    artifact that is opened from its folder has no default, and has to be given them."""

    additive: bool = False
    """Scale skips that are added, too; else a U-Net with such skips is refused."""


class SkipScale(Pass[SkipScaleOptions]):
    """Multiplies what a U-Net's encoder hands to its decoder by factors below one.

    The skips are found on the graph: concatenations that take in what was computed before the
    bottleneck. A tensor that other nodes read too is scaled for the decoder alone. Residual sums
    inside blocks stay. Where there are factors of 1 and no input is asked for, nothing is put in.

    `depth_scales` has the factors over depth; `noise_scale` one for a noise level, which the
    sampler hands over as `rho`. Values have to be found for a model and a number of steps: few
    steps want smaller ones (published values lie between 0.5 and 1).

    Source: P08, "The Surprising Effectiveness of Skip-Tuning in Diffusion Sampling". The
    paper's own values per model are not known to us, so `rho` has no default.
    """

    contract = "lossy"
    weights = "kept"
    papers = ("P08",)
    changes_interface = True

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        editor = Editor(program, by=self.id)
        skips = self._skips(program.replace(graph=editor.graph))
        factors = depth_scales(len(skips), options.rho, options.rho_top)
        made = program
        source: fx.Node | None = None
        if options.as_input:
            source, made = _add_input(editor, program, factors, skips[0])
        actions = []
        for number, (skip, factor) in enumerate(zip(skips, factors, strict=True)):
            name = f"skip into {skip.join.name}"
            if source is None and factor == 1.0:
                actions.append(Action.left(name, "its factor is 1", "kept"))
                continue
            _scale(editor, skip, factor if source is None else source, number)
            said = f"times rho[{number}], {factor:g} by default" if source else f"times {factor:g}"
            actions.append(Action(name, said))
        result = editor.finish()
        result = result.replace(signature=made.signature, examples=made.examples)
        return Result(result, tuple(actions), {"skips": float(len(skips))})

    def _skips(self, program: Program) -> list[Skip]:
        found = [skip for skip in find_skips(program) if skip.is_long]
        added = [skip for skip in found if skip.kind == "add"]
        if added and not self.options.additive:
            joined = len(found) - len(added)
            raise ModelError(
                f"{self.id}: {len(added)} long skips are added and not concatenated "
                f"({joined} are concatenated), the first at {added[0].join.name}",
                fix="Set additive: true to scale those too; the paper scales concatenated ones.",
            )
        if not found:
            raise ModelError(
                f"{self.id}: the program has no skips from an encoder to a decoder",
                fix="The pass is for U-Nets: nets that join what was computed before a bottleneck.",
            )
        return found


def depth_scales(count: int, rho: float, rho_top: float = 1.0) -> tuple[float, ...]:
    """Factors of `count` skips in even steps, from `rho` at the deepest to `rho_top`."""
    if count == 1:
        return (rho,)
    return tuple(rho + (rho_top - rho) * n / (count - 1) for n in range(count))


def noise_scale(
    sigma: float,
    low: tuple[float, float],
    high: tuple[float, float],
    schedule: Literal["linear", "inverse"] = "linear",
) -> float:
    """The factor at a noise level, between two at which it is known; constant outside them.

    Args:
        sigma: noise level, above 0.
        low, high: (noise level, factor), the levels rising.
        schedule: in even steps of sigma (`linear`), or of 1 / sigma (`inverse`), which moves most
            of the change to low noise.

    Raises:
        ArgumentError: a level is not positive, or they do not rise.
    """
    if not 0 < low[0] < high[0] or sigma <= 0:
        raise ArgumentError(f"noise levels {sigma:g}, {low[0]:g}, {high[0]:g} have to be positive "
                            "and the last two rising")  # fmt: skip
    at = min(max(sigma, low[0]), high[0])
    if schedule == "linear":
        share = (at - low[0]) / (high[0] - low[0])
    else:
        share = (1 / low[0] - 1 / at) / (1 / low[0] - 1 / high[0])
    return low[1] + (high[1] - low[1]) * share


def _scale(editor: Editor, skip: Skip, factor: fx.Node | float, number: int) -> None:
    join, source = skip.join, skip.source
    by: Any = factor
    if isinstance(factor, fx.Node):
        by = editor.call(aten.select.int, factor, 0, number, before=join, like=join)
    scaled = editor.call(aten.mul.Tensor, source, by, before=join, like=join)
    if skip.kind == "cat":
        parts = list(join.args[0])  # type: ignore[arg-type]
        parts[parts.index(source)] = scaled
        editor.set_args(join, parts, *join.args[1:], **join.kwargs)
    else:
        editor.set_args(join, *(scaled if a is source else a for a in join.args), **join.kwargs)


def _add_input(
    editor: Editor, program: Program, factors: tuple[float, ...], first: Skip
) -> tuple[fx.Node, Program]:
    signature = program.signature
    if INPUT in [spec.name for spec in signature.inputs]:
        raise ModelError(f"the program has an input {INPUT!r} already")
    value = first.source.meta["val"]
    example = torch.tensor(factors, dtype=value.dtype, device=program.examples[0].device)
    last = [node for node in editor.graph.nodes if node.op == "placeholder"][-1]
    with editor.graph.inserting_after(last):
        node = editor.graph.placeholder(INPUT)
    node.meta["val"] = editor.fake(example)
    set_gw_meta(node, by=editor.by)
    editor.changed = True
    dtype = str(value.dtype).removeprefix("torch.")
    spec = TensorSpec(INPUT, dtype, (len(factors),))
    made = replace(signature, inputs=(*signature.inputs, spec), state=(*signature.state, INPUT))
    return node, program.replace(signature=made, examples=(*program.examples, example))
