"""Random inputs within a signature's ranges, at any of the sizes it allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphwright.ir.signature import DimRange, Signature, TensorSpec


def example_sizes(signature: Signature, examples: Sequence[Tensor]) -> dict[str, int]:
    """Size of every dynamic dimension in the example inputs."""
    return {
        dim: size
        for spec, example in zip(signature.inputs, examples, strict=True)
        for dim, size in zip(spec.shape, example.shape, strict=True)
        if isinstance(dim, str)
    }


def other_size_inputs(
    signature: Signature, examples: Sequence[Tensor], seed: int
) -> dict[str, Tensor] | None:
    """Random inputs in which every dynamic dimension that can has another size than the examples.

    The first axis grows by one; others are halved from 32 on and doubled below, which keeps what
    a model divides by and stays clear of what a convolution needs at least. None where nothing
    can differ.
    """
    sizes = example_sizes(signature, examples)
    leading = {spec.shape[0] for spec in signature.inputs if spec.shape}
    other = dict(sizes)
    for dim, size in sizes.items():
        bounds = signature.dims.get(dim, DimRange())
        wanted = [size + 1] if dim in leading else [size // 2] if size >= 32 else [2 * size]
        for candidate in (*wanted, size + 1, size - 1):
            if bounds.min <= candidate and (bounds.max is None or candidate <= bounds.max):
                other[dim] = candidate
                break
    if other == sizes:
        return None
    return synthetic_inputs(signature, other, torch.Generator().manual_seed(seed))


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
