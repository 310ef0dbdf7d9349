"""reparameterize.acnet: a square kernel and its horizontal and vertical strips become one."""

from __future__ import annotations

from graphwright.passes.reparameterize._branches.base import BranchPass


class Acnet(BranchPass):
    """Folds blocks of ACNet: k x k, 1 x k and k x 1 convolutions of one input, summed, with norms.

    A strip is added to the row or column of the square kernel that reads the same places, which its
    padding decides: 1 x 3 with padding (0, 1) is the middle row of 3 x 3 with padding 1. At least
    one branch has unequal sides; 1 x 1 and identity branches may be there too.

    Source: Ding et al. 2019, "ACNet", section 3.3.
    """

    kinds = frozenset({"kernel", "strip", "pointwise", "identity"})
    asks = frozenset({"strip"})
    what = "a square convolution and strips"
