"""Copies of calls at a fraction of their width, with parameters of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.constants import depends_on_input
from graphwright.ir.graph.nodes import full_arguments, op_name
from graphwright.ir.layers.kinds import (
    BIAS_ARGUMENT,
    INPUT_ARGUMENT,
    KINDS,
    MATRICES,
    TABLE,
    WEIGHT_ARGUMENT,
)

aten = torch.ops.aten

KEPT_LITERALS = {
    "transpose", "permute", "unsqueeze", "squeeze", "cat", "chunk", "unbind", "getitem", "t",
    "contiguous", "clone", "to", "_to_copy", "mean", "sum", "amax", "var", "softmax", "_softmax",
    "log_softmax", "matmul", "bmm", "sym_size", "detach", "alias", "dropout", "type_as",
    "repeat_interleave",
}  # fmt: skip
"""Operators whose numbers are dimensions, or no sizes at all."""

SIZES = {"reshape", "view", "expand", "unflatten", "_unsafe_view"}
"""Operators with a list of sizes, the last of which is the width."""

ELSEWHERE = "Name another chain of blocks in `blocks`, or use adapt.lora."

Call = Callable[..., fx.Node]
Store = Callable[[str, Tensor], fx.Node]


class Narrow:
    """Copies a block's calls at 1 / `factor` of their width.

    Every activation keeps its dimensions and the number of heads; features become fewer by the
    factor. Matrices are drawn anew, norms start at one and zero, and what a block is given from
    outside, as the rotation of rotary positions, is read at every `factor`-th feature, which are
    the frequencies of the narrow heads.

    Args:
        factor: by which features become fewer.
        call: adds a call to the graph.
        store: stores a parameter under a name, and gives the node that reads it.
        generator: of the matrices.
    """

    def __init__(self, factor: int, call: Call, store: Store, generator: torch.Generator) -> None:
        self.factor, self.call, self.store, self.generator = factor, call, store, generator
        self.known: dict[fx.Node, fx.Node] = {}

    def copy(
        self, nodes: Sequence[fx.Node], source: fx.Node, narrow: fx.Node, result: fx.Node,
        name: Callable[[str], str], editor_state: Any,
    ) -> fx.Node:  # fmt: skip
        """Copies the calls from `source` to `result`, reading `narrow` in the place of `source`.

        Args:
            nodes: in graph order.
            source: value that is replaced.
            narrow: its narrow stand-in.
            result: one of the nodes.
            name: of a new parameter, by that of the old.
            editor_state: stored tensors by name.

        Raises:
            ModelError: a size is no multiple of the factor, or a call has no narrow form.
        """
        self.known = {source: narrow}
        self.name, self.state = name, editor_state
        for node in nodes:
            if set(node.all_input_nodes) & set(self.known):
                self.known[node] = self._copied(node)
        return self.known[result]

    # ---- one call

    def _copied(self, node: fx.Node) -> fx.Node:
        kind = KINDS.get(node.target, "")
        args, _ = full_arguments(node)
        if kind in MATRICES and not depends_on_input(args[WEIGHT_ARGUMENT[kind]]):
            return self._product(node, kind, args)
        if kind in ("layer_norm", "rms_norm"):
            return self._norm(node, kind, args)
        name = op_name(node)
        if name == "scaled_dot_product_attention":
            return self._attention(node)
        if name in SIZES:
            return self._resized(node)
        if name in ("split", "split_with_sizes"):
            return self._split(node)
        if name == "slice":
            return self._sliced(node)
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self._pointwise(node)
        if name in KEPT_LITERALS:
            return self._call(node, *self._mapped(node.args), **self._mapped(dict(node.kwargs)))
        raise ModelError(
            f"a side network has no narrow form of {node.target} ({node.name!r})", fix=ELSEWHERE
        )

    def _product(self, node: fx.Node, kind: str, args: list[Any]) -> fx.Node:
        facts = TABLE[kind]
        weight = args[facts.weight]
        old = self._reads(args[INPUT_ARGUMENT[kind]])
        assert facts.in_axis is not None
        shape = list(weight.meta["val"].shape)
        shape[facts.out_axis] = self._part(shape[facts.out_axis], node)
        shape[facts.in_axis] = int(old.meta["val"].shape[-1])
        bound = 1 / math.sqrt(shape[facts.in_axis])
        values = torch.empty(shape).uniform_(-bound, bound, generator=self.generator)
        new = list(args)
        new[facts.input] = old
        new[facts.weight] = self._parameter(weight, values)
        bias = None if kind not in BIAS_ARGUMENT else args[BIAS_ARGUMENT[kind]]
        if isinstance(bias, fx.Node):
            new[BIAS_ARGUMENT[kind]] = self._parameter(bias, torch.zeros(shape[facts.out_axis]))
        return self._call(node, *new[: len(node.args)])

    def _norm(self, node: fx.Node, kind: str, args: list[Any]) -> fx.Node:
        new = list(self._mapped(node.args))
        if len(args[1]) != 1:
            raise ModelError(f"{node.name!r} normalizes over {len(args[1])} dimensions, and a side "
                             "network narrows one")  # fmt: skip
        size = self._part(args[1][0], node)
        new[1] = [size]
        for place, start in ((2, torch.ones(size)), (3, torch.zeros(size))):
            if kind == "rms_norm" and place == 3:
                break
            if place < len(args) and isinstance(args[place], fx.Node):
                new[place] = self._parameter(args[place], start)
        return self._call(node, *new)

    def _attention(self, node: fx.Node) -> fx.Node:
        kwargs = dict(self._mapped(dict(node.kwargs)))
        if kwargs.get("scale") is not None:
            # 1 / sqrt(width of a head), of the narrow one
            kwargs["scale"] *= math.sqrt(self.factor)
        kwargs.pop("dropout_p", None)
        args = list(self._mapped(node.args))
        if len(args) > 4:
            args[4] = 0.0
        return self._call(node, *args, **kwargs)

    def _resized(self, node: fx.Node) -> fx.Node:
        args = list(self._mapped(node.args))
        place = 2 if op_name(node) == "unflatten" else 1
        sizes = list(args[place])
        width = self._narrowed(node.args[0]).get(1)
        if width is not None:
            if not isinstance(sizes[-1], int):
                raise ModelError(f"the last size of {node.name!r} is computed, and a side network "
                                 "cannot narrow it")  # fmt: skip
            if sizes[-1] > 1:
                sizes[-1] = self._part(sizes[-1], node)
        args[place] = sizes
        return self._call(node, *args, **self._mapped(dict(node.kwargs)))

    def _split(self, node: fx.Node) -> fx.Node:
        x, sizes, *rest = full_arguments(node)[0]
        if self._is_narrowed(x, rest[0]):
            sizes = ([self._part(size, node) for size in sizes] if isinstance(sizes, list | tuple)
                     else self._part(sizes, node))  # fmt: skip
        return self._call(node, self._reads(x), sizes, *rest)

    def _sliced(self, node: fx.Node) -> fx.Node:
        x, dim, start, end, *rest = full_arguments(node)[0]
        if self._is_narrowed(x, dim):
            start = self._bound(start, node)
            end = self._bound(end, node)
            if rest and rest[0] != 1:
                raise ModelError(f"{node.name!r} takes every {rest[0]}-th feature, and a side "
                                 "network cannot narrow that")  # fmt: skip
        call = (self._reads(x), dim, self._mapped(start), self._mapped(end), *rest)
        return self._call(node, *call)

    def _pointwise(self, node: fx.Node) -> fx.Node:
        narrowed: dict[int, int] = {}
        for operand in node.all_input_nodes:
            narrowed |= self._narrowed(operand)
        name = op_name(node)
        new: dict[fx.Node, fx.Node] = {}
        for operand in node.all_input_nodes:
            if operand in self.known:
                new[operand] = self.known[operand]
            elif self._is_parameter(operand) and narrowed:
                new[operand] = self._own(operand, name, node)
            else:
                new[operand] = self._strided(operand, narrowed, node)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: new[n])
        return self._call(node, *args, **kwargs)

    # ---- operands

    def _own(self, operand: fx.Node, name: str, node: fx.Node) -> fx.Node:
        shape = [int(size) for size in operand.meta["val"].shape]
        starts = {"mul": 1.0, "add": 0.0, "sub": 0.0}
        if name not in starts or not shape:
            raise ModelError(f"a side network has no narrow form of the parameter "
                             f"{operand.target!r} in {node.name!r}")  # fmt: skip
        shape[-1] = self._part(shape[-1], node)
        return self._parameter(operand, torch.full(shape, starts[name]))

    def _strided(self, operand: fx.Node, narrowed: dict[int, int], node: fx.Node) -> fx.Node:
        """A value from outside at every `factor`-th feature, where the others are narrow."""
        value = operand.meta.get("val")
        if not isinstance(value, Tensor):
            return operand
        for place, width in narrowed.items():
            size = value.shape[-place] if place <= value.dim() else 1
            if isinstance(size, int) and size == width and size > 1:
                end = torch.iinfo(torch.int64).max
                operand = self.call(
                    aten.slice.Tensor, operand, value.dim() - place, 0, end, self.factor
                )
        return operand

    def _narrowed(self, operand: Any) -> dict[int, int]:
        """Old sizes of the narrowed dimensions of a copied value, by place from the end."""
        if operand not in self.known:
            return {}
        old, new = operand.meta["val"], self.known[operand].meta["val"]
        if not isinstance(old, Tensor):
            return {}
        return {place: before
                for place, (before, after) in enumerate(
                    zip(reversed(old.shape), reversed(new.shape), strict=True), 1)
                if isinstance(before, int) and isinstance(after, int) and before != after
                }  # fmt: skip

    def _is_narrowed(self, operand: fx.Node, dim: int) -> bool:
        rank = operand.meta["val"].dim()
        return rank - dim % rank in self._narrowed(operand)

    def _is_parameter(self, operand: fx.Node) -> bool:
        return operand.op == "get_attr" and isinstance(
            self.state.get(str(operand.target)), nn.Parameter
        )

    def _reads(self, operand: Any) -> Any:
        return self.known.get(operand, operand)

    def _mapped(self, value: Any) -> Any:
        return fx.map_arg(value, self._reads)

    def _part(self, size: int, node: fx.Node) -> int:
        if not isinstance(size, int) or size % self.factor:
            raise ModelError(
                f"{size} features at {node.name!r} are no multiple of the reduction {self.factor}",
                fix="Choose a `reduction` that divides the width of the model, of a head, and half "
                "of a head where positions are rotary.",
            )
        return size // self.factor

    def _bound(self, bound: Any, node: fx.Node) -> Any:
        is_end = bound is None or (isinstance(bound, int) and bound >= torch.iinfo(torch.int64).max)
        return bound if is_end else self._part(bound, node)

    def _parameter(self, old: fx.Node, values: Tensor) -> fx.Node:
        from graphwright.ir.graph.constants import weight_source

        source = weight_source(old)
        assert source is not None
        return self.store(self.name(str(source.target)), values)

    def _call(self, node: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        try:
            return self.call(node.target, *args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(
                f"a side network cannot narrow {node.target} ({node.name!r})",
                details=(str(error).splitlines()[0],),
                fix=ELSEWHERE,
            ) from error
