"""quantize.bn_tuning: output statistics of folded norms, estimated anew on the quantized net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.calibration.observe import bound_batches
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.layers.bias import can_set_bias, set_bias
from graphwright.ir.layers.kinds import PRODUCTS, TURNED
from graphwright.ir.layers.products import bias_node, geometry, weight_node
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result

aten = torch.ops.aten
ours = torch.ops.graphwright

FOLDED = "cleanup.fold_batch_norm"
"""The fact that holds gamma, beta and eps of every folded norm, by layer."""

MEAN, VARIANCE = 3, 4
"""Places of the running statistics among the arguments of a batch norm."""


class BnTuningOptions(Bounded):
    """Options of quantize.bn_tuning."""

    momentum: Annotated[float, Field(gt=0, le=1)] | None = 0.1
    """Share of a batch in the running statistics, as in the paper's code: after five batches they
    are 41% new. Null takes the plain mean over all batches instead."""

    targets: Selector = ("*",)
    """Layers whose norms are put back: selector patterns over names and kinds."""


class BnTuning(Pass[BnTuningOptions]):
    """Puts the folded batch norms back, lets them see calibration data, and folds them again.

    What a folded norm gave had mean beta and variance gamma^2 per channel by construction.
    Quantization has moved both. A norm that starts from these very statistics (so that it changes
    nothing) is put behind each layer that had one; running the calibration data moves its
    statistics to those of the quantized network; and it is folded again: weight, scale of the
    codes and bias are multiplied, so that the grid still fits. No labels, no gradients.

    Needs `cleanup.fold_batch_norm` earlier in the chain, which remembers gamma and beta. For
    networks without batch norm there is `compensate.bias_correction`.

    Source: Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets",
    section 5.1.
    """

    contract = "lossy"
    behind = ("cleanup.fold_batch_norm",)
    needs = "calibration"
    papers = ("P47",)
    after = ("cleanup.*", "prune.*", "quantize.adaquant", "quantize.gptq", "quantize.rtn",
             "quantize.int8", "quantize.bit_allocation")  # fmt: skip

    def run(self, program: Program, context: Context) -> Result:
        known: dict[str, Any] = dict(program.facts.get(FOLDED, {}))
        chosen = select(program, self.options.targets, PRODUCTS)
        actions, tuned = [], []
        for layer in chosen:
            why = _refusal(program, layer, known.get(layer.name))
            if why:
                actions.append(Action.left(layer.name, why))
            else:
                tuned.append(layer)
        if not tuned:
            raise ModelError(
                f"{self.id}: no selected layer has a batch norm folded into it",
                fix="Put cleanup.fold_batch_norm before the passes that quantize, or use "
                "compensate.bias_correction.",
                details=tuple(sorted({f"{a.layer}: {a.reason}" for a in actions}))[:5],
            )
        norms = _Norms(program, tuned, known, self.id)
        norms.run(context, self.options.momentum)
        editor = Editor(program, by=self.id)
        shifts = []
        for layer in tuned:
            factor, shift = norms.affine(layer)
            _fold(editor, layer, factor, shift)
            shifts.append(float((factor - 1).abs().mean()))
            actions.append(Action(layer.name, f"scaled by {float(factor.mean()):.4f} on average"))
        metrics = {"layers": float(len(tuned)), "mean_rescaling": sum(shifts) / len(shifts)}
        return Result(editor.finish(), tuple(actions), metrics)


def _refusal(program: Program, layer: Layer, known: dict[str, list[float]] | None) -> str:
    if known is None:
        return "no batch norm was folded into it"
    if len(known["gamma"]) != geometry(program, layer).out:
        return "its channels are no longer those of its norm"
    if not can_set_bias(layer):
        return "its bias is computed in the graph"
    if _scales(layer) is None:
        return "its weight is rebuilt by an op whose scale is not one per output channel"
    return ""


def _scales(layer: Layer) -> fx.Node | None:
    """The stored tensor that is proportional to the weight, channel by channel: itself, or the
    scales of its codes. None where there is none."""
    node = weight_node(layer)
    if node.target in (aten.reshape.default, aten.transpose.int):
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        node = inner
    if len(node.users) != 1:
        return None
    if node.op == "get_attr":
        return node
    per_row = node.target is ours.dequantize_blocks.default
    if not per_row and not (node.target is ours.dequantize.default and node.args[3] == 0):
        return None
    scale = node.args[1]
    return scale if isinstance(scale, fx.Node) and scale.op == "get_attr" else None


class _Norms:
    """The program with norms put back, which the calibration data runs through."""

    def __init__(
        self, program: Program, tuned: Sequence[Layer], known: dict[str, Any], by: str
    ) -> None:
        editor = Editor(program, by=by)
        self.calls: dict[str, fx.Node] = {}
        self.state: dict[str, tuple[str, str]] = {}
        for layer in tuned:
            self._put_back(editor, layer, known[layer.name])
        self.program = editor.finish()

    def _put_back(self, editor: Editor, layer: Layer, known: dict[str, list[float]]) -> None:
        node = next(n for n in editor.graph.nodes if n.name == layer.node.name)
        dtype = node.meta["val"].dtype
        gamma, beta = (torch.tensor(known[k], dtype=dtype) for k in ("gamma", "beta"))
        eps = float(known["eps"][0])
        names = [
            editor.add_state(f"{layer.name}.tuned_{part}", value.clone())
            for part, value in (
                ("weight", (gamma.square() + eps).sqrt()), ("bias", beta),
                ("mean", beta), ("variance", gamma.square()),
            )
        ]  # fmt: skip
        self.state[layer.name] = (names[2], names[3])
        readers = list(node.users)
        norm = editor.call(
            aten.batch_norm.default, node, *(editor.get(name) for name in names),
            True, 0.1, eps, False, before=node.next, like=node,
        )  # fmt: skip
        for reader in readers:
            reader.replace_input_with(node, norm)
        self.calls[layer.name] = norm

    def run(self, context: Context, momentum: float | None) -> None:
        """Moves the running statistics, which are tensors of this copy alone."""
        runner = fx.Interpreter(self.program.module)
        calls = [n for n in self.program.module.graph.nodes
                 if n.name in {c.name for c in self.calls.values()}]  # fmt: skip
        with torch.no_grad():
            for index, inputs in enumerate(bound_batches(self.program, context.batches)):
                for call in calls:
                    share = 1 / (index + 1) if momentum is None else momentum
                    call.args = (*call.args[:6], share, *call.args[7:])
                runner.run(*inputs)
                context.progress("statistics", index + 1, 0)

    def affine(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """factor and shift (out,), float64, of y * factor + shift: the norm in inference mode."""
        call = self.calls[layer.name]
        weight, bias, mean, variance = (
            constant_value(self.program, node).double() for node in _nodes(call.args[1:5])
        )
        eps = float(call.args[7])  # type: ignore[arg-type]
        factor = weight / (variance + eps).sqrt()
        return factor, bias - mean * factor


def _nodes(values: Sequence[Any]) -> list[fx.Node]:
    assert all(isinstance(value, fx.Node) for value in values)
    return list(values)


def _fold(editor: Editor, layer: Layer, factor: Tensor, shift: Tensor) -> None:
    """weight * factor and bias * factor + shift, on the weight's own grid."""
    stored = _scales(layer)
    assert stored is not None
    old = editor.state[str(stored.target)]
    if old.dim() == 0:
        old = old.expand(len(factor))
    if layer.kind in TURNED and stored is weight_node(layer):
        scaled = old.double() * factor
    else:
        scaled = old.double() * factor.reshape(-1, *[1] * (old.dim() - 1))
    value = scaled.to(old.dtype)
    if isinstance(old, torch.nn.Parameter):
        value = torch.nn.Parameter(value.detach(), requires_grad=old.requires_grad)
    editor.set_state(str(stored.target), value.detach() if not old.requires_grad else value)
    bias = bias_node(layer)
    before = torch.zeros_like(shift)
    if bias is not None:
        before = constant_value(editor.program, bias).double()
    dtype = layer.node.meta["val"].dtype
    set_bias(editor, layer, (before * factor + shift).to(dtype), factor)
