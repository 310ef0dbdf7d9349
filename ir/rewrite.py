"""Pattern -> condition -> replacement over a program's graph, with typed captures.

    class Silu(Rewrite):
        pattern = op(aten.mul.Tensor, value("x"), op(aten.sigmoid.default, value("x")))

        def replacement(self, match, editor):
            return editor.call(aten.silu.default, match.node("x"), before=match.root)

A pattern is matched backwards from its last call. A name captured twice must be the same node.
Inner calls must have no user outside the match, unless they are marked `shared=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import full_arguments


@dataclass(frozen=True)
class Value:
    """Any graph node, captured under `name`; `where` may narrow it."""

    name: str
    where: Callable[[fx.Node], bool] | None = None


@dataclass(frozen=True)
class Const:
    """Any plain value that is no node (number, list, None), captured under `name`."""

    name: str
    where: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Op:
    """A call to one of `targets`.

    Attributes:
        targets: operator overloads that match.
        args: patterns of the positional arguments; further arguments of the call must be at
            their defaults unless `rest` is true.
        kwargs: patterns of keyword arguments.
        name: captures the call itself.
        commutative: the first two arguments may come in either order.
        shared: the call may have users outside the match.
        rest: further arguments may be anything.
    """

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    commutative: bool = False
    shared: bool = False
    rest: bool = False


@dataclass(frozen=True)
class OneOf:
    """The first of several patterns that matches."""

    patterns: tuple[Any, ...]


Pattern = Value | Const | Op | OneOf | Any


def value(name: str, where: Callable[[fx.Node], bool] | None = None) -> Value:
    """Captures any node."""
    return Value(name, where)


def const(name: str, where: Callable[[Any], bool] | None = None) -> Const:
    """Captures any plain value."""
    return Const(name, where)


def op(
    targets: Any,
    *args: Pattern,
    name: str = "",
    commutative: bool = False,
    shared: bool = False,
    rest: bool = False,
    **kwargs: Pattern,
) -> Op:
    """A call to `targets` (one overload or a sequence of them); see `Op`."""
    several = tuple(targets) if isinstance(targets, list | tuple | set) else (targets,)
    return Op(several, args, kwargs, name, commutative, shared, rest)


def one_of(*patterns: Pattern) -> OneOf:
    """Alternatives, tried in order."""
    return OneOf(patterns)


@dataclass
class Match:
    """A place in a graph that fits a pattern.

    Attributes:
        root: the last call of the pattern.
        captures: name to node or plain value.
        inner: all calls the pattern covers, root included.
    """

    root: fx.Node
    captures: dict[str, Any]
    inner: list[fx.Node]

    def node(self, name: str) -> fx.Node:
        """A captured node."""
        found = self.captures[name]
        if not isinstance(found, fx.Node):
            raise TypeError(f"capture {name!r} is {found!r}, not a node")
        return found

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]

    def get(self, name: str) -> Any:
        """A capture, or None when the alternative that matched has no such name."""
        return self.captures.get(name)


@dataclass(frozen=True)
class Rejection:
    """A place where the pattern matched and the condition said no."""

    rewrite: str
    node: str
    reason: str


class Rewrite:
    """One pattern, its condition, its replacement."""

    pattern: Pattern

    def condition(self, match: Match, editor: Editor) -> str | None:
        """None to go ahead, or the reason why not."""
        return None

    def replacement(self, match: Match, editor: Editor) -> fx.Node | None:
        """Builds what stands for `match.root`; None when the edit is already made."""
        raise TypeError(f"{type(self).__name__} defines no replacement")


@dataclass
class Applied:
    """Outcome of `apply_rewrites`: how often each rewrite fired, and what was turned down."""

    counts: dict[str, int] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of replacements made."""
        return sum(self.counts.values())


def find_matches(graph: fx.Graph, pattern: Pattern) -> Iterator[Match]:
    """Every place where `pattern` matches, in graph order; places may overlap."""
    for node in graph.nodes:
        match = match_at(node, pattern)
        if match is not None:
            yield match


def match_at(node: fx.Node, pattern: Pattern) -> Match | None:
    """The match whose last call is `node`, or None."""
    for captures, inner in _match(pattern, node, {}, []):
        if _is_closed(inner, node):
            return Match(node, captures, [n for n, _ in inner])
    return None


def apply_rewrites(editor: Editor, rewrites: Sequence[Rewrite], max_rounds: int = 20) -> Applied:
    """Applies the rewrites until none fires.

    Raises:
        RuntimeError: they still fire after `max_rounds` rounds: two of them undo each other.
    """
    applied = Applied()
    for _ in range(max_rounds):
        applied.rejections.clear()
        fired = [_apply_once(editor, rewrite, applied) for rewrite in rewrites]
        if not any(fired):
            return applied
    names = [type(r).__name__ for r, hit in zip(rewrites, fired, strict=True) if hit]
    raise RuntimeError(f"rewrites {names} undo each other")


def _apply_once(editor: Editor, rewrite: Rewrite, applied: Applied) -> bool:
    name, fired = type(rewrite).__name__, False
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        match = match_at(node, rewrite.pattern)
        if match is None:
            continue
        reason = rewrite.condition(match, editor)
        if reason is not None:
            applied.rejections.append(Rejection(name, node.name, reason))
            continue
        new = rewrite.replacement(match, editor)
        if new is not None:
            editor.replace(match.root, new)
        _erase_dead(editor, match.inner)
        applied.counts[name] = applied.counts.get(name, 0) + 1
        fired = True
    return fired


def _erase_dead(editor: Editor, nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        if not node._erased and not node.users and node.op == "call_function":
            editor.erase(node)


_Inner = list[tuple[fx.Node, bool]]


def _match(
    pattern: Pattern, found: Any, captures: dict[str, Any], inner: _Inner
) -> Iterator[tuple[dict[str, Any], _Inner]]:
    if isinstance(pattern, OneOf):
        for alternative in pattern.patterns:
            yield from _match(alternative, found, captures, inner)
    elif isinstance(pattern, Value):
        if isinstance(found, fx.Node) and (pattern.where is None or pattern.where(found)):
            yield from _capture(pattern.name, found, captures, inner)
    elif isinstance(pattern, Const):
        if not isinstance(found, fx.Node) and (pattern.where is None or pattern.where(found)):
            yield from _capture(pattern.name, found, captures, inner)
    elif isinstance(pattern, Op):
        if isinstance(found, fx.Node) and found.op == "call_function":
            yield from _match_call(pattern, found, captures, inner)
    elif _same_plain(pattern, found):
        yield captures, inner


def _same_plain(pattern: Any, found: Any) -> bool:
    """Equal by type and value; FX stores lists as a subclass of list."""
    if isinstance(pattern, list | tuple):
        same_length = isinstance(found, list | tuple) and len(found) == len(pattern)
        return same_length and all(_same_plain(p, f) for p, f in zip(pattern, found, strict=True))
    return not isinstance(found, fx.Node) and type(found) is type(pattern) and found == pattern


def _capture(
    name: str, found: Any, captures: dict[str, Any], inner: _Inner
) -> Iterator[tuple[dict[str, Any], _Inner]]:
    if name not in captures:
        yield {**captures, name: found}, inner
    elif captures[name] is found or (not isinstance(found, fx.Node) and captures[name] == found):
        yield captures, inner


def _match_call(
    pattern: Op, node: fx.Node, captures: dict[str, Any], inner: _Inner
) -> Iterator[tuple[dict[str, Any], _Inner]]:
    if node.target not in pattern.targets:
        return
    args, kwargs = full_arguments(node)
    if len(args) < len(pattern.args) or any(key not in kwargs for key in pattern.kwargs):
        return
    if not pattern.rest and not _defaults_only(node, len(pattern.args), set(pattern.kwargs)):
        return
    wanted = [*pattern.args, *pattern.kwargs.values()]
    given = [*args[: len(pattern.args)], *(kwargs[key] for key in pattern.kwargs)]
    orders = [given]
    if pattern.commutative:
        orders.append([given[1], given[0], *given[2:]])
    if pattern.name:
        captures = {**captures, pattern.name: node}
    inner = [*inner, (node, pattern.shared)]
    for order in orders:
        yield from _match_all(wanted, order, captures, inner)


def _match_all(
    patterns: list[Pattern], found: list[Any], captures: dict[str, Any], inner: _Inner
) -> Iterator[tuple[dict[str, Any], _Inner]]:
    if not patterns:
        yield captures, inner
        return
    for new_captures, new_inner in _match(patterns[0], found[0], captures, inner):
        yield from _match_all(patterns[1:], found[1:], new_captures, new_inner)


def _defaults_only(node: fx.Node, positional: int, named: set[str]) -> bool:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return len(node.args) <= positional and set(node.kwargs) <= named
    arguments = target._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    extra = dict(
        zip((a.name for a in arguments[positional:]), node.args[positional:], strict=False)
    )
    extra.update({k: v for k, v in node.kwargs.items()})
    names = {a.name for a in arguments[:positional]} | named
    return all(k in names or (k in defaults and defaults[k] == v) for k, v in extra.items())


def _is_closed(inner: _Inner, root: fx.Node) -> bool:
    covered = {node for node, _ in inner}
    return all(
        node is root or shared or all(user in covered for user in node.users)
        for node, shared in inner
    )
