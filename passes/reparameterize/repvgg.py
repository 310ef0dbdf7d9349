"""reparameterize.repvgg: a convolution, a 1x1 one and an identity become one convolution."""

from __future__ import annotations

from graphwright.ir.folding import Region
from graphwright.passes.reparameterize._branches.base import BranchPass


class Repvgg(BranchPass):
    """Folds blocks of RepVGG: k x k and 1 x 1 convolutions and an identity, summed, each with norm.

    Found on the graph, whatever the modules are called: a sum whose operands all come from one
    tensor, at most one through a k x k convolution, at most one through a 1 x 1 convolution, at
    most one through none; batch norms, constant factors and zero padding may stand in any of them.
    The 1 x 1 kernel is padded, the identity is a Dirac kernel, a batch norm multiplies a kernel's
    outputs by gamma / sqrt(var + eps). Arithmetic is in float64.

    Norms in training mode, strides or results that do not agree, and stretches that something else
    reads too stay, with the reason.

    Source: Ding et al. 2021, "RepVGG", section 3.3.
    """

    kinds = frozenset({"kernel", "pointwise", "identity"})
    what = "a convolution, a 1x1 convolution and an identity"

    def is_wanted(self, region: Region) -> bool:
        found = [branch.kind for branch in region.branches]
        return super().is_wanted(region) and len(set(found)) == len(found)
