"""The chain of repeated blocks in a program: where each begins, ends, and what follows the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir.errors import ModelError
from graphwright.ir.graph.constants import depends_on_input
from graphwright.ir.graph.nodes import adapter_of
from graphwright.ir.layers.kinds import KINDS, PRODUCTS


@dataclass(frozen=True)
class Block:
    """One block of the chain.

    Attributes:
        name: of its module, as `model.layers.3`.
        nodes: its calls, in graph order.
        source: the value that it reads from the block before, or from the embedding.
        result: the value that the next block reads.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    source: fx.Node
    result: fx.Node


@dataclass(frozen=True)
class Stack:
    """The chain of blocks, and the norm behind it.

    Attributes:
        blocks: in order.
        tail: calls from the last block's result to `end`; empty where nothing is between.
        end: the last value of the same shape in front of the head (or of the output), through
            which all goes that the last block computes.
    """

    blocks: tuple[Block, ...]
    tail: tuple[fx.Node, ...]
    end: fx.Node


def find_stack(graph: fx.Graph, prefix: str | None) -> Stack:
    """The chain of blocks `prefix.0`, `prefix.1`, ...; the one with most products when None.

    Raises:
        ModelError: there is no such chain, a block has no single input or result, or the widths
            of the blocks differ.
    """
    scopes = {n: _scope(n) for n in graph.nodes if n.op == "call_function" and not adapter_of(n)}
    chains = _chains(scopes)
    if prefix is None:
        if not chains:
            raise ModelError(
                "the model has no chain of numbered blocks, as `layers.0`, `layers.1`",
                fix="A side network runs along such a chain; use adapt.lora for other models.",
            )
        # of nested chains the outer one: it has all the products of the inner one
        prefix = max(chains, key=lambda p: (chains[p], -len(p)))
    elif prefix not in chains:
        known = ", ".join(sorted(chains)) or "none"
        raise ModelError(f"the model has no chain of blocks {prefix!r}", fix=f"It has {known}.")
    blocks: list[Block] = []
    while nodes := _inside(scopes, name := f"{prefix}.{len(blocks)}".removeprefix(".")):
        blocks.append(_block(name, nodes, blocks))
    tail, end = _tail(graph, blocks[-1].result)
    return Stack(tuple(blocks), tail, end)


def _scope(node: fx.Node) -> str:
    scopes = list(node.meta.get("nn_module_stack", {}))
    return str(scopes[-1]) if scopes else ""


def _inside(scopes: dict[fx.Node, str], name: str) -> tuple[fx.Node, ...]:
    return tuple(node for node, scope in scopes.items()
                 if (scope == name or scope.startswith(f"{name}.")) and depends_on_input(node)
                 )  # fmt: skip


def _chains(scopes: dict[fx.Node, str]) -> dict[str, int]:
    """Products in every chain of two or more numbered modules, by its prefix."""
    numbers: dict[str, set[int]] = {}
    products: dict[str, int] = {}
    for node, scope in scopes.items():
        parts = scope.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal():
                prefix = ".".join(parts[:place])
                numbers.setdefault(prefix, set()).add(int(part))
                products[prefix] = products.get(prefix, 0) + (KINDS.get(node.target) in PRODUCTS)
    return {prefix: products[prefix] for prefix, found in numbers.items()
            if found == set(range(len(found))) and len(found) > 1 and products[prefix]
            }  # fmt: skip


def _block(name: str, inside: tuple[fx.Node, ...], before: list[Block]) -> Block:
    source = before[-1].result if before else _source(name, inside)
    if source not in {n for node in inside for n in node.all_input_nodes}:
        raise ModelError(f"block {name!r} does not read what block {before[-1].name!r} gives",
                         fix="Name the prefix of a chain of blocks in `blocks`.")  # fmt: skip
    # what does not depend on the block before, as an angle of positions, all blocks may share
    own: dict[fx.Node, None] = {}
    for node in inside:
        if any(n is source or n in own for n in node.all_input_nodes):
            own[node] = None
    results = [n for n in own if _is_float(n) and any(user not in own for user in n.users)]
    if len(results) != 1:
        shown = ", ".join(n.name for n in results[:4]) or "nothing"
        raise ModelError(
            f"block {name!r} gives {len(results)} values to what follows ({shown}), and a side "
            "network follows one",
            fix="Trace without a cache of keys and values, or name another chain in `blocks`.",
        )
    (result,) = results
    if _shape(source) != _shape(result):
        raise ModelError(f"block {name!r} changes the shape, from {_shape(source)} to "
                         f"{_shape(result)}; a side network follows one width",
                         fix="Name a chain of equal blocks in `blocks`.")  # fmt: skip
    return Block(name, tuple(own), source, result)


def _source(name: str, inside: tuple[fx.Node, ...]) -> fx.Node:
    """What the first block reads: the one value from outside in the shape of its last one."""
    own, last = set(inside), inside[-1]
    outside = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in own)
    sources = [n for n in outside if depends_on_input(n) and _is_float(n)
               and _shape(n) == _shape(last)]  # fmt: skip
    if len(sources) != 1:
        raise ModelError(
            f"block {name!r} reads {len(sources)} values of the shape of its result, "
            f"{_shape(last)}, from outside, and a side network follows one",
            fix="Name the prefix of another chain of blocks in `blocks`.",
        )
    return sources[0]


def _tail(graph: fx.Graph, last: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node]:
    """The calls behind the last block up to the last value that alone goes on to the head."""
    found: list[fx.Node] = []
    end, seen = last, {last}
    behind = iter(graph.nodes)
    for node in behind:
        if node is last:
            break
    for node in behind:
        if not seen.intersection(node.all_input_nodes):
            continue
        if node.op == "output" or KINDS.get(node.target) in PRODUCTS:
            break
        seen.add(node)
        found.append(node)
        open_ends = {n for n in seen if any(user not in seen for user in n.users)}
        if open_ends == {node} and _is_float(node) and _shape(node) == _shape(last):
            end = node
    tail = found[: found.index(end) + 1] if end is not last else []
    return tuple(tail), end


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found: set[fx.Node] = set()
    stack: list[fx.Node] = [node]
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _shape(node: fx.Node) -> str:
    """The shape as text: comparing free sizes as numbers would fix them."""
    return str(tuple(node.meta["val"].shape))
