"""What of a decoder's outputs is read: the logits behind real tokens, and the cache of these.

At padding a decoder gives numbers too, and each way to run it gives others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.generation.record import Generation
from graphwright.ir.signature import Signature

Flat = tuple[Tensor, ...]


def visible(record: Generation, signature: Signature, inputs: Flat, outputs: Flat) -> Flat:
    """The outputs with zeros at padding, and of the logits each row's last token alone.

    Args:
        record: of the decoder.
        signature: names of inputs and outputs.
        inputs: one tensor per input.
        outputs: one tensor per output; logits of every token, or of the last ones alone.
    """
    given = {spec.name: tensor for spec, tensor in zip(signature.inputs, inputs, strict=True)}
    tokens = given[record.ids].shape[1]
    shown = None if record.mask is None else given[record.mask] != 0
    caches = {name for layer in record.layers for name in (layer.present_key, layer.present_value)}
    found = []
    for spec, tensor in zip(signature.outputs, outputs, strict=True):
        if spec.name in caches and shown is not None:
            tensor = tensor * shown[:, None, :, None].to(tensor)
        elif spec.name == record.logits and tensor.shape[1] == tokens:
            tensor = _last(tensor, None if shown is None else shown[:, -tokens:])
        found.append(tensor)
    return tuple(found)


def _last(logits: Tensor, shown: Tensor | None) -> Tensor:
    """(batch, 1, vocabulary) behind the last token of each row that is no padding."""
    if shown is None:
        return logits[:, -1:]
    last = (shown * torch.arange(shown.shape[1], device=shown.device)).amax(1)
    return logits.gather(1, last[:, None, None].expand(-1, 1, logits.shape[2]))
