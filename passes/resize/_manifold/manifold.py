"""The manifold: networks that make the tensors of a program at any width, and its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.atomic import write_atomically
from graphwright.ir.channels import ChannelGroup, cut, permute
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.digest import tensor_digest
from graphwright.ir.program import Program
from graphwright.passes.resize._manifold import network
from graphwright.passes.resize._manifold.coordinates import coordinates, encode
from graphwright.passes.resize._manifold.layout import Layout, last_units, layouts

KIND = "graphwright manifold 1"


@dataclass(frozen=True)
class Manifold:
    """Weights of a program as functions of their coordinates.

    Attributes:
        base: digest of the tensors of the program that it was trained on.
        orders: the old unit at every place, by name of a channel group.
        networks: parameters of a network, by name of the tensor that it makes.
        units: what a network's value of 1 stands for, times the input channels, by the same name.
        frequencies: of the encoding.
        noise: width of the jitter of coordinates.
        widths: least and largest share of the units that training saw.
    """

    base: str
    orders: dict[str, list[int]]
    networks: dict[str, dict[str, Tensor]]
    units: dict[str, float]
    frequencies: int
    noise: float
    widths: tuple[float, float]

    def make(
        self,
        name: str,
        layout: Layout,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """One tensor at a width.

        Source: P48: values over the input channels, so that sums over them stay alike over widths.

        Args:
            name: which.
            layout: of the tensor at the width in question.
            noise: width of the jitter.
            generator: of the jitter.
            parameters: of its network, where they are not the manifold's.
        """
        own = self.networks[name] if parameters is None else parameters
        place = list(self.networks).index(name)
        points = coordinates(place, len(self.networks), layout.units, noise, generator)
        points = points.to(own["out.bias"].device)
        values = network.run(own, encode(points, self.frequencies))
        fan_in = layout.units[1] if len(layout.units) > 1 else 1
        return layout.arrange(values) * (self.units[name] / fan_in)

    def sample(self, name: str, layout: Layout, draws: int, generator: torch.Generator) -> Tensor:
        """The mean of several draws: the first at the very coordinates, the others jittered."""
        with torch.no_grad():
            total = self.make(name, layout).double()
            for _ in range(draws - 1):
                total += self.make(name, layout, self.noise, generator).double()
        return total / draws

    def at(
        self,
        program: Program,
        groups: Sequence[ChannelGroup],
        width: float,
        draws: int,
        generator: torch.Generator,
    ) -> Program:
        """The program at a width.

        Args:
            program: the one that it was trained on.
            groups: its channel groups.
            width: share of the units that stay.
            draws: of every tensor.
            generator: of the jitter.

        Raises:
            ModelError: it was trained on another program.
            ArgumentError: the width is outside of those of training.
        """
        if base_digest(program) != self.base:
            raise ModelError(
                "the manifold was trained on another program",
                fix="Put the same passes in front of it as when it was trained.",
            )
        least, largest = self.widths
        if not least <= width <= largest:
            raise ArgumentError(
                f"width {width:g} is outside of {least:g} to {largest:g}, the widths of training",
                fix="A manifold says nothing beyond them: train it with wider `widths`.",
            )
        chosen = [group for group in groups if group.name in self.orders]
        base = permute(program, {g: self.orders[g.name] for g in chosen})
        smaller = cut(base, last_units(chosen, width))
        state = dict(smaller.state)
        for name, layout in layouts(base, chosen, list(self.networks), width).items():
            old = state[name]
            new = self.sample(name, layout, draws, generator).to(old.device, old.dtype)
            state[name] = torch.nn.Parameter(new, old.requires_grad)
        return smaller.replace(state=state)

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        from safetensors.torch import save

        about = {
            "kind": KIND, "base": self.base, "orders": self.orders, "names": list(self.networks),
            "units": self.units, "frequencies": self.frequencies, "noise": self.noise,
            "widths": list(self.widths),
        }  # fmt: skip
        tensors = {
            f"{name}:{part}": value.detach().contiguous()
            for name, parts in self.networks.items()
            for part, value in parts.items()
        }
        write_atomically(path, save(tensors, {"manifold": json.dumps(about)}))


def load_manifold(path: Path) -> Manifold:
    """Reads a file that `Manifold.save` wrote.

    Raises:
        ModelError: it cannot be read, or is another file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            about = _about(file.metadata(), path)
            networks: dict[str, dict[str, Tensor]] = {name: {} for name in about["names"]}
            for key in file.keys():  # noqa: SIM118  a file, not a dict
                name, _, part = key.rpartition(":")
                networks[name][part] = file.get_tensor(key)
        least, largest = about["widths"]
        return Manifold(
            about["base"], about["orders"], networks, about["units"],
            int(about["frequencies"]), float(about["noise"]), (float(least), float(largest)),
        )  # fmt: skip
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the manifold cannot be read: {error}", where=str(path)) from error


def _about(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    found = json.loads((metadata or {}).get("manifold", "null"))
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ModelError(
            "the file is no manifold",
            where=str(path),
            fix="`resize.neumeta: {save: ...}` writes one.",
        )
    return found


def base_digest(program: Program) -> str:
    """sha256 (hex) over the names and values of a program's tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(program.state.items()):
        found.update(f"{name} {tensor_digest(tensor)}\n".encode())
    return found.hexdigest()


def unit(tensor: Tensor, layout: Layout) -> float:
    """The unit in which a network makes a tensor: its root mean square, times its inputs, in units
    of channels; a network's values are about 1/4 at the start."""
    fan_in = layout.units[1] if len(layout.units) > 1 else 1
    return 4 * float(tensor.detach().double().square().mean().sqrt()) * fan_in or 1.0
