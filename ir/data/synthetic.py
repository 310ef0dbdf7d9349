"""Random inputs within a signature's ranges, at any of the sizes it allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphwright.ir.data.defaults import with_defaults
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


Change = int | float | None
"""A step to another size: whole numbers are added, fractions multiplied, 0 is the least size that
the bounds allow, and None leaves a size alone."""

OTHER: tuple[tuple[Change, Change], ...] = (
    (1, 3), (1, -1), (1, 1), (1, 2.0), (1, 0.5), (1, 8), (1, None),
    (2.0, 2.0), (2.0, None), (0.5, 0.5), (8, 8), (None, 3), (None, 2.0), (None, 1),
)  # fmt: skip
"""Steps of the leading axis and of the others, in the order they are tried: odd ones first, then
those that keep the divisors a net asks for, then one kind of axis alone."""

SMALLER: tuple[tuple[Change, Change], ...] = (
    (0, 3), (0, -1), (0, 1), (0, 2.0), (0, 0.5), (0, 8), (0, None), (0, 0), *OTHER,
)  # fmt: skip
"""Steps to one sample, the others at an odd size; any other size where the net takes no one."""

LARGER: tuple[tuple[Change, Change], ...] = (
    (8.0, 4.0), (8.0, 2.0), (4.0, 2.0), (8.0, None), (2.0, 2.0), (4.0, None), (None, 4.0),
    (3.0, None), (2.0, None), (None, 2.0),
)  # fmt: skip
"""Steps to a size far above the example's."""

CHEAP = 1e9
"""Weights times input elements of a run that is always cheap enough."""

MOST = 4.0
"""Largest number of input elements, in multiples of the example's, where a run is not cheap."""


def other_size_inputs(program: Program, seed: int, least: int = 1) -> list[tuple[Tensor, ...]]:
    """Inputs at two other sizes of the dynamic dimensions, at which the program runs.

    The one policy of every check: one sample, and far more than in the examples, as far as a run
    is cheap. A size that a pass or a backend has fixed shows at one of the two. The values are
    random within the inputs' ranges, or those of the examples, cut or repeated, where the program
    makes no numbers of random ones.

    Args:
        program: what is to run at the sizes.
        seed: of the values.
        least: number of samples in place of the single one.

    Returns:
        the inputs of a call, smaller sizes first; none where no dimension can differ, or the
        program runs at none of the sizes that were tried.
    """
    example = example_sizes(program.signature, program.examples)
    found: list[tuple[Tensor, ...]] = []
    seen = [example]
    for changes in (SMALLER, LARGER):
        sizes = other_sizes(program.signature, example, changes, least)
        tried = [s for s in sizes if s not in seen]
        affordable = (s for s in tried if _is_affordable(program, s, example))
        inputs = _first_that_runs(program, affordable, seed)
        if inputs is not None:
            seen.append(example_sizes(program.signature, inputs))
            found.append(inputs)
    return found


def _is_affordable(program: Program, sizes: Mapping[str, int], example: Mapping[str, int]) -> bool:
    """Counted, not timed, so that two runs look at the same sizes."""
    weights = sum(t.numel() for t in program.state.values() if t.is_floating_point())
    elements = _elements(program.signature, sizes)
    return max(weights, 1) * elements <= CHEAP or elements <= MOST * _elements(
        program.signature, example
    )


def _elements(signature: Signature, sizes: Mapping[str, int]) -> int:
    return sum(
        math.prod(sizes[d] if isinstance(d, str) else d for d in spec.shape)
        for spec in signature.inputs
    )


def _first_that_runs(
    program: Program, candidates: Iterable[dict[str, int]], seed: int
) -> tuple[Tensor, ...] | None:
    """Inputs of the first sizes at which the program gives numbers, or else of those it takes."""
    found = None
    specs = program.signature.inputs
    for sizes in candidates:
        drawn = synthetic_inputs(program.signature, sizes, torch.Generator().manual_seed(seed))
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


def other_sizes(
    signature: Signature,
    sizes: Mapping[str, int],
    changes: Iterable[tuple[Change, Change]] = OTHER,
    least: int = 1,
) -> Iterator[dict[str, int]]:
    """Sizes of the dynamic dimensions within their bounds, stepped by `changes` from `sizes`.

    The least size of a step is `least`, or what the bounds allow. Sizes that follow from others do
    so; one that may be 0 is 0 at the least step.
    """
    leading = {spec.shape[0] for spec in signature.inputs if spec.shape}
    made: list[dict[str, int]] = [dict(sizes)]
    for first, rest in changes:
        other = {}
        for dim, size in sizes.items():
            step = first if dim in leading else rest
            other[dim] = _moved(size, signature.dims.get(dim, DimRange()), step, least)
        other = signature.completed(other)
        if other not in made and _follows_within(signature, other):
            made.append(other)
            yield other


def _follows_within(signature: Signature, sizes: Mapping[str, int]) -> bool:
    """Whether the sizes that follow from others are within their bounds."""
    for dim in signature.derived:
        bounds = signature.dims.get(dim, DimRange())
        if dim in sizes and not bounds.min <= sizes[dim] <= (bounds.max or sizes[dim]):
            return False
    return True


def _moved(size: int, bounds: DimRange, change: Change, smallest: int) -> int:
    least = bounds.min
    if change is None:
        return size
    if change == 0:
        return min(max(least, smallest), bounds.max or smallest) if least else 0
    wanted = size + change if isinstance(change, int) else int(size * change)
    if bounds.max is not None:
        wanted = min(wanted, bounds.max)
    for candidate in (wanted, size + 1, size - 1):
        if candidate != size and least <= candidate <= (bounds.max or candidate):
            return candidate
    return size


def resized(tensor: Tensor, spec: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    """The tensor with its dynamic dimensions cut, or repeated from the start."""
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, str):
            places = torch.arange(sizes[dim], device=tensor.device) % max(1, tensor.shape[axis])
            tensor = tensor.index_select(axis, places)
    return tensor


def _outputs(program: Program, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Flat outputs; None where the size does not fit the model itself."""
    try:
        with torch.no_grad():
            # not through the call of the module, which prints what fails
            return tuple(program.running.forward(*inputs))
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
    Inputs that follow from the others (`Signature.defaults`) do so.
    """
    drawn = {
        spec.name: _draw(
            spec, [d if isinstance(d, int) else sizes[d] for d in spec.shape], generator
        )
        for spec in signature.inputs
        if signature.defaults.get(spec.name) not in ("ones", "positions")
    }
    full = with_defaults(signature, drawn)
    return {spec.name: full[spec.name] for spec in signature.inputs}


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
    low = max(2, bounds.min) if bounds.min else 0
    high = max(low, sizes.get(dim, 32))
    if bounds.max is not None:
        low, high = min(low, bounds.max), min(high, bounds.max)
    return int(torch.randint(low, high + 1, (), generator=generator))
