"""Free dimensions of a trace: asked for, found out, given up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import DimRange, TensorSpec, completed
from graphwright.ir.trace.errors import is_users

Dynamic = Mapping[str, Mapping[int, str]]
"""Input name -> {axis: dimension name}."""


def normalize(inputs: Mapping[str, Tensor], dynamic: Dynamic) -> dict[str, dict[int, str]]:
    """`dynamic` with axes counted from the front.

    Raises:
        ArgumentError: an unknown input, an axis it lacks, or one name for two sizes.
    """
    sizes: dict[str, int] = {}
    out: dict[str, dict[int, str]] = {}
    for name, axes in dynamic.items():
        if name not in inputs:
            raise ArgumentError(f"dynamic names the input {name!r}; the inputs are {list(inputs)}")
        rank = inputs[name].dim()
        for axis, dim in axes.items():
            if not -rank <= axis < rank:
                raise ArgumentError(f"input {name!r} has {rank} axes, and no axis {axis}")
            size = inputs[name].shape[axis]
            if sizes.setdefault(dim, size) != size:
                raise ArgumentError(
                    f"dimension {dim!r} is {sizes[dim]} and {size} in the example inputs",
                    fix="Give different dimensions different names.",
                )
            out.setdefault(name, {})[axis % rank] = dim
    return out


def dim_names(dynamic: Dynamic) -> list[str]:
    """Names of the free dimensions, each once, in order of appearance."""
    return list(dict.fromkeys(dim for axes in dynamic.values() for dim in axes.values()))


def without(dynamic: Dynamic, fixed: set[str]) -> dict[str, dict[int, str]]:
    """The same request with some dimensions left static."""
    return {
        name: {axis: dim for axis, dim in axes.items() if dim not in fixed}
        for name, axes in dynamic.items()
    }


def resized(
    inputs: Mapping[str, Tensor], dynamic: Dynamic, sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Inputs with named dimensions cut, or grown by slices of their own.

    The new slices are drawn among the old, the same in all inputs, so that equal ones in a row do
    not hide a difference; where values are sorted along the axis, as those of a mask or of
    positions, the last one is repeated.
    """
    out = dict(inputs)
    for name, axes in dynamic.items():
        for axis, dim in axes.items():
            size = out[name].shape[axis]
            wanted = sizes.get(dim, size)
            if wanted != size:
                index = torch.arange(min(wanted, size))
                if wanted > size:
                    index = torch.cat([index, _grown(out[name], axis, wanted - size)])
                out[name] = out[name].index_select(axis, index.to(out[name].device))
    return out


def _grown(tensor: Tensor, axis: int, count: int) -> Tensor:
    """The slices that follow the last one."""
    size = tensor.shape[axis]
    if not tensor.is_complex():
        steps = tensor.narrow(axis, 1, size - 1).to(torch.float64)
        steps = steps - tensor.narrow(axis, 0, size - 1).to(torch.float64)
        if not bool((steps < 0).any()) or not bool((steps > 0).any()):
            return torch.full((count,), size - 1)
    generator = torch.Generator().manual_seed(count)
    return torch.randint(size, (count,), generator=generator)


def example_sizes(inputs: Mapping[str, Tensor], dynamic: Dynamic) -> dict[str, int]:
    """Size of every named dimension in the example inputs."""
    return {
        dim: inputs[name].shape[axis]
        for name, axes in dynamic.items()
        for axis, dim in axes.items()
    }


def traceable_examples(
    inputs: Mapping[str, Tensor],
    dynamic: Dynamic,
    more: int = 0,
    derived: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Inputs whose free dimensions are at least 2, below which torch takes a size for fixed.

    Args:
        inputs: the example inputs.
        dynamic: the free dimensions.
        more: by how much each free dimension is larger than that.
        derived: dimensions that follow from others.
    """
    sizes = example_sizes(inputs, dynamic)
    larger = {dim: max(2, size) + more for dim, size in sizes.items()}
    return resized(inputs, dynamic, completed(derived or {}, larger))


def shapes_for_export(inputs: Mapping[str, Tensor], dynamic: Dynamic) -> Any:
    """`dynamic_shapes` of torch.export for a model with flat positional inputs.

    `Dim.AUTO` lets torch find the range of each dimension, and says afterwards which the model
    fixes; a named Dim makes the user guess the range and fails when the guess is off by one.
    """
    free = torch.export.Dim.AUTO
    return (tuple(dict.fromkeys(dynamic.get(name, {}), free) for name in inputs),)


def is_free(size: int | torch.SymInt) -> bool:
    """Whether a recorded size still stands for more than one number."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def specialized(
    exported: Any, inputs: Mapping[str, Tensor], dynamic: Dynamic, places: Mapping[str, str]
) -> dict[str, str]:
    """Dimensions asked to be free that the trace found fixed -> "path:line" of who fixed it.

    The place is empty where nobody knows it. `places` has those that were noted during the export,
    by the symbol of the size.
    """
    placeholders = user_placeholders(exported)
    fixed: dict[str, str] = {}
    for node, name in zip(placeholders, inputs, strict=True):
        for axis, dim in dynamic.get(name, {}).items():
            size = node.meta["val"].shape[axis]
            if not is_free(size):
                fixed[dim] = fixed.get(dim) or _place_of(size, places)
    return fixed


def _place_of(size: Any, noted: Mapping[str, str]) -> str:
    """The place where a size became a number, as far as torch remembers (private there, so with
    care), or as it was noted."""
    node = getattr(size, "node", None)
    places = getattr(getattr(node, "shape_env", None), "replacements_slocs", {})
    symbol = getattr(node, "_expr", None)
    place = places.get(symbol)
    frame = getattr(place, "maybe_user_loc", None) or getattr(place, "framework_loc", None)
    file, line = getattr(frame, "filename", ""), getattr(frame, "lineno", 0)
    return f"{file}:{line}" if file and is_users(file) else noted.get(str(symbol), "")


def user_placeholders(exported: Any) -> list[fx.Node]:
    """The placeholders of the user's inputs, in call order."""
    names = set(exported.graph_signature.user_inputs)
    return [n for n in exported.graph.find_nodes(op="placeholder") if n.name in names]


def shape_environment(exported: Any) -> Any:
    """Torch's knowledge of the sizes in an export; None where all of them are fixed."""
    for node in user_placeholders(exported):
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def ranges_found(
    graph: fx.Graph,
    specs: tuple[TensorSpec, ...],
    constraints: Mapping[Any, Any],
    given: Mapping[str, DimRange],
) -> dict[str, DimRange]:
    """Range per named dimension: the user's, narrowed by what tracing found out."""
    bounds: dict[str, DimRange] = {}
    for node, spec in zip(graph.find_nodes(op="placeholder"), specs, strict=True):
        for size, dim in zip(node.meta["val"].shape, spec.shape, strict=True):
            if not isinstance(dim, str):
                continue
            known = bounds.get(dim) or given.get(dim) or DimRange()
            limits = constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            bounds[dim] = known if limits is None else _narrow(known, limits)
    return bounds


def _narrow(known: DimRange, limits: Any) -> DimRange:
    # torch takes every free size to be 2 or more; whether 1 runs too is found out by running it.
    low = max(known.min, int(limits.lower)) if limits.lower > 2 else known.min
    high = known.max
    if limits.upper.is_number and limits.upper < 2**31:
        high = int(limits.upper) if high is None else min(high, int(limits.upper))
    return DimRange(low, high)
