"""Training and inference mode, which an exported graph carries as arguments of its calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import gw_meta, op_name, set_gw_meta
from graphwright.ir.program import Program

aten = torch.ops.aten

FLAG_ARGUMENT = {
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.lstm.input: 6,
    aten.gru.input: 6,
    aten.rnn_tanh.input: 6,
    aten.rnn_relu.input: 6,
}
"""Position of the argument that says that an op trains."""

NORMS = (aten.batch_norm.default, aten.instance_norm.default)

DROPOUTS = {
    "dropout": aten.dropout.default,
    "feature_dropout": aten.feature_dropout.default,
    "alpha_dropout": aten.alpha_dropout.default,
    "feature_alpha_dropout": aten.feature_alpha_dropout.default,
}

ATTENTION = aten.scaled_dot_product_attention.default
ATTENTION_DROPOUT = 4
"""Position of `dropout_p` among the arguments of an attention call."""


def set_mode(program: Program, *, training: bool) -> Program:
    """The program with its norms and dropouts in the mode asked for.

    Dropout is not in an inference program: `canonical` takes it out and leaves
    `meta["custom"]["gw"]["dropout"]` on the node it followed, a list of [kind, p] or, where only
    some readers got the dropped value, [kind, p, names of those]; training puts it back there.
    The same goes for `attention_dropout` on attention calls.

    A training program gets running statistics of its own, because running it updates them.
    Stochastic depth, and whatever else a model does only `if self.training`, is not in a trace.
    """
    editor = Editor(program, by="train" if training else "eval")
    for node in list(editor.graph.nodes):
        if node.op == "call_function" and node.target in FLAG_ARGUMENT:
            _set_flag(editor, node, training)
        if node.target is ATTENTION:
            _set_attention_dropout(editor, node, training)
        if training:
            for kind, p, *readers in gw_meta(node).get("dropout") or ():
                _insert_dropout(editor, node, kind, p, readers[0] if readers else None)
    if not training:
        take_out_dropout(editor)
    return editor.finish()


def _set_flag(editor: Editor, node: fx.Node, training: bool) -> None:
    if node.target in DROPOUTS.values():
        return
    args = list(node.args)
    statistics = [node.args[3], node.args[4]] if node.target in NORMS else []
    # A norm without running statistics always uses the input's, in both modes.
    if node.target in NORMS and not isinstance(statistics[0], fx.Node):
        return
    target: Any = node.target
    position = FLAG_ARGUMENT[target]
    if args[position] == training:
        return
    args[position] = training
    editor.set_args(node, *args, **node.kwargs)
    for statistic in statistics:
        tensor = editor.tensor(statistic)
        if training and tensor is not None and isinstance(statistic, fx.Node):
            editor.set_state(str(statistic.target), tensor.clone())


def _set_attention_dropout(editor: Editor, node: fx.Node, training: bool) -> None:
    p = gw_meta(node).get("attention_dropout")
    if p is None:
        return
    defaults: list[Any] = [None, None, None, None, 0.0, False]
    args = [*node.args, *defaults[len(node.args) :]][: max(len(node.args), ATTENTION_DROPOUT + 1)]
    kwargs = dict(node.kwargs)
    if len(node.args) < 4 and "attn_mask" in kwargs:
        args[3] = kwargs.pop("attn_mask")
    kwargs.pop("dropout_p", None)
    args[ATTENTION_DROPOUT] = p if training else 0.0
    editor.set_args(node, *args, **kwargs)


def _insert_dropout(
    editor: Editor, node: fx.Node, kind: str, p: float, readers: list[str] | None
) -> None:
    users = [user for user in node.users if readers is None or user.name in readers]
    if not users:
        return
    # A parameter's or an input's dropout goes behind all of them, where calls begin.
    place = node.next
    while place.op in ("placeholder", "get_attr"):
        place = place.next
    new = editor.call(DROPOUTS[kind], node, p, True, before=place, like=node)
    for user in users:
        user.replace_input_with(node, new)
    set_gw_meta(node, dropout=None)


def drops(node: fx.Node) -> bool:
    """Whether a call is dropout in training mode, with a probability."""
    if node.op != "call_function" or node.target not in DROPOUTS.values():
        return False
    p, training = (*node.args[1:3], *(None, None))[:2]
    return bool(node.kwargs.get("train", training)) and bool(node.kwargs.get("p", p))


def take_out_dropout(editor: Editor) -> None:
    """Removes dropout; the node it followed remembers kind, probability and who read the result."""
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or node.target not in DROPOUTS.values():
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        entry: list[Any] = [op_name(node), p]
        if len(source.users) > 1:
            entry.append([user.name for user in node.users])
        if node.users:
            set_gw_meta(source, dropout=[*(gw_meta(source).get("dropout") or ()), entry])
        editor.replace(node, source)
