"""Complex numbers as pairs of real tensors, up to the operations that have no form on pairs.

ONNX has no complex type and neither do our kernels. A complex value becomes two nodes, its real
and its imaginary part. An operation without a rule, as a Fourier transform, stays: it is given
`complex(real, imaginary)`, and its result is taken apart again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor

aten = torch.ops.aten

Pair = tuple[Any, Any]
"""Real and imaginary part: nodes, or numbers; the latter None for a real value."""
Call = Callable[..., fx.Node]

ON_EACH_PART = {
    "reshape", "view", "_unsafe_view", "unsqueeze", "squeeze", "permute", "transpose", "t",
    "expand", "select", "slice", "flatten", "unflatten", "repeat", "index_select", "narrow",
    "contiguous", "clone", "alias", "detach", "neg", "roll", "flip", "movedim", "diagonal",
    "unfold", "index", "gather", "sum", "mean", "cumsum", "tile", "constant_pad_nd", "swapaxes",
    "lift_fresh_copy", "tril", "triu", "numpy_T", "mT",
}  # fmt: skip
"""Operations that do the same to the real and to the imaginary part."""

PRODUCTS = {"mul", "matmul", "mm", "bmm", "mv", "dot", "outer"}
"""Operations of two operands that are linear in both."""


class _NoRuleError(Exception):
    """A complex operation that has no form on pairs."""


def split_complex(editor: Editor) -> None:
    """Rewrites the editor's graph in place."""
    nodes = [n for n in editor.graph.nodes if _is_complex(n) or any(map(_is_complex, _operands(n)))]
    splitter = _Splitter(editor)
    for node in nodes:
        splitter.split(node)


def _is_complex(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype.is_complex


def _operands(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


class _Splitter:
    """Walks the complex nodes of a graph and keeps the parts of each."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.pairs: dict[fx.Node, Pair] = {}
        self.kept: set[fx.Node] = set()

    def split(self, node: fx.Node) -> None:
        def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return self.editor.call(op, *args, before=node, like=node, **kwargs)

        try:
            result = self._rule(call, node)
        except _NoRuleError:
            self._keep(node)
            return
        if isinstance(result, tuple):
            self.pairs[node] = result
        else:
            self.editor.replace(node, result)

    def _rule(self, call: Call, node: fx.Node) -> Pair | fx.Node:
        """Parts of a complex result, or the replacement of a real one.

        Raises:
            _NoRuleError: there is no rule for this operation on these operands.
        """
        target: Any = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            raise _NoRuleError
        name = target._schema.name.split("::")[1]
        if name in MAKERS:
            return MAKERS[name](call, node)
        if name in ("cat", "stack"):
            return self._joined(call, node)
        if name == "einsum":
            return self._einsum(call, node)
        if node.kwargs:
            raise _NoRuleError
        if name in BINARY or name in PRODUCTS:
            return self._of_two(call, node, name)
        return self._of_one(call, node, name)

    def _of_two(self, call: Call, node: fx.Node, name: str) -> Pair:
        if len(node.args) != 2:
            raise _NoRuleError
        left, right = (self._factor(argument) for argument in node.args)
        if name in BINARY:
            return BINARY[name](call, left, right)
        target: Any = node.target
        times = _times(call) if name == "mul" else lambda a, b: call(target, a, b)
        return _product(call, times, left, right)

    def _of_one(self, call: Call, node: fx.Node, name: str) -> Pair | fx.Node:
        real, imaginary = self._parts(node.args[0])
        rest = node.args[1:]
        if any(_is_complex(arg) for arg in rest):
            raise _NoRuleError
        if name == "pad":
            return _padded(call, (real, imaginary), rest)
        if name in ON_EACH_PART:
            return call(node.target, real, *rest), call(node.target, imaginary, *rest)
        if name in UNARY and not rest:
            result: Pair | fx.Node = UNARY[name](call, (real, imaginary))
            return result
        raise _NoRuleError

    def _keep(self, node: fx.Node) -> None:
        """Leaves an operation as it is, between joined operands and the parts of its result."""
        joined: dict[fx.Node, fx.Node] = {}
        for operand in _operands(node):
            if operand in self.pairs and operand not in self.kept:
                real, imaginary = self.pairs[operand]
                joined[operand] = self.editor.call(
                    aten.complex.default, real, imaginary, before=node, like=node
                )
        if joined:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: joined.get(n, n))
            self.editor.set_args(node, *args, **kwargs)
        if _is_complex(node):
            self.kept.add(node)
            behind = node.next
            if node.op in ("placeholder", "get_attr"):
                heads = ("placeholder", "get_attr")
                behind = next(n for n in self.editor.graph.nodes if n.op not in heads)
            self.pairs[node] = (
                self.editor.call(aten.real.default, node, before=behind, like=node),
                self.editor.call(aten.imag.default, node, before=behind, like=node),
            )

    def _parts(self, value: Any) -> Pair:
        if not isinstance(value, fx.Node) or value not in self.pairs:
            raise _NoRuleError
        return self.pairs[value]

    def _factor(self, value: Any) -> Pair:
        if isinstance(value, fx.Node) and value in self.pairs:
            return self.pairs[value]
        if isinstance(value, complex):
            return value.real, value.imag
        if _is_complex(value):
            raise _NoRuleError
        return value, None

    def _joined(self, call: Call, node: fx.Node) -> Pair:
        """`cat` and `stack`: the real parts, and the imaginary ones."""
        tensors: Any = node.args[0]
        both = [self._factor(tensor) for tensor in tensors]
        rest = node.args[1:]
        imaginary = [call(aten.zeros_like.default, r) if i is None else i for r, i in both]
        target: Any = node.target
        return (
            call(target, [r for r, _ in both], *rest, **node.kwargs),
            call(target, imaginary, *rest, **node.kwargs),
        )

    def _einsum(self, call: Call, node: fx.Node) -> Pair:
        equation, tensors = node.args[:2]
        factors = [self._factor(tensor) for tensor in tensors]  # type: ignore[union-attr]
        if len(factors) == 1:
            real, imaginary = factors[0]
            return (
                call(aten.einsum.default, equation, [real]),
                call(aten.einsum.default, equation, [imaginary]),
            )
        if len(factors) != 2:
            raise _NoRuleError
        return _product(call, lambda a, b: call(aten.einsum.default, equation, [a, b]), *factors)


# ---- makers of complex values


def _polar(call: Call, node: fx.Node) -> Pair:
    size, angle = node.args[:2]
    return (
        call(aten.mul.Tensor, size, call(aten.cos.default, angle)),
        call(aten.mul.Tensor, size, call(aten.sin.default, angle)),
    )


def _from_last_axis(call: Call, node: fx.Node) -> Pair:
    x = node.args[0]
    return call(aten.select.int, x, -1, 0), call(aten.select.int, x, -1, 1)


def _from_parts(call: Call, node: fx.Node) -> Pair:
    real, imaginary = node.args[:2]
    return real, imaginary


MAKERS = {"polar": _polar, "view_as_complex": _from_last_axis, "complex": _from_parts}


# ---- operations of one operand


def _magnitude(call: Call, parts: Pair) -> fx.Node:
    squares = [call(aten.mul.Tensor, part, part) for part in parts]
    return call(aten.sqrt.default, call(aten.add.Tensor, *squares))


def _exp(call: Call, parts: Pair) -> Pair:
    real, imaginary = parts
    size = call(aten.exp.default, real)
    return (
        call(aten.mul.Tensor, size, call(aten.cos.default, imaginary)),
        call(aten.mul.Tensor, size, call(aten.sin.default, imaginary)),
    )


def _angle(call: Call, parts: Pair) -> fx.Node:
    real, imaginary = parts
    return call(aten.atan2.default, imaginary, real)


def _conjugate(call: Call, parts: Pair) -> Pair:
    real, imaginary = parts
    return real, call(aten.neg.default, imaginary)


UNARY: dict[str, Callable[[Call, Pair], Any]] = {
    "view_as_real": lambda call, parts: call(aten.stack.default, list(parts), -1),
    "real": lambda call, parts: parts[0],
    "imag": lambda call, parts: parts[1],
    "abs": _magnitude,
    "angle": _angle,
    "exp": _exp,
    "log": lambda call, parts: (
        call(aten.log.default, _magnitude(call, parts)),
        _angle(call, parts),
    ),
    "reciprocal": lambda call, parts: _divide(call, (1.0, None), parts),
    "square": lambda call, parts: _product(call, _times(call), parts, parts),
    "conj": _conjugate,
    "_conj": _conjugate,
    "conj_physical": _conjugate,
    "_conj_physical": _conjugate,
    "resolve_conj": lambda call, parts: parts,
    "resolve_neg": lambda call, parts: parts,
}


def _padded(call: Call, parts: Pair, rest: tuple[Any, ...]) -> Pair:
    """`pad`: a number that fills is real."""
    constant = len(rest) < 2 or rest[1] == "constant"
    return (
        call(aten.pad.default, parts[0], *rest),
        call(aten.pad.default, parts[1], *(rest[:1] if constant else rest)),
    )


# ---- operations of two operands


def _times(call: Call) -> Callable[[Any, Any], fx.Node]:
    def times(a: Any, b: Any) -> fx.Node:
        return (
            call(aten.mul.Tensor, a, b) if isinstance(a, fx.Node) else call(aten.mul.Tensor, b, a)
        )

    return times


def _product(call: Call, times: Callable[[Any, Any], fx.Node], left: Pair, right: Pair) -> Pair:
    """The product by an operation that is linear in both operands."""
    (a, b), (c, d) = left, right
    if b is None:
        return times(a, c), times(a, d)
    if d is None:
        return times(a, c), times(b, c)
    real = call(aten.sub.Tensor, times(a, c), times(b, d))
    return real, call(aten.add.Tensor, times(a, d), times(b, c))


def _sum(op: Any) -> Callable[[Call, Pair, Pair], Pair]:
    def combine(call: Call, left: Pair, right: Pair) -> Pair:
        (a, b), (c, d) = left, right
        real = call(op, a, c)
        if b is None:
            b = call(aten.zeros_like.default, a)
        if d is None and not isinstance(c, fx.Node):
            return real, b
        # The shape of a real operand may be the wider one.
        return real, call(op, b, call(aten.zeros_like.default, c) if d is None else d)

    return combine


def _divide(call: Call, left: Pair, right: Pair) -> Pair:
    c, d = right
    if d is None:
        a, b = left
        return call(aten.div.Tensor, a, c), call(aten.div.Tensor, b, c)
    if not isinstance(c, fx.Node):
        inverse = 1 / complex(c, d)
        return _product(call, _times(call), left, (inverse.real, inverse.imag))
    size = call(aten.add.Tensor, *(call(aten.mul.Tensor, part, part) for part in right))
    numerator = _product(call, _times(call), left, _conjugate(call, right))
    return call(aten.div.Tensor, numerator[0], size), call(aten.div.Tensor, numerator[1], size)


BINARY: dict[str, Callable[[Call, Pair, Pair], Pair]] = {
    "add": _sum(aten.add.Tensor),
    "sub": _sum(aten.sub.Tensor),
    "div": _divide,
}
