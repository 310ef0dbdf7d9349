"""Training and inference mode, which an exported graph carries as arguments of its calls."""

from __future__ import annotations

import torch

from graphwright.ir.edit import Editor, gw_meta, set_gw_meta
from graphwright.ir.program import Program

aten = torch.ops.aten

FLAG_ARGUMENT = {
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
}
"""Which argument of an op says that it trains."""

DROPOUTS = {
    "dropout": aten.dropout.default,
    "feature_dropout": aten.feature_dropout.default,
    "alpha_dropout": aten.alpha_dropout.default,
    "feature_alpha_dropout": aten.feature_alpha_dropout.default,
}


def set_mode(program: Program, *, training: bool) -> Program:
    """The program with its norms and dropouts in the mode asked for.

    Dropout is not in an inference program: `canonical` takes it out and leaves
    `meta["custom"]["gw"]["dropout"]` on the node it followed; training puts it back there.
    """
    editor = Editor(program, by="train" if training else "eval")
    for node in list(editor.graph.nodes):
        if node.op != "call_function":
            continue
        position = FLAG_ARGUMENT.get(node.target)
        if position is not None and node.target not in DROPOUTS.values():
            _set_flag(editor, node, position, training)
        if training:
            for kind, p in gw_meta(node).get("dropout") or ():
                _insert_dropout(editor, node, kind, p)
    if not training:
        from graphwright.ir.canonical import take_out_dropout

        take_out_dropout(editor)
    return editor.finish()


def _set_flag(editor: Editor, node: torch.fx.Node, position: int, training: bool) -> None:
    args = list(node.args)
    # An instance norm without running statistics always uses the input's, in both modes.
    if node.target is aten.instance_norm.default and args[3] is None:
        return
    if args[position] != training:
        args[position] = training
        editor.set_args(node, *args, **node.kwargs)


def _insert_dropout(editor: Editor, node: torch.fx.Node, kind: str, p: float) -> None:
    users = list(node.users)
    new = editor.call(DROPOUTS[kind], node, p, True, before=node.next, like=node)
    for user in users:
        user.replace_input_with(node, new)
    set_gw_meta(node, dropout=None)
