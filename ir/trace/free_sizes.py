"""Calls that torch runs with plain numbers only, in forms that leave a free size free.

`torch.linspace(-1, 1, w)` fixes `w` at the example's size, and so do pooling over a whole axis
(`avg_pool2d(x, x.shape[2:])`), `max_pool1d` along a free axis and `affine_grid`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Pooling = Callable[..., Any]
AVERAGES: dict[Pooling, int] = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
LARGEST: dict[Pooling, int] = {
    F.max_pool1d: 1, torch.max_pool1d: 1, F.max_pool2d: 2, torch.max_pool2d: 2,
    F.max_pool3d: 3, torch.max_pool3d: 3,
}  # fmt: skip


class KeepSizesFree(TorchFunctionMode):
    """Rewrites such calls where a size among their arguments is free; entered by an export."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        result = None
        if func is torch.linspace:
            result = _linspace(*args, **kwargs)
        elif func is F.affine_grid:
            result = _affine_grid(*args, **kwargs)
        elif func in AVERAGES:
            result = _averaged(AVERAGES[func], *args, **kwargs)
        elif func in LARGEST:
            result = _largest(LARGEST[func], *args, **kwargs)
        return func(*args, **kwargs) if result is None else result


def _linspace(start: Any, end: Any, steps: Any = None, *, dtype: Any = None, **more: Any) -> Any:
    dtype = dtype or torch.get_default_dtype()
    exact = dtype.is_floating_point and "out" not in more
    if not isinstance(steps, SymInt) or isinstance(start, Tensor) or isinstance(end, Tensor):
        return None
    return _spaced(start, end, steps, dtype=dtype, **more) if exact else None


def _spaced(start: Any, end: Any, steps: Any, **how: Any) -> Tensor:
    """Numbers from `start` to `end`, counted from the nearer end as torch's kernel does."""
    places = torch.arange(steps, **how)
    # A tensor, for as sizes go torch takes it that `steps` is no 1.
    gaps = torch.scalar_tensor(steps - 1, dtype=places.dtype, device=places.device).clamp(min=1)
    step = torch.scalar_tensor(end - start, dtype=places.dtype, device=places.device) / gaps
    ahead, back = places * step + start, end - (steps - 1 - places) * step
    return torch.where(places * 2 < steps, ahead, back)


def _affine_grid(theta: Tensor, size: Any, align_corners: bool | None = None) -> Any:
    if len(size) != 4 or not any(isinstance(s, SymInt) for s in size[2:]):
        return None
    height, width = size[2:]
    how: dict[str, Any] = {"dtype": theta.dtype, "device": theta.device}
    lines = []
    for count in (width, height):
        gaps = torch.scalar_tensor(count - 1, **how)
        # One place alone lies in the middle.
        reach = gaps.clamp(max=1) if align_corners else gaps / count
        lines.append(_spaced(-1, 1, count, **how) * reach)
    x, y = lines[0].expand(height, width), lines[1][:, None].expand(height, width)
    places = torch.stack([x, y, torch.ones_like(x)], -1)
    flat = places.reshape(1, height * width, 3)
    return (flat @ theta.transpose(1, 2)).reshape(-1, height, width, 2)


def _averaged(
    rank: int, x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Any:  # fmt: skip
    axes = _whole_axes(rank, x, kernel_size, stride, padding)
    return x.mean(axes, keepdim=True) if axes and divisor_override is None else None


def _largest(
    rank: int, x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    if return_indices:
        return None
    axes = _whole_axes(rank, x, kernel_size, stride, padding)
    if axes:
        return x.amax(axes, keepdim=True)
    if rank > 1 or not isinstance(x.shape[-1], SymInt):
        return None
    # Torch has free sizes for two axes only.
    (size,), (step,) = _spread(kernel_size, 1), _spread(stride or kernel_size, 1)
    (pad,), (apart,) = _spread(padding, 1), _spread(dilation, 1)
    flat = F.max_pool2d(
        x.unsqueeze(-2), (1, size), (1, step), (0, pad), (1, apart), bool(ceil_mode)
    )
    return flat.squeeze(-2)


def _whole_axes(rank: int, x: Tensor, kernel: Any, stride: Any, padding: Any) -> list[int]:
    """Axes that a window covers from end to end, one of them free; none where others move."""
    sizes, windows = x.shape[-rank:], _spread(kernel, rank)
    if not any(isinstance(window, SymInt) for window in windows) or any(_spread(padding, rank)):
        return []
    steps = _spread(stride, rank) if stride else windows
    axes = []
    for axis, (size, window, step) in enumerate(zip(sizes, windows, steps, strict=True)):
        if _is(window, size):
            axes.append(axis - rank)
        elif not (_is(window, 1) and _is(step, 1)):
            return []
    return axes


def _is(a: Any, b: Any) -> bool:
    """Whether two sizes are one, whatever the size is."""
    a, b = (s.node.expr if isinstance(s, SymInt) else s for s in (a, b))
    return bool(a == b)


def _spread(value: Any, rank: int) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * rank if len(values) == 1 else values
