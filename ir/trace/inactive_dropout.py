"""Keeps apart a tensor and its dropout, which in inference mode are one to torch 2.14 and newer."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

_DROPOUTS = frozenset(
    {
        functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d,
        functional.alpha_dropout, functional.feature_alpha_dropout,
        torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout,
    }
)  # fmt: skip


class KeepInputsApart(TorchFunctionMode):
    """Gives every dropout an alias of its input; entered while a model is exported.

    Dropout that is off returns its input, so that a trace takes all later readers of the input for
    readers of the dropout: put back for training, it would drop for them too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS and not kwargs.get("inplace"):
            if args:
                args = (aten.alias.default(args[0]), *args[1:])
            elif "input" in kwargs:
                kwargs["input"] = aten.alias.default(kwargs["input"])
        return func(*args, **kwargs)
