"""One language for "which layers", used by every pass.

A selector is a list of patterns. A pattern is a glob over the layer's qualified name
(`encoder.layer.0.*`; `lstm.weight_ih_l0` where a call reads several weights), or a kind
(`kind:linear`); a leading `!` excludes. A layer is selected when
any including pattern matches it and no excluding one does; a list needs at least one pattern that
includes (`*` for all).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.constants import weight_source
from graphwright.ir.graph.nodes import adapter_of
from graphwright.ir.layers.kinds import EXPERTS, KINDS, SEVERAL, at_place, weight_places
from graphwright.ir.layers.stacks import stack_names
from graphwright.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """One use of a weight.

    Attributes:
        name: qualified name of the module that owns the weight, as `encoder.layer.0.output.dense`;
            of the weight itself where it is a stack of experts, or its call reads several.
        kind: one of the values of `KINDS`.
        node: the call.
        weight: name of the weight in the program's state; empty when it is computed in the graph
            (a quantized or adapted weight).
        names: every name this use answers to (several for a tied weight used outside its modules).
        place: of the weight among the call's arguments, as `at_place` takes it.
    """

    name: str
    kind: str
    node: fx.Node
    weight: str
    names: tuple[str, ...]
    place: tuple[int, ...]


def layers(program: Program, kinds: Collection[str] | None = None) -> list[Layer]:
    """Every layer of the given kinds (all kinds when None), in graph order.

    The products inside an adapter are none: they belong to the layer that it adapts.
    """
    found = []
    for node in program.graph.nodes:
        kind = KINDS.get(node.target) if node.op == "call_function" else None
        if kind is None or (kinds is not None and kind not in kinds) or adapter_of(node):
            continue
        for place in weight_places(node, kind):
            layer = _layer(program, node, kind, place)
            found += [layer] if layer else []
    return found


def _layer(program: Program, node: fx.Node, kind: str, place: tuple[int, ...]) -> Layer | None:
    weight = at_place(node, place)
    source = weight_source(weight)
    if source is None:
        return None
    state = str(source.target)
    direct = state if source is weight else ""
    if kind in EXPERTS or kind in SEVERAL:
        names = stack_names(program, source)
        if kind in SEVERAL and weight.meta["val"].dim() < 2:  # type: ignore[attr-defined]
            return None
    else:
        names = _owners(node, state, program.aliases.get(state, (state,)))
    return Layer(names[0], kind, node, direct, names, place)


def _owners(node: fx.Node, state: str, aliases: tuple[str, ...]) -> tuple[str, ...]:
    """A tied weight has one state name, but each use its own module: the scope tells which.

    Where the scope does not tell, the use answers to every name of the weight.
    """
    if len(aliases) > 1:
        scopes = list(node.meta.get("nn_module_stack", {}))
        for alias in aliases:
            if scopes and _module(alias) == scopes[-1]:
                return (_module(alias),)
    return (_module(state), *(_module(a) for a in aliases if a != state))


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


class NoLayerError(ModelError):
    """Selectors that select nothing of a program."""


def matching(program: Program, targets: Sequence[str]) -> list[str]:
    """Those of the selectors that match a layer of the program."""
    everything = layers(program)
    return [p for p in targets if any(_matches(each, p.removeprefix("!")) for each in everything)]


def select(
    program: Program, targets: Sequence[str], kinds: Collection[str] | None = None
) -> list[Layer]:
    """The layers that `targets` selects among those of the given kinds.

    Raises:
        NoLayerError: a pattern matches no layer (near misses are named), or nothing is selected.
    """
    candidates = layers(program, kinds)
    everything = layers(program)
    for pattern in targets:
        bare = pattern.removeprefix("!")
        if not any(_matches(layer, bare) for layer in everything):
            fix = _near(bare, everything, program)
            raise NoLayerError(f"selector {pattern!r} matches no layer", fix=fix)
    including = [p for p in targets if not p.startswith("!")]
    if not including:
        raise ModelError(f"targets {list(targets)} only exclude", fix="Put '*' in front.")
    excluding = [p[1:] for p in targets if p.startswith("!")]
    chosen = [
        layer
        for layer in candidates
        if any(_matches(layer, p) for p in including)
        and not any(_matches(layer, p) for p in excluding)
    ]
    if not chosen:
        wanted = f" of kind {', '.join(sorted(kinds))}" if kinds else ""
        others = [x for x in everything if any(_matches(x, p) for p in including)]
        raise NoLayerError(
            f"targets {list(targets)} select no layer{wanted}",
            fix=_near(including[0], candidates, program)
            if candidates or not others
            else _others(others),
        )
    return chosen


def _matches(layer: Layer, pattern: str) -> bool:
    if pattern.startswith("kind:"):
        return fnmatchcase(layer.kind, pattern.removeprefix("kind:"))
    return any(fnmatchcase(name, pattern) for name in {layer.name, *layer.names})


def _near(pattern: str, candidates: list[Layer], program: Program) -> str:
    names = sorted({layer.name for layer in candidates})
    if not names:
        return _weights(program)
    plain = pattern.strip("*.!")
    by_part = {part for name in names for part in name.split(".")}
    near = difflib.get_close_matches(plain, [*names, *by_part], n=3, cutoff=0.5)
    shown = near or names[:3]
    return f"Did you mean one of {', '.join(repr(n) for n in shown)}? ({len(names)} layers in all)"


def _others(found: list[Layer]) -> str:
    """What targets select, where the pass takes nothing of it."""
    names = list(dict.fromkeys(f"{layer.name} ({layer.kind})" for layer in found))
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"They select {', '.join(names[:4])}{more}, which this pass does not take."


def _weights(program: Program) -> str:
    """Where the weights are of a program that has no layer of a known kind."""
    from graphwright.ir.graph.cost import cost

    owners = dict.fromkeys(f"{c.name} ({c.kind})" for c in cost(program).layers if c.parameters)
    if not owners:
        return "The program has no weights."
    shown = ", ".join(list(owners)[:4])
    return f"Passes have no form for the weights that are here: {shown}."
