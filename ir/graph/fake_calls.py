"""`fake_call` for all calls of a graph, fast: what repeats, and what needs no asking."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    disable_fake_tensor_cache,
    in_kernel_invocation_manager,
)

from graphwright.ir.graph.fake import fake_call, python_dispatcher

aten = torch.ops.aten

BARE = {aten.linear.default, aten.layer_norm.default}
"""Operators that torch makes of many smaller ones, and whose results have the same sizes and
strides on every device. They, and what works on each value by itself, run on the meta tensors
inside fake ones, without the bookkeeping around each of the smaller operators: several times as
fast where sizes are free."""

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class FakeCalls:
    """`fake_call` for the calls of one graph, of which equal ones are computed once.

    Calls are equal when operator and literal arguments are, and the tensors agree in sizes and
    strides (as expressions over the free sizes), offset, dtype and device. Every result is a
    tensor of its own, but which results share memory it does not say. What brings in a size that
    its operands do not have (one that depends on data), and what gives no tensors, is computed
    each time.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._results: dict[Hashable, Any] = {}
        self._dtypes: dict[Hashable, torch.dtype] = {}
        # a tensor stands beside its description, so that no other one gets its id
        self._described: dict[int, tuple[FakeTensor, tuple[Any, ...]]] = {}

    def __call__(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The result of `target(*args, **kwargs)`."""
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            return self._uncached(target, args, kwargs)
        try:
            key = (target, self._describe(args), self._describe(kwargs))
            known = self._results.get(key)
        except (_IndescribableError, TypeError):  # TypeError: an argument has no hash
            return self._uncached(target, args, kwargs)
        if known is not None:
            return self._wrapped(known)
        result = self._compute(target, args, kwargs)
        if _is_tensors(result) and _symbols(result) <= _symbols((args, kwargs)):
            with contextlib.suppress(_IndescribableError):
                self._describe(result)
                self._results[key] = self._bare(result)
        return result

    def _compute(self, target: Any, args: Any, kwargs: Any) -> Any:
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        simple = not any(isinstance(value, (torch.Tensor, *SYMBOLIC)) for value in kwargs.values())
        if simple and tensors:
            first = tensors[0]
            if self._is_like_first(target, args, kwargs, tensors):
                return self._wrapped(self._bare(first))
            is_bare = target in BARE or torch.Tag.pointwise in target.tags
            if is_bare and all(map(_is_plain, tensors)) and len({t.device for t in tensors}) == 1:
                return self._wrapped((self._inner(target, args, kwargs), first.device))
        return self._uncached(target, args, kwargs)

    def _uncached(self, target: Any, args: Any, kwargs: Any) -> Any:
        """`fake_call` without torch's cache of parts of calls.

        What that holds is from tracing too, where equal sizes may be written in another way; and
        it costs more than it saves where equal calls do not come back.
        """
        with disable_fake_tensor_cache(self.mode):
            return fake_call(target, args, kwargs, self.mode)

    def _is_like_first(
        self, target: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]
    ) -> bool:
        """Whether the result surely has the first operand's sizes, strides, dtype and device.

        So it is where torch says that an operator works on each value by itself, and all operands
        are laid out alike, densely. The dtype is asked of torch, on tensors of the least size.
        """
        first = tensors[0]
        if target is aten.batch_norm.default:
            return _is_batch_norm(*args[:5])
        if not _is_elementwise(target) or any(isinstance(value, SYMBOLIC) for value in args):
            return False
        layouts = {self._describe(t)[1:] for t in tensors}
        if len(layouts) > 1 or not _is_dense(first):
            return False
        literals = [None if isinstance(value, torch.Tensor) else value for value in args]
        dtypes = tuple(t.dtype for t in tensors)
        key = (target, first.dim(), dtypes, self._describe(literals), self._describe(kwargs))
        if key not in self._dtypes:
            with torch.no_grad():
                self._dtypes[key] = target(*map(_small, args), **kwargs).dtype
        return self._dtypes[key] == first.dtype

    def _describe(self, value: Any) -> Any:
        """The part of an argument that a result's sizes, strides and dtype can depend on; it has a
        hash."""
        if isinstance(value, torch.Tensor):
            known = self._described.get(id(value))
            if known is None:
                if not isinstance(value, FakeTensor) or value.fake_mode is not self.mode:
                    raise _IndescribableError
                known = self._described[id(value)] = (value, _meta(value))
            return known[1]
        if isinstance(value, SYMBOLIC):
            return (type(value), value.node.expr)
        if isinstance(value, Mapping):
            return tuple((key, self._describe(part)) for key, part in sorted(value.items()))
        if isinstance(value, list | tuple):
            return tuple(map(self._describe, value))
        return (type(value), value)  # 1, 1.0 and True are equal, and give other dtypes

    def _inner(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A call on the meta tensors inside fake ones; gives a meta tensor."""
        with torch.no_grad(), python_dispatcher(), in_kernel_invocation_manager(self.mode):
            return target(*args, **kwargs)

    def _bare(self, result: Any) -> Any:
        """The meta tensors inside fake ones, each with its device."""
        if isinstance(result, torch.Tensor):
            return (self._inner(aten.alias.default, (result,), {}), result.device)
        return [type(result), *map(self._bare, result)]

    def _wrapped(self, bare: Any) -> Any:
        """New fake tensors around what `_bare` gave."""
        if isinstance(bare, tuple):
            return FakeTensor(self.mode, *bare)
        kind, *parts = bare
        return kind([self._wrapped(part) for part in parts])


class _IndescribableError(Exception):
    """More belongs to a tensor than sizes, strides, offset, dtype and device."""


def _meta(value: FakeTensor) -> tuple[Any, ...]:
    plain = value.layout is torch.strided and not (value.is_quantized or value.requires_grad)
    if not plain or value.is_conj() or value.is_neg() or value.constant is not None:
        raise _IndescribableError
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    return (value.dtype, value.device, value.dim(), *map(_expression, sizes))


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, SYMBOLIC) else size


def _is_plain(value: torch.Tensor) -> bool:
    """Whether strides are no matter of choice, as they are beside a dimension of size 0 or 1."""
    return not any(type(size) is int and size < 2 for size in value.shape)


def _is_dense(value: torch.Tensor) -> bool:
    """Whether values lie one behind the other, so that strides of a result are those of this."""
    if value.storage_offset() != 0 or not all(map(_is_positive, value.shape)):
        return False
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if _expression(stride) != expected:
            break
        expected = expected * _expression(size)
    else:
        return True
    channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return channels_last and _is_plain(value)


def _is_positive(size: int | torch.SymInt) -> bool:
    """Whether a size is seen to be one: strides of others are written as of Max(1, size)."""
    if isinstance(size, int):
        return size > 0
    return bool(size.node.expr.is_Symbol and size.node.expr.is_positive)


def _is_elementwise(target: Any) -> bool:
    schema = target._schema
    alone = len(schema.returns) == 1 and isinstance(schema.returns[0].type, torch.TensorType)
    return (
        alone
        and torch.Tag.pointwise in target.tags
        and not any(argument.name == "memory_format" for argument in schema.arguments)
    )


def _small(value: Any) -> Any:
    """A tensor of the least plain size in the place of one; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty((2,) * value.dim(), dtype=value.dtype, device="meta")


def _is_batch_norm(x: torch.Tensor, *stats: torch.Tensor | None) -> bool:
    """Whether arguments of a batch norm fit, so that its result is like `x`.

    Torch makes it of twenty operators: most of what a convolutional network took.
    """
    channels = x.shape[1] if x.dim() > 1 else None
    return (
        type(channels) is int
        and _is_dense(x)
        and all(
            t is None
            or (t.dtype == x.dtype and t.device == x.device and list(t.shape) == [channels])
            for t in stats
        )
    )


def _is_tensors(result: Any) -> bool:
    parts = result if isinstance(result, list | tuple) else [result]
    return all(isinstance(part, FakeTensor) for part in parts)


def _symbols(value: Any) -> set[Any]:
    """Free symbols of sizes and strides of all tensors and numbers in a value."""
    if isinstance(value, torch.Tensor):
        return _symbols((*value.shape, *value.stride(), value.storage_offset()))
    if isinstance(value, SYMBOLIC):
        return set(value.node.expr.free_symbols)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return set().union(*map(_symbols, value)) if isinstance(value, list | tuple) else set()
