"""Attention over a cache: every sample against the formula, slot by slot, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from graphwright.ir.ops import OPS
from graphwright.ir.ops.cached_attention import _samples, cached_attention
from graphwright.ir.ops.quantize_cache import quantize_cache

SAMPLES = list(enumerate(_samples()))
Q, K, V, KEYS, VALUES, LENGTHS, TABLE, SCALE, WINDOW, CAP, SINKS, KEY_SCALE, VALUE_SCALE = range(13)


def fresh(sample: tuple[Any, ...]) -> list[Any]:
    return [v.clone() if isinstance(v, Tensor) else v for v in sample]


def slot(given: list[Any], which: int, row: int, head: int, place: int) -> Tensor:
    """One head of one slot of keys (0) or values (1) as float64."""
    buffer, scale, table = given[KEYS + which], given[KEY_SCALE + which], given[TABLE]
    block, at = row, place
    if table is not None:
        block, at = int(table[row, place // buffer.shape[2]]), place % buffer.shape[2]
    held = buffer[block, head, at]
    if buffer.dtype == torch.uint8:
        codes = [c - 16 if c > 7 else c for byte in held.tolist() for c in (byte & 15, byte >> 4)]
        held = torch.tensor(codes)
    if scale is None:
        return held.double()
    return held.double() * (scale[head] if scale.dim() == 2 else scale[block, head, at]).double()


def by_hand(given: list[Any]) -> Tensor:
    """The formula over a cache that holds the new tokens."""
    q, shared = given[Q].double(), given[K].shape[1]
    y = torch.zeros_like(q)
    for row, head, token in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        last = int(given[LENGTHS][row]) + token
        first = max(0, last + 1 - given[WINDOW]) if given[WINDOW] else 0
        group = head // (q.shape[1] // shared)
        places = range(first, last + 1)
        keys = torch.stack([slot(given, 0, row, group, p) for p in places])
        scores = keys @ q[row, head, token] * given[SCALE]
        if given[CAP]:
            scores = given[CAP] * torch.tanh(scores / given[CAP])
        weights = scores.exp()
        total = weights.sum()
        if given[SINKS] is not None:
            total = total + given[SINKS][head].double().exp()
        values = torch.stack([slot(given, 1, row, group, p) for p in places])
        y[row, head, token] = weights @ values / total
    return y


@pytest.mark.parametrize(("index", "sample"), SAMPLES)
def test_the_result_is_the_formula_and_new_tokens_are_in_their_slots(
    index: int, sample: tuple[Any, ...]
) -> None:
    given = fresh(sample)
    y = cached_attention(*given)
    torch.testing.assert_close(y.double(), by_hand(given), rtol=1e-5, atol=1e-6)
    bits = {torch.int8: 8, torch.uint8: 4}.get(given[KEYS].dtype)
    for which, new in ((0, given[K]), (1, given[V])):
        scale = given[KEY_SCALE + which]
        if bits:  # what a program computes that holds `quantize_cache`
            new = quantize_cache(new, scale[:, None] if scale.dim() == 2 else None, bits)
        for row, start in enumerate(given[LENGTHS].tolist()):
            for token in range(new.shape[2]):
                found = slot(given, which, row, 0, start + token)
                torch.testing.assert_close(found, new[row, 0, token].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("index", "sample"), SAMPLES)
def test_nothing_but_the_new_slots_is_written(index: int, sample: tuple[Any, ...]) -> None:
    given = fresh(sample)
    cached_attention(*given)
    for which in (KEYS, VALUES):
        changed = (given[which] != sample[which]).any(-1).any(1).sum()
        assert 0 < changed <= sample[K].shape[0] * sample[K].shape[2]


@pytest.mark.parametrize(("index", "sample"), SAMPLES)
def test_the_kernel_writes_what_eager_writes(index: int, sample: tuple[Any, ...]) -> None:
    pytest.importorskip("triton")
    from graphwright.ir.kernels.cached_attention import cached_attention as kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = [v.to(device) if isinstance(v, Tensor) else v for v in fresh(sample)]
    y = kernel.launch(*given)
    given = [v.cpu() if isinstance(v, Tensor) else v for v in given]
    torch.testing.assert_close(y.cpu().double(), by_hand(given), rtol=1e-4, atol=1e-5)
    other = fresh(sample)
    OPS["cached_attention"].eager(*other)
    for which in (KEYS, VALUES, KEY_SCALE, VALUE_SCALE):
        if given[which] is not None:
            torch.testing.assert_close(given[which], other[which], rtol=1e-6, atol=0)


def steps(parts: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for count in parts:
        yield start, start + count
        start += count


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("parts", [[9], [1] * 9, [4, 1, 4]])
def test_a_prompt_may_come_in_any_parts(parts: list[int], window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 9, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 9, 8, generator=generator)
    at = torch.arange(9)
    seen = at <= at[:, None]
    if window:
        seen &= at > at[:, None] - window
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    keys, values = torch.zeros(2, 1, 2, 12, 8)
    found = [
        cached_attention(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], keys, values,
            torch.tensor([a], dtype=torch.int32), None, 8**-0.5, window, 0.0, None, None, None,
        )
        for a, b in steps(parts)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(found, 2), expected, rtol=1e-5, atol=1e-6)


def test_offsets_of_the_kernel_beyond_32_bits() -> None:
    pytest.importorskip("triton")
    from graphwright.ir.kernels.cached_attention import cached_attention as kernel

    if torch.cuda.is_available():
        pytest.skip("the interpreter wraps 32 bits as a GPU does; memory untouched is free here")
    q, (k, v) = torch.randn(1, 2, 1, 16), torch.randn(2, 1, 1, 1, 16)
    keys, values = (torch.empty((2**31 // (16 * 64) + 2, 1, 64, 16)) for _ in range(2))
    table = torch.tensor([[len(keys) - 1]], dtype=torch.int32)
    lengths = torch.zeros(1, dtype=torch.int32)
    y = kernel.launch(q, k, v, keys, values, lengths, table, 0.25, 0, 0.0, None, None, None)
    torch.testing.assert_close(y, v.expand_as(q))
    assert torch.equal(keys[-1, 0, 0], k[0, 0, 0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("is_static", [True, False])
def test_a_quantized_value_is_within_half_a_step(bits: int, is_static: bool) -> None:
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax((0, 2))[:, None] / most if is_static else None
    y = quantize_cache(x, scale, bits)
    step = x.abs().amax(-1, keepdim=True) / most if scale is None else scale
    assert ((y - x).abs() <= step / 2 * (1 + 1e-9)).all()
    assert torch.equal((y / step).round(), (x / step).round())


def test_gradients_pass_the_rounding_and_stop_where_it_saturates() -> None:
    x = torch.tensor([[[[0.3, 5.0]]]], requires_grad=True)
    quantize_cache(x, torch.full((1, 1, 2), 0.01), 8).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[[[1.0, 0.0]]]]))  # type: ignore[arg-type]
