"""The fuser: patterns over a program's ATen graph become calls of our fused ops."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from graphwright.backends.triton.activations import (
    BiasActivation,
    GatedActivation,
    spelled_activations,
)
from graphwright.backends.triton.adapted import Adapted
from graphwright.backends.triton.experts import ExpertBlocks, ExpertsLowRankBeside
from graphwright.backends.triton.low_bit import (
    LowBitActivation,
    LowBitEmbedding,
    LowBitLinear,
    LowBitSum,
    LowRankBeside,
)
from graphwright.backends.triton.norms import (
    AddLayerNorm,
    AddRmsNorm,
    AtenRmsNorm,
    NoCast,
    SpelledRmsNorm,
)
from graphwright.backends.triton.products import Int8Linear, Int8LinearActivation, ScaleMask
from graphwright.backends.triton.sparse import Linear24
from graphwright.ir.edit import Editor
from graphwright.ir.ops import OPS
from graphwright.ir.program import Program
from graphwright.ir.rewrite import Rewrite, apply_rewrites

BY = "lower.triton"
"""Recorded on every node that the fuser makes."""


def rewrites() -> list[Rewrite]:
    """All rewrites, each building on what the ones before it made."""
    return [
        NoCast(),
        *spelled_activations(),
        SpelledRmsNorm(),
        AtenRmsNorm(),
        AddRmsNorm(),
        AddLayerNorm(),
        ExpertsLowRankBeside(),
        ExpertBlocks(),
        LowBitLinear(),
        LowBitEmbedding(),
        LowRankBeside(),
        Int8Linear(),
        Linear24(),
        Adapted(),
        GatedActivation(),
        LowBitSum(),
        LowBitActivation(),
        Int8LinearActivation(),
        BiasActivation(),
        ScaleMask(),
    ]


def fuse(program: Program) -> Program:
    """The program with everything that one of our ops covers replaced by it.

    Exact up to rounding: intermediate values stay in float32 where the graph rounds them.
    """
    editor = Editor(program, by=BY)
    apply_rewrites(editor, rewrites())
    return editor.finish()


def count_ops(graph: fx.Graph) -> dict[str, int]:
    """The number of calls of each of our ops, by name."""
    ours = {op.overload: name for name, op in OPS.items()}
    found = Counter(ours[node.target] for node in graph.nodes if node.target in ours)
    return dict(sorted(found.items()))


def largest_leftovers(graph: fx.Graph, most: int = 10) -> dict[str, int]:
    """The ops that stay torch's own, most frequent first."""
    found = Counter(
        node.target._schema.name.split("::")[1]
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
    )
    return dict(found.most_common(most))
