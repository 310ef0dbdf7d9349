"""GPTQ checkpoints: AutoGPTQ, GPTQModel, and auto-round where it packs as they do.

qweight (in * bits / 32, out)     a string of bits along the inputs (in planes: gptq_p)
qzeros (groups, out * bits / 32)  likewise along the outputs, less one in the first version
scales (groups, out)
g_idx (in)                        the group of every input; absent or sorted without act order
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.forms import Blocks
from graphwright.ir.files.coded.layout import Layer, Layout, group_order
from graphwright.ir.files.coded.words import bytes_of, from_planes, from_string, to_string

VERSIONS = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}
"""Number that stored zero points are less by, for every `checkpoint_format`."""

PLANED = (5, 6, 7)
"""Bits that GPTQModel stores in planes always; auto-round does not."""

_REGULAR = (2, 4, 8)
"""Bits at which no code crosses a word: GPTQModel counts whole words of zero points there."""


class Gptq(Layout):
    """A checkpoint of GPTQ."""

    name = "GPTQ"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(config, where)
        self.version = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        if self.version not in VERSIONS:
            raise self.refuse(f"in the form {self.version!r}")
        quantizer = str((config.get("meta") or {}).get("quantizer", ""))
        self.counts_words = "gptqmodel" in quantizer
        self.planes: tuple[int, ...] = PLANED
        if "bits" not in config:
            raise self.refuse("whose description names no bits")
        self._wrapped = 0

    def read(self, owner: str, parts: Mapping[str, Tensor]) -> Layer:
        bits, block = self.grid(owner)
        is_planes = self.version == "gptq_p" or bits in self.planes
        unpack = from_planes if is_planes else from_string
        form = read_gptq(
            parts, bits, block, unpack, offset=VERSIONS[self.version],
            counts_words=self.counts_words and bits in _REGULAR,
        )  # fmt: skip
        if VERSIONS[self.version] and not self.counts_words and form.zero is not None:
            self._wrapped += int((form.zero == 0).sum())
        return Layer(form)

    def remarks(self) -> list[str]:
        if not self._wrapped:
            return super().remarks()
        return [*super().remarks(),
                f"{self._wrapped} zero points are stored as -1 and read as 0; tools differ on "
                "them, and some wrote their neighbours wrong"]  # fmt: skip

    def grid(self, owner: str) -> tuple[int, int]:
        """Bits and group size of a layer; `dynamic` gives some their own, the first match first."""
        bits, block = self.config["bits"], self.config.get("group_size", 128)
        for pattern, own in (self.config.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("+:"), owner) and isinstance(own, Mapping):
                bits, block = own.get("bits", bits), own.get("group_size", block)
                break
        return int(bits), int(block)


def read_gptq(parts: Mapping[str, Tensor], bits: int, block: int,
              unpack: Callable[[Tensor, int, int], Tensor] = from_string, *, offset: int,
              counts_words: bool = False) -> Blocks:  # fmt: skip
    """A layer of a GPTQ checkpoint.

    A stored zero point of -1 stands for 0. It is kept modulo 2^bits by most tools; GPTQModel takes
    one from every code of a word in one subtraction, so that it borrows from the next code, and
    its own loader adds them back.

    Args:
        parts: `qweight`, `qzeros`, `scales`, and `g_idx` where inputs were reordered.
        bits: 2 to 8.
        block: inputs of a group; -1 for all.
        unpack: how codes lie in words.
        offset: what stored zero points are less by.
        counts_words: the file was written by GPTQModel.
    """
    qweight, scales = parts["qweight"], parts["scales"]
    inputs, out = qweight.shape[0] * qweight.itemsize * 8 // bits, qweight.shape[1]
    block = inputs if block < 1 else block
    q = unpack(qweight.T.contiguous(), inputs, bits)
    stored = parts["qzeros"]
    if offset and counts_words:
        ones = sum(1 << place for place in range(0, 32, bits))
        words = bytes_of(stored).view(torch.int32).long() + ones
        zero = from_string(words.to(torch.int32), out, bits)
    else:
        zero = unpack(stored, out, bits)
        zero = ((zero.to(torch.int16) + offset) & (2**bits - 1)).to(torch.uint8)
    order = group_order(parts.get("g_idx"), inputs, block)
    q = q if order is None else q[:, order]
    is_middle = bool((zero == 1 << (bits - 1)).all())
    return Blocks(q, scales.T.contiguous(), None if is_middle else zero.T.contiguous(), order, bits,
                  block)  # fmt: skip


def write_gptq(form: Blocks, *, version: str = "gptq") -> dict[str, Tensor]:
    """The tensors of a layer.

    Args:
        form: of the weight.
        version: `gptq`, or `gptq_v2`, which alone can say a zero point of 0 to every loader.

    Raises:
        ModelError: sizes that do not fill words, or bits that GPTQ has no string of.
    """
    bits = form.bits
    out, inputs = form.shape
    if bits not in (2, 3, 4, 8):
        raise ModelError(f"a GPTQ checkpoint holds 2, 3, 4 or 8 bits, and not {bits}")
    for size, what in ((out, "outputs"), (inputs, "inputs")):
        if size * bits % 32:
            raise ModelError(f"the {what} of a layer do not fill 32-bit words, as gptq asks")
    back = None if form.order is None else torch.argsort(form.order)
    q = form.q if back is None else form.q[:, back]
    zero = zero_points(form).to(torch.int16) - VERSIONS[version]
    groups = torch.arange(inputs) // form.block
    return {
        "qweight": to_string(q, bits).T.contiguous(),
        "qzeros": to_string((zero & (2**bits - 1)).to(torch.uint8).T.contiguous(), bits),
        "scales": form.scale.T.contiguous(),
        "g_idx": (groups if back is None else groups[back]).to(torch.int32),
    }


def zero_points(form: Blocks) -> Tensor:
    """(out, groups) uint8, also where the form leaves them out."""
    if form.zero is not None:
        return form.zero
    return torch.full(tuple(form.scale.shape), 1 << (form.bits - 1), dtype=torch.uint8)
