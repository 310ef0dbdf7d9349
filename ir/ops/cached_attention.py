"""graphwright::cached_attention: writes new keys and values into a cache and attends over it.

Row b holds `lengths[b]` tokens. Its new ones go to the slots behind them, and the query at place
i of the new ones sees the slots up to its own, `lengths[b] + i`, and of these the last `window`
where that is positive:

    s_j = softcap tanh(scale q k_j / softcap)    (scale q k_j where softcap is 0)
    y = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sink))

Keys and values are never repeated over the heads that share them. The Triton face reads the
lengths on the device, so that one captured CUDA graph serves every step.

Buffers are (blocks, heads, block, size). Without a table, block b is the whole cache of row b.
With one, slot p of row b lies in block `table[b, p // block]` at `p % block`; rows of unlike
lengths then take the memory that they need. Block 0 belongs to nobody: writes of padding that
have no block of their own go there.

A buffer of int8 holds codes of 8 bits, one of uint8 codes of 4 bits, neighbours in a byte, the
first one in its low half. Their scales are (heads, size), fixed, or (blocks, heads, block), one
for every token, found when it is written. See `quantize_cache`, whose numbers these are.

Sources: Ainslie et al. 2023, "GQA"; Kwon et al. 2023, "Efficient Memory Management for Large
Language Model Serving with PagedAttention", section 4.1; Dao 2023, "FlashAttention-2", and "Flash-
Decoding for long-context inference" (the division of the keys); Gemma Team 2024, "Gemma 2",
section 2 (soft-capping); OpenAI 2025, "gpt-oss", section 2.2 (sinks).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.errors import LoweringError
from graphwright.ir.ops.quantize_cache import cache_codes, token_scale
from graphwright.ir.ops.registry import declare


class Cache(NamedTuple):
    """A buffer with its scales and the table of its blocks; shapes as the op takes them."""

    buffer: Tensor
    scale: Tensor | None
    table: Tensor | None

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for floats."""
        return {torch.int8: 8, torch.uint8: 4}.get(self.buffer.dtype, 0)

    def write(self, new: Tensor, lengths: list[int]) -> None:
        """Puts `new` (batch, heads, tokens, size) behind the tokens of every row."""
        tokens = new.shape[2]
        if self.bits:
            assert self.scale is not None
            by_token = self.scale.dim() == 3
            scale = token_scale(new, self.bits) if by_token else self.scale[:, None].to(new.dtype)
            codes = cache_codes(new, scale, self.bits)
            new = _packed(codes) if self.bits == 4 else codes
            if by_token:
                self._put(self.scale, scale.squeeze(-1), lengths, tokens)
        self._put(self.buffer, new, lengths, tokens)

    def _put(self, to: Tensor, new: Tensor, lengths: list[int], tokens: int) -> None:
        if self.table is None and len(set(lengths)) == 1:
            to[:, :, lengths[0] : lengths[0] + tokens] = new
            return
        slots = torch.tensor(lengths, device=to.device)[:, None] + torch.arange(
            tokens, device=to.device
        )
        blocks = torch.arange(len(lengths), device=to.device)[:, None]
        if self.table is not None:
            size = to.shape[2]
            blocks, slots = self.table.long().gather(1, slots // size), slots % size
        to[blocks, :, slots] = new.transpose(1, 2).to(to.dtype)

    def read(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Slots `first` to `last` of every row as floats: (batch, heads, slots, size)."""
        found = self._take(self.buffer, first, last)
        if not self.bits:
            return found
        assert self.scale is not None
        codes = _unpacked(found) if self.bits == 4 else found
        if self.scale.dim() == 2:
            return codes.to(dtype) * self.scale[:, None].to(dtype)
        return codes.to(dtype) * self._take(self.scale, first, last)[..., None].to(dtype)

    def _take(self, held: Tensor, first: int, last: int) -> Tensor:
        if self.table is None:
            return held[:, :, first:last]
        size = held.shape[2]
        begin = first // size
        blocks = held[self.table[:, begin : -(-last // size)].long()].transpose(1, 2)
        whole: Tensor = blocks.flatten(2, 3)
        return whole[:, :, first - begin * size : last - begin * size]


def _packed(codes: Tensor) -> Tensor:
    pairs = (codes.to(torch.int16) & 15).unflatten(-1, (-1, 2))
    packed: Tensor = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    return packed


def _unpacked(packed: Tensor) -> Tensor:
    pair = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int8)
    return pair - ((pair & 8) << 1)


def _visible(lengths: list[int], tokens: int, first: int, last: int, window: int) -> Tensor | None:
    """(batch, 1, tokens, slots): whether a query sees a slot; None where all see all."""
    if tokens == 1 and len(set(lengths)) == 1:
        return None
    slots = torch.arange(first, last)
    at = torch.tensor(lengths)[:, None, None, None] + torch.arange(tokens)[:, None]
    seen = slots <= at
    return seen & (slots > at - window) if window else seen


def _grouped(q: Tensor, heads: int) -> Tensor:
    """Queries of the heads that share a key, one below the other: (batch, heads, rows, size)."""
    return q.reshape(q.shape[0], heads, -1, q.shape[3])


def _prompt(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A prompt on an empty cache: no mask in memory, and half of the work."""
    parts = q.unflatten(1, (k.shape[1], -1)).unbind(2)
    found = [F.scaled_dot_product_attention(p, k, v, is_causal=True, scale=scale) for p in parts]
    return torch.stack(found, 2).flatten(1, 2)


def _plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Attention without cap and sinks."""
    (batch, heads, tokens, _), shared = q.shape, k.shape[1]
    if seen is not None:
        groups = heads // shared
        seen = seen.expand(-1, groups, -1, -1).reshape(len(seen), 1, groups * tokens, -1)
    y = F.scaled_dot_product_attention(_grouped(q, shared), k, v, seen, scale=scale)
    return y.reshape(batch, heads, tokens, v.shape[3])


def _capped(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention written out, with scores in float32 or more."""
    batch, heads, tokens, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.matmul(_grouped(q, k.shape[1]), k.transpose(2, 3)).to(wide) * scale
    scores = scores.view(batch, heads, tokens, -1)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(wide).view(1, -1, 1, 1).expand(batch, heads, tokens, 1)
        shares = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        shares = torch.softmax(scores, -1)
    return torch.matmul(_grouped(shares.to(v.dtype), k.shape[1]), v).reshape(
        batch, heads, tokens, v.shape[3]
    )


def _eager(
    q: Tensor, k: Tensor, v: Tensor, key_buffer: Tensor, value_buffer: Tensor, lengths: Tensor,
    table: Tensor | None, scale: float, window: int, softcap: float, sinks: Tensor | None,
    key_scale: Tensor | None, value_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    filled = [int(n) for n in lengths.tolist()]
    keys, values = Cache(key_buffer, key_scale, table), Cache(value_buffer, value_scale, table)
    keys.write(k, filled)
    values.write(v, filled)
    last = max(filled) + q.shape[2]
    first = max(0, min(filled) + 1 - window) if window else 0
    held, summed = (cache.read(first, last, q.dtype).to(q.dtype) for cache in (keys, values))
    is_plain = softcap == 0 and sinks is None
    if is_plain and max(filled) == 0 and not 0 < window < last:
        return _prompt(q, held, summed, scale)
    seen = _visible(filled, q.shape[2], first, last, window)
    seen = seen if seen is None else seen.to(q.device)
    if not is_plain:
        return _capped(q, held, summed, seen, scale, softcap, sinks)
    return _plain(q, held, summed, seen, scale)


def _meta(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)


def _onnx(*given: Any) -> Any:
    raise LoweringError(
        "graphwright::cached_attention has no ONNX form: it writes into its buffers",
        fix="Lower the program with explicit past keys and values; the backend's own step "
        "makes a cached attention of them.",
    )


def _macs(q: Tensor, k: Tensor, v: Tensor, key_buffer: Tensor, *rest: Any) -> Any:
    """With a full cache: the most that a call can take."""
    table = rest[2]
    slots = key_buffer.shape[2] if table is None else key_buffer.shape[2] * table.shape[1]
    return q.shape[0] * q.shape[1] * q.shape[2] * slots * (q.shape[3] + v.shape[3])


def _samples() -> Iterator[tuple[Any, ...]]:
    """Prompts and steps, rows of unlike lengths, blocks, windows, caps, sinks, codes."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    for heads, shared, tokens, size, lengths, window, cap, has_sinks, form in [
        (4, 2, 1, 16, [5, 9], 0, 0.0, False, "whole"),
        (6, 2, 7, 24, [0, 0], 0, 0.0, False, "whole"),
        (3, 3, 3, 16, [11, 0, 4], 4, 0.0, False, "blocks"),
        (8, 2, 1, 16, [140, 3], 33, 20.0, True, "blocks"),
        (4, 1, 1, 32, [37], 0, 0.0, False, "int8"),
        (4, 2, 5, 16, [6, 1], 0, 0.0, False, "int4"),
    ]:
        batch, capacity = len(lengths), max(lengths) + tokens + 3
        q = random(batch, heads, tokens, size)
        k, v = random(batch, shared, tokens, size), random(batch, shared, tokens, size)
        block, table = capacity, None
        if form == "blocks":
            block, columns = 16, -(-capacity // 16)
            order = torch.randperm(batch * columns, generator=generator) + 1
            table = order.reshape(batch, columns).to(torch.int32)
        blocks = batch if table is None else 1 + table.numel()
        keys, values = random(blocks, shared, block, size), random(blocks, shared, block, size)
        scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if form in ("int8", "int4"):
            bits = int(form[3:])
            grid = torch.exp2(torch.round(torch.rand(shared, size, generator=generator)) - bits + 2)
            scales = grid, torch.zeros(blocks, shared, block)
            keys, values = (
                torch.randint(0, 127, (blocks, shared, block, size * bits // 8),
                              generator=generator, dtype=torch.int8 if bits == 8 else torch.uint8)
                for _ in range(2)
            )  # fmt: skip
            scales[1].copy_(torch.rand(blocks, shared, block, generator=generator) / 2**bits)
        sinks = random(heads) if has_sinks else None
        counts = torch.tensor(lengths, dtype=torch.int32)
        yield (q, k, v, keys, values, counts, table, size**-0.5, window, cap, sinks, *scales)


cached_attention = declare(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) key_buffer, "
    "Tensor(b!) value_buffer, Tensor lengths, Tensor? table, float scale, int window, "
    "float softcap, Tensor? sinks, Tensor(c!)? key_scale, Tensor(d!)? value_scale) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.cached_attention:cached_attention",
    samples=_samples,
    macs=_macs,
)
"""q (batch, heads, tokens, size), k and v (batch, shared heads, tokens, size), lengths int32
(batch,), table int32 (batch, columns) or None: (batch, heads, tokens, size)."""
