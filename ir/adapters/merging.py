"""Adapters worked into the weights of their layers, and their nodes taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.adapters.branch import results, stored_weight
from graphwright.ir.adapters.record import Adapter, adapters, forget, record
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.digest import tensor_digest
from graphwright.ir.graph.nodes import adapter_of, full_arguments, gw_meta, set_gw_meta
from graphwright.ir.layers.kinds import BIAS_ARGUMENT, INPUT_ARGUMENT, WEIGHT_ARGUMENT
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program


@dataclass(frozen=True)
class Adapted:
    """An adapted layer, as the formula of a merge is given it.

    Attributes:
        name: of the layer.
        kind: of the layer.
        groups: of a convolution.
        weight: of the layer, in its own shape, at least float32.
        bias: of the layer, at least float32.
        parts: tensors of the adapter by their part, at least float32.
        scale: factor of the change.
        options: of the pass that put it in.
    """

    name: str
    kind: str
    groups: int
    weight: Tensor
    bias: Tensor | None
    parts: Mapping[str, Tensor]
    scale: float
    options: Mapping[str, Any]


MERGED = "adapters_merged"
"""Key among a program's facts of the merged tensors: digests before and after, by name."""

Merged = tuple[Tensor, Tensor | None]
"""A weight and a bias."""

Formula = Callable[[Adapted], Merged]
"""The weight and the bias with which a layer alone does what it does with its adapter."""


@dataclass(frozen=True)
class Applied:
    """A merged layer.

    Attributes:
        layer: its name.
        change: ||new - old|| / ||old|| of its weight.
        lost: ||stored - exact|| / ||exact - old||: the share of the change that rounding to the
            weight's dtype lost.
    """

    layer: str
    change: float
    lost: float


def merge(
    program: Program, chosen: list[Adapter], formula: Callable[[Adapter], Formula], by: str
) -> tuple[Program, list[Applied]]:
    """Merges adapters into the weights of their layers.

    Sums are formed in float32 or more and rounded once. Parameters that the adapters froze can be
    trained again.

    Args:
        program: left as it is.
        chosen: adapters, in the order they were put in.
        formula: by adapter.
        by: id of the pass.

    Raises:
        ModelError: a weight is rebuilt from codes, is read by a layer without the adapter as well,
            or has an earlier adapter that stays.
    """
    editor = Editor(program, by=by)
    applied: list[Applied] = []
    for adapter in chosen:
        applied += _merge_one(editor, program, adapter, formula(adapter))
        program = editor.finish()
        editor = Editor(program, by=by)
    for adapter in chosen:
        forget(editor, adapter.name)
    _unfreeze(editor, tuple(name for adapter in chosen for name in adapter.frozen))
    return editor.finish(), applied


def bare(program: Program) -> Program:
    """The program without its adapters, on the weights as they are."""
    editor = Editor(program, by="bare")
    calls = {node.name: node for node in editor.graph.nodes}
    for adapter in reversed(adapters(program).values()):
        for layer in layers(program):
            if adapter.layers.get(layer.name):
                _take_out(calls[layer.node.name], layer, adapter)
        if not adapter.layers:
            _take_out_network(editor.graph, adapter)
        forget(editor, adapter.name)
    return editor.finish()


def _take_out_network(graph: fx.Graph, adapter: Adapter) -> None:
    """Lets what reads the mix of a model and a network beside it read the model again."""
    own = [node for node in graph.nodes if adapter_of(node) == adapter.name]
    model = own[-1]
    while adapter_of(model) == adapter.name:  # the model's value stands first in the mix
        first = model.args[0]
        assert isinstance(first, fx.Node)
        model = first
    own[-1].replace_all_uses_with(model)
    for node in reversed(own):
        graph.erase_node(node)


def _unfreeze(editor: Editor, names: tuple[str, ...]) -> None:
    """Lets parameters be trained again; while other adapters are there, these keep them frozen."""
    others = list(adapters(editor).values())
    if others:
        record(editor, replace(others[0], frozen=(*others[0].frozen, *names)))
        return
    for name in names:
        if name in editor.state:
            editor.set_state(name, nn.Parameter(editor.state[name].detach()))


def _merge_one(
    editor: Editor, program: Program, adapter: Adapter, formula: Formula
) -> list[Applied]:
    calls = {node.name: node for node in editor.graph.nodes}
    applied: dict[str, Applied] = {}
    for layer in layers(program):
        if not adapter.layers.get(layer.name):  # a rule of training alone has no tensors
            continue
        call = calls[layer.node.name]
        if layer.name not in applied:
            applied[layer.name] = _store(editor, layer, call, adapter, formula)
        _take_out(call, layer, adapter)
    return list(applied.values())


def _store(
    editor: Editor, layer: Layer, call: fx.Node, adapter: Adapter, formula: Formula
) -> Applied:
    """Puts the merged weight and bias where all calls of the layer read them."""
    weight = stored_weight(call, WEIGHT_ARGUMENT[layer.kind])
    _refuse(weight, layer, call, adapter)
    place = BIAS_ARGUMENT.get(layer.kind)
    args, _ = full_arguments(call)
    bias = None if place is None else args[place]
    old, old_bias = editor.tensor(weight), editor.tensor(bias)
    assert old is not None
    wide = torch.promote_types(old.dtype, torch.float32)
    given = Adapted(
        layer.name, layer.kind, int(args[6]) if "conv" in layer.kind else 1, old.detach().to(wide),
        None if old_bias is None else old_bias.detach().to(wide),
        {part: editor.state[name].detach().to(_wide(editor.state[name]))
         for part, name in adapter.layers[layer.name].items()},
        adapter.scales.get(layer.name, 1.0), adapter.options,
    )  # fmt: skip
    new, new_bias = formula(given)
    stored = new.to(old.dtype)
    replace_stored(editor, str(weight.target), stored)
    if old_bias is not None and new_bias is not None and isinstance(bias, fx.Node):
        replace_stored(editor, str(bias.target), new_bias.to(old_bias.dtype))
    change = (new.double() - given.weight.double()).norm()
    lost = (stored.double() - new.double()).norm()
    return Applied(
        layer.name,
        float(change / given.weight.double().norm().clamp_min(1e-30)),
        float(lost / change) if change else 0.0,
    )


def replace_stored(editor: Editor, name: str, new: Tensor) -> None:
    """Stores a merged tensor, and remembers the digests of the one before it and of itself."""
    old = editor.state[name]
    if torch.equal(old, new):
        return
    new = _like(old, new)
    known = dict(editor.facts.get(MERGED, {}))
    first = known[name][0] if name in known else tensor_digest(old)
    editor.facts[MERGED] = {**known, name: [first, tensor_digest(new)]}
    editor.set_state(name, new)


def unmerge(program: Program, base: Program, by: str) -> tuple[Program, list[str]]:
    """Puts the original's tensors back where adapters were merged; byte for byte.

    Returns:
        The program, and the names of the tensors put back.

    Raises:
        ModelError: nothing was merged, a tensor was changed since, or the base is another one.
    """
    merged: dict[str, list[str]] = dict(program.facts.get(MERGED, {}))
    if not merged:
        raise ModelError("no adapter was merged into the program")
    editor = Editor(program, by=by)
    for name, (before, after) in merged.items():
        now = program.state.get(name)
        if now is None or tensor_digest(now) != after:
            raise ModelError(f"{name!r} was changed after the adapter was merged into it",
                             fix="Unmerge right behind the merge.")  # fmt: skip
        original = base.state.get(name)
        if original is None or tensor_digest(original) != before:
            raise ModelError(f"{name!r} of the base is not the tensor that the adapter was merged "
                             "into", fix="Give the program before the merge.")  # fmt: skip
        editor.set_state(name, _like(now, original.detach()))
    del editor.facts[MERGED]
    return editor.finish(), list(merged)


def _refuse(weight: fx.Node, layer: Layer, call: fx.Node, adapter: Adapter) -> None:
    if weight.op != "get_attr":
        raise ModelError(
            f"the weight of {layer.name!r} is rebuilt from codes: adapter {adapter.name!r} cannot "
            "be merged into it",
            fix="Put adapt.merge before the pass that quantizes, or leave the adapter beside it.",
        )
    place = WEIGHT_ARGUMENT[layer.kind]
    for reader in weight.users:
        is_adapted = any(adapter_of(r) == adapter.name for r in results(reader, layer.name))
        is_own = adapter_of(reader) == adapter.name
        scaled = _scaled_input(reader, adapter)
        if not (is_own or is_adapted or scaled) or (
            not is_own and reader.args[place] is not weight
        ):
            raise ModelError(
                f"the weight of {layer.name!r} is also read by {reader.name!r}, which adapter "
                f"{adapter.name!r} does not change",
                fix="Leave the adapter beside the layer, or adapt both.",
            )
    others = [adapter_of(r) for r in results(call, layer.name)]
    if adapter.name in others and others[0] != adapter.name:
        raise ModelError(
            f"{layer.name!r} has the adapter {others[0]!r} under {adapter.name!r}",
            fix=f"Merge {others[0]!r} first, or both.",
        )


def _scaled_input(call: fx.Node, adapter: Adapter) -> fx.Node | None:
    """The adapter's node that scales what a call reads."""
    found = [n for n in call.all_input_nodes
             if adapter_of(n) == adapter.name and "adapter_of" in gw_meta(n)]  # fmt: skip
    return found[0] if found else None


def _take_out(call: fx.Node, layer: Layer, adapter: Adapter) -> None:
    """Lets every reader of the adapter's result read the layer's own output again."""
    place = WEIGHT_ARGUMENT[layer.kind]
    read = call.args[place]
    if isinstance(read, fx.Node) and adapter_of(read) == adapter.name:
        call.update_arg(place, stored_weight(call, place))
    scaled = _scaled_input(call, adapter)
    if scaled is not None:
        source: Any = scaled
        for _ in range(int(gw_meta(scaled).get("steps", 1))):
            source = source.args[0]
        call.update_arg(INPUT_ARGUMENT[layer.kind], source)
    tip = call
    for result in results(call, layer.name):
        if adapter_of(result) == adapter.name:
            if dropout := gw_meta(result).get("dropout"):
                set_gw_meta(tip, dropout=dropout)
            result.replace_all_uses_with(tip)
            _forget_dropout(call, adapter)
            return
        tip = result


def _forget_dropout(call: fx.Node, adapter: Adapter) -> None:
    """Takes the dropout of the adapter's own readers off the layer's input."""
    for source in call.all_input_nodes:
        entries = gw_meta(source).get("dropout")
        if not entries:
            continue
        own = {user.name for user in source.users if adapter_of(user) == adapter.name}
        kept = [e for e in entries if len(e) < 3 or not set(e[2]) <= own]
        set_gw_meta(source, dropout=kept or None)


def _wide(tensor: Tensor) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.promote_types(tensor.dtype, torch.float32)


def _like(old: Tensor, new: Tensor) -> Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
    return new.contiguous()
