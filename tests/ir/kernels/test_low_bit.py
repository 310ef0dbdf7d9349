"""Products of compressed weights on sizes that fall beside the tiles.

Run by Triton's interpreter where there is no GPU. The reference is the formula in float64, on codes
that were drawn as numbers and packed for the kernel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from graphwright.ir.kernels import codebook_linear, low_bit_linear, tuning
from graphwright.ir.kernels.tuning import Tiles
from graphwright.ir.ops.blocks import pack_codes
from graphwright.ir.ops.codebook import pack_indices
from graphwright.ir.ops.table import levels

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=DEVICE, dtype=dtype)


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Largest error at most `bound` of the largest value."""
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= bound, float(error)


def in_blocks(
    n: int, k: int, bits: int, block: int, has_zero: bool, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
    """(codes, scale, zero_point) as stored, and the weight (n, k) in float64."""
    count = -(-k // block)
    q = randint(2**bits, n, count, block)
    zero = randint(2**bits, n, count, seed=1) if has_zero else torch.full((n, count), 2**bits // 2)
    scale = (randn(n, count, seed=2).abs() + 0.1).to(dtype)
    weight = (q - zero[..., None]).to(DEVICE).double() * scale.double()[..., None]
    packed = pack_codes(q.to(torch.uint8), bits).to(DEVICE)
    zeros = pack_codes(zero.to(torch.uint8), bits).to(DEVICE) if has_zero else None
    return (packed, scale, zeros), weight.flatten(1)[:, :k]


def rest_of(m: int, n: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """bias, low, b, added."""
    return (
        randn(n, seed=3, dtype=dtype),
        randn(m, rank, seed=4, dtype=dtype),
        randn(n, rank, seed=5, dtype=dtype),
        randn(m, n, seed=6, dtype=dtype),
    )


def expected(x: Tensor, weight: Tensor, rest: tuple[Tensor | None, ...]) -> Tensor:
    bias, low, b, added = (None if t is None else t.double() for t in rest)
    y = x.double() @ weight.T
    if bias is not None:
        y = y + bias
    if low is not None and b is not None:
        y = y + low @ b.T
    return y if added is None else y + added


@pytest.mark.parametrize(
    ("m", "n", "k", "bits", "block"),
    [
        (1, 37, 75, 4, 16),
        (1, 21, 130, 2, 32),
        (1, 19, 300, 8, 128),
        (1, 9, 2500, 4, 128),
        (2, 37, 96, 4, 48),  # three pieces share a scale
        (1, 18, 160, 8, 160),  # one scale to a row
        (3, 37, 75, 4, 32),
        (3, 21, 130, 2, 64),
        (17, 70, 300, 8, 64),
        (5, 37, 1100, 4, 64),
        (130, 129, 70, 4, 32),
        (2, 11, 75, 3, 32),  # rebuilt, and so is the next
        (1, 11, 60, 4, 20),
    ],
)
@pytest.mark.parametrize(
    ("has_zero", "dtype"),
    [(True, torch.float32), (False, torch.float32), (True, torch.float16)],
    ids=["zero", "middle", "half"],
)
def test_blocks(
    m: int, n: int, k: int, bits: int, block: int, has_zero: bool, dtype: torch.dtype
) -> None:
    stored, weight = in_blocks(n, k, bits, block, has_zero, dtype)
    x, rest = randn(m, k, seed=9, dtype=dtype), rest_of(m, n, 5, dtype)
    y = low_bit_linear.blocks_linear.launch(x, *stored, *rest, bits, block, "none")
    rebuilt = bits == 3 or block == 20  # then the result is rounded after every step
    assert_near(y, expected(x, weight, rest), (3 if rebuilt else 1) * BOUND[dtype])


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("rank", [0, 1, 70])
def test_every_part_of_the_epilogue(m: int, rank: int) -> None:
    stored, weight = in_blocks(35, 64, 4, 32, True, torch.float32)
    x, everything = randn(m, 64, seed=9), rest_of(m, 35, rank, torch.float32)
    nothing = (None,) * 4
    for given in (nothing, (everything[0], *nothing[1:]), (None, *everything[1:3], None),
                  (*nothing[:3], everything[3]), everything):  # fmt: skip
        y = low_bit_linear.blocks_linear.launch(x, *stored, *given, 4, 32, "relu")
        assert_near(y, expected(x, weight, given).relu(), 1e-6)


@pytest.mark.parametrize("size", [1e-6, 1e12])
def test_inputs_of_any_usual_size(size: float) -> None:
    """The dot product scales its inputs by 2^64 and takes codes for subnormal numbers."""
    stored, weight = in_blocks(8, 64, 4, 32, True, torch.float32)
    x = randn(1, 64, seed=9) * size
    y = low_bit_linear.blocks_linear.launch(x, *stored, *(None,) * 4, 4, 32, "none")
    assert_near(y, x.double() @ weight.T, 1e-6)


@pytest.mark.parametrize(("m", "n", "k"), [(5, 37, 1100), (1, 8, 2200)])
def test_split_over_the_inner_dimension_is_reproducible(m: int, n: int, k: int) -> None:
    stored, weight = in_blocks(n, k, 4, 64, True, torch.float32)
    packed = low_bit_linear.Packed(*stored, 4, 64, 1)
    x, rest = randn(m, k, seed=9), rest_of(m, n, 5, torch.float32)
    epilogue = low_bit_linear.Epilogue.of(*rest, "none")
    results = []
    for _ in range(2):
        y = torch.empty(m, n, device=DEVICE)
        if m == 1:
            low_bit_linear._gemv(x, packed, epilogue, y, Tiles(1, 4, 512, 4, 1, 3))
        else:
            assert low_bit_linear.split_for(m, n, k, Tiles(16, 64, 64, 4, 4)) > 1
            low_bit_linear._gemm(x, packed, epilogue, y, Tiles(16, 64, 64, 4, 4))
        results.append(y)
    assert torch.equal(*results)
    assert_near(results[0], expected(x, weight, rest), 1e-6)


def test_every_candidate_computes_the_same() -> None:
    stored, weight = in_blocks(20, 200, 4, 32, True, torch.float32)
    packed = low_bit_linear.Packed(*stored, 4, 32, 1)
    for m in (1, 4, 12, 200):
        x, rest = randn(m, 200, seed=9), rest_of(m, 20, 5, torch.float32)
        epilogue = low_bit_linear.Epilogue.of(*rest, "none")
        candidates = low_bit_linear._candidates(m, packed)
        assert len(set(candidates)) == len(candidates) > 1
        for tiles in candidates:
            y = torch.full((m, 20), torch.nan, device=DEVICE)
            launch = low_bit_linear._gemv if tiles.block_m <= 4 else low_bit_linear._gemm
            launch(x, packed, epilogue, y, tiles)
            assert_near(y, expected(x, weight, rest), 1e-6)


@pytest.mark.parametrize("form", ["blocks", "table"])
def test_many_tokens_take_a_weight_that_is_rebuilt(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_bit_linear, "DENSE_FROM", 8)
    monkeypatch.setattr(low_bit_linear, "linear", None)
    x, rest = randn(2, 4, 64, seed=9), rest_of(8, 21, 5, torch.float32)
    shaped = [t if t.shape[0] == 21 else t.view(2, 4, -1) for t in rest]
    if form == "blocks":
        stored, weight = in_blocks(21, 64, 4, 32, True, torch.float32)
        y = low_bit_linear.blocks_linear.launch(x, *stored, *shaped, 4, 32, "relu")
    else:
        (codes, scale), weight = in_table("nf4", 21, 64, 64)
        y = low_bit_linear.table_linear.launch(x, codes, scale, *shaped, "nf4", 64, 21, "relu")
    assert y.shape == (2, 4, 21)
    assert_near(y.view(8, 21), expected(x.view(8, 64), weight, rest).relu(), 1e-6)


def test_float32_that_may_not_be_rounded_takes_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit_linear, "_is_exact", lambda x: True)
    monkeypatch.setattr(low_bit_linear, "_gemm", None)
    stored, weight = in_blocks(21, 64, 4, 32, True, torch.float32)
    for m in (3, 4, 5):
        x, rest = randn(m, 64, seed=9), rest_of(m, 21, 5, torch.float32)
        y = low_bit_linear.blocks_linear.launch(x, *stored, *rest, 4, 32, "none")
        assert_near(y, expected(x, weight, rest), 1e-6)


def in_table(name: str, n: int, k: int, block: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    q = randint(16, n * k)
    scale = randn(n * k // block, seed=2).abs() + 0.1
    weight = levels(name).double()[q].to(DEVICE) * scale.double().repeat_interleave(block)
    codes = ((q[0::2] << 4) | q[1::2]).to(torch.uint8).to(DEVICE)  # the first one is high
    return (codes, scale), weight.view(n, k)


@pytest.mark.parametrize(
    ("m", "n", "k", "block", "name"),
    [
        (1, 37, 128, 64, "nf4"),
        (2, 9, 96, 32, "fp4"),
        (3, 21, 192, 64, "fp4"),
        (17, 5, 256, 256, "nf4"),
    ],
)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_tables(m: int, n: int, k: int, block: int, name: str, dtype: torch.dtype) -> None:
    (codes, scale), weight = in_table(name, n, k, block)
    x, rest = randn(m, k, seed=9, dtype=dtype), rest_of(m, n, 5, dtype)
    y = low_bit_linear.table_linear.launch(x, codes, scale, *rest, name, block, n, "none")
    assert_near(y, expected(x, weight, rest), BOUND[dtype])


@pytest.mark.parametrize(
    ("m", "rows", "k", "bits", "width", "size", "groups"),
    [
        (1, 37, 75, 12, 4, 3000, 1),
        (2, 64, 300, 8, 8, 256, 1),
        (3, 30, 96, 16, 6, 300, 3),
        (5, 33, 40, 5, 2, 30, 4),
    ],
)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_codebooks(
    m: int, rows: int, k: int, bits: int, width: int, size: int, groups: int, dtype: torch.dtype
) -> None:
    index = randint(size, -(-rows // width), k)
    books = randn(groups, size, width, seed=1, dtype=dtype)
    group = torch.arange(k) * groups // k
    vectors = books.double()[group[None, :], index]  # (vectors, k, width)
    weight = vectors.transpose(1, 2).reshape(-1, k)[:rows]
    x, rest = randn(m, k, seed=9, dtype=dtype), rest_of(m, rows, 5, dtype)
    y = codebook_linear.codebook_linear.launch(
        x, pack_indices(index, bits).to(DEVICE), books, *rest, bits, rows, "none"
    )
    assert_near(y, expected(x, weight, rest), BOUND[dtype])


def test_inputs_that_are_not_contiguous() -> None:
    stored, weight = in_blocks(35, 64, 4, 32, True, torch.float32)
    bias, low, b, added = rest_of(6, 35, 5, torch.float32)
    x = randn(64, 6, seed=9).T
    wide = torch.cat([added, added], 1)[:, :35].view(3, 2, 35)
    given = (bias, low.T.contiguous().T.view(3, 2, 5), b.T.contiguous().T, wide)
    y = low_bit_linear.blocks_linear.launch(x.view(3, 2, 64), *stored, *given, 4, 32, "none")
    assert_near(y.view(6, 35), expected(x, weight, (bias, low, b, added)), 1e-6)


def test_codes_that_begin_in_the_middle_of_a_word() -> None:
    (codes, scale, zero), weight = in_blocks(9, 64, 4, 32, True, torch.float32)
    storage = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=DEVICE)
    moved = storage[1:].view(codes.shape).copy_(codes)
    for m in (1, 3):
        x = randn(m, 64, seed=9)
        rest = (None,) * 4
        y = low_bit_linear.blocks_linear.launch(x, moved, scale, zero, *rest, 4, 32, "none")
        assert_near(y, x.double() @ weight.T, 1e-6)


def fits(**changed: Any) -> bool:
    stored, _ = in_blocks(8, 64, 4, 32, True, torch.float32)
    given = dict(zip(("x", "codes", "scale", "zero"), (randn(2, 64), *stored), strict=True))
    given |= {"bias": None, "low": None, "b": None, "added": None} | changed
    return bool(low_bit_linear.blocks_linear.fits(*given.values(), 4, 32, "none"))


def test_what_no_kernel_takes_is_left_to_eager() -> None:
    assert fits()
    assert fits(low=randn(2, 0), b=randn(8, 0))
    assert not fits(x=randn(2, 64).double())
    assert not fits(x=randn(0, 64))
    assert not fits(scale=randn(8, 2).double())
    assert not fits(bias=randn(8).half())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("m", [1, 2, 4, 16, 64, 300, 1000])
def test_bfloat16_on_a_gpu(m: int) -> None:
    stored, weight = in_blocks(1000, 1500, 4, 32, True, torch.bfloat16)
    x, rest = randn(m, 1500, dtype=torch.bfloat16), rest_of(m, 1000, 16, torch.bfloat16)
    y = low_bit_linear.blocks_linear.launch(x, *stored, *rest, 4, 32, "none")
    assert_near(y, expected(x, weight, rest), 1.6e-2)
    again = low_bit_linear.blocks_linear.launch(x, *stored, *rest, 4, 32, "none")
    assert torch.equal(y, again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tiles_are_measured_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    monkeypatch.setenv(tuning.SWITCH, "1")
    stored, weight = in_blocks(1000, 1024, 4, 128, True, torch.float16)
    x = randn(1, 1024, dtype=torch.float16)
    rest = (None,) * 4
    y = low_bit_linear.blocks_linear.launch(x, *stored, *rest, 4, 128, "none")
    assert_near(y, x.double() @ weight.T, 1e-3)
    (file,) = tmp_path.iterdir()
    assert len(tuning.Cache(file).choices) == 1
