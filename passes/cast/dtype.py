"""cast.dtype: half precision, with what needs range or digits kept in float32; or all of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.layers.on_codes import computed_on_codes
from graphwright.ir.layers.selectors import select
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.signature import TensorSpec
from graphwright.passes.base import Action, Context, Pass, Result

aten = torch.ops.aten

FLOAT32_OPS = frozenset(
    {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "softmax",
     "log_softmax", "exp", "expm1", "log", "log1p", "log2", "log10", "pow", "rsqrt", "reciprocal",
     "sqrt", "sum", "mean", "var", "std", "norm", "linalg_vector_norm", "cumsum", "cumprod", "prod",
     "softplus", "erfinv", "logsumexp", "cosine_similarity", "cos", "sin", "add_rms_norm",
     "add_layer_norm"}
)  # fmt: skip
"""Ops that overflow or lose their digits in half precision; the usual autocast list."""


HALF = ("float16", "bfloat16")
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = ("float32", *HALF)


class DtypeOptions(Bounded):
    """Options of cast.dtype."""

    to: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of weights and arithmetic; `float32` takes half precision out of a program."""

    keep: Selector = ()
    """Layers that stay in float32: selector patterns over names and kinds."""

    keep_ops: tuple[str, ...] = ()
    """Further operators that stay in float32, by ATen name, as `sigmoid`."""


class Dtype(Pass[DtypeOptions]):
    """Computes in float16, bfloat16 or float32; inputs and outputs keep their types.

    Weights are stored in the new type. Norms, softmax, exponentials, logarithms, powers and sums
    stay in float32 (the usual autocast list), and so do the layers in `keep`; casts are put where
    a value crosses. So do quantized layers whose inputs are quantized too: integer kernels take and
    give float32. Constants beyond the range of the type (the -3.4e38 of masks) are clamped to its
    largest finite value, so that a masked row gives no NaN. With `to: float32` everything is.
    """

    contract = "lossy"
    after = ("cleanup.*",)

    def run(self, program: Program, context: Context) -> Result:
        dtype = getattr(torch, self.options.to)
        editor = Editor(program, by=self.id)
        kept = set()
        if self.options.keep:
            kept = {layer.node.name for layer in select(program, self.options.keep)}
        work = _Caster(editor, dtype, kept, FLOAT32_OPS | set(self.options.keep_ops))
        actions = work.run()
        return Result(editor.finish(propagate=True), actions)


def in_float32(program: Program) -> Program:
    """The program with no half precision in it, inputs, outputs and examples included."""
    signature = program.signature
    editor = Editor(program, by="cast.dtype")
    for node in editor.graph.find_nodes(op="placeholder"):
        value: Any = node.meta.get("val")
        if _is_half(value):
            with value.fake_mode:
                node.meta["val"] = value.to(torch.float32)
    _Caster(editor, torch.float32, set(), frozenset(), interface=True).run()
    return editor.finish(propagate=True).replace(
        signature=replace(
            signature,
            inputs=tuple(_wide(spec) for spec in signature.inputs),
            outputs=tuple(_wide(spec) for spec in signature.outputs),
        ),
        examples=tuple(t.float() if _is_half(t) else t for t in program.examples),
    )


def _wide(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="float32") if spec.dtype in HALF else spec


class _Caster:
    """One walk over the graph; every value has the type its producer computed in."""

    def __init__(
        self,
        editor: Editor,
        dtype: torch.dtype,
        kept: set[str],
        float32_ops: frozenset[str],
        *,
        interface: bool = False,
    ) -> None:
        self.interface = interface
        self.editor = editor
        self.dtype = dtype
        self.kept = kept
        self.on_codes = {node.name for node in computed_on_codes(editor.graph)}
        self.float32_ops = float32_ops
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def run(self) -> tuple[Action, ...]:
        stays: Counter[str] = Counter()
        for node in list(self.editor.graph.nodes):
            if node.op == "call_function":
                reason = self._reason(node)
                self._convert(node, torch.float32 if reason else self.dtype)
                if reason and _is_float(node.meta.get("val")):
                    stays[f"{op_name(node)}: {reason}"] += 1
            elif node.op == "output":
                self._restore_outputs(node)
        done = Action("graph", str(self.dtype).removeprefix("torch."))
        return (done, *(Action.left(k, f"{n} calls", "float32") for k, n in sorted(stays.items())))

    def _convert(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Gives `node` operands of one type and recomputes its result type."""
        if not _is_operator(node):
            return
        node.args, node.kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: self._as(n, dtype, node)
        )
        node.args = _map_plain(node.args, lambda v: self._constant(v, dtype))
        node.kwargs = {k: self._constant(v, dtype) for k, v in node.kwargs.items()}
        node.meta["val"] = self.editor.evaluate(node)
        self.editor.changed = True

    def _constant(self, value: Any, dtype: torch.dtype) -> Any:
        if value is torch.float32 or (self.dtype is torch.float32 and value in _HALVES):
            return dtype
        if isinstance(value, float) and abs(value) != float("inf"):
            limit = torch.finfo(dtype).max
            return max(-limit, min(limit, value))
        return value

    def _as(self, operand: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        value: Any = operand.meta.get("val")
        if not _is_float(value) or value.dtype is dtype:
            return operand
        if operand.op == "get_attr":
            return self._stored(operand, dtype)
        key = (operand, dtype)
        if key not in self.casts:
            self.casts[key] = self.editor.call(
                aten.to.dtype, operand, dtype, before=_behind(operand, before), like=operand
            )
        return self.casts[key]

    def _stored(self, operand: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A weight is stored in the type its reader wants; two types only when two are wanted."""
        key = (operand, dtype)
        if key not in self.casts:
            name = str(operand.target)
            tensor = self.editor.state[name]
            value, limit = tensor.detach(), torch.finfo(dtype)
            if torch.finfo(value.dtype).max > limit.max:
                value = value.clamp(limit.min, limit.max)
            value = value.to(dtype)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            suffix = str(dtype).removeprefix("torch.")
            readers_agree = all(self._wants(u) is dtype for u in operand.users)
            if readers_agree:
                self.editor.set_state(name, value)
                return operand
            self.casts[key] = self.editor.get(self.editor.add_state(f"{name}.{suffix}", value))
        return self.casts[key]

    def _wants(self, node: fx.Node) -> torch.dtype:
        return torch.float32 if self._reason(node) else self.dtype

    def _reason(self, node: fx.Node) -> str:
        """Why a call stays in float32; empty where it does not."""
        if node.name in self.kept:
            return "in keep"
        if node.name in self.on_codes:
            return "computed on codes"
        return "needs float32" if op_name(node) in self.float32_ops else ""

    def _restore_outputs(self, node: fx.Node) -> None:
        outputs = node.args[0]
        assert isinstance(outputs, tuple)
        specs = self.editor.program.signature.outputs
        restored = [
            self._as(out, getattr(torch, spec.dtype), node)
            if isinstance(out, fx.Node) and not self.interface and spec.dtype in _FLOATS
            else out
            for out, spec in zip(outputs, specs, strict=True)
        ]
        node.args = (tuple(restored),)


def _behind(operand: fx.Node, before: fx.Node) -> fx.Node:
    """Right behind the operand, so that later readers can use the cast too."""
    return before if operand.op == "placeholder" else operand.next


def _is_operator(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, *_HALVES)


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in _HALVES


def _map_plain(value: Any, change: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_map_plain(v, change) for v in value)
    return value if isinstance(value, fx.Node) else change(value)
