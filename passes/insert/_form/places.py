"""Where a module goes: behind a value, or in front of what a call reads."""

from __future__ import annotations

import torch
from torch import fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graft import graft
from graphwright.ir.graph.nodes import gw_meta, set_gw_meta
from graphwright.ir.options import Options
from graphwright.ir.program import Program


class InsertOptions(Options):
    """Options of every pass that inserts a module."""

    freeze: bool = False
    """Freeze what the network could train before, so that only the inserted module learns."""


def apply_freeze(editor: Editor, freeze: bool) -> None:
    """Freezes the program's own parameters where that is asked for."""
    for name in editor.program.trainable() if freeze else ():
        if name in editor.state:
            fixed = nn.Parameter(editor.state[name].detach(), requires_grad=False)
            editor.set_state(name, fixed)


def in_editor(editor: Editor, node: fx.Node) -> fx.Node:
    """The copy of a program's node in an editor's graph."""
    copied: fx.Node = next(n for n in editor.graph.nodes if n.name == node.name)
    return copied


def image_input(
    program: Program, name: str | None, by: str, axes: tuple[int, ...] = (3, 4, 5)
) -> fx.Node:
    """The input that is a map (batch, channels, ...).

    Raises:
        ModelError: none is, or several are and none is named.
    """
    nodes = program.graph.find_nodes(op="placeholder")
    specs = program.signature.inputs
    found: list[fx.Node] = [
        node for node, spec in zip(nodes, specs, strict=True)
        if name in (None, spec.name) and len(spec.shape) in axes
        and node.meta["val"].is_floating_point()
    ]  # fmt: skip
    if len(found) != 1:
        names = ", ".join(spec.name for spec in specs)
        fix = f"Name one with `image`; the inputs are {names}." if found else f"It has {names}."
        raise ModelError(f"{by}: {len(found)} inputs can be the image", fix=fix)
    return found[0]


def seeded(make: type[nn.Module], generator: torch.Generator, *args: object) -> nn.Module:
    """A module whose random start depends on `generator` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return make(*args)


def behind(node: fx.Node) -> fx.Node:
    """The node to insert before, so that what is inserted stands right behind `node`."""
    after = node.next
    while after.op in ("placeholder", "get_attr"):
        after = after.next
    return after


def put_behind(editor: Editor, node: fx.Node, module: nn.Module, name: str) -> fx.Node:
    """Lets every reader of `node` read what `module` makes of it; returns that value."""
    (result,) = graft(editor, module, node, name=name, before=behind(node))
    replace_but(editor, node, result)
    return result


def put_in_front(
    editor: Editor, call: fx.Node, index: int, module: nn.Module, name: str
) -> fx.Node:
    """Lets `call` alone read what `module` makes of its argument `index`; returns that value."""
    source = call.args[index]
    assert isinstance(source, fx.Node)
    (result,) = graft(editor, module, source, name=name, before=call)
    call.update_arg(index, result)
    editor.changed = True
    return result


def replace_but(editor: Editor, old: fx.Node, new: fx.Node) -> None:
    """Lets all readers of `old` read `new`, but for the calls that `new` is computed by."""
    own, stack = {new}, [new]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source is not old and source not in own:
                own.add(source)
                stack.append(source)
    if dropout := gw_meta(old).get("dropout"):
        set_gw_meta(new, dropout=dropout)
        set_gw_meta(old, dropout=None)
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in own)
    editor.changed = True
