"""compensate.svd: the low-rank correction that is best for the weights themselves."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from graphwright.ir.calibration.experts import is_stack, part_names
from graphwright.ir.layers.factors import Factors, relative_error, split
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.products import as_matrix, geometry, weight_value
from graphwright.ir.layers.selectors import select
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.work import Load, Work
from graphwright.passes.base import Context, Pass, Result
from graphwright.passes.compensate._math import low_rank


class SvdOptions(Bounded):
    """Options of compensate.svd."""

    rank: Annotated[int, Field(ge=1)] = 128
    """Rank of every correction; a layer with fewer rows or columns gets as many as it has."""

    targets: Selector = ("*",)
    """Layers to compensate: selector patterns over names and kinds. Those that no earlier pass has
    changed are left alone."""


class Svd(Pass[SvdOptions]):
    """Gives every compressed layer the truncated SVD of what its weight lost.

    Needs no data, and knows nothing of what the layer is used on: the baseline that
    `compensate.eora` is measured against, and the same thing where inputs are isotropic.

    Source: Eckart and Young 1936; as a baseline in Liu et al. 2024, "EoRA".
    """

    contract = "lossy"
    behind = low_rank.COMPRESSING
    after = ("cleanup.*", "cast.*", "prune.*", "quantize.*")

    def cost(self, load: Load) -> Work:
        layers = load.targeted(self.options.targets)
        return super().cost(load) + load.decompositions(layers)

    def run(self, program: Program, context: Context) -> Result:
        chosen = select(program, self.options.targets, PRODUCTS)
        originals, actions = low_rank.differences(program, context.before_compression, chosen)
        found: dict[str, Factors] = {}
        before, after = [], []
        changed = low_rank.changed(chosen, originals)
        for layer in low_rank.first_uses(changed):
            shape = geometry(program, layer)
            names = part_names(layer, shape.groups)
            original = torch.stack([originals[name] for name in names]).float()
            delta = original - as_matrix(shape, weight_value(program, layer)).float()
            parts = [split(each, None, None, self.options.rank) for each in delta]
            factors = Factors(
                torch.stack([part.b for part in parts]), torch.stack([part.a for part in parts])
            )
            left = delta - factors.b @ factors.a
            single = Factors(factors.b[0], factors.a[0])
            found[layer.name] = factors if is_stack(layer) else single
            before.append(relative_error(delta, original, None))
            after.append(relative_error(left, original, None))
            actions.append(low_rank.action(layer.name, factors.b.shape[2], before[-1], after[-1]))
        result = low_rank.insert(program, self.id, changed, found)
        return Result(result, tuple(actions), low_rank.metrics(before, after))
