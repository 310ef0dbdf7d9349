"""graphwright::selective_scan: the recurrence of a selective state-space model (Mamba).

    h_t = exp(delta_t a) * h_{t-1} + (delta_t x_t) b_t,    y_t = sum_n c_t[n] h_t[:, n],    h_0 = 0

with delta > 0 and a < 0. The input matrix is delta b, the first-order form of the published
models, not the exact zero-order hold. Gates, skips and softplus are plain calls around the op.

`recurrence` is the definition, a step at a time. The eager face cuts the length into chunks and
walks through all of them at once, where that is quicker. No factor is ever divided
by a decay, so nothing overflows where decays vanish.

Source: P84, section 3.2 (Gu and Dao 2023, "Mamba", equation 2 and algorithm 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ir.ops.registry import declare

SIDE_BY_SIDE = 1 << 16
"""States that the chunks of a step hold together at most: they stay in a core's own cache."""


def recurrence(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The definition, one step after the other; shapes as `selective_scan`."""
    return walked(x, delta, a, b, c, _nothing(x, a))[0]


def walked(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence from a state (B, D, N) in front of the first step, and its last state."""
    x, delta, b, c, a, state = (_wide(t) for t in (x, delta, b, c, a, state))
    found = []
    for t in range(x.shape[1]):
        state = _step(state, x[:, t], delta[:, t], a, b[:, t])
        found.append(_read(state, c[:, t]))
    return torch.stack(found, 1) if found else torch.empty_like(x), state


def chunked(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int | None = None
) -> Tensor:
    """The same function of the same tensors, `chunk` steps of every chunk at a time."""
    return in_chunks(x, delta, a, b, c, _nothing(x, a), chunk)[0]


def in_chunks(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    start: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`walked`, `chunk` steps of every chunk at a time.

    All chunks are walked through twice side by side: from zero, for the state at their ends, and
    from the state in front of them, for y.

    Args:
        x, delta, a, b, c: as `selective_scan`.
        start: (B, D, N), the state in front of the first step.
        chunk: steps in a chunk; as many as are quickest when None.
    """
    batch, length, width = x.shape
    size = chunk or _steps_in_chunk(length, batch * width * a.shape[1])
    count = -(-length // size)
    if count <= 1:
        return walked(x, delta, a, b, c, start)
    x, delta, b, c, a, start = (_wide(t) for t in (x, delta, b, c, a, start))

    def cut(t: Tensor) -> Tensor:
        # behind the end delta is 0: the state stays as it is
        padded = F.pad(t, (0, 0, 0, count * size - length))
        return padded.reshape(batch, count, size, t.shape[2])

    x, delta, b, c = (cut(t) for t in (x, delta, b, c))
    state = x.new_zeros(batch, count, width, a.shape[1])
    for t in range(size):
        state = _step(state, x[:, :, t], delta[:, :, t], a, b[:, :, t])
    decay = torch.exp(delta.sum(2).unsqueeze(-1) * a)
    starts = [start]
    for k in range(count):
        starts.append(torch.addcmul(state[:, k], decay[:, k], starts[-1]))
    state = torch.stack(starts[:-1], 1)
    found = []
    for t in range(size):
        state = _step(state, x[:, :, t], delta[:, :, t], a, b[:, :, t])
        found.append(_read(state, c[:, :, t]))
    y = torch.stack(found, 2).reshape(batch, count * size, width)[:, :length]
    return y, starts[-1]


def _nothing(x: Tensor, a: Tensor) -> Tensor:
    return _wide(x).new_zeros(x.shape[0], x.shape[2], a.shape[1])


def _steps_in_chunk(length: int, values: int) -> int:
    """Chunks pay while a step's states are few: then calls cost more than numbers do."""
    count = min(math.isqrt(length), SIDE_BY_SIDE // max(1, values))
    return -(-length // count) if count > 1 else max(1, length)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _step(state: Tensor, x: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The next state (..., D, N)."""
    factor = torch.exp(delta.unsqueeze(-1) * a)
    return torch.addcmul((delta * x).unsqueeze(-1) * b.unsqueeze(-2), factor, state)


def _read(state: Tensor, c: Tensor) -> Tensor:
    return (state @ c.unsqueeze(-1)).squeeze(-1)


def _eager(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return chunked(x, delta, a, b, c).to(x.dtype)


def _meta(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _onnx(x: Any, delta: Any, a: Any, b: Any, c: Any) -> Any:
    from onnxscript import opset18 as op

    sizes = op.Concat(op.Shape(x, start=0, end=1), op.Shape(a), axis=0)
    start = op.Expand(op.Constant(value_float=0.0), sizes)
    return onnx_scan(x, delta, a, b, c, start)[0]


def onnx_scan(x: Any, delta: Any, a: Any, b: Any, c: Any, start: Any) -> tuple[Any, Any]:
    """One Scan over the length, whatever it is; exp(delta a) is never stored for all steps.

    `start` is float32, as the state at the end is.
    """
    import onnx_ir as ir
    from onnxscript import FLOAT, evaluator
    from onnxscript import opset18 as op

    wide, decays, rates, inputs, readers = (op.Cast(t, to=FLOAT.dtype) for t in (x, delta, a, b, c))
    kind = ir.TensorType(ir.DataType.FLOAT)
    names = ("state", "x", "delta", "b", "c")
    given = [ir.Value(name=f"selective_scan.{name}", type=kind) for name in names]
    nodes: list[ir.Node] = []

    def call(name: str, *args: ir.Value, **attributes: Any) -> ir.Value:
        out = ir.Value(name=f"selective_scan.{name}.{len(nodes)}", type=kind)
        nodes.append(ir.node(name, list(args), attributes, outputs=[out]))
        return out

    last, before_last = op.Constant(value_ints=[-1]), op.Constant(value_ints=[-2])
    state, x_t, delta_t, b_t, c_t = given
    factor = call("Exp", call("Mul", call("Unsqueeze", delta_t, last), rates))
    row = call("Unsqueeze", b_t, before_last)
    added = call("Mul", call("Unsqueeze", call("Mul", delta_t, x_t), last), row)
    new = call("Add", call("Mul", factor, state), added)
    y = call("MatMul", new, call("Unsqueeze", c_t, last))
    y = call("Squeeze", y, last)
    body = ir.Graph(
        given, [call("Identity", new), y], nodes=nodes, opset_imports={"": 18}, name="step"
    )
    scan = ir.node(
        "Scan", [start, wide, decays, inputs, readers],
        {"body": body, "num_scan_inputs": 4, "scan_input_axes": [1] * 4, "scan_output_axes": [1]},
        num_outputs=2, version=18,
    )  # fmt: skip
    recorder: Any = evaluator.default()
    recorder.nodes.append(scan)
    return op.CastLike(scan.outputs[1], x), scan.outputs[0]


def _samples() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for batch, length, width, states in ((2, 11, 37, 5), (1, 1, 16, 16), (3, 130, 9, 3)):
        x, spread = torch.randn((2, batch, length, width), generator=generator)
        b, c = torch.randn((2, batch, length, states), generator=generator)
        a = -torch.rand((width, states), generator=generator) * 4 - 0.1
        yield x, F.softplus(spread), a, b, c
    x, spread = torch.randn((2, 1, 9, 7), generator=generator)
    b, c = torch.randn((2, 1, 9, 4), generator=generator)
    yield x, F.softplus(spread) * 50, torch.full((7, 4), -200.0), b, c


selective_scan = declare(
    "selective_scan(Tensor x, Tensor delta, Tensor a, Tensor b, Tensor c) -> Tensor",
    eager=_eager,
    meta=_meta,
    onnx=_onnx,
    kernel="graphwright.ir.kernels.selective_scan:selective_scan",
    samples=_samples,
    macs=lambda x, delta, a, b, c: 3 * x.shape[0] * x.shape[1] * x.shape[2] * a.shape[1],
)
"""x (B, L, D), delta (B, L, D), a (D, N), b and c (B, L, N): y (B, L, D), computed in float32."""
