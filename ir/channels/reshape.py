"""Effect of a change of shape on ids: blocks of dimensions with equal products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphwright.ir.channels.values import Factor, Value
from graphwright.ir.channels.walk import UnknownCallError, Walk


@dataclass(frozen=True)
class Block:
    """Source dimensions whose positions, together, are those of the target dimensions."""

    source: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def is_relabelling(self) -> bool:
        return len(self.source) == 1 and len(self.target) == 1


def blocks(old: Sequence[int], new: Sequence[int]) -> list[Block]:
    """Minimal blocks of a reshape; dimensions of size 1 are in none.

    Raises:
        UnknownCallError: a size is 0, or the totals differ.
    """
    source = [(d, s) for d, s in enumerate(old) if s != 1]
    target = [(d, s) for d, s in enumerate(new) if s != 1]
    found, i, j = [], 0, 0
    while i < len(source) and j < len(target):
        left, right = [source[i][0]], [target[j][0]]
        a, b, i, j = source[i][1], target[j][1], i + 1, j + 1
        while a != b:
            if a < b and i < len(source):
                left.append(source[i][0])
                a, i = a * source[i][1], i + 1
            elif b < a and j < len(target):
                right.append(target[j][0])
                b, j = b * target[j][1], j + 1
            else:
                raise UnknownCallError
        found.append(Block(tuple(left), tuple(right)))
    if i < len(source) or j < len(target):
        raise UnknownCallError
    return found


def reshape(walk: Walk, x: Value, shape: Sequence[int]) -> Value:
    """The value of a reshape, view, flatten, squeeze or unsqueeze."""
    if not x.factors:
        return Value(tuple(shape))
    found = blocks(x.shape, shape)
    home = {d: b for b in found for d in b.source}
    x = _without_conflicts(walk, x, home)
    factors = [_moved(walk, x, f, found, shape) for f in x.factors]
    return walk.value(shape, [f for f in factors if f is not None])


def _without_conflicts(walk: Walk, x: Value, home: dict[int, Block]) -> Value:
    """Two factors flattened into one dimension: a position would belong to two units.

    The outer one stays.
    """
    while True:
        taken: dict[Block, Factor] = {}
        for f in sorted(x.factors, key=lambda f: f.dims):
            inner = [d for d in f.dims if taken.setdefault(home[d], f) is not f]
            if inner:
                x = walk.fix_all(x, inner, "two independent dimensions are flattened into one")
                break
        else:
            return x


def _moved(
    walk: Walk, x: Value, f: Factor, found: Sequence[Block], shape: Sequence[int]
) -> Factor | None:
    touched = [b for b in found if set(b.source) & set(f.dims)]
    target = [d for b in touched for d in b.target]
    if all(b.is_relabelling for b in touched):
        return Factor(tuple(target), f.ids, f.zero)
    source = [d for b in touched for d in b.source]
    axes = [x.shape[d] if d in f.dims else 1 for d in source]
    ids = f.ids.reshape(axes)
    for axis, d in enumerate(source):
        if d not in f.dims:
            ids = ids.repeat(x.shape[d], axis)
    return walk.release(target, ids.reshape([shape[d] for d in target]), f.zero)
