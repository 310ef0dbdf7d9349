"""Is the ONNX model the program? Checked by numbers at three sizes of every dynamic dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from graphwright.ir.check.exact import SMALL_MULTIPLE
from graphwright.ir.check.fidelity import compare
from graphwright.ir.check.precision import roundoff, run_in_double
from graphwright.ir.check.slices import LEAST, is_astray, slice_errors
from graphwright.ir.data.synthetic import example_sizes, other_size_inputs
from graphwright.ir.program import Program

FAR_MULTIPLE = 64.0
"""As the small multiple, on inputs far from the examples: a runtime approximates sigmoids and their
kin by absolute error, so that it loses more where they all but vanish."""

MOST = 0.1
"""Relative error that is never called rounding, whatever float32 itself loses."""


LOST = 1e-2
"""Relative error of one slice of an output that is looked at, however small it is beside others."""


class Differs(Exception):
    """A model that does not compute what the program computes (or does not run at all).

    Attributes:
        inputs: those at which it differs, where it runs.
    """

    def __init__(self, text: str, inputs: tuple[torch.Tensor, ...] | None = None) -> None:
        super().__init__(text)
        self.inputs = inputs


@dataclass(frozen=True)
class Case:
    """Inputs, the program's own outputs for them, and the sizes of the dynamic dimensions.

    `reference` computes the same outputs in float64; None where a float32 result is all that
    they can be compared with.
    `drawn` says how the inputs differ from the examples otherwise; empty when they do not. `usual`
    is then the size of every output on the examples: an output that all but vanishes here (behind
    a sigmoid) need be no more exact than it is there.
    `losses` gives for every output the most that the program's own precision loses of it over this
    and other cases of its kind. One run may lose little by chance: of ten runs of a deep decoder,
    the most lost is ten times the least.
    """

    inputs: tuple[torch.Tensor, ...]
    expected: tuple[torch.Tensor, ...]
    sizes: dict[str, int]
    reference: Callable[[], tuple[torch.Tensor, ...]] | None = None
    drawn: str = ""
    usual: tuple[float, ...] = ()
    losses: Callable[[], tuple[float, ...]] | None = None

    def __str__(self) -> str:
        if self.drawn:
            return f"with the example inputs {self.drawn}"
        return f"at {self.sizes or 'the example sizes'}"


def check_cases(program: Program) -> list[Case]:
    """The example inputs, few samples, and far more, where a size is free.

    Two samples are few: a single one is tried when the model is done (`smallest.py`), for a model
    that is wrong only there is handed over for sizes of 2 or more.
    """
    cases = [program.examples, *other_size_inputs(program, seed=0, least=2)]
    return [case_of(program, inputs) for inputs in cases]


@torch.no_grad()
def case_of(program: Program, inputs: tuple[torch.Tensor, ...]) -> Case:
    """A case with what the program computes for `inputs`, one tensor per input."""
    sizes = example_sizes(program.signature, inputs)
    exact = cache(partial(run_in_double, program, inputs))
    return Case(inputs, program.run_flat(inputs), sizes, exact)


def tolerance_for(program: Program, tolerance: float) -> float:
    """The bound against the program's own outputs: at least the rounding of its coarsest type."""
    return max(tolerance, roundoff(program) / 2)


def compare_outputs(
    program: Program,
    case: Case,
    actual: Sequence[torch.Tensor],
    bound: float,
    multiple: float | None = None,
) -> float:
    """Largest relative error over the outputs, against the program's own.

    Beyond `bound` an output is right as well if it is as near to the program in float64 as the
    program's own output is, up to a small multiple: some nets lose digits however they are run.

    Args:
        program: whose outputs they are.
        case: what is expected, and how it was computed.
        actual: the outputs of the model.
        bound: relative error that needs no look in float64.
        multiple: of the loss of `case.expected`, when not that of the case.

    Raises:
        Differs: names the first output that is off, with its error.
    """
    worst = 0.0
    exact: tuple[torch.Tensor, ...] | None = None
    specs = program.signature.outputs
    for index, (spec, a, b) in enumerate(zip(specs, case.expected, actual, strict=True)):
        where = f"output {spec.name!r} {case}"
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Differs(
                f"{where} is {tuple(b.shape)} {b.dtype}, the program's {tuple(a.shape)} {a.dtype}",
                case.inputs,
            )
        error = compare(a, b)
        is_near = error.within(bound) and (bound > LOST or not _has_lost_slice(a, b, case))
        if not is_near and not _is_vanishing(case, index, a, b, bound):
            exact = exact or (case.reference() if case.reference else None)
            times = multiple or (FAR_MULTIPLE if case.drawn else SMALL_MULTIPLE)
            known = case.losses()[index] if case.losses else 0.0
            if exact is None or not is_as_near(exact[index], a, b, roundoff(program), times, known):
                raise Differs(
                    f"{where} differs: relative error {error.relative:.3g}, allowed {bound:.3g}"
                    + ("" if exact is None else _in_double(exact[index], a, b)),
                    case.inputs,
                )
        worst = worst if error.blank else max(worst, error.relative)
    return worst


def _has_lost_slice(a: torch.Tensor, b: torch.Tensor, case: Case) -> bool:
    """Whether a channel or a sample is off by much, which is too small to show in the whole."""
    errors = slice_errors(a, b, LEAST)
    return not case.drawn and bool((errors > LOST).any())


def _is_vanishing(case: Case, index: int, a: torch.Tensor, b: torch.Tensor, bound: float) -> bool:
    """Whether an output far from the examples is off by less than the bound allows on these."""
    if not case.usual or not b.isfinite().all():
        return False
    return float((a.double() - b.double()).square().mean().sqrt()) <= bound * case.usual[index]


def is_as_near(
    exact: torch.Tensor,
    own: torch.Tensor,
    actual: torch.Tensor,
    unit: float,
    multiple: float = SMALL_MULTIPLE,
    known: float = 0.0,
) -> bool:
    """Whether `actual` is as near to `exact` as `own` is, up to a small multiple.

    Args:
        exact: the program's value in float64.
        own: its value in its own precision, whose roundoff is `unit`.
        actual: what the model gives, of the same shape.
        multiple: of what `own` loses.
        known: loss that is known of other runs, where it is larger.
    """
    loss, error = max(known, compare(exact, own).relative), compare(exact, actual)
    return error.within(min(MOST, multiple * max(loss, unit / 2))) and not is_astray(
        exact, own, actual, LOST
    )


def _in_double(exact: torch.Tensor, own: torch.Tensor, actual: torch.Tensor) -> str:
    error, loss = compare(exact, actual).relative, compare(exact, own).relative
    return f"; against float64 {error:.3g}, where the program itself loses {loss:.3g}"
