"""AWQ checkpoints, version gemm: AutoAWQ, and auto-round where it packs so. 4 bits.

qweight (in, out / 8)    eight outputs a word, in the order 0 2 4 6 1 3 5 7
qzeros (groups, out / 8) the same
scales (groups, out)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.forms import Blocks
from graphwright.ir.files.coded.gptq import zero_points
from graphwright.ir.files.coded.layout import Layer, Layout
from graphwright.ir.files.coded.words import from_fields, to_fields

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each of a word's eight nibbles holds, low nibble first."""


class Awq(Layout):
    """A checkpoint of AWQ."""

    name = "AWQ"
    parts = ("qweight", "qzeros", "scales")

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(config, where)
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise self.refuse(
                f"in the form {version!r}", "Save the checkpoint in the version gemm."
            )
        bits = int(config.get("bits", config.get("w_bit", 4)))
        if bits != 4:
            raise self.refuse(f"of {bits} bits")
        self.block = int(config.get("group_size", config.get("q_group_size", 128)))

    def read(self, owner: str, parts: Mapping[str, Tensor]) -> Layer:
        return Layer(read_awq(parts, self.block))


def read_awq(parts: Mapping[str, Tensor], block: int) -> Blocks:
    """A layer of an AWQ checkpoint.

    Args:
        parts: `qweight`, `qzeros`, `scales`.
        block: inputs of a group; -1 for all.
    """
    inputs, out = parts["qweight"].shape[0], parts["scales"].shape[1]
    place = torch.argsort(torch.tensor(ORDER))

    def outputs(words: Tensor) -> Tensor:
        codes = from_fields(words, out, 4).unflatten(-1, (-1, 8))
        turned: Tensor = codes[..., place].flatten(-2).T.contiguous()
        return turned

    return Blocks(
        outputs(parts["qweight"]), parts["scales"].T.contiguous(), outputs(parts["qzeros"]), None,
        4, inputs if block < 1 else block,
    )  # fmt: skip


def write_awq(form: Blocks) -> dict[str, Tensor]:
    """The tensors of a layer.

    Raises:
        ModelError: not 4 bits, reordered inputs, or outputs that do not fill words.
    """
    if form.bits != 4 or form.order is not None:
        raise ModelError("an AWQ checkpoint holds 4 bits, and inputs in their own order")
    if form.shape[0] % 8:
        raise ModelError("the outputs of a layer do not fill 32-bit words, as awq asks")

    def words(codes: Tensor) -> Tensor:
        turned = codes.T.unflatten(-1, (-1, 8))[..., torch.tensor(ORDER)].flatten(-2)
        return to_fields(turned, 4)

    return {
        "qweight": words(form.q),
        "qzeros": words(zero_points(form)),
        "scales": form.scale.T.contiguous(),
    }
