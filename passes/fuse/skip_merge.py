"""fuse.skip_merge: a skip past convolutions and ReLUs is carried along inside of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.graph.skips import Skip, find_skips, operands
from graphwright.ir.layers.kinds import CONVOLUTIONS, KINDS
from graphwright.ir.layers.selectors import Layer, layers, select
from graphwright.ir.options import Options, Selector
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result

KEEPS_SIGN = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
              "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "cat", "add",
              "mul", "reshape", "view", "flatten", "permute", "slice", "dropout")  # fmt: skip
NEVER_NEGATIVE = ("relu", "relu6", "sigmoid", "softmax")


class NotMergeableError(Exception):
    """A skip that stays, with the reason."""


class SkipMergeOptions(Options):
    """Options of fuse.skip_merge."""

    targets: Selector = ("*",)
    """Skips by the last layer that they go past: selector patterns over names and kinds."""


@dataclass(frozen=True)
class _Block:
    """fork -> conv -> relu -> ... -> conv -> sum, and a skip from the fork into the sum."""

    skip: Skip
    convolutions: tuple[fx.Node, ...]
    projection: fx.Node | None


class SkipMerge(Pass[SkipMergeOptions]):
    """Makes plain chains of residual blocks: x + conv(relu(conv(x))) without the sum.

    The first convolution gets a channel more for every one of x, which hands it on (a Dirac
    kernel); ReLUs leave it as it is, because x is not negative; the last convolution adds it to its
    result, through the weight of the skip's own 1x1 convolution where it has one. The block
    computes the same, as one chain of wider layers: more multiplications, but no tensor that has to
    be kept beside it, and layers that pruning may cut freely. It pays together with pruning, or
    where memory counts.

    Convolutions inside have to be whole (one group), activations ReLU, and x known to be
    not negative; what does not fit stays, with the reason. Batch norms are to be folded first
    (`cleanup.fold_batch_norm`).

    Source: Meng et al. 2021, "RMNet: Equivalently Removing Residual Connection from Networks",
    section 3 (reserving and merging).
    """

    contract = "exact"
    stores_weights = True
    weights = "reformed"
    before = ("quantize.*", "prune.*", "adapt.*")

    def run(self, program: Program, context: Context) -> Result:
        chosen = {layer.node.name for layer in select(program, self.options.targets)}
        editor = Editor(program, by=self.id)
        now = program.replace(graph=editor.graph)
        by_node = {layer.node: layer for layer in layers(now)}
        actions = []
        for skip in find_skips(now):
            last = skip.body[-1]
            if last.name not in chosen:
                continue
            name = f"skip past {by_node[last].name}"
            try:
                block = _block(skip, by_node)
                wider = _widen(editor, block, by_node)
                actions.append(Action(name, f"{wider} channels are carried along"))
            except NotMergeableError as reason:
                actions.append(Action.left(name, str(reason), "kept"))
        if not actions:
            actions = [Action.left("graph", "no skip")]
        merged = sum(action.changed for action in actions)
        return Result(editor.finish(), tuple(actions), {"skips_merged": float(merged)})


def _block(skip: Skip, by_node: dict[fx.Node, Layer]) -> _Block:
    """Raises NotMergeableError."""
    if skip.kind == "cat":
        raise NotMergeableError("it is joined to the body's result, not added")
    if skip.join.kwargs.get("alpha", 1) != 1:
        raise NotMergeableError("the sum has a factor")
    (end,) = (n for n in operands(skip.join) if n is not skip.source)
    chain = _chain(end, skip.fork)
    if len(chain) == 1:
        raise NotMergeableError("it goes past one convolution: fuse.skip folds it")
    for convolution in chain:
        layer = by_node.get(convolution)
        if layer is None or not layer.weight:
            raise NotMergeableError("a layer's weight is computed in the graph")
        if _groups(convolution) != 1:
            raise NotMergeableError(f"{layer.name} has groups")
        if _centre(convolution) is None:
            raise NotMergeableError(f"no tap of {layer.name} is at the place that it computes")
    if not _is_never_negative(skip.fork):
        raise NotMergeableError("what it carries may be negative, and a ReLU would cut that off")
    return _Block(skip, chain, _projection(skip, chain, by_node))


def _chain(end: fx.Node, fork: fx.Node) -> tuple[fx.Node, ...]:
    """Convolutions from the fork to the body's end, with nothing but ReLUs between."""
    found: list[fx.Node] = []
    node = end
    while node is not fork:
        if len(node.users) != 1:
            raise NotMergeableError(f"{node.name} has other readers")
        is_convolution = KINDS.get(node.target) in CONVOLUTIONS
        if not is_convolution and op_name(node) != "relu":
            raise NotMergeableError(f"{op_name(node)} is in its way")
        if not is_convolution and not found:
            raise NotMergeableError("the body ends with an activation")
        if is_convolution:
            found.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return tuple(reversed(found))


def _projection(
    skip: Skip, chain: tuple[fx.Node, ...], by_node: dict[fx.Node, Layer]
) -> fx.Node | None:
    """The skip's own 1x1 convolution, which has to be all that is on it."""
    if skip.source is skip.fork:
        strides = {s for node in chain for s in _sizes(node, 3, 1)}
        if strides != {1}:
            raise NotMergeableError("the body has a stride that the skip has not")
        return None
    (node,) = skip.projection or (None,)
    if node is not skip.source or node is None or node.args[0] is not skip.fork:
        raise NotMergeableError("something besides a 1x1 convolution is on it")
    kernel = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    if KINDS[node.target] not in CONVOLUTIONS or set(kernel) != {1} or _groups(node) != 1:
        raise NotMergeableError("its projection is no whole 1x1 convolution")
    total = tuple(math.prod(s) for s in zip(*(_sizes(n, 3, 1) for n in chain), strict=True))
    if any(_sizes(node, 4, 0)) or _sizes(node, 3, 1) != total:
        raise NotMergeableError("its projection has another stride than the body, or padding")
    bias = node.args[2] if len(node.args) > 2 else None
    if not by_node[node].weight or (isinstance(bias, fx.Node) and bias.op != "get_attr"):
        raise NotMergeableError("its projection's weights are computed in the graph")
    return node


def _groups(node: fx.Node) -> int:
    return int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]


def _sizes(node: fx.Node, place: int, default: int) -> tuple[int, ...]:
    """A convolution's strides (place 3), paddings (4) or dilations (5), one for every axis."""
    axes = len(node.args[1].meta["val"].shape) - 2  # type: ignore[union-attr]
    given = node.args[place] if len(node.args) > place else default
    if isinstance(given, str):
        raise NotMergeableError(f"{node.name} has padding {given!r}")
    sizes = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    return tuple(int(s) for s in (sizes * axes if len(sizes) == 1 else sizes))


def _centre(node: fx.Node) -> tuple[int, ...] | None:
    """The tap that reads the place where the result stands; None where there is none."""
    kernel = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    taps = []
    for side, padding, dilation in zip(kernel, _sizes(node, 4, 0), _sizes(node, 5, 1), strict=True):
        if padding % dilation or padding // dilation >= side:
            return None
        taps.append(padding // dilation)
    return tuple(taps)


def _is_never_negative(node: fx.Node) -> bool:
    name = op_name(node) if node.op == "call_function" else ""
    if name in NEVER_NEGATIVE:
        return True
    if name == "mul" and len(operands(node)) == 2 and operands(node)[0] is operands(node)[1]:
        return True
    if name not in KEEPS_SIGN:
        return False
    parts = node.all_input_nodes
    numbers: list[float] = []
    if name in ("add", "mul"):
        given = (*node.args, *node.kwargs.values())
        numbers = [a for a in given if isinstance(a, (int, float))]
    return bool(parts) and all(map(_is_never_negative, parts)) and all(n >= 0 for n in numbers)


def _widen(editor: Editor, block: _Block, by_node: dict[fx.Node, Layer]) -> int:
    """Carries the skip along; returns the number of channels that were added."""
    first, last = block.convolutions[0], block.convolutions[-1]
    names = [by_node[node].weight for node in block.convolutions]
    if len(set(names)) < len(names) or any(len(editor.uses(name)) > 1 for name in names):
        raise NotMergeableError("a weight of the body is used twice")
    for bias in filter(None, map(_bias, block.convolutions)):
        if len(bias.users) > 1 or editor.tensor(bias) is None:
            raise NotMergeableError("a bias of the body is used twice or computed in the graph")
    extra = int(editor.state[names[0]].shape[1])
    for node, name in zip(block.convolutions, names, strict=True):
        weight = editor.state[name]
        carried = torch.eye(extra, dtype=weight.dtype, device=weight.device)
        if node is last and block.projection is not None:
            carried = _stored(editor, block.projection.args[1]).flatten(1)
        kernel = _at_centre(carried, node, weight)
        if node is first:
            wide = torch.cat([weight.detach(), kernel])
        elif node is last:
            wide = torch.cat([weight.detach(), kernel], 1)
        else:
            wide = _on_diagonal(weight.detach(), kernel)
        editor.set_state(name, nn.Parameter(wide, weight.requires_grad))
        if node is not last and (own_bias := _bias(node)) is not None:
            own = editor.state[str(own_bias.target)]
            longer = torch.cat([own.detach(), own.new_zeros(extra)])
            editor.set_state(str(own_bias.target), nn.Parameter(longer, own.requires_grad))
    if block.projection is not None:
        _add_bias(editor, last, block.projection, by_node[last].name)
    (end,) = (n for n in operands(block.skip.join) if n is not block.skip.source)
    editor.replace(block.skip.join, end)
    return extra


def _bias(node: fx.Node) -> fx.Node | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return bias if isinstance(bias, fx.Node) else None


def _stored(editor: Editor, node: object) -> Tensor:
    found = editor.tensor(node)
    assert found is not None  # `_projection` looked at it
    return found.detach()


def _at_centre(matrix: Tensor, node: fx.Node, weight: Tensor) -> Tensor:
    """A kernel like the layer's that is `matrix` at its centre and zero elsewhere."""
    kernel = weight.new_zeros(*matrix.shape, *weight.shape[2:])
    centre = _centre(node)
    assert centre is not None  # `_block` looked at it
    index: tuple[slice | int, ...] = (slice(None), slice(None), *centre)
    kernel[index] = matrix
    return kernel


def _on_diagonal(upper: Tensor, lower: Tensor) -> Tensor:
    """Both weights in one, zeros beside them."""
    out, into = upper.shape[:2]
    wide = upper.new_zeros(out + lower.shape[0], into + lower.shape[1], *upper.shape[2:])
    wide[:out, :into], wide[out:, into:] = upper, lower
    return wide


def _add_bias(editor: Editor, node: fx.Node, projection: fx.Node, layer: str) -> None:
    """Lets a layer add the bias that the skip's projection added."""
    more = _bias(projection)
    if more is None:
        return
    value, bias = _stored(editor, more), _bias(node)
    if bias is not None:
        own = editor.state[str(bias.target)]
        editor.set_state(str(bias.target), nn.Parameter(own.detach() + value, own.requires_grad))
        return
    name = editor.add_state(f"{layer}.bias", nn.Parameter(value.clone()))
    editor.set_args(node, *node.args[:2], editor.get(name), *node.args[3:], **node.kwargs)
