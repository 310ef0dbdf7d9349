"""Finds the dropout of fused attention calls, which a trace in eval mode does not show.

Models pass `dropout_p=p if self.training else 0.0`. So the model is run once in training mode on
fake tensors (no arithmetic, no weights touched), and the probabilities it passes are noted on
the attention calls of the traced graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from graphwright.ir.graph.nodes import set_gw_meta
from graphwright.ir.mode import ATTENTION
from graphwright.ir.trace.calling import FlatModel
from graphwright.ir.trace.untouched import same_attributes


def note_attention_dropout(graph: fx.Graph, flat: FlatModel) -> None:
    """Sets `attention_dropout` on the attention calls of `graph`.

    Nothing is noted when the model has no dropout, or when in training mode it makes another
    number of attention calls, so that they cannot be told apart.
    """
    calls = [node for node in graph.nodes if node.target is ATTENTION]
    if not calls or not any(_drops(module) for module in flat.model.modules()):
        return
    found = _probabilities_in_training(flat)
    if len(found) != len(calls):
        return
    for node, p in zip(calls, found, strict=True):
        if p > 0:
            set_gw_meta(node, attention_dropout=p)


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return any("drop" in k and isinstance(v, float) and v > 0 for k, v in vars(module).items())


class _Recorder(TorchFunctionMode):
    """Notes `dropout_p` of every attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            p = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
            self.found.append(float(p))
        return func(*args, **kwargs)


def _probabilities_in_training(flat: FlatModel) -> list[float]:
    recorder = _Recorder()
    modes = {module: module.training for module in flat.model.modules()}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [fake.from_tensor(t) for t in flat.inputs.values()]
    structure = flat.record.structure
    try:
        flat.model.train()
        with same_attributes(flat.model), torch.no_grad(), fake, recorder:
            flat(*inputs)
    except Exception:
        # A training path that cannot run on fake tensors says nothing about its dropout.
        return []
    finally:
        flat.record.structure = structure
        for module, training in modes.items():
            module.training = training
    return recorder.found
