"""insert.selective_ssm: the dual selective state-space projector in front of a classifier."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graft import graft
from graphwright.ir.graph.nodes import gw_meta, op_name, set_gw_meta
from graphwright.ir.modules.selective_ssm import ProjectorBranch
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result
from graphwright.passes.insert._form.places import (
    InsertOptions,
    apply_freeze,
    behind,
    in_editor,
    replace_but,
    seeded,
)

aten = torch.ops.aten
MARK = "selective_ssm"
"""Entry on the node whose value is the projector's result."""


class SelectiveSsmOptions(InsertOptions):
    """Options of insert.selective_ssm."""

    branch: Literal["base", "new"] = "base"
    """`base`: the first branch, with the linear projection beside it, trained on the base classes.
    `new`: the second one, which learns what new classes add; it follows an earlier `base`."""

    block: Literal["ss2d", "mamba"] = "ss2d"
    """What scans the map: four scans with weights of their own, or one block for all four ways."""

    states: Annotated[int, Field(ge=1, le=4096)] = 256
    """State values of every channel."""

    rank: Annotated[int, Field(ge=1)] | None = None
    """Width that the time steps are computed from; `states` when absent."""


class SelectiveSsm(Pass[SelectiveSsmOptions]):
    """Adds features that a selective state-space model finds in the last map to its average.

    A classifier averages its last feature map and reads the result with one linear layer. Here
    that layer reads x + W g (+ x_new): g is the average, W a linear projection, and x and x_new
    come from two branches, each of which scans the map in four directions with parameters that
    depend on the map. The new branch sends no gradient into the network below.

    The network is the same until it is trained: W starts as the identity, and the gates of both
    branches at zero (the paper starts the new one so; its W starts at random, for its head is new
    too). The map's height and width have to be fixed sizes.

    Source: P84, sections 3.3 and 3.4.
    """

    papers = ("P84",)
    contract: ClassVar[Contract] = "identity_at_init"
    weights: ClassVar[Effect | None] = "kept"

    def run(self, program: Program, context: Context) -> Result:
        """Inserts one branch.

        Raises:
            ModelError: the network has no single global average of a map of fixed size, or the
                branch `new` has no `base`.
        """
        options = self.options
        pool = _global_pool(program)
        editor = Editor(program, by=self.id)
        pooled = in_editor(editor, pool)
        feature = pooled.args[0]
        assert isinstance(feature, fx.Node)
        height, width = _fixed_map(pooled, feature)
        channels = int(feature.meta["val"].shape[1])
        branch = seeded(
            ProjectorBranch, context.generator(options.branch), channels, height, width, channels,
            options.states, options.rank, options.block,
        ).to(feature.meta["val"].dtype)  # fmt: skip
        base = next((n for n in editor.graph.nodes if gw_meta(n).get(MARK)), None)
        if (base is None) == (options.branch == "new"):
            what = "has a projector already" if base else "has no projector to add a branch to"
            raise ModelError(
                f"insert.selective_ssm: the network {what}",
                fix="Insert `branch: base` once, then `branch: new`.",
            )
        before = behind(base or pooled)
        if base is not None:
            feature = editor.call(aten.detach.default, feature, before=before)
        (found,) = graft(editor, branch, feature, name=f"projector.{options.branch}", before=before)
        if found.meta["val"].dim() < (base or pooled).meta["val"].dim():
            found = editor.call(aten.unsqueeze.default, found, -1, before=before)
            found = editor.call(aten.unsqueeze.default, found, -1, before=before)
        old = base or pooled
        kept = old if base else _projected(editor, pooled, channels, before)
        new = editor.call(aten.add.Tensor, kept, found, before=before)
        set_gw_meta(new, **{MARK: True})
        set_gw_meta(old, **{MARK: None})
        replace_but(editor, old, new)
        apply_freeze(editor, options.freeze)
        result = editor.finish()
        size = sum(p.numel() for p in branch.parameters())
        what = f"{channels} x {height} x {width} scanned, {size:,} parameters"
        return Result(
            result, (Action(f"projector.{options.branch}", what),), {"inserted_parameters": size}
        )


class _Identity(nn.Module):
    """A linear projection of the channels that starts as the identity."""

    def __init__(self, channels: int, is_map: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, channels, bias=False)
        nn.init.eye_(self.proj.weight)
        self.is_map = is_map

    def forward(self, pooled: Tensor) -> Tensor:
        found: Tensor = self.proj(pooled.flatten(1))
        return found.unsqueeze(-1).unsqueeze(-1) if self.is_map else found


def _projected(editor: Editor, pooled: fx.Node, channels: int, before: fx.Node) -> fx.Node:
    value = pooled.meta["val"]
    module = _Identity(channels, value.dim() == 4).to(value.dtype)
    (result,) = graft(editor, module, pooled, name="projector.residual", before=before)
    return result


def _global_pool(program: Program) -> fx.Node:
    """The one global average of a map."""
    found: list[fx.Node] = [node for node in program.graph.nodes if _is_global_pool(node)]
    if len(found) != 1:
        where = tuple(str(gw_meta(node).get("source") or node.name) for node in found[:4])
        raise ModelError(
            f"insert.selective_ssm: {len(found)} global averages of a feature map, and the "
            "projector goes to the only one",
            fix="It takes classifiers that end in one average over height and width.",
            details=where,
        )
    return found[0]


def _is_global_pool(node: fx.Node) -> bool:
    source: Any = node.args[0] if node.args else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
        return False
    if op_name(node) == "adaptive_avg_pool2d":
        size: Any = node.args[1]
        return list(size) in ([1, 1], [1])
    if node.target is aten.mean.dim:
        axes: Any = node.args[1]
        return sorted(axis % 4 for axis in axes) == [2, 3]
    return False


def _fixed_map(pooled: fx.Node, feature: fx.Node) -> tuple[int, int]:
    height, width = feature.meta["val"].shape[2:]
    if not (isinstance(height, int) and isinstance(width, int)):
        raise ModelError(
            "insert.selective_ssm: the map in front of the average has a free height or width, "
            "and the projector has a parameter for every place of it",
            where=str(gw_meta(pooled).get("source") or pooled.name),
            fix="Trace the model with a fixed image size; the batch may stay free.",
        )
    return height, width
