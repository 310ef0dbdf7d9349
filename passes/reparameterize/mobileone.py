"""reparameterize.mobileone: several convolutions of one kind, a 1x1 one and a norm become one."""

from __future__ import annotations

from graphwright.passes.reparameterize._branches.base import BranchPass


class Mobileone(BranchPass):
    """Folds blocks of MobileOne: any number of k x k, 1 x 1 and identity branches, summed.

    As `reparameterize.repvgg`, without its limit of one branch of every kind: a block of MobileOne
    has up to four equal convolutions, depthwise or pointwise, beside a 1 x 1 convolution (its scale
    branch) and a batch norm (its skip branch). Groups stay: depthwise branches fold to a depthwise
    convolution.

    Source: Vasu et al. 2023, "MobileOne", section 3.2.
    """

    kinds = frozenset({"kernel", "pointwise", "identity"})
    what = "k x k convolutions, 1x1 convolutions and identities"
