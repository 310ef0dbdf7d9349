"""Checks a pass that makes another function: against what it says this is, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from graphwright.ir.check.fidelity import Fidelity, compare, merge
from graphwright.ir.check.precision import run_in_double, same_draws, widened
from graphwright.ir.data.synthetic import other_size_inputs
from graphwright.ir.errors import ContractError
from graphwright.ir.program import Program

Named = Mapping[str, Tensor]
Run = Callable[[Named], Named]
"""Named inputs of a program to its named outputs."""

Expected = Callable[[Program, Run, Named], Named]
"""What a pass says that its result computes: out of runs of the program before."""

CLOSE = 1e-9
"""Relative error in float64 that rounding explains."""


def runner(program: Program, *, wide: bool) -> Run:
    """A program by names; in float64 where `wide`."""
    names = [spec.name for spec in program.signature.inputs]
    outputs = [spec.name for spec in program.signature.outputs]

    def run(given: Named) -> Named:
        inputs = tuple(given[name] for name in names)
        with same_draws():
            found = run_in_double(program, inputs) if wide else program.run_flat(inputs)
        return dict(zip(outputs, found, strict=True))

    return run


def restated_inputs(program: Program) -> list[tuple[Tensor, ...]]:
    """The examples, and inputs of other sizes."""
    return [program.examples, *other_size_inputs(program, 0)]


def check_restated(before: Program, after: Program, by: str, expected: Expected) -> Fidelity:
    """Compares the program behind a pass with what the pass says it is.

    Raises:
        ContractError: an output differs by more than rounding, is missing, or is not said.
    """
    ours, theirs = runner(after, wide=True), runner(before, wide=True)
    found = []
    for inputs in restated_inputs(after):
        names = [spec.name for spec in after.signature.inputs]
        given = dict(zip(names, inputs, strict=True))
        wide = {name: widened(tensor) for name, tensor in given.items()}
        want, got = expected(after, theirs, wide), ours(given)
        if set(want) != set(got):
            raise ContractError(f"{by} made the outputs {sorted(got)}, and says {sorted(want)}")
        for name, value in got.items():
            error = compare((want[name],), (value,))
            if not error.within(CLOSE):
                raise ContractError(
                    f"{by} broke its contract: the output {name!r} is off by {error.relative:.3g}",
                    details=(f"inputs of the sizes {[tuple(t.shape) for t in inputs]}",),
                )
            found.append(error)
    return merge(found)


def flat(run: Run, program: Program, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a runner gives, in the order of a program's inputs and outputs."""
    names = [spec.name for spec in program.signature.inputs]
    found = run(dict(zip(names, inputs, strict=True)))
    return tuple(found[spec.name] for spec in program.signature.outputs)


def restated_run(expected: Expected, after: Program, run: Run) -> Run:
    """The runner of what a pass says, out of the runner of the program before."""
    return lambda given: expected(after, run, given)
