"""Artifacts of decoders: checked through their own cache, and timed on a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphwright.ir.errors import ContractError, LoweringError

if TYPE_CHECKING:
    from torch import Tensor

    from graphwright.backends.base import Compiled
    from graphwright.ir.check.verify import Checker
    from graphwright.ir.generation.runner import Runner
    from graphwright.ir.program import Program


def timed_inputs(program: Program) -> tuple[Tensor, ...]:
    """Inputs of a call that is timed: the examples; of a decoder their tokens as a prompt."""
    from graphwright.ir.generation.record import Generation

    record = Generation.of(program)
    if record is None or record.kind != "decoder":
        return program.examples
    names = [spec.name for spec in program.signature.inputs]
    return program.bind(**{record.ids: program.examples[names.index(record.ids)]})


def runner_for(checker: Checker, lowered: Compiled) -> Runner:
    """The artifact's own runner, or one over its calls where the backend has none."""
    from graphwright.ir.generation.concat import ConcatRunner

    assert checker.decode is not None
    if lowered.generation is not None:
        return lowered.runner()
    return ConcatRunner(checker.decode.record, lowered.signature, lowered.run_flat)


def decode_error(checker: Checker, lowered: Compiled | None) -> float | None:
    """Of a decoder with a cache: what its artifact gives in steps against at once.

    Raises:
        LoweringError: another text.
    """
    from graphwright.ir.check.precision import roundoff

    if checker.decode is None or lowered is None:
        return checker.decode_error
    try:
        unit = roundoff(checker.program)
        return checker.decode.hold(runner_for(checker, lowered), unit, lowered.backend)
    except ContractError as failure:
        raise LoweringError(failure.message, details=failure.details) from failure
