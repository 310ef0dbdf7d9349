"""Random inputs within a signature's ranges, at any of the sizes it allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphwright.ir.signature import DimRange, Signature, TensorSpec

if TYPE_CHECKING:
    from graphwright.ir.program import Program


def example_sizes(signature: Signature, examples: Sequence[Tensor]) -> dict[str, int]:
    """Size of every dynamic dimension in the example inputs."""
    return {
        dim: size
        for spec, example in zip(signature.inputs, examples, strict=True)
        for dim, size in zip(spec.shape, example.shape, strict=True)
        if isinstance(dim, str)
    }


CHANGES: tuple[tuple[float | None, float | None], ...] = (
    (1, 3), (1, -1), (1, 1), (1, 2.0), (1, 0.5), (1, 8), (1, None),
    (2.0, 2.0), (2.0, None), (0.5, 0.5), (8, 8), (None, 3), (None, 2.0), (None, 1),
)  # fmt: skip
"""Steps to another size, of the leading axis and of the others, in the order they are tried: odd
ones first, then those that keep the divisors a net asks for, then one kind of axis alone. Whole
numbers are added, fractions multiplied."""


def other_size_inputs(program: Program, seed: int) -> tuple[Tensor, ...] | None:
    """Inputs at another size of every dynamic dimension, at which the program runs.

    The one policy of every check: a size that a pass or a backend has fixed shows at any other.
    The values are random within the inputs' ranges, or those of the examples, cut or repeated,
    where the program makes no numbers of random ones.

    Returns:
        one tensor per input; None where no dimension can differ, or the program runs at none of
        the sizes that were tried.
    """
    found = None
    for sizes in other_sizes(program.signature, example_sizes(program.signature, program.examples)):
        drawn = synthetic_inputs(program.signature, sizes, torch.Generator().manual_seed(seed))
        specs = program.signature.inputs
        for inputs in (
            tuple(drawn[spec.name] for spec in specs),
            tuple(resized(t, s, sizes) for t, s in zip(program.examples, specs, strict=True)),
        ):
            outputs = _outputs(program, inputs)
            if outputs is not None and not any(_has_nan(out) for out in outputs):
                return inputs
            if outputs is not None and found is None:
                found = inputs
    return found


def other_sizes(signature: Signature, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes of the dynamic dimensions within their bounds, as different from `sizes` as may be."""
    leading = {spec.shape[0] for spec in signature.inputs if spec.shape}
    made: list[dict[str, int]] = [dict(sizes)]
    for first, rest in CHANGES:
        other = {}
        for dim, size in sizes.items():
            step = first if dim in leading else rest
            other[dim] = _moved(size, signature.dims.get(dim, DimRange()), step)
        if other not in made:
            made.append(other)
            yield other


def _moved(size: int, bounds: DimRange, change: float | None) -> int:
    if change is None:
        return size
    wanted = size + change if isinstance(change, int) else int(size * change)
    for candidate in (wanted, size + 1, size - 1):
        if max(bounds.min, 1) <= candidate and (bounds.max is None or candidate <= bounds.max):
            return candidate
    return size


def resized(tensor: Tensor, spec: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    """The tensor with its dynamic dimensions cut, or repeated from the start."""
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, str):
            places = torch.arange(sizes[dim], device=tensor.device) % tensor.shape[axis]
            tensor = tensor.index_select(axis, places)
    return tensor


def _outputs(program: Program, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Flat outputs; None where the size does not fit the model itself."""
    try:
        with torch.no_grad():
            return program.run_flat(inputs)
    except (RuntimeError, IndexError, ValueError):
        return None


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def synthetic_inputs(
    signature: Signature, sizes: Mapping[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """One batch of random inputs with the given size of every dynamic dimension.

    Integers are uniform in the input's range, [0, 2) where none is known; floats uniform in it,
    standard normal where none is known. A 2-D integer or boolean input whose name ends in `mask`
    is a right-padding mask: random ones and zeros would leave rows with nothing to attend to.
    """
    return {
        spec.name: _draw(
            spec, [d if isinstance(d, int) else sizes[d] for d in spec.shape], generator
        )
        for spec in signature.inputs
    }


def _draw(spec: TensorSpec, shape: list[int], generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        if spec.range is None:
            return torch.randn(shape, generator=generator).to(dtype)
        low, high = spec.range
        return (low + (high - low) * torch.rand(shape, generator=generator)).to(dtype)
    if spec.name.endswith("mask") and len(shape) == 2:
        lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        return (torch.arange(shape[1]) < lengths).to(dtype)
    low, high = (int(v) for v in spec.range or (0, 2))
    return torch.randint(low, max(high, low + 1), shape, generator=generator).to(dtype)


def draw_size(
    dim: str, signature: Signature, sizes: Mapping[str, int], generator: torch.Generator
) -> int:
    """A size of a dynamic dimension: within its bounds, at most what `sizes` says (else 32)."""
    bounds = signature.dims[dim]
    low = max(2, bounds.min)
    high = max(low, sizes.get(dim, 32))
    if bounds.max is not None:
        low, high = min(low, bounds.max), min(high, bounds.max)
    return int(torch.randint(low, high + 1, (), generator=generator))
