"""quantize.bias_tuning: biases of a quantized network, trained to follow the original's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.layers.bias import can_set_bias, set_bias
from graphwright.ir.layers.kinds import BIAS_ARGUMENT, PRODUCTS
from graphwright.ir.layers.products import bias_node, weight_node
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Bounded, Selector
from graphwright.ir.program import Program
from graphwright.ir.stored.read import is_coded
from graphwright.ir.tune import TuneOptions, tune
from graphwright.passes.base import Action, Context, Pass, Result

RECIPE: dict[str, Any] = {
    "loss": "kl", "optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "schedule": "constant",
    "steps": 800,
}  # fmt: skip
"""The training of the paper's code: ten epochs of twenty times four batches. (Its rate would fall
after the tenth epoch, which is the last.)"""


class BiasTuningOptions(Bounded):
    """Options of quantize.bias_tuning."""

    targets: Selector = ("*",)
    """Layers whose biases are trained: selector patterns over names and kinds."""

    tune: TuneOptions = TuneOptions(**RECIPE)
    """Options of training. What is left out is as in the paper's code: SGD at a constant 0.1, 800
    steps, KL divergence from the original's outputs. 0.1 is for logits of a classifier with folded
    norms; give a smaller `lr` where the loss rises."""


class BiasTuning(Pass[BiasTuningOptions]):
    """Trains the biases of a quantized network, and nothing else, against the original's outputs.

    Weights, their codes and all grids stay as they are, so that the result is stored and computed
    like what went in. Few numbers are trained, on few samples, without labels: the KL divergence
    between the softmax of the outputs and that of the model before the first pass. A bias of int32
    codes is trained as a float and rounded at the end. A layer of a kind that takes a bias and has
    none gets none. The paper runs it behind `quantize.bn_tuning`, and trains the weights of
    the last layer along; here they keep their codes.

    Source: Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets",
    section 5.2, and its code.
    """

    contract = "lossy"
    needs = "training"
    weights = "compressed"
    papers = ("P47",)
    computes_in = ("float64", "float32", "bfloat16")
    after = ("cleanup.*", "prune.*", "quantize.adaquant", "quantize.gptq", "quantize.rtn",
             "quantize.int8", "quantize.bit_allocation", "quantize.bn_tuning")  # fmt: skip

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        chosen = select(program, options.targets, PRODUCTS)
        refused = {layer: why for layer in chosen if (why := _refusal(layer))}
        tuned = [layer for layer in chosen if layer not in refused]
        if not tuned:
            raise ModelError(
                f"{self.id} can train the bias of none of its targets",
                fix="Put it behind a pass that quantizes layers with biases.",
                details=tuple(sorted({f"{x.name}: {why}" for x, why in refused.items()}))[:5],
            )
        twin, names = _floating(program, tuned, self.id)
        found = tune(twin, context.training_data, options.tune, context, names=set(names.values()))
        editor = Editor(program, by=self.id)
        actions = [Action.left(layer.name, why) for layer, why in refused.items()]
        done: set[str] = set()
        for layer in tuned:
            name = names[_key(layer)]
            value = found.program.state[name].detach()
            if name not in done:
                done.add(name)
                set_bias(editor, layer, value)
            moved = float((value - twin.state[name].detach()).abs().mean())
            actions.append(Action(layer.name, f"bias moved by {moved:.2e} on average"))
        losses = found.history.losses
        metrics = {"steps": float(len(losses)), "first_loss": losses[0], "last_loss": losses[-1]}
        return Result(editor.finish(), tuple(actions), metrics)


def _refusal(layer: Layer) -> str:
    if layer.kind not in BIAS_ARGUMENT or bias_node(layer) is None:
        return "it has no bias"
    if not is_coded(weight_node(layer)):
        return "its weight is not quantized"
    return "" if can_set_bias(layer) else "its bias is computed in the graph"


def _key(layer: Layer) -> str:
    """Equal for layers that share a bias."""
    node = bias_node(layer)
    assert node is not None
    stored = node if node.op == "get_attr" else node.all_input_nodes[0]
    return str(stored.target)


def _floating(program: Program, layers: Sequence[Layer], by: str) -> tuple[Program, dict[str, str]]:
    """A copy whose biases are parameters of their own, and their names by `_key`."""
    editor = Editor(program, by=by)
    twin: dict[fx.Node, fx.Node] = dict(zip(program.graph.nodes, editor.graph.nodes, strict=True))
    names: dict[str, str] = {}
    for layer in layers:
        node, key = bias_node(layer), _key(layer)
        assert node is not None
        if key not in names:
            value: Tensor = constant_value(program, node).clone()
            names[key] = editor.add_state(f"{layer.name}.tuned_bias", nn.Parameter(value))
        call = twin[layer.node]
        args = list(call.args)
        args[BIAS_ARGUMENT[layer.kind]] = editor.get(names[key])
        editor.set_args(call, *args, **call.kwargs)
    with torch.no_grad():
        return editor.finish(), names
