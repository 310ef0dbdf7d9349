"""Rules of quantized weights and activations: codes and scales are sliced together."""

from __future__ import annotations

from typing import Any

from graphwright.ir.channels.values import Result, Value
from graphwright.ir.channels.walk import Call, Walk, rule


@rule("dequantize")
def _dequantize(walk: Walk, call: Call) -> Result:
    codes = call["codes"]
    rank = len(codes.shape)
    values, labels = [codes], [list(range(rank))]
    for name in ("scale", "zero_point"):
        value = call.get(name)
        if isinstance(value, Value):
            values.append(value)
            labels.append([call.raw["axis"] % rank] * len(value.shape))
    linked = walk.link(values, labels, text="a scale that is fixed")
    symmetric = call.raw["zero_point"] is None
    return walk.gather(call.shape, range(rank), linked,
                       lambda k: symmetric and k.zero.get(0, False))  # fmt: skip


@rule("fake_quantize")
def _fake_quantize(walk: Walk, call: Call) -> Result:
    """0 has a code of its own where the range holds the zero point."""
    low, zero_point, high = (call.raw[n] for n in ("low", "zero_point", "high"))
    return call.first.flags(low <= zero_point <= high)


@rule("fake_quantize_dynamic")
def _fake_quantize_dynamic(walk: Walk, call: Call) -> Result:
    """The range of the whole tensor, which always holds 0."""
    text: Any = "a range is measured over it, and a removed slot is not zero"
    for f in call.first.factors:
        if not f.zero:
            walk.classes.pin(f.ids, walk.node, text)
    return call.first
