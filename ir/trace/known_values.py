"""Tensors of numbers and constants alone, which a model may read as Python values when traced."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

FACTORIES = frozenset({
    torch.arange, torch.bartlett_window, torch.blackman_window, torch.eye, torch.full,
    torch.hamming_window, torch.hann_window, torch.kaiser_window,
    torch.linspace, torch.logspace, torch.ones, torch.tensor, torch.tril_indices,
    torch.triu_indices, torch.zeros,
})  # fmt: skip
READS = frozenset({
    Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__int__,
    Tensor.__float__, Tensor.__index__,
})  # fmt: skip
ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
IN_PLACE = frozenset(f"__i{name}__" for name in (*ARITHMETIC, "lshift", "rshift"))
MOST_VALUES = 1 << 16
"""Larger tensors are not followed: nobody reads them as lists."""


class KnownValues(TorchFunctionMode):
    """Computes what follows from numbers alone beside the trace, and answers when it is read.

    `torch.arange(1, 3).tolist()` is a list of stand-ins to torch.export, and a branch on one of
    them an error, although it holds the same values at every call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self.wrote = False
        self.modes = _modes()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.compiler.is_dynamo_compiling() or _modes() < self.modes:
            # The body of a condition, where stand-ins look real; or a rule of torch for a call
            # that TorchScript makes, whose numbers are real tensors.
            return func(*args, **kwargs)
        if func in READS and args[0] is not None and self._value(args[0]) is not None:
            return _really(func, (self._value(args[0]), *args[1:]), kwargs)
        real = self._real(func, args, kwargs)
        result = func(*args, **kwargs)
        if real is not None:
            self._remember(result, real)
        elif _writes(func, kwargs):
            self.values.clear()  # it may have written into the storage of any of them
            self.wrote = True
        return result

    def _value(self, tensor: Any) -> Tensor | None:
        if type(tensor) is Tensor and not self.wrote:
            return tensor  # a real one among stand-ins: a constant of the model's code
        known = self.values.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _real(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of a call that follows, with all its operands, from numbers alone."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if _writes(func, kwargs) or not (tensors or func in FACTORIES):
            return None
        if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves):
            return None
        known = [self._value(tensor) for tensor in tensors]
        if any(value is None for value in known):
            return None
        values = iter(known)
        leaves = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        leaves = ["cpu" if isinstance(leaf, torch.device) else leaf for leaf in leaves]
        real_args, real_kwargs = pytree.tree_unflatten(leaves, tree)
        random = torch.get_rng_state()
        try:
            result = _really(func, real_args, real_kwargs)
        except Exception:
            return None  # the trace shows its own error
        if not torch.equal(random, torch.get_rng_state()):
            torch.set_rng_state(random)
            return None
        return result

    def _remember(self, result: Any, real: Any) -> None:
        made, values = pytree.tree_leaves(result), pytree.tree_leaves(real)
        if len(made) != len(values):
            return
        for tensor, value in zip(made, values, strict=True):
            both = isinstance(tensor, Tensor) and isinstance(value, Tensor)
            if both and value.numel() <= MOST_VALUES:
                self.values[id(tensor)] = (weakref.ref(tensor), value)


def _modes() -> int:
    """Modes that a call of an operator goes through: fewer inside of one."""
    return int(torch._C._len_torch_dispatch_stack()) + int(_len_torch_dispatch_stack_pre_dispatch())


def _really(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The call outside of the trace."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return func(*args, **kwargs)


def _writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may write into a tensor that it is given."""
    name = str(getattr(func, "__name__", func))
    if name.endswith("__"):
        return name in ("__setitem__", "__set__") or name in IN_PLACE
    return name.endswith("_") or kwargs.get("out") is not None
