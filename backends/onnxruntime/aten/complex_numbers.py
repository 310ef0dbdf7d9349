"""Complex values as pairs of ONNX values, where an operation between real ones needs them."""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnxruntime.aten.registry import translates
from graphwright.backends.onnxruntime.emitter import Emitter, Untranslatable, sizes_of

aten = torch.ops.aten


class Pair(NamedTuple):
    """The ONNX value of a complex node."""

    real: ir.Value
    imaginary: ir.Value


def pair_of(e: Emitter, node: fx.Node) -> Pair:
    """Both parts of a node; of a stored complex tensor, two initializers."""
    value = e.values.get(node)
    if isinstance(value, Pair):
        return value
    if node.op == "get_attr" and node.meta["val"].dtype.is_complex:
        stored = e.state[str(node.target)].detach()
        parts = torch.view_as_real(stored.resolve_conj()).unbind(-1)
        names = (f"{node.target}.real", f"{node.target}.imaginary")
        e.values[node] = Pair(*(e.derived(n, p) for n, p in zip(names, parts, strict=True)))
        return e.values[node]  # type: ignore[no-any-return]
    raise Untranslatable(node, "a complex value that comes from outside")


@translates(aten.complex.default)
def complex_(e: Emitter, node: fx.Node, a: Any, b: Any) -> Any:
    want = sizes_of(node)
    parts = [
        e.values[x] if sizes_of(x) == want else e.op("Expand", e.values[x], e.shape(want))
        for x in (a, b)
    ]
    return Pair(*parts)


@translates(aten.view_as_complex.default)
def view_as_complex(e: Emitter, node: fx.Node, a: Any) -> Any:
    parts = (e.op("Gather", e.values[a], e.constant(i, torch.int64), axis=-1) for i in range(2))
    return Pair(*parts)


@translates(aten.view_as_real.default)
def view_as_real(e: Emitter, node: fx.Node, a: Any) -> Any:
    parts = [e.op("Unsqueeze", part, e.ints(-1)) for part in pair_of(e, a)]
    return e.op("Concat", *parts, axis=-1)


@translates(aten.real.default)
def real(e: Emitter, node: fx.Node, a: Any) -> Any:
    return pair_of(e, a).real if a.meta["val"].dtype.is_complex else e.values[a]


@translates(aten.imag.default)
def imag(e: Emitter, node: fx.Node, a: Any) -> Any:
    return pair_of(e, a).imaginary
