"""Checks that the artifact of a decoder says the same token by token as at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphwright.ir.errors import ContractError, LoweringError

if TYPE_CHECKING:
    from graphwright.backends.base import Compiled
    from graphwright.ir.check.verify import Checker


def decode_error(checker: Checker, lowered: Compiled | None) -> float | None:
    """Of a decoder with a cache: what its artifact gives in steps against at once.

    Raises:
        LoweringError: another text.
    """
    from graphwright.ir.check.precision import roundoff
    from graphwright.ir.generation.concat import ConcatRunner

    if checker.decode is None or lowered is None:
        return checker.decode_error
    record, signature = checker.decode.record, lowered.signature
    has_own = lowered.generation is not None
    runner = lowered.runner() if has_own else ConcatRunner(record, signature, lowered.run_flat)
    try:
        return checker.decode.hold(runner, roundoff(checker.program), lowered.backend)
    except ContractError as failure:
        raise LoweringError(failure.message, details=failure.details) from failure
