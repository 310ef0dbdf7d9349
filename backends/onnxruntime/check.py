"""Is the ONNX model the program? Checked by numbers at two sizes of every dynamic dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from graphwright.ir.check.fidelity import compare
from graphwright.ir.program import Program
from graphwright.ir.signature import TensorSpec

HALF = {"float16": 2**-10, "bfloat16": 2**-7}


class Differs(Exception):
    """A model that does not compute what the program computes (or does not run at all)."""


@dataclass(frozen=True)
class Case:
    """Inputs, the program's own outputs for them, and the sizes of the dynamic dimensions."""

    inputs: tuple[torch.Tensor, ...]
    expected: tuple[torch.Tensor, ...]
    sizes: dict[str, int]


def check_cases(program: Program) -> list[Case]:
    """The example inputs, and the same inputs cut or repeated to another size of every dimension.

    Sizes that the program itself does not take (a U-Net wants multiples of its stride) are passed
    over for others; when none works the examples stand alone.
    """
    with torch.no_grad():
        cases = [Case(program.examples, program.run_flat(program.examples), _sizes(program))]
        for sizes in _other_sizes(program):
            inputs = tuple(
                _resized(tensor, spec, sizes)
                for tensor, spec in zip(program.examples, program.signature.inputs, strict=True)
            )
            try:
                expected = program.run_flat(inputs)
            except (RuntimeError, IndexError, ValueError):
                continue
            return [*cases, Case(inputs, expected, sizes)]
    return cases


def _sizes(program: Program) -> dict[str, int]:
    return {
        dim: size
        for tensor, spec in zip(program.examples, program.signature.inputs, strict=True)
        for size, dim in zip(tensor.shape, spec.shape, strict=True)
        if isinstance(dim, str)
    }


def _other_sizes(program: Program) -> Iterator[dict[str, int]]:
    """Candidates, all dimensions changed at once: odd steps first, then doubled and halved."""
    here = _sizes(program)
    if not here:
        return
    changes: tuple[Callable[[int], int], ...] = (
        lambda n: n + 3,
        lambda n: n - 1,
        lambda n: 2 * n,
        lambda n: n // 2,
    )
    for change in changes:
        sizes = {}
        for dim, size in here.items():
            bounds = program.signature.dims.get(dim)
            wanted = change(size)
            low = bounds.min if bounds else 1
            high = bounds.max if bounds and bounds.max is not None else wanted
            sizes[dim] = max(low, min(high, wanted), 1)
        if all(sizes[dim] != here[dim] for dim in here if not _is_pinned(program, dim)):
            yield sizes


def _is_pinned(program: Program, dim: str) -> bool:
    bounds = program.signature.dims.get(dim)
    return bounds is not None and bounds.min == bounds.max


def _resized(tensor: torch.Tensor, spec: TensorSpec, sizes: dict[str, int]) -> torch.Tensor:
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, str) and dim in sizes:
            places = torch.arange(sizes[dim]) % tensor.shape[axis]
            tensor = tensor.index_select(axis, places)
    return tensor


def tolerance_for(program: Program, tolerance: float) -> float:
    """The bound for a program: float32's, or as much coarser as its coarsest float type is."""
    names = {str(t.dtype).removeprefix("torch.") for t in program.state.values()}
    names |= {spec.dtype for spec in program.signature.outputs}
    return tolerance * max([HALF.get(name, 2**-23) for name in names] or [2**-23]) / 2**-23


def compare_outputs(
    program: Program, case: Case, actual: Sequence[torch.Tensor], bound: float
) -> float:
    """Largest relative error over the outputs.

    Raises:
        Differs: names the first output that is off, with its error.
    """
    worst = 0.0
    for spec, a, b in zip(program.signature.outputs, case.expected, actual, strict=True):
        where = f"output {spec.name!r} at {case.sizes or 'the example sizes'}"
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Differs(
                f"{where} is {tuple(b.shape)} {b.dtype}, the program's {tuple(a.shape)} {a.dtype}"
            )
        error = compare(a, b)
        if error.broken or not error.relative <= bound:
            raise Differs(
                f"{where} differs: relative error {error.relative:.3g}, allowed {bound:.3g}"
            )
        worst = max(worst, error.relative)
    return worst
