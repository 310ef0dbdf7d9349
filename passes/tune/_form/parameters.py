"""The parameters that the option `targets` names, and what training made of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from graphwright.ir.action import Action
from graphwright.ir.adapters.record import adapters
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.constants import depends_on_input
from graphwright.ir.layers.kinds import SEVERAL
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import Layer, layers, select
from graphwright.ir.program import Program
from graphwright.ir.tune import History, Tuned
from graphwright.ir.tune.zeros import MADE


@dataclass(frozen=True)
class Chosen:
    """What is trained of a program.

    Attributes:
        program: as it was before.
        names: of the parameters in training.
        layers: that were selected.
        owned: trainable parameters of every layer.
        loose: trainable parameters of no layer.
    """

    program: Program
    names: frozenset[str]
    layers: frozenset[Layer]
    owned: dict[Layer, tuple[str, ...]]
    loose: tuple[str, ...]

    def actions(self, tuned: Tuned) -> list[Action]:
        """What became of every layer, and of the parameters of none."""
        found = [_action(layer, names, self.layers, self.program, tuned)
                 for layer, names in self.owned.items()]  # fmt: skip
        return found + _loose_actions(self.program, tuned, self.loose)


def chosen_parameters(program: Program, targets: Sequence[str], by: str) -> Chosen:
    """The trainable parameters that `targets` selects.

    Args:
        program: to be trained.
        targets: patterns over names and kinds of layers; a parameter of no layer goes by its own
            name.
        by: id of the pass, for messages.

    Raises:
        ModelError: there is none.
    """
    owned = {layer: _parameters(program, layer) for layer in layers(program)}
    in_layers = {name for names in owned.values() for name in names}
    loose = [name for name in program.trainable() if name not in in_layers]
    selected = _select_layers(program, targets, loose)
    names = {name for layer in selected for name in owned[layer]}
    names |= _select_names(loose, targets)
    if not names:
        raise ModelError(
            f"{by}: targets {list(targets)} hold no trainable parameter",
            fix="Their weights are frozen, or compressed by an earlier pass.",
        )
    return Chosen(program, frozenset(names), frozenset(selected), owned, tuple(loose))


def metrics_of(history: History) -> dict[str, float]:
    """Figures of a training run for the report."""
    metrics = {
        "steps": float(history.steps),
        "first_loss": history.losses[0],
        "last_loss": history.losses[-1],
    }
    if history.batch_sizes:
        metrics["last_batch_size"] = float(history.batch_sizes[-1])
    if history.window_bytes:
        metrics["mfac_window_mib"] = history.window_bytes / 2**20
    if history.zeros:
        metrics["weights_with_kept_zeros"] = float(len(history.zeros))
    if history.evaluations:
        values = dict(history.evaluations)
        metrics["best_evaluation"] = values[history.best_step or history.evaluations[0][0]]
        metrics["best_step"] = float(history.best_step or 0)
    return metrics


def _loose_actions(before: Program, tuned: Tuned, loose: Sequence[str]) -> list[Action]:
    """What became of parameters of no layer: a network beside the model is one entry."""
    networks = {name: adapter.name for adapter in adapters(before).values()
                for name in adapter.shared.values()}  # fmt: skip
    groups: dict[str, list[str]] = {}
    for name in loose:
        if tuned.program.state[name] is not before.state[name]:
            groups.setdefault(networks.get(name, name), []).append(name)
    return [Action(group, f"trained, {_moved(names, before, tuned.program)}")
            for group, names in groups.items()]  # fmt: skip


def _moved(names: Sequence[str], before: Program, after: Program) -> str:
    shift = scale = 0.0
    for name in names:
        old, new = (p.state[name].detach().double() for p in (before, after))
        shift += float((new - old).square().sum())
        scale += float(old.square().sum())
    share = (shift / scale) ** 0.5 if scale else float("inf")
    return f"parameters moved by {share:.2e} of their norm"


def _parameters(program: Program, layer: Layer) -> tuple[str, ...]:
    """Trainable parameters that a layer reads, also through nodes that rebuild its weight, and
    those of its adapters. Of a call that reads several weights, each layer has its own alone."""
    trainable = program.trainable()
    beside = [
        {**a.layers[layer.name], **a.shared}
        for a in adapters(program).values()
        if layer.name in a.layers
    ]
    found = {n: None for parts in beside for n in parts.values() if n in trainable}
    read = [weight_node(layer)] if layer.kind in SEVERAL else layer.node.all_input_nodes
    stack, seen = [n for n in read if not depends_on_input(n)], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr" and str(node.target) in trainable:
            found[str(node.target)] = None
        stack.extend(node.all_input_nodes)
    return tuple(found)


def _select_layers(program: Program, targets: Sequence[str], loose: list[str]) -> set[Layer]:
    """The selected layers; a target that is the name of a loose parameter names no layer."""
    rest = [pattern for pattern in targets if pattern.removeprefix("!") not in loose]
    if all(pattern.startswith("!") for pattern in rest) and len(rest) < len(targets):
        return set()
    return set(select(program, rest))


def _select_names(loose: list[str], targets: Sequence[str]) -> set[str]:
    """Parameters of no layer whose own name is selected."""
    excluding = [pattern[1:] for pattern in targets if pattern.startswith("!")]
    including = [pattern for pattern in targets if not pattern.startswith("!")]

    def is_in(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return {name for name in loose if is_in(name, including) and not is_in(name, excluding)}


def _action(
    layer: Layer, names: tuple[str, ...], chosen: frozenset[Layer], before: Program, tuned: Tuned
) -> Action:
    after = tuned.program
    moved = [name for name in names if after.state[name] is not before.state[name]]
    if not moved:
        reason = "not among the targets" if layer not in chosen else "has no trainable parameter"
        return Action.left(layer.name, reason)
    what = f"trained, {_moved(moved, before, after)}"
    if layer.weight in tuned.history.zeros:
        return Action(layer.name, f"{what}, {tuned.history.zeros[layer.weight]:.1%} zeros kept")
    return Action(layer.name, what, _lost_zeros(layer.weight, before, after))


def _lost_zeros(weight: str, before: Program, after: Program) -> str:
    """The share of zeros that training filled, where there were any to speak of."""
    if not weight:
        return ""
    old, new = (float((p.state[weight] == 0).float().mean()) for p in (before, after))
    if new >= old or not MADE <= old < 1:
        return ""
    return f"it was {old:.1%} zeros and is {new:.1%}: keep_zeros is off"
