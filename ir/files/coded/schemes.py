"""Schemes of a compressed-tensors description, and the layers they apply to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.layout import Layout

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Args:
    """The quantization of the weights or the inputs of a layer.

    Attributes:
        bits: of a code.
        type: `int` or `float`.
        strategy: what shares a scale: `tensor`, `channel`, `group`, `block`, `token`.
        group: inputs of a group; 0 for as many as the stored scales make it.
        block: (outputs, inputs) of a block.
        is_symmetric: there are no zero points.
        is_dynamic: scales of inputs are found as the layer runs.
    """

    bits: int
    type: str
    strategy: str
    group: int = 0
    block: tuple[int, int] = (0, 0)
    is_symmetric: bool = True
    is_dynamic: bool = False

    def tile(self, out: int, inputs: int) -> tuple[int, int]:
        """(outputs, inputs) that share a scale in a weight (out, inputs)."""
        tiles = {"tensor": (out, inputs), "channel": (1, inputs), "group": (1, self.group),
                 "block": self.block}  # fmt: skip
        if self.strategy not in tiles:
            raise ModelError(f"weights with a scale per {self.strategy} are not read")
        return tiles[self.strategy]


@dataclass(frozen=True)
class Scheme:
    """The stored form of a layer.

    Attributes:
        format: on disk, one of `FORMATS`.
        weights: of its weight.
        inputs: of its inputs; None where they are not rounded.
    """

    format: str
    weights: Args
    inputs: Args | None


class Groups:
    """The groups of layers of a description, each with a scheme of its own."""

    def __init__(self, config: Mapping[str, Any], layout: Layout) -> None:
        self.layout = layout
        for key in ("sparsity_config", "transform_config"):
            self._refuse_section(key, config.get(key))
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise layout.refuse("without config_groups")
        default = str(config.get("format") or "")
        self._schemes = [self._group(name, group, default) for name, group in groups.items()]

    def of(self, owner: str) -> Scheme:
        """The scheme of a layer: by its whole name, else by a pattern, else by its class.

        Raises:
            ModelError: no group has it.
        """
        for test in (lambda t: t == owner, lambda t: _fits(t, owner), lambda t: _is_class(t)):
            for targets, scheme in self._schemes:
                if any(test(target) for target in targets):
                    return scheme
        raise ModelError(f"no group of layers in the description has {owner!r}")

    def _group(self, name: str, group: Any, default: str) -> tuple[list[str], Scheme]:
        if isinstance(group, list):
            scheme = self._preset(name, default)
            return [str(target) for target in group], scheme
        if group.get("output_activations"):
            raise self.layout.refuse("whose outputs are rounded")
        weights = _args(group.get("weights") or {})
        inputs = group.get("input_activations")
        scheme = self._scheme(group.get("format") or default, weights,
                              _args(inputs) if inputs else None)  # fmt: skip
        return [str(target) for target in group.get("targets") or ()], scheme

    def _scheme(self, format: str, weights: Args, inputs: Args | None) -> Scheme:
        if format not in FORMATS:
            raise self.layout.refuse(
                f"in the form {format!r}", f"Save it as one of {', '.join(FORMATS)}."
            )
        is_float8 = weights.type == "float" and weights.bits == 8 and format != FORMATS[0]
        if not is_float8 and (weights.type != "int" or not 2 <= weights.bits <= 8):
            raise self.layout.refuse(f"with {weights.bits}-bit {weights.type} weights as {format}")
        return Scheme(format, weights, inputs)

    def _preset(self, name: str, default: str) -> Scheme:
        """A scheme that is named instead of written out."""
        key = name.upper()
        token = Args(8, "int", "token", is_dynamic=True)
        float_token = Args(8, "float", "token", is_dynamic=True)
        known = {
            "W8A8": (Args(8, "int", "channel"), token),
            "INT8": (Args(8, "int", "channel"), token),
            "W4A16_ASYM": (Args(4, "int", "group", is_symmetric=False), None),
            "W4AFP8": (Args(4, "int", "group"), float_token),
            "FP8": (Args(8, "float", "tensor"), Args(8, "float", "tensor")),
            "FP8_DYNAMIC": (Args(8, "float", "channel"), float_token),
            "FP8_BLOCK": (Args(8, "float", "block", block=(128, 128)),
                          Args(8, "float", "group", 128, is_dynamic=True)),
        }  # fmt: skip
        found = re.fullmatch(r"W([2-8])A(8|16)", key)
        if key not in known and not found:
            raise self.layout.refuse(f"with the scheme {name!r}")
        if key in known:
            weights, inputs = known[key]
        else:
            assert found is not None
            weights = Args(int(found[1]), "int", "group")
            inputs = token if found[2] == "8" else None
        return self._scheme(default, weights, inputs)

    def _refuse_section(self, key: str, section: Any) -> None:
        is_used = isinstance(section, Mapping) and (
            section.get("config_groups") or section.get("format", "dense") != "dense"
        )
        if is_used:
            raise self.layout.refuse(f"with a {key}")


def _args(given: Mapping[str, Any]) -> Args:
    group = given.get("group_size")
    strategy = given.get("strategy") or ("group" if group and group > 0 else "tensor")
    if strategy == "group" and (group is None or group < 1):
        strategy = "channel"
    block = given.get("block_structure") or (0, 0)
    if isinstance(block, str):
        block = [int(size) for size in block.split("x")]
    return Args(
        int(given.get("num_bits", 8)), str(given.get("type", "int")), str(strategy),
        int(group or 0), (int(block[0]), int(block[1])), bool(given.get("symmetric", True)),
        bool(given.get("dynamic", False)),
    )  # fmt: skip


def _fits(target: str, owner: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), owner) is not None


def _is_class(target: str) -> bool:
    """Whether a target is the name of a class, not of a layer."""
    return not target.startswith("re:") and "." not in target
