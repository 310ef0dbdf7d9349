"""An operator without a translation, taken apart at its place by torch's own decompositions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._decomp import global_decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from graphwright.ir.graph.constants import Stored, constant_nodes, constant_results
from graphwright.ir.trace.prepare import quiet


@cache
def _decompositions() -> dict[Any, Any]:
    import torch._refs  # noqa: F401  # registers the reference implementations

    return dict(global_decomposition_table["post_autograd"])


def taken_apart(node: fx.Node, known: Collection[Any]) -> tuple[fx.Graph, list[fx.Node]] | None:
    """A call in terms of other operators; None where torch knows no other terms.

    Args:
        node: a call of an operator on nodes with `meta["val"]`.
        known: operators that are not taken apart themselves, wherever they come up.

    Returns:
        A graph whose nodes have `meta["val"]` in the symbols of the given one, and the arguments
        of the call that its placeholders stand for, in order.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    given = [arg for arg in flat if isinstance(arg, fx.Node)]
    fakes = [arg.meta["val"] for arg in given]
    modes = [fake.fake_mode for fake in fakes if isinstance(fake, torch._subclasses.FakeTensor)]
    if not modes:
        return None

    def call(*values: Any) -> Any:
        stand_in = iter(values)
        full = [next(stand_in) if isinstance(arg, fx.Node) else arg for arg in flat]
        args, kwargs = pytree.tree_unflatten(full, spec)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    table = {
        op: rule for op, rule in _decompositions().items() if op not in known or op is node.target
    }
    try:
        with quiet(), modes[0], torch.no_grad(), _no_new_guards(modes[0].shape_env):
            made = make_fx(call, decomposition_table=table, tracing_mode="real")(*fakes)
    except Exception:
        return None
    graph = made.graph
    graph.eliminate_dead_code()
    calls = [inner for inner in graph.nodes if inner.op == "call_function"]
    if any(inner.target is node.target for inner in calls) or graph.find_nodes(op="get_attr"):
        return None
    return (graph, given) if all(_without_writing(inner) for inner in calls) else None


class _GuardError(Exception):
    """A decomposition that is right only at sizes like the example's."""


@contextmanager
def _no_new_guards(env: Any) -> Iterator[None]:
    """Fails where a branch on a size would be taken as the example goes.

    Such a branch would fix sizes of the program itself, which shares its symbols.
    """

    def refuse(*_: Any) -> None:
        raise _GuardError

    if env is None:
        yield
        return
    env._check_frozen = refuse  # what torch asks just before it installs a guard
    try:
        yield
    finally:
        del env._check_frozen


def _without_writing(node: fx.Node) -> bool:
    """Makes a copy into a value that nothing else reads later one that gives a new value.

    Returns:
        False for any other call that writes to its arguments.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return True
    old = node.args[0]
    if target is not torch.ops.aten.copy_.default or not isinstance(old, fx.Node):
        return False
    maker = old.target
    if not isinstance(maker, torch._ops.OpOverload) or any(user > node for user in old.users):
        return False
    if any(result.alias_info is not None for result in maker._schema.returns):
        return False  # a view: the write shows in the tensor it looks into
    node.target = torch.ops.aten.copy.default
    return True


def computed_ahead(state: Stored, node: fx.Node) -> list[torch.Tensor] | None:
    """The results of a call that depends on no input; None for any other, and for complex ones."""
    if node not in constant_nodes(node.graph):
        return None
    found = constant_results(state, node)
    return None if any(value.is_complex() for value in found) else found
