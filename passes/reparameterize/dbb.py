"""reparameterize.dbb: diverse branches, sequences and poolings too, become one convolution."""

from __future__ import annotations

from graphwright.passes.reparameterize._branches.base import BranchPass


class Dbb(BranchPass):
    """Folds diverse branch blocks: every sum, or join of channels, of linear branches of one input.

    Branches are chains of convolutions, batch norms, average poolings, padding and constant
    factors. The six transformations of the paper are rules of one calculus: norm into kernel, sum
    of branches, sequence of convolutions, join of channels, average pooling as a kernel, kernels of
    several sizes.

    In a sequence the second convolution may pad only where that continues what the first one gives
    beyond its ends: with zeros where a 1 x 1 convolution without bias comes first, or with the
    image of zero under the norm, as the paper's own blocks do (they train with that border). All
    other padding in the middle stays, with the reason: the border would come out wrong.

    Source: Ding et al. 2021, "Diverse Branch Block", section 3.2.
    """

    kinds = frozenset({"kernel", "strip", "pointwise", "identity", "average", "sequence"})
    what = "linear branches"
