"""New texts from a language model that is shown a few."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.ir.tune.losses import main_output


def continued(
    program: Program, seeds: dict[str, Tensor], count: int, temperature: float,
    random: torch.Generator,
) -> dict[str, Tensor]:  # fmt: skip
    """Texts that a model writes behind all seeds in a row, in an order drawn for each.

    Args:
        program: a language model: `input_ids` to logits (batch, length, words), with a free length.
        seeds: `input_ids` (seeds, length), and other inputs of that shape, which are ones.
        count: of the texts, each as long as a seed.
        temperature: that logits are divided by.
        random: of orders and tokens.

    Raises:
        ModelError: the model is no such one.
    """
    ids = seeds.get("input_ids")
    if ids is None or ids.dim() != 2 or any(t.shape != ids.shape for t in seeds.values()):
        raise ModelError("the generator `base` goes on from token ids, the input `input_ids` "
                         "(batch, length), with a mask at most beside them",
                         fix="Name a function in `generator`.")  # fmt: skip
    length = ids.shape[1]
    orders = [torch.randperm(len(ids), generator=random) for _ in range(count)]
    text = torch.stack([ids[order].flatten() for order in orders])
    place = main_output(program.signature)
    with torch.no_grad():
        for _ in range(length):
            inputs = {n: text if n == "input_ids" else torch.ones_like(text) for n in seeds}
            logits = program.run_flat(program.bind(**inputs))[place]
            if logits.dim() != 3 or logits.shape[:2] != text.shape:
                raise ModelError("the generator `base` needs logits (batch, length, words), and "
                                 f"this model gives {tuple(logits.shape)}",
                                 fix="Name a function in `generator`.")  # fmt: skip
            shares = (logits[:, -1].float() / temperature).softmax(-1)
            text = torch.cat([text, torch.multinomial(shares, 1, generator=random)], 1)
    made = text[:, -length:]
    return {n: made if n == "input_ids" else torch.ones_like(made) for n in seeds}
