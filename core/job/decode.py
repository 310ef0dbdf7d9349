"""How far the artifact of a decoder is from the original, through its own cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphwright.ir.errors import ContractError, LoweringError

if TYPE_CHECKING:
    from torch import Tensor

    from graphwright.backends.base import Compiled
    from graphwright.ir.check.fidelity import Fidelity
    from graphwright.ir.check.verify import Checker
    from graphwright.ir.generation.record import Generation
    from graphwright.ir.generation.runner import Runner


def artifact_fidelity(checker: Checker, lowered: Compiled) -> Fidelity:
    """Distance of an artifact's outputs from the original's, on the checker's inputs.

    Of a decoder, of the logits behind every text: an artifact may give no others, and keep its
    cache in another way.
    """
    if checker.decode is None:
        return checker.total(lowered.run_flat)
    import torch

    from graphwright.ir.check.decode import at_once, distance, runner_of
    from graphwright.ir.check.fidelity import merge

    decode = checker.decode
    before, after = runner_of(decode.program, decode.record), runner_for(checker, lowered)
    parts = [distance(decode.first, at_once(after, decode.record, decode.ids))]
    for inputs in checker.inputs[: checker.measured]:
        ids, counts = _texts(inputs, [s.name for s in decode.program.signature.inputs],
                             decode.record)  # fmt: skip
        logits = []
        for runner in (before, after):
            runner.start(len(ids), ids.shape[1])
            with torch.no_grad():
                logits.append([runner.run(ids, counts)])
        parts.append(distance(*logits))
    return merge(parts)


def _texts(
    inputs: tuple[Tensor, ...], names: list[str], record: Generation
) -> tuple[Tensor, Tensor]:
    """Token ids with the padding on the right, and the number of tokens of each row."""
    import torch

    ids = inputs[names.index(record.ids)]
    if record.mask is None:
        return ids, torch.full((len(ids),), ids.shape[1])
    shown = inputs[names.index(record.mask)][:, -ids.shape[1] :] != 0
    order = torch.argsort((~shown).long(), dim=1, stable=True)
    return ids.gather(1, order), shown.sum(1).clamp_min(1)


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
