"""A case of the sweep: a small module, its inputs, and six sizes of each free dimension."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, tuple[int, ...]] = {
    "b": (2, 3, 5, 8, 9, 1),
    "n": (6, 7, 16, 40, 25, 1),
    "m": (4, 5, 9, 24, 16, 1),
    "t": (12, 13, 16, 24, 49, 1),
    "h": (8, 9, 16, 24, 35, 4),
    "w": (10, 11, 19, 16, 41, 5),
}
"""Sizes of a dimension by its name: the example's first, one more, an odd one, a power of two, a
multiple of eight, one far away, the smallest. A case whose module needs others gives its own."""


@dataclass(frozen=True)
class Draw:
    """How one input is drawn: from which numbers, and its sizes (names where they are free)."""

    kind: str
    shape: tuple[int | str, ...]
    high: int = 0

    def __call__(self, sizes: Mapping[str, int]) -> Tensor:
        shape = [sizes[s] if isinstance(s, str) else s for s in self.shape]
        return DRAWINGS[self.kind](shape, self.high)

    @property
    def free(self) -> dict[int, str]:
        """Free axes with their names, as `gw.trace` takes them."""
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}


DRAWINGS: dict[str, Callable[[list[int], int], Tensor]] = {
    "real": lambda shape, _: torch.randn(shape),
    "positive": lambda shape, _: torch.rand(shape) * 2 + 0.1,
    "unit": lambda shape, _: torch.rand(shape) * 1.9 - 0.95,
    "tiny": lambda shape, _: torch.randn(shape) * 1e-6,
    "ties": lambda shape, _: torch.randint(-2, 3, shape).float(),
    "ints": lambda shape, high: torch.randint(0, high, shape),
    "signed": lambda shape, high: torch.randint(-high, high, shape),
    "bools": lambda shape, _: torch.rand(shape) > 0.4,
}


def real(*shape: int | str) -> Draw:
    """Normal numbers."""
    return Draw("real", shape)


def positive(*shape: int | str) -> Draw:
    """Numbers from 0.1 to 2.1."""
    return Draw("positive", shape)


def unit(*shape: int | str) -> Draw:
    """Numbers from -0.95 to 0.95."""
    return Draw("unit", shape)


def tiny(*shape: int | str) -> Draw:
    """Numbers about 1e-6, where careless formulas cancel."""
    return Draw("tiny", shape)


def ties(*shape: int | str) -> Draw:
    """Whole numbers from -2 to 2 as floats: many are equal."""
    return Draw("ties", shape)


def ints(high: int, *shape: int | str) -> Draw:
    """Integers from 0 to below `high`."""
    return Draw("ints", shape, high)


def signed(high: int, *shape: int | str) -> Draw:
    """Integers from `-high` to below `high`."""
    return Draw("signed", shape, high)


def bools(*shape: int | str) -> Draw:
    """Three true values of five."""
    return Draw("bools", shape)


class Call(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Any:
        return self.function(*(tensor for tensor in (x, y, z) if tensor is not None))


class With(nn.Module):
    """A function of this module and tensors, with buffers and submodules by name."""

    def __init__(self, function: Callable[..., Any], **parts: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Any:
        return self.function(self, *(tensor for tensor in (x, y, z) if tensor is not None))


@dataclass(frozen=True)
class Case:
    """One module of the sweep.

    Attributes:
        theme: the group of modules it belongs to.
        name: unique in its theme.
        build: makes the module.
        inputs: how each argument of the module is drawn, in order.
        sizes: six sizes of every free dimension.
        blames: words of which a refusal must name one: the operator that has no form, or a
            source line of the module.
    """

    theme: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Mapping[str, Draw]
    sizes: Mapping[str, tuple[int, ...]]
    blames: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.theme}: {self.name}"

    def module(self) -> nn.Module:
        """The module in inference mode, with the same weights every time."""
        torch.manual_seed(zlib.crc32(self.title.encode()))
        return self.build().eval()

    def tensors(self, at: int) -> tuple[Tensor, ...]:
        """Inputs at the sizes number `at`, in order."""
        torch.manual_seed(zlib.crc32(self.title.encode()) + 1 + at)
        return tuple(draw(self.at(at)) for draw in self.inputs.values())

    def at(self, number: int) -> dict[str, int]:
        """The free dimensions' sizes number `number`."""
        return {dim: sizes[number] for dim, sizes in self.sizes.items()}

    def by_name(self, module: nn.Module) -> dict[str, Draw]:
        """The drawings under the names that the module's `forward` has for its arguments."""
        names = inspect.signature(module.forward).parameters
        return dict(zip(names, self.inputs.values(), strict=False))


@dataclass
class Theme:
    """A group of cases of one kind."""

    name: str
    cases: list[Case] = field(default_factory=list)

    def module(
        self,
        name: str,
        build: Callable[[], nn.Module],
        *,
        sizes: Mapping[str, tuple[int, ...]] | None = None,
        blames: tuple[str, ...] = (),
        **inputs: Draw,
    ) -> None:
        """Adds a case of a module that `build` makes; its input is `x`, (n, 5), unless given."""
        drawn = inputs or {"x": real("n", 5)}
        dims = list(dict.fromkeys(dim for draw in drawn.values() for dim in draw.free.values()))
        chosen = {dim: (sizes or {}).get(dim) or SIZES[dim] for dim in dims}
        words = blames or (name.split()[0].rstrip("_"),)
        self.cases.append(Case(self.name, name, build, drawn, chosen, words))

    def function(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        sizes: Mapping[str, tuple[int, ...]] | None = None,
        blames: tuple[str, ...] = (),
        **inputs: Draw,
    ) -> None:
        """As `module`, for a function of tensors."""
        self.module(name, lambda: Call(function), sizes=sizes, blames=blames, **inputs)

    def functions(
        self,
        table: Mapping[str, Callable[..., Any]],
        *,
        blames: tuple[str, ...] = (),
        **inputs: Draw,
    ) -> None:
        """One case for each function, all on inputs of the same kind."""
        for name, function in table.items():
            self.function(name, function, blames=blames, **inputs)
