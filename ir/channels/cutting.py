"""The public face: find channel groups, zero units, cut units out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_aggregate

import graphwright.ir.channels.norm_literals  # noqa: F401  registers the handlers of norms
from graphwright.ir.channels.analysis import Analysis, analyse
from graphwright.ir.channels.classes import Ids
from graphwright.ir.channels.extents import Extents
from graphwright.ir.channels.fold import fold
from graphwright.ir.channels.groups import ChannelGroup
from graphwright.ir.channels.literals import Literals, check_shapes
from graphwright.ir.channels.walk import Norm, Unit, Walk
from graphwright.ir.channels.weights import is_zeroed
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program

Picks = Mapping[ChannelGroup, Sequence[int]]


def channel_groups(
    program: Program, *, unit: Unit = "head", norm: Norm = "exact"
) -> list[ChannelGroup]:
    """Every group of slices that can only be removed together, prunable or not.

    Args:
        program: left as it is.
        unit: where a channel dimension is split (heads by width of a head), whether whole heads
            or the same offset of every head are units.
        norm: `exact` lets channels under a norm go, which then keeps its original divisor;
            `pin` keeps them.

    Raises:
        ArgumentError: an option has another value.
    """
    if unit not in ("head", "channel") or norm not in ("exact", "pin"):
        raise ArgumentError(
            f"unit is {unit!r} and norm is {norm!r}",
            fix="unit is 'head' or 'channel', norm is 'exact' or 'pin'.",
        )
    return analyse(prepared(program), unit, norm).groups


def zero(program: Program, picks: Picks) -> Program:
    """The program with all parameter slices of the picked units set to zero.

    Args:
        program: left as it is; the one the groups were found on, or one with the same graph
            (other weights).
        picks: unit indices by group.

    Raises:
        ArgumentError: a unit does not exist or may not be removed, or too many are picked.
    """
    if not any(len(units) for units in picks.values()):
        return program
    program = prepared(program)
    analysis, removed = resolve(program, picks)
    state = dict(program.state)
    for name, gone in _zeroed(analysis, removed).items():
        state[name] = _blanked(state[name], gone)
    return program.replace(state=retied(program, state, analysis))


def masked_outputs(program: Program, picks: Picks) -> tuple[torch.Tensor, ...]:
    """Outputs of `zero(program, picks)` on the examples; one zeroed tensor in memory at a time.

    Args and raises as `zero`.
    """
    masked: dict[int, dict[int, Ids]] = {}
    if any(len(units) for units in picks.values()):
        program = prepared(program)
        analysis, removed = resolve(program, picks)
        zeroed = _zeroed(analysis, removed)
        masked = {
            id(program.state[name]): zeroed[owner]
            for name, owner in analysis.owners.items()
            if owner in zeroed and program.state[name].shape == program.state[owner].shape
        }
    with torch.no_grad():
        found: tuple[torch.Tensor, ...] = tuple(
            _Masked(program.module, masked).run(*program.examples)
        )
    return found


class _Masked(fx.Interpreter):
    """Runs a graph with stored tensors zeroed where they are read."""

    def __init__(self, module: fx.GraphModule, masked: dict[int, dict[int, Ids]]) -> None:
        super().__init__(module)
        self._masked = masked

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = map_aggregate((args, kwargs), self._read)
        return super().call_function(target, args, kwargs)

    def _read(self, value: Any) -> Any:
        gone = self._masked.get(id(value))
        return value if gone is None else _blanked(value, gone)


def cut(program: Program, picks: Picks) -> Program:
    """The program without the picked units; equal to `zero(program, picks)` on every input.

    Args and raises as `zero`; besides,

    Raises:
        ModelError: shapes after the cut differ from the predicted ones; names the node.
    """
    if not any(len(units) for units in picks.values()):
        return program
    program = prepared(program)
    analysis, removed = resolve(program, picks)
    extents = Extents(analysis, removed)
    editor = Editor(program, by="channels")
    for name, positions in _kept(analysis, removed).items():
        tensor = _sliced(program.state[name], positions)
        for alias, owner in analysis.owners.items():
            if owner == name:
                editor.set_state(alias, tensor)
    before = dict(analysis.values)
    try:
        Literals(editor, extents).rewrite()
        result = editor.finish(propagate=True)
        check_shapes(Walk(program, analysis.unit, analysis.norm), result.graph, extents)
    finally:
        analysis.values.clear()
        analysis.values.update(before)
    return result


def kept_positions(program: Program, picks: Picks) -> dict[str, dict[int, torch.Tensor]]:
    """Positions that a cut keeps, by tensor name and dimension, where some of them go.

    An optimizer's moments, or any other tensor of a parameter's shape, are sliced by the same.
    """
    if not any(len(units) for units in picks.values()):
        return {}
    program = prepared(program)
    analysis, removed = resolve(program, picks)
    return {
        alias: {d: torch.from_numpy(where) for d, where in positions.items()}
        for name, positions in _kept(analysis, removed).items()
        for alias, owner in analysis.owners.items()
        if owner == name
    }


def cut_tensors(
    program: Program, picks: Picks, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors that belong to parameters, cut as the parameters are.

    For what a trainer keeps beside a parameter: the moments of Adam, a momentum, a running
    average of weights.

    Args:
        program, picks: as for `cut`.
        tensors: by parameter name, of the parameter's shape; a single number (a step count) has
            no slices and comes back as it is.

    Returns:
        New tensors where something is removed, the given ones elsewhere.

    Raises:
        ArgumentError: as `zero`; or a name is no tensor of the program, or a shape differs.
    """
    kept = kept_positions(program, picks)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        own = program.state.get(name)
        if own is None:
            raise ArgumentError(f"the program has no tensor {name}")
        if tensor.dim() and tensor.shape != own.shape:
            raise ArgumentError(f"the tensor given for {name} has shape {tuple(tensor.shape)}, "
                                f"the parameter {tuple(own.shape)}")  # fmt: skip
        where = {d: ids.numpy() for d, ids in kept.get(name, {}).items()} if tensor.dim() else {}
        found[name] = _sliced(tensor, where) if where else tensor
    return found


def prepared(program: Program) -> Program:
    """Without dead code, constant subgraphs folded; the same object when there is neither."""
    return fold(program)


def resolve(program: Program, picks: Picks) -> tuple[Analysis, np.ndarray]:
    """The analysis that picks belong to, and a removal flag per class.

    Raises:
        ArgumentError: as `zero`.
    """
    groups = list(picks)
    analysis = groups[0].analysis
    if any(g.analysis is not analysis for g in groups):
        raise ArgumentError("the picked groups come from different calls of channel_groups")
    if not _is_same_graph(program, analysis.program):
        raise ArgumentError("the groups were found on another program",
                            fix="Call channel_groups on this one.")  # fmt: skip
    removed = np.zeros(analysis.count, bool)
    for group in groups:
        removed[_picked(group, list(picks[group]))] = True
    empty = Extents(analysis, removed).emptied()
    if empty is not None:
        raise ArgumentError(f"the picks leave nothing of a dimension of node {empty[0]}",
                            fix="Keep at least one unit of what it holds.")  # fmt: skip
    return analysis, removed


def _picked(group: ChannelGroup, units: Sequence[int]) -> Ids:
    if units and not group.prunable:
        raise ArgumentError(f"group {group.name} cannot be pruned: {group.reason}")
    wrong = [u for u in units if not 0 <= u < group.units]
    if wrong:
        raise ArgumentError(f"group {group.name} has no unit {wrong[0]}; it has {group.units}")
    if len(set(units)) == group.units:
        raise ArgumentError(f"all {group.units} units of group {group.name} are picked",
                            fix="Keep at least one.")  # fmt: skip
    return group.classes[np.asarray(units, np.int64)]


def _is_same_graph(a: Program, b: Program) -> bool:
    if a is b or a.graph is b.graph:
        return True
    left, right = list(a.graph.nodes), list(b.graph.nodes)
    return len(left) == len(right) and all(
        (m.name, m.target) == (n.name, n.target) for m, n in zip(left, right, strict=True)
    ) and all(a.state[n].shape == b.state[n].shape for n in b.state)  # fmt: skip


def _zeroed(analysis: Analysis, removed: np.ndarray) -> dict[str, dict[int, Ids]]:
    """Positions to set to zero, by first name of a tensor and dimension."""
    gone: dict[str, dict[int, Ids]] = {}
    for (name, dim), classes in analysis.stored.items():
        where = np.flatnonzero(removed[classes])
        if where.size and is_zeroed(analysis.program, name):
            gone.setdefault(name, {})[dim] = where
    return gone


def _blanked(tensor: torch.Tensor, gone: dict[int, Ids]) -> torch.Tensor:
    new = tensor.detach().clone()
    for dim, where in gone.items():
        new.index_fill_(dim, torch.from_numpy(where).to(tensor.device), 0)
    return like(tensor, new)


def _kept(analysis: Analysis, removed: np.ndarray) -> dict[str, dict[int, Ids]]:
    kept: dict[str, dict[int, Ids]] = {}
    for (name, dim), classes in analysis.stored.items():
        gone = removed[classes]
        if gone.any():
            kept.setdefault(name, {})[dim] = np.flatnonzero(~gone)
    return kept


def _sliced(tensor: torch.Tensor, positions: dict[int, Ids]) -> torch.Tensor:
    new = tensor.detach()
    for dim, where in sorted(positions.items()):
        new = new.index_select(dim, torch.from_numpy(where).to(tensor.device))
    return like(tensor, new)


def like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`new`, a parameter where `old` is one."""
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def retied(
    program: Program, state: dict[str, torch.Tensor], analysis: Analysis
) -> dict[str, torch.Tensor]:
    """Names that shared a tensor share the new one."""
    for name, owner in analysis.owners.items():
        if name != owner and program.state[name].shape == state[owner].shape:
            state[name] = state[owner]
    return state
