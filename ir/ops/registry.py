"""One declaration per custom op: schema, eager, meta, ONNX and Triton faces, gradient, samples.

Ops live in the `torch.library` namespace `graphwright`. `declare` registers an op with torch
and keeps the declaration in `OPS`, where the ONNX backend, the fuser and the tests find it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.kernels import Kernel

NAMESPACE = "graphwright"
SWITCH = "GRAPHWRIGHT_KERNELS"

OPS: dict[str, Op] = {}
"""Every declared op by its name without the namespace; filled at import, then read-only."""

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Op:
    """A declared custom op.

    Attributes:
        name: without the namespace, as `int8_linear`.
        schema: in torch's schema language, without the name.
        eager: reference in plain ATen calls; runs on every device. Never returns an alias.
            The op's results are made contiguous, whatever this returns.
        meta: same arguments on fake tensors; returns new contiguous tensors of the result's
            shape, dtype and device.
        onnx: same arguments as symbolic values, `None` and Python numbers; returns symbolic
            values. Fit for `torch.onnx.export(custom_translation_table=...)`.
        kernel: `module:attribute` of a `Kernel`, imported when first wanted.
        samples: argument tuples that the tests run; awkward shapes included.
        macs: same arguments as fake tensors; multiply-accumulates of one call, an int or a
            symbolic size. None for an op that multiplies no matrices.

    An op that writes into its arguments says so in its schema. It has no gradient, and its ONNX
    face refuses: a graph of values has no place for it.
    """

    name: str
    schema: str
    eager: Callable[..., Any]
    meta: Callable[..., Any]
    onnx: Callable[..., Any]
    kernel: str
    samples: Callable[[], Iterable[tuple[Any, ...]]]
    macs: Callable[..., Any] | None = None

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable that stands in a graph, `torch.ops.graphwright.<name>.default`."""
        packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        return packet.default  # type: ignore[no-any-return]

    @property
    def writes(self) -> bool:
        """Whether it writes into arguments."""
        return bool(self.overload._schema.is_mutable)

    def load_kernel(self) -> Kernel:
        """The Triton face; imports triton."""
        module, _, attribute = self.kernel.partition(":")
        kernel = getattr(importlib.import_module(module), attribute)
        if not isinstance(kernel, Kernel):
            raise TypeError(f"{self.kernel} is a {type(kernel).__name__}, not a Kernel")
        return kernel


def declare(
    schema: str,
    *,
    eager: Callable[..., Any],
    meta: Callable[..., Any],
    onnx: Callable[..., Any],
    kernel: str,
    samples: Callable[[], Iterable[tuple[Any, ...]]],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    macs: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Register a custom op from its one declaration and return what to put into a graph.

    Args:
        schema: `name(Tensor x, Tensor? bias, str activation) -> Tensor`.
        eager, meta, onnx, kernel, samples, macs: the faces, see `Op`.
        backward, setup_context: as for `torch.library.register_autograd`. Left out, the gradient
            is that of `eager`, recomputed in the backward pass.

    Raises:
        ValueError: an op of that name is declared already.
    """
    name, _, rest = schema.partition("(")
    if name in OPS:
        raise ValueError(f"custom op {name!r} is declared twice")
    op = Op(name, f"({rest}", eager, meta, onnx, kernel, samples, macs)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, functools.partial(_run, op), "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, meta, lib=_LIBRARY)
    OPS[name] = op
    if op.writes:
        return op.overload
    if backward is None:
        backward, setup_context = _backward_of(eager), _save_inputs
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return op.overload


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Every op's ONNX face, as `torch.onnx.export(custom_translation_table=...)` takes them."""
    return {op.overload: op.onnx for op in OPS.values()}


def _run(op: Op, *args: Any, **kwargs: Any) -> Any:
    arguments = _bind(op, args, kwargs)
    if kernels_enabled(_first_tensor(arguments).device):
        kernel = op.load_kernel()
        if kernel.fits(*arguments):
            with torch.cuda.device_of(_first_tensor(arguments)):
                return kernel.launch(*arguments)
    result = op.eager(*arguments)
    if isinstance(result, tuple):
        return tuple(part.contiguous() for part in result)
    return result.contiguous()


def _bind(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments by position; the dispatcher leaves out trailing ones that equal the default."""
    declared = op.overload._schema.arguments
    if len(args) == len(declared):
        return args
    missing = declared[len(args) :]
    return (*args, *(kwargs.get(a.name, a.default_value) for a in missing))


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    return next(a for a in arguments if isinstance(a, Tensor))


def kernels_enabled(device: torch.device) -> bool:
    """Whether ops on this device run their Triton face.

    The environment variable `GRAPHWRIGHT_KERNELS` decides: `eager` never, `triton` wherever
    triton can run (on a CPU through its interpreter), unset on NVIDIA GPUs from capability 8.0.

    Raises:
        ArgumentError: the variable holds another word.
    """
    mode = os.environ.get(SWITCH, "")
    if mode not in ("", "eager", "triton"):
        raise ArgumentError(f"{SWITCH} is {mode!r}", fix="Set it to 'eager' or 'triton'.")
    if mode == "eager" or not _has_triton():
        return False
    if device.type == "cuda":
        return _is_supported_gpu(device.index or 0)
    return mode == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_supported_gpu(index: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.save_for_backward(*(v for v, t in zip(inputs, is_tensor, strict=True) if t))
    ctx.is_tensor = is_tensor
    ctx.others = [None if t else v for v, t in zip(inputs, is_tensor, strict=True)]


def _backward_of(eager: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Recompute the eager reference and differentiate it."""
        saved: Iterator[Tensor] = iter(ctx.saved_tensors)
        # the dispatcher leaves out trailing arguments that equal their defaults; never tensors
        absent = len(ctx.is_tensor) - len(ctx.needs_input_grad)
        needed: tuple[bool, ...] = (*ctx.needs_input_grad, *(False,) * absent)
        inputs: list[Any] = [
            next(saved).detach().requires_grad_(needs) if is_tensor else other
            for is_tensor, other, needs in zip(ctx.is_tensor, ctx.others, needed, strict=True)
        ]
        with torch.enable_grad():
            result = eager(*inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grads, strict=True)
            if grad is not None and out.requires_grad
        ]
        wanted = [value for value, needs in zip(inputs, needed, strict=True) if needs]
        if not pairs:
            return (None,) * len(inputs)
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
            )
        )
        return tuple(next(found) if needs else None for needs in needed)

    return backward
