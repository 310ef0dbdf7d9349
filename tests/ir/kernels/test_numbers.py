"""Kernels on sizes that fall beside the tiles, strided inputs, and offsets beyond 32 bits.

Run by Triton's interpreter where there is no GPU. The reference is the formula in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from graphwright.ir.kernels import activation, int8_linear, norm  # noqa: E402
from graphwright.ir.ops import OPS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=DEVICE, dtype=dtype)


def codes(n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8).to(DEVICE)


def assert_near(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Largest error at most `bound` of the largest value."""
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= bound, float(error)


@pytest.mark.parametrize("columns", [1, 37, 1023, 1025, 2500])
def test_bias_act_with_rows_longer_than_a_block(columns: int) -> None:
    x, bias = randn(3, columns), randn(columns, seed=1)
    y = activation.bias_act.launch(x, bias, "gelu")
    assert_near(y, torch.nn.functional.gelu((x + bias).double()), 3e-7)


def test_gated_act_reads_halves_of_a_packed_tensor_in_place() -> None:
    gate, up = randn(5, 2 * 1100).chunk(2, dim=1)
    y = activation.gated_act.launch(gate, up, "silu")
    assert y.is_contiguous()
    assert_near(y, torch.nn.functional.silu(gate.double()) * up.double(), 3e-7)


def test_scale_mask_keeps_minus_infinity() -> None:
    x = randn(2, 3, 5, 7)
    mask = torch.full((5, 7), -torch.inf, device=DEVICE).triu(1)
    y = activation.scale_mask.launch(x, mask, 0.5)
    assert torch.equal(y, x * 0.5 + mask)


@pytest.mark.parametrize("columns", [1, 75, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_add_layer_norm_normalizes_the_rounded_sum(columns: int, dtype: torch.dtype) -> None:
    x, residual = randn(3, columns, dtype=dtype) * 3 + 10, randn(3, columns, seed=1, dtype=dtype)
    y, total = norm.add_layer_norm.launch(x, residual, None, None, 1e-5)
    assert torch.equal(total, x + residual)
    expected = torch.nn.functional.layer_norm((x + residual).double(), (columns,), eps=1e-5)
    # one column: the result is 0 and the bound is absolute
    error = (y.double() - expected).abs().max()
    assert error <= (2e-3 if dtype == torch.float16 else 5e-6)


def test_rows_that_do_not_fit_in_registers_are_left_to_eager() -> None:
    fits = OPS["rms_norm"].load_kernel().fits
    assert fits(randn(1, norm.WIDEST_ROW), None, 1e-6)
    assert not fits(randn(1, norm.WIDEST_ROW + 1), None, 1e-6)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 37, 75),
        (1, 5, 1100),
        (2, 37, 75),
        (17, 37, 75),
        (5, 37, 1100),
        (130, 129, 70),
        (16, 63, 127),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_linear_on_sizes_beside_the_tiles(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = randn(m, k, dtype=dtype), codes(n, k)
    scale, bias = randn(n, seed=1, dtype=dtype).abs() / 127, randn(n, seed=2, dtype=dtype)
    y = int8_linear.int8_linear.launch(x, weight, scale, bias, "gelu")
    product = x.double() @ (weight.double() * scale.double()[:, None]).T + bias.double()
    expected = torch.nn.functional.gelu(product)
    assert_near(y, expected, 1e-6 if dtype == torch.float32 else 1e-3)


def test_int8_linear_split_over_the_inner_dimension_is_reproducible() -> None:
    x, weight, scale = randn(5, 2100), codes(37, 2100), randn(37, seed=1)
    assert int8_linear.split_for(5, 37, 2100, int8_linear.tiles_for(5)) > 1
    first = int8_linear.int8_linear.launch(x, weight, scale, None, "none")
    second = int8_linear.int8_linear.launch(x, weight, scale, None, "none")
    assert torch.equal(first, second)


def far_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows 2**30 elements apart, so that the third starts beyond 2**31; pages never touched
    take no memory."""
    stride = 2**30
    storage = torch.empty((rows - 1) * stride + columns, dtype=dtype, device=DEVICE)
    return storage.as_strided((rows, columns), (stride, 1))


def test_offsets_beyond_32_bits() -> None:
    weight = far_rows(3, 40, torch.int8)
    weight.copy_(codes(3, 40))
    scale = randn(3, seed=1)
    for tokens in (1, 3):
        x = randn(tokens, 40)
        y = int8_linear.int8_linear.launch(x, weight, scale, None, "none")
        assert_near(y, x.double() @ (weight.double() * scale.double()[:, None]).T, 1e-6)
    x16 = far_rows(3, 40, torch.float16)
    x16.copy_(randn(3, 40, dtype=torch.float16))
    y = norm.rms_norm.launch(x16, None, 1e-6)
    wide = x16.double()
    assert_near(y, wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6), 1e-3)
