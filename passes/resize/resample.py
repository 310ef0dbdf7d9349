"""resize.resample: a network of another width, from a manifold that was trained before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from graphwright.ir.channels import channel_groups
from graphwright.ir.options import Bounded
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.resize._manifold.layout import kept_units
from graphwright.passes.resize._manifold.manifold import load_manifold


class ResampleOptions(Bounded):
    """Options of resize.resample."""

    manifold: Annotated[str, Field(min_length=1, examples=["manifold.safetensors"])]
    """File that `resize.neumeta: {save: ...}` wrote; relative to the spec's folder."""

    width: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the units of every resized channel group that the resulting network has."""

    draws: Annotated[int, Field(ge=1)] = 100
    """Draws of every tensor whose mean is the result: the first without jitter."""


class Resample(Pass[ResampleOptions]):
    """Makes the network of a width from a trained manifold, without training or data.

    The program has to be the one that the manifold was trained on, behind the same passes; every
    width between the least and the largest of training is possible, in steps of one channel.

    Source: P48 (Yang et al. 2024, "Neural Metamorphosis").
    """

    contract = "lossy"
    weights = "trained"
    papers = ("P48",)
    before = ("quantize.*", "adapt.*")
    computes_in = ("float64", "float32")

    def run(self, program: Program, context: Context) -> Result:
        o = self.options
        path = Path(o.manifold)
        manifold = load_manifold(path if path.is_absolute() else context.folder / path)
        groups = channel_groups(program)
        result = manifold.at(program, groups, o.width, o.draws, context.generator("draws"))
        actions = [
            Action(g.name, f"{g.units} -> {kept_units(g, o.width)} units")
            for g in groups
            if g.name in manifold.orders
        ]
        return Result(result, tuple(actions))
