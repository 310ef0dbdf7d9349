"""Running a decoder whose rows lie compact in its cache on the inputs of its program.

The program takes any mask: padding on the left, holes, several tokens on the pasts of a batch. The
kernel takes rows without holes. So each row is run alone on what its mask shows, and its results
are put back where the program has them; zeros stand at what is padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphwright.ir.generation.last_logits import has_all_logits
from graphwright.ir.generation.record import Generation
from graphwright.ir.signature import Signature

Flat = tuple[Tensor, ...]


def takes_whole(record: Generation, signature: Signature, inputs: Flat) -> bool:
    """Whether the kernel computes a batch as it is: a prompt or single tokens, without holes."""
    given = _named(signature, inputs)
    assert record.mask is not None
    ids, mask = given[record.ids], given[record.mask]
    tokens, total = ids.shape[1], mask.shape[1]
    if not bool((mask != 0).all()):
        shown = mask != 0
        is_compact = bool((shown[:, 1:] <= shown[:, :-1]).all() and shown[:, 0].all())
        return tokens == total and is_compact
    return tokens in (1, total) or len(ids) == 1


def run_by_row(
    run: Callable[[Flat], Flat], record: Generation, signature: Signature, inputs: Flat
) -> Flat:
    """Flat outputs of the program, each row computed alone.

    Args:
        run: the model, on a batch of one without padding.
        record: of the decoder.
        signature: of the model.
        inputs: one tensor per input of the program.
    """
    given = _named(signature, inputs)
    assert record.mask is not None
    shown = given[record.mask] != 0
    past = shown.shape[1] - given[record.ids].shape[1]
    shown[~shown[:, past:].any(1), past] = True  # a row of padding alone has a token to run
    has_all = has_all_logits(signature, record)
    results: dict[str, list[Tensor]] = {spec.name: [] for spec in signature.outputs}
    for row in range(len(shown)):
        slots = shown[row].nonzero()[:, 0]
        old, new = slots[slots < past], slots[slots >= past] - past
        outputs = run(_alone(record, signature, given, row, old, new))
        for spec, tensor in zip(signature.outputs, outputs, strict=True):
            if spec.name in record.present:
                wide = tensor.new_zeros((*tensor.shape[:2], shown.shape[1], tensor.shape[3]))
                wide[:, :, shown[row]] = tensor
            elif spec.name == record.logits and has_all:
                wide = tensor.new_zeros((1, shown.shape[1] - past, tensor.shape[2]))
                wide[:, new] = tensor
            else:
                wide = tensor
            results[spec.name].append(wide)
    return tuple(torch.cat(results[spec.name]) for spec in signature.outputs)


def _alone(
    record: Generation, signature: Signature, given: dict[str, Tensor], row: int,
    old: Tensor, new: Tensor,
) -> Flat:  # fmt: skip
    made = []
    for spec in signature.inputs:
        tensor = given[spec.name][row : row + 1]
        if spec.name == record.mask:
            tensor = torch.ones(1, len(old) + len(new), dtype=tensor.dtype)
        elif spec.name in (record.ids, record.positions):
            tensor = tensor[:, new]
        elif spec.name in record.past:
            tensor = tensor[:, :, old]
        made.append(tensor)
    return tuple(made)


def _named(signature: Signature, inputs: Flat) -> dict[str, Tensor]:
    return {spec.name: tensor for spec, tensor in zip(signature.inputs, inputs, strict=True)}
