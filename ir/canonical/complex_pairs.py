"""Complex numbers as pairs of real tensors, for the rotary embeddings that are written with them.

ONNX has no complex type and neither do our kernels. A complex value becomes two nodes, its real
and its imaginary part; a graph with a complex operation that no rule covers is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor

aten = torch.ops.aten

Pair = tuple[fx.Node, fx.Node]

ON_EACH_PART = {
    "reshape", "view", "_unsafe_view", "unsqueeze", "squeeze", "permute", "transpose", "t",
    "expand", "select", "slice", "flatten", "unflatten", "repeat", "index_select", "narrow",
    "contiguous", "clone", "alias", "detach", "neg",
}  # fmt: skip
"""Operations that do the same to the real and to the imaginary part."""


class _NoRuleError(Exception):
    """A complex operation that has no form on pairs."""


def split_complex(editor: Editor) -> None:
    """Rewrites the editor's graph in place."""
    nodes = [n for n in editor.graph.nodes if _is_complex(n) or any(map(_is_complex, _operands(n)))]
    if not nodes:
        return
    before = set(editor.graph.nodes)
    pairs: dict[fx.Node, Pair] = {}
    replaced: list[tuple[fx.Node, fx.Node]] = []
    try:
        for node in nodes:
            result = _rule(editor, node, pairs)
            if isinstance(result, tuple):
                pairs[node] = result
            else:
                replaced.append((node, result))
    except _NoRuleError:
        for node in reversed([n for n in editor.graph.nodes if n not in before]):
            editor.erase(node)
        return
    for old, new in replaced:
        editor.replace(old, new)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_complex


def _operands(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


def _rule(editor: Editor, node: fx.Node, pairs: dict[fx.Node, Pair]) -> Pair | fx.Node:
    """Parts of a complex result, or the replacement of a real one."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        raise _NoRuleError
    name = target._schema.name.split("::")[1]

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return editor.call(op, *args, before=node, like=node, **kwargs)

    if name in MAKERS:
        return MAKERS[name](call, node)
    if name in READERS:
        return READERS[name](call, _parts(node.args[0], pairs))
    if name in PRODUCTS and not node.kwargs:
        left, right = (_factor(argument, pairs) for argument in node.args[:2])
        return PRODUCTS[name](call, left, right)
    if name in ON_EACH_PART:
        real, imaginary = _parts(node.args[0], pairs)
        rest = node.args[1:]
        return (
            call(target, real, *rest, **node.kwargs),
            call(target, imaginary, *rest, **node.kwargs),
        )
    if name == "cat":
        both = [_parts(part, pairs) for part in node.args[0]]  # type: ignore[union-attr]
        rest = node.args[1:]
        return call(target, [p[0] for p in both], *rest), call(target, [p[1] for p in both], *rest)
    if name in ("conj", "_conj", "resolve_conj"):
        real, imaginary = _parts(node.args[0], pairs)
        return (
            (real, imaginary)
            if name == "resolve_conj"
            else (real, call(aten.neg.default, imaginary))
        )
    raise _NoRuleError


def _parts(value: Any, pairs: dict[fx.Node, Pair]) -> Pair:
    if not isinstance(value, fx.Node) or value not in pairs:
        raise _NoRuleError
    return pairs[value]


Factor = tuple[Any, Any]
"""Real and imaginary part of a factor; the latter None for a real one."""


def _factor(value: Any, pairs: dict[fx.Node, Pair]) -> Factor:
    if isinstance(value, fx.Node) and value in pairs:
        return pairs[value]
    if isinstance(value, complex) or (isinstance(value, fx.Node) and _is_complex(value)):
        raise _NoRuleError
    return value, None


Call = Callable[..., fx.Node]


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
    assert isinstance(real, fx.Node)
    assert isinstance(imaginary, fx.Node)
    return real, imaginary


def _to_last_axis(call: Call, parts: Pair) -> fx.Node:
    return call(aten.stack.default, list(parts), -1)


def _magnitude(call: Call, parts: Pair) -> fx.Node:
    squares = [call(aten.mul.Tensor, part, part) for part in parts]
    return call(aten.sqrt.default, call(aten.add.Tensor, *squares))


def _multiply(call: Call, left: Factor, right: Factor) -> Pair:
    (a, b), (c, d) = left, right
    if b is None:
        return call(aten.mul.Tensor, c, a), call(aten.mul.Tensor, d, a)
    if d is None:
        return call(aten.mul.Tensor, a, c), call(aten.mul.Tensor, b, c)
    real = call(aten.sub.Tensor, call(aten.mul.Tensor, a, c), call(aten.mul.Tensor, b, d))
    imaginary = call(aten.add.Tensor, call(aten.mul.Tensor, a, d), call(aten.mul.Tensor, b, c))
    return real, imaginary


def _sum(op: Any) -> Callable[[Call, Factor, Factor], Pair]:
    def combine(call: Call, left: Factor, right: Factor) -> Pair:
        (a, b), (c, d) = left, right
        if b is None or d is None:
            # The other's shape may be the wider one; adding a real number keeps the rest.
            raise _NoRuleError
        return call(op, a, c), call(op, b, d)

    return combine


MAKERS = {"polar": _polar, "view_as_complex": _from_last_axis, "complex": _from_parts}
READERS: dict[str, Callable[[Call, Pair], fx.Node]] = {
    "view_as_real": _to_last_axis,
    "real": lambda call, parts: parts[0],
    "imag": lambda call, parts: parts[1],
    "abs": _magnitude,
}
PRODUCTS: dict[str, Callable[[Call, Factor, Factor], Pair]] = {
    "mul": _multiply,
    "add": _sum(aten.add.Tensor),
    "sub": _sum(aten.sub.Tensor),
}
