"""A trunk of blocks in modules, and networks in which one module is another's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.ir.trunk.units import Unit, blocks, find_units, without


@dataclass(frozen=True)
class Trunk:
    """A program's blocks in consecutive modules.

    Attributes:
        program: the whole program, the teacher.
        modules: the blocks of every module, each a tuple of units.
        owner: the module that every stored tensor belongs to, by name: that of the node which reads
            it first. What is in front of the blocks is of the first, what is behind them of the
            last.
    """

    program: Program
    modules: tuple[tuple[tuple[Unit, ...], ...], ...]
    owner: Mapping[str, int]

    def reduced(self, depths: Sequence[int], by: str) -> Program:
        """The program with so many blocks in every module, evenly spread, the first among them."""
        gone: list[Unit] = []
        for module, depth in zip(self.modules, depths, strict=True):
            kept = spread(len(module), depth)
            gone += [u for i, block in enumerate(module) if i not in kept for u in block]
        return without(self.program, gone, by)

    def hybrid(self, meta: Program, place: int, depth: int, meta_depth: int, by: str) -> Program:
        """The meta model with the teacher's module of a depth in one place."""
        depths = [meta_depth] * len(self.modules)
        depths[place] = depth
        graph = self.reduced(depths, by)
        state = {
            name: tensor if self.owner[name] == place else meta.state[name]
            for name, tensor in graph.state.items()
        }
        return graph.replace(state=state)

    def ends(self, depths: Sequence[int] | None = None) -> list[str]:
        """Nodes whose values go from module to module, of `reduced(depths)` or of the program."""
        gone: dict[str, str] = {}
        for module, depth in zip(self.modules, depths or map(len, self.modules), strict=True):
            kept = spread(len(module), depth)
            gone |= {u.join: u.source for i, b in enumerate(module) if i not in kept for u in b}
        found = []
        for module in self.modules[:-1]:
            name = module[-1][-1].join
            while name in gone:
                name = gone[name]
            found.append(name)
        return found

    def names(self, program: Program, place: int) -> list[str]:
        """Tensors of a program that belong to a module."""
        return [name for name in program.state if self.owner[name] == place]


def spread(count: int, kept: int) -> list[int]:
    """`kept` of `count` places, evenly spread, the first among them."""
    return sorted({number * count // kept for number in range(min(kept, count))})


def split_trunk(program: Program, count: int) -> Trunk:
    """The blocks of a program in `count` modules of as equal lengths as possible.

    Raises:
        ModelError: there are fewer blocks.
    """
    found = [tuple(units) for units in blocks(find_units(program)).values()]
    if len(found) < count:
        raise ModelError(
            f"{count} modules need as many blocks of residual units; the program has {len(found)}",
            fix="Lower modules.",
        )
    edges = [number * len(found) // count for number in range(count + 1)]
    return _trunk(program, tuple(tuple(found[a:b]) for a, b in itertools.pairwise(edges)))


def split_like(program: Program, other: Trunk) -> Trunk:
    """The blocks of a program in modules that end with the same blocks as those of another.

    Where blocks have names that the other has not, or none of a module is left, they are split by
    number.

    Raises:
        ModelError: there are fewer blocks than modules.
    """
    where = {block[0].block: n for n, module in enumerate(other.modules) for block in module}
    found = [tuple(units) for units in blocks(find_units(program)).values()]
    modules = tuple(
        tuple(block for block in found if where.get(block[0].block) == number)
        for number in range(len(other.modules))
    )
    if not all(modules) or sum(map(len, modules)) < len(found):
        return split_trunk(program, len(other.modules))
    return _trunk(program, modules)


def _trunk(program: Program, modules: tuple[tuple[tuple[Unit, ...], ...], ...]) -> Trunk:
    order = {node.name: number for number, node in enumerate(program.graph.nodes)}
    ends = [order[module[-1][-1].join] for module in modules[:-1]]
    owner: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            first = min((order[user.name] for user in node.users), default=0)
            owner[str(node.target)] = sum(first > end for end in ends)
    return Trunk(program, modules, owner)
