"""The cost of a program: weight values, stored bytes, and multiply-accumulates per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphwright.ir.data.batches import example_sizes
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.graph.sizes import Size, dimension_names, expression_of, named_symbol, shape_of
from graphwright.ir.layers.kinds import EXPERTS, KINDS
from graphwright.ir.layers.stacks import stack_name
from graphwright.ir.program import Program


@dataclass(frozen=True)
class LayerCost:
    """Cost of one call in the graph that stores weights or multiplies matrices.

    Attributes:
        name: module it belongs to (the weight's owner), or the node's name outside any module.
        kind: the operator, as `linear`.
        node: name of the node.
        parameters: weight values it holds; a tied weight counts at its first use only.
        weight_bytes: bytes of the stored tensors it is computed from, counted likewise.
        macs: multiply-accumulates of one run at the example sizes; None if they depend on data.
        formula: the same over the dimension names, as `768*batch*seq`; empty when zero.
    """

    name: str
    kind: str
    node: str
    parameters: int
    weight_bytes: int
    macs: int | None
    formula: str


@dataclass(frozen=True)
class Cost:
    """Cost of a program; `sizes` are the example sizes that `macs` is evaluated at."""

    parameters: int
    weight_bytes: int
    macs: int | None
    formula: str
    sizes: dict[str, int]
    layers: tuple[LayerCost, ...]
    notes: tuple[str, ...]


def cost(program: Program) -> Cost:
    """Counts a program's weights and multiply-accumulates.

    Parameters are weight values: a tied weight counts once, a weight stored as integer codes
    counts the values it rebuilds, its scales not. Bytes are those of all stored tensors. MACs are
    those of matrix products, convolutions, attention (full, also where a causal mask halves it)
    and recurrent layers; elementwise work is not counted, as in `torch.utils.flop_counter`, whose
    floating-point operations are twice these.
    """
    names = dimension_names(program)
    sizes = example_sizes(program.signature, program.examples)
    owned = _stored_at_first_use(program)
    layers, total, notes = [], sympy.Integer(0), []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if _has_nested_graph(node, program):
            notes.append(f"{node.name}: work inside its nested graph is not counted")
        macs = _rename(node_macs(node), names)
        parameters, weight_bytes = owned.get(node, (0, 0))
        if not (parameters or weight_bytes or macs != 0):
            continue
        total += macs
        formula = "" if macs == 0 else str(sympy.expand(macs))
        name, count = layer_name(node, program), _value(macs, sizes)
        layers.append(
            LayerCost(name, op_name(node), node.name, parameters, weight_bytes, count, formula)
        )
    value = _value(total, sizes)
    if value is None:
        notes.append("some sizes depend on the data: MACs have no value")
    return Cost(
        sum(layer.parameters for layer in layers),
        sum(nbytes(t) for t in _distinct(program.state.values())),
        value,
        "" if total == 0 else str(sympy.expand(total)),
        sizes,
        tuple(layers),
        tuple(notes),
    )


def _has_nested_graph(node: fx.Node, program: Program) -> bool:
    attributes = (a for a in node.all_input_nodes if a.op == "get_attr")
    return any(str(a.target) not in program.state for a in attributes)


def layer_name(node: fx.Node, program: Program) -> str:
    """Innermost module of a call, or its weight where the root owns it or it is a stack of
    experts, or the node itself."""
    if KINDS.get(node.target) in EXPERTS:
        return stack_name(program, node)
    scopes = [path for path in node.meta.get("nn_module_stack", {}) if not path.startswith("_")]
    if scopes:
        return str(scopes[-1])
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and str(operand.target) in program.state:
            return str(operand.target).rpartition(".")[0] or str(operand.target)
    return node.name


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


# --- multiply-accumulates ----------------------------------------------------------------------


def node_macs(node: fx.Node) -> Size:
    """Multiply-accumulates of one call, an int or an expression over torch's own size symbols."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "graphwright":
        return _own_op_macs(node)
    count = _COUNTERS.get(op_name(node))
    if count is None or not hasattr(node.target, "_schema"):
        return sympy.Integer(0)
    return count(_values(node), shape_of(node.meta.get("val")))


def _own_op_macs(node: fx.Node) -> Size:
    from graphwright.ir.ops import OPS

    op = OPS.get(op_name(node))
    hook: Callable[..., Any] | None = getattr(op, "macs", None)
    return sympy.Integer(0) if hook is None else expression_of(hook(*_values(node)))


def _values(node: fx.Node) -> list[Any]:
    """The call's arguments with the (fake) values that nodes stand for; defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    full = [given.get(a.name, a.default_value) for a in schema]
    return [fx.map_arg(v, lambda n: n.meta.get("val")) for v in full]


def _product(sizes: Sequence[Size]) -> Size:
    return sympy.Mul(*sizes)


def _linear(args: list[Any], out: tuple[Size, ...]) -> Size:
    return _product(out) * shape_of(args[0])[-1]


def _product_of(left: int) -> Callable[[list[Any], tuple[Size, ...]], Size]:
    """A matrix product whose left operand is argument `left`: (..., n, k) by (..., k, m)."""

    def count(args: list[Any], out: tuple[Size, ...]) -> Size:
        return _product(out) * shape_of(args[left])[-1]

    return count


def _addbmm(args: list[Any], out: tuple[Size, ...]) -> Size:
    return _product(shape_of(args[1])) * out[-1]


def _convolution(args: list[Any], out: tuple[Size, ...]) -> Size:
    return _product(out) * _product(shape_of(args[1])[1:])


def _transposed(args: list[Any], out: tuple[Size, ...]) -> Size:
    return _product(shape_of(args[0])) * _product(shape_of(args[1])[1:])


def _either_convolution(args: list[Any], out: tuple[Size, ...]) -> Size:
    return _transposed(args, out) if args[6] else _convolution(args, out)


def _attention(args: list[Any], out: tuple[Size, ...]) -> Size:
    query, key, value = (shape_of(a) for a in args[:3])
    scores = _product(query[:-1]) * key[-2]
    return scores * query[-1] + scores * value[-1]


def _einsum(args: list[Any], out: tuple[Size, ...]) -> Size:
    """Operands are contracted from left to right, as torch does without a path."""
    equation, operands = args[0].replace(" ", ""), [shape_of(a) for a in args[1]]
    inputs, _, result = equation.partition("->")
    if "->" not in equation:
        letters = inputs.replace(",", "").replace(".", "")
        result = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    terms: list[Any] = []
    extent: dict[Any, Any] = {}
    for term, shape in zip(inputs.split(","), operands, strict=True):
        # an ellipsis stands for leading axes: give each one a name of its own, from the right
        hidden = len(shape) - len(term.replace("...", ""))
        axes = _ellipsis_axes(hidden) if "..." in term else []
        head, _, tail = term.partition("...")
        labels = [*head, *axes, *tail]
        terms.append(set(labels))
        for label, size in zip(labels, shape, strict=True):
            extent[label] = size if size != 1 else extent.get(label, size)
    kept = set(result.replace("...", "")) | {label for label in extent if len(label) > 1}
    total, current = sympy.Integer(0), terms[0]
    for index, term in enumerate(terms[1:], 1):
        total += _product([extent[label] for label in current | term])
        later: set[str] = set().union(*terms[index + 1 :])
        current = (current | term) & (kept | later)
    return total


def _ellipsis_axes(count: int) -> list[str]:
    return [f"axis{index}" for index in range(count, 0, -1)]


def _bilinear(args: list[Any], out: tuple[Size, ...]) -> Size:
    return _product(out) * shape_of(args[0])[-1] * (shape_of(args[1])[-1] + 1)


def _recurrent(args: list[Any], out: tuple[Size, ...]) -> Size:
    """Every weight matrix of every layer and direction is applied once to each time step."""
    packed = isinstance(args[2], Tensor)  # (data, batch_sizes, hx, params, ...)
    weights = args[3] if packed else args[2]
    steps = _product(shape_of(args[0])[:-1])
    return steps * sum(_product(shape_of(w)) for w in weights if w.dim() == 2)


def _recurrent_cell(args: list[Any], out: tuple[Size, ...]) -> Size:
    rows = _product(shape_of(args[0])[:-1])
    return rows * (_product(shape_of(args[2])) + _product(shape_of(args[3])))


_COUNTERS: dict[str, Callable[[list[Any], tuple[Size, ...]], Size]] = {
    "linear": _linear,
    **dict.fromkeys(["matmul", "mm", "bmm", "mv", "dot", "vdot", "inner"], _product_of(0)),
    **dict.fromkeys(["addmm", "addmv", "baddbmm"], _product_of(1)),
    "addbmm": _addbmm,
    "einsum": _einsum,
    "bilinear": _bilinear,
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _transposed),
    "convolution": _either_convolution,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(["lstm", "gru", "rnn_tanh", "rnn_relu"], _recurrent),
    **dict.fromkeys(["lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"], _recurrent_cell),
}


def _rename(expression: Size, names: dict[sympy.Symbol, sympy.Symbol]) -> Size:
    return sympy.sympify(expression).xreplace(names)


def _value(expression: Size, sizes: dict[str, int]) -> int | None:
    value = expression.xreplace({named_symbol(n): sympy.Integer(s) for n, s in sizes.items()})
    return int(value) if value.is_number else None


# --- weights -----------------------------------------------------------------------------------


def _stored_at_first_use(program: Program) -> dict[fx.Node, tuple[int, int]]:
    """(weight values, bytes) of the stored tensors that each call is the first to use.

    A call uses a tensor directly, or through calls that depend on no input (a rebuilt weight).
    """
    seen: set[Any] = set()
    owned: dict[fx.Node, tuple[int, int]] = {}
    constant: dict[fx.Node, bool] = {}
    for node in program.graph.nodes:
        operands = node.all_input_nodes
        constant[node] = node.op == "get_attr" or (
            node.op == "call_function" and bool(operands) and all(constant[n] for n in operands)
        )
        if node.op != "call_function" or constant[node]:
            continue
        parameters = weight_bytes = 0
        for operand in operands:
            if constant[operand] and _key(operand, program) not in seen:
                values, size = _weight_of(operand, program, seen)
                parameters, weight_bytes = parameters + values, weight_bytes + size
        if parameters or weight_bytes:
            owned[node] = (parameters, weight_bytes)
    return owned


def _weight_of(node: fx.Node, program: Program, seen: set[Any]) -> tuple[int, int]:
    """(weight values, bytes) of a weight operand, leaving out what is in `seen`; adds to it."""
    key = _key(node, program)
    if key in seen:
        return 0, 0
    seen.add(key)
    if node.op == "get_attr":
        tensor = program.state.get(str(node.target))
        if tensor is None:
            return 0, 0
        # integer codes that feed one of our ops are weights whatever the state calls them
        is_code = not tensor.dtype.is_floating_point and any(map(_is_own, node.users))
        counts = isinstance(tensor, torch.nn.Parameter) or is_code
        return tensor.numel() if counts else 0, nbytes(tensor)
    parts = [_weight_of(operand, program, seen) for operand in node.all_input_nodes]
    parameters, size = sum(p for p, _ in parts), sum(s for _, s in parts)
    if _is_own(node) and size and any(_is_code(operand, program) for operand in _sources(node)):
        parameters = math.prod(int(d) for d in node.meta["val"].shape)
    return parameters, size


def _is_own(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "graphwright"


def _is_code(node: fx.Node, program: Program) -> bool:
    tensor = program.state.get(str(node.target))
    return tensor is not None and not tensor.dtype.is_floating_point


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    for operand in node.all_input_nodes:
        if operand.op == "get_attr":
            yield operand
        else:
            yield from _sources(operand)


def _key(node: fx.Node, program: Program) -> Any:
    tensor = program.state.get(str(node.target)) if node.op == "get_attr" else None
    return node if tensor is None else _identity(tensor)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return (id(tensor),)
    place = tensor.untyped_storage().data_ptr()
    return place, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _distinct(tensors: Any) -> list[Tensor]:
    return list({_identity(tensor): tensor for tensor in tensors}.values())
