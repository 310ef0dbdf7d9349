"""Every block type rebuilt from random blocks, against llama.cpp's own package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from graphwright.ir.files.coded.forms import Blocks, Expanded
from graphwright.ir.files.coded.layout import Layer
from graphwright.ir.files.coded.modules import coded_linear
from graphwright.ir.files.gguf.blocks import CODED, form_of, values_of
from graphwright.ir.files.gguf.reader import Stored
from graphwright.ir.files.gguf.types import NUMBERS, TYPES, TensorType

gguf = pytest.importorskip("gguf")

HALVES = {  # where a block has numbers of half precision
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "TQ2_0": (64,), "TQ1_0": (52,), "IQ2_XS": (0,),
}  # fmt: skip


def random_blocks(name: str, rows: int, columns: int) -> Stored:
    """Blocks of random bytes, whose scales are numbers as weights have."""
    kind: TensorType = TYPES[NUMBERS[name]]
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (rows * columns // kind.block, kind.size), dtype=np.uint8)
    for at in HALVES.get(name, ()):
        scales = generator.normal(0, 0.02, (len(data), 1)).astype(np.float16)
        data[:, at : at + 2] = scales.view(np.uint8)
    if name == "MXFP4":
        data[:, 0] = generator.integers(115, 128, len(data))
    rowed = data.reshape(rows, -1)
    return Stored(kind, (rows, columns), torch.from_numpy(rowed))


def reference(stored: Stored) -> torch.Tensor:
    kind: Any = gguf.GGMLQuantizationType[stored.type.name]
    return torch.from_numpy(gguf.quants.dequantize(stored.data.numpy(), kind))


@pytest.mark.parametrize("name", CODED)
def test_a_weight_is_what_llama_cpp_reads(name: str) -> None:
    stored = random_blocks(name, 6, 512)
    form = form_of(stored)
    assert isinstance(form, Blocks)
    wanted, found = reference(stored), coded_linear(Layer(form)).weight
    assert found.dtype == torch.float32
    assert float((found - wanted).abs().max()) <= 2e-7 * float(wanted.abs().max())


@pytest.mark.parametrize(("name", "first", "high"), [("Q4_0", 2, None), ("Q4_1", 4, None),
                                                      ("Q5_0", 6, 2), ("Q5_1", 8, 4)])  # fmt: skip
def test_codes_are_those_of_the_file(name: str, first: int, high: int | None) -> None:
    stored = random_blocks(name, 4, 64)
    form = form_of(stored)
    assert isinstance(form, Blocks)
    for row, codes in zip(stored.data, form.q, strict=True):
        for block, wanted in zip(row.view(2, -1), codes.view(2, 32), strict=True):
            nibbles = [int(byte) & 15 for byte in block[first:]]
            nibbles += [int(byte) >> 4 for byte in block[first:]]
            if high is not None:
                word = int.from_bytes(bytes(block[high : high + 4].tolist()), "little")
                nibbles = [nibble | (word >> i & 1) << 4 for i, nibble in enumerate(nibbles)]
            assert nibbles == wanted.tolist()


def test_a_minimum_of_whole_steps_is_a_zero_point() -> None:
    stored = random_blocks("Q4_1", 2, 32)
    halves = stored.data.view(2, 20)[:, :4].contiguous().view(torch.float16)
    halves[:, 0], halves[:, 1] = 0.25, -0.75
    stored.data[:, :4] = halves.view(torch.uint8)
    form = form_of(stored)
    assert isinstance(form, Blocks)
    assert form.rest is None
    assert form.zero is not None
    assert form.zero.tolist() == [[3], [3]]


def test_rows_too_long_to_sum_their_blocks_become_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = random_blocks("Q4_K", 2, 512)
    monkeypatch.setattr("graphwright.ir.files.gguf.blocks.MOST_SUMMED", 512 * 15)
    form = form_of(stored)
    assert isinstance(form, Expanded)
    torch.testing.assert_close(form.weight, reference(stored), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_are_views(name: str) -> None:
    data = torch.randint(0, 120, (3, 4 * TYPES[NUMBERS[name]].size), dtype=torch.uint8)
    stored = Stored(TYPES[NUMBERS[name]], (3, 4), data)
    found = values_of(stored)
    assert found is not None
    assert torch.equal(found.float(), reference(stored).view(3, 4))
    assert found.data_ptr() == data.data_ptr()


@pytest.mark.parametrize("name", ["TQ1_0", "IQ2_XS"])
def test_other_blocks_become_floats(name: str) -> None:
    stored = random_blocks(name, 2, 256)
    form = form_of(stored)
    assert isinstance(form, Expanded)
    assert torch.equal(form.weight, reference(stored))
