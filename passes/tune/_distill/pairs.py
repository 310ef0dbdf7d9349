"""Nodes of a student and of its teacher that are compared: those that share a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, fx

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import arguments
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program
from graphwright.passes.tune._distill.distances import (
    Distance,
    attention_distance,
    feature_distance,
    map_distance,
)

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
LEAST_OF_MAP = 3
"""Dimensions of a map: batch, channels, and one size at least."""


@dataclass(frozen=True)
class Compared:
    """A place where values are compared.

    Attributes:
        name: in the report.
        own: names of nodes of the student.
        theirs: names of nodes of the teacher, as many.
        distance: of their values.
    """

    name: str
    own: tuple[str, ...]
    theirs: tuple[str, ...]
    distance: Distance


@dataclass(frozen=True)
class Found:
    """The places where a student and its teacher are compared.

    Attributes:
        features: by values.
        attention: by attention.
        left: reasons why places of equal name are not compared, by name.
    """

    features: list[Compared] = field(default_factory=list)
    attention: list[Compared] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def find_places(student: Program, teacher: Program, patterns: Sequence[str]) -> Found:
    """The places that patterns name.

    Args:
        student: in training.
        teacher: that it follows.
        patterns: over names of layers, which stand for their outputs, and of fused attentions; the
            exact name of any node; or `student=teacher`, two exact names. The layer that gives the
            output is no place.

    Raises:
        ModelError: a pattern names nothing that both have, or two exact names differ in shape.
    """
    ours, theirs = _places(student), _places(teacher)
    found = Found()
    for pattern in patterns:
        pairs = _matches(pattern, student, teacher, ours, theirs)
        is_exact = not any(sign in pattern for sign in "*?[")
        for name, a, b in pairs:
            _add(found, name, a, b, is_exact)
    return found


def _places(program: Program) -> dict[str, fx.Node]:
    """Outputs of layers, and fused attentions, by name."""
    found: dict[str, fx.Node] = {}
    for layer in layers(program):
        if not any(user.op == "output" for user in layer.node.users):
            found.setdefault(layer.name, layer.node)
    fused = program.graph.find_nodes(op="call_function", target=ATTENTION)
    return found | {node.name: node for node in fused}


def _matches(
    pattern: str, student: Program, teacher: Program,
    ours: Mapping[str, fx.Node], theirs: Mapping[str, fx.Node],
) -> list[tuple[str, fx.Node, fx.Node]]:  # fmt: skip
    if "=" in pattern:
        own, _, other = pattern.partition("=")
    else:
        shared = [n for n in ours if n in theirs and fnmatchcase(n, pattern)]
        if shared or any(sign in pattern for sign in "*?["):
            if not shared:
                raise ModelError(
                    f"{pattern!r} names no layer that the model and its teacher share",
                    fix="Name nodes in pairs, as `student_node=teacher_node`.",
                )
            return [(name, ours[name], theirs[name]) for name in shared]
        own = other = pattern
    return [(pattern, _node(own, student, ours, "model"), _node(other, teacher, theirs, "teacher"))]


def _node(name: str, program: Program, places: Mapping[str, fx.Node], whose: str) -> fx.Node:
    if name in places:
        return places[name]
    for node in program.graph.nodes:
        if node.name == name and node.op == "call_function":
            found: fx.Node = node
            return found
    raise ModelError(f"the {whose} has no layer or node {name!r} to compare")


def _add(found: Found, name: str, a: fx.Node, b: fx.Node, is_exact: bool) -> None:
    if a.target is ATTENTION and b.target is ATTENTION:
        _add_attention(found, name, a, b)
        return
    sizes = [_sizes(node) for node in (a, b)]
    if not all(_is_float(node) for node in (a, b)):
        reason = "holds no floats"
    elif sizes[0] == sizes[1]:
        found.features.append(Compared(name, (a.name,), (b.name,), feature_distance))
        reason = ""
    else:
        reason = f"is {_said(sizes[0])}, and the teacher's {_said(sizes[1])}"
    is_map = min(map(len, sizes)) >= LEAST_OF_MAP and (is_exact or "conv" in str(a.target))
    if is_map and (sizes[0][0], *sizes[0][2:]) == (sizes[1][0], *sizes[1][2:]):
        found.attention.append(Compared(name, (a.name,), (b.name,), map_distance))
    elif reason and is_exact:
        raise ModelError(f"{name!r} cannot be compared: it {reason}")
    if reason:
        found.left[name] = reason


def _add_attention(found: Found, name: str, a: fx.Node, b: fx.Node) -> None:
    calls = [arguments(node) for node in (a, b)]
    operands = [tuple(call[part] for part in ("query", "key", "attn_mask")) for call in calls]
    names = [tuple(n.name for n in parts if isinstance(n, fx.Node)) for parts in operands]
    if calls[0]["is_causal"] != calls[1]["is_causal"]:
        found.left[name] = "is causal on one side only"
        return
    distance = partial(
        attention_distance, causal=bool(calls[0]["is_causal"]),
        scales=(calls[0]["scale"], calls[1]["scale"]),
    )  # fmt: skip
    found.attention.append(Compared(name, names[0], names[1], distance))


def _sizes(node: fx.Node) -> tuple[int | None, ...]:
    """Sizes of a node's value, None for a free one; those of the two graphs have names apart."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _said(sizes: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"
