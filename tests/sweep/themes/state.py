"""Modules that keep something between calls, and modules whose shapes depend on values."""

from __future__ import annotations

import torch
from sweep.cases import Theme, With, bools, real
from torch import Tensor, nn

state = Theme("state written in forward")


def _assigned(m: nn.Module, x: Tensor) -> Tensor:
    m.count = m.count + 1
    return x * m.count


def _in_place(m: nn.Module, x: Tensor) -> Tensor:
    m.count += 1
    return x * m.count


def _read_before(m: nn.Module, x: Tensor) -> Tensor:
    out = x * m.count
    m.count.mul_(2)
    return out


def _average(m: nn.Module, x: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(x.mean(0) * 0.1)
    return x - m.mean


def _copied(m: nn.Module, x: Tensor) -> Tensor:
    m.mean.copy_(x.amax(0))
    return x / m.mean


def _cached(m: nn.Module, x: Tensor) -> Tensor:
    m.last = x.sum(0)
    return x + m.last


def _cached_table(m: nn.Module, x: Tensor) -> Tensor:
    if not hasattr(m, "table") or m.table.shape[0] != x.shape[0]:
        m.table = torch.arange(x.shape[0]).float()
    return x * m.table[:, None]


def _ring(m: nn.Module, x: Tensor) -> Tensor:
    m.memory[1:] = m.memory[:-1].clone()
    m.memory[0] = x.mean(0)
    return x + m.memory.sum(0)


def _counted(m: nn.Module, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return x * m.calls


def _listed(m: nn.Module, x: Tensor) -> Tensor:
    m.seen = [*getattr(m, "seen", []), x.detach()]
    return x + m.seen[-1].mean()


def _first_call(m: nn.Module, x: Tensor) -> Tensor:
    if not bool(m.ready):
        m.scale.copy_(x.std(0))
        m.ready.fill_(True)
    return x / m.scale


for _name, _function, _parts in (
    ("a buffer assigned", _assigned, {"count": torch.tensor(3.0)}),
    ("a buffer added to in place", _in_place, {"count": torch.tensor(3.0)}),
    ("a counter of integers", _in_place, {"count": torch.tensor(3)}),
    ("a buffer written after it is read", _read_before, {"count": torch.tensor(3.0)}),
    ("a running average", _average, {"mean": torch.rand(5)}),
    ("a buffer copied into", _copied, {"mean": torch.rand(5)}),
    ("a tensor cached in an attribute", _cached, {}),
    ("a table cached by size", _cached_table, {}),
    ("a ring of memory", _ring, {"memory": torch.rand(4, 5)}),
    ("a counter of calls", _counted, {}),
    ("a list of inputs", _listed, {}),
    ("a first call that fits a scale", _first_call,
     {"scale": torch.ones(5), "ready": torch.tensor(False)}),
):  # fmt: skip
    state.module(
        _name,
        lambda function=_function, parts=_parts: With(
            function, **{name: part.clone() for name, part in parts.items()}
        ),
        x=real("n", 5),
        blames=("count", "mean", "memory", "last", "table", "themes/", "ready", "scale"),
        sizes={"n": (6, 7, 16, 40, 25, 2)},
    )
state.module("batch norm in training mode", lambda: _Training(5), x=real("n", 5), blames=("norm",),
             sizes={"n": (6, 7, 16, 40, 25, 2)})  # fmt: skip


class _Training(nn.Module):
    """Batch norm that stays in training mode, as in models whose `train` is overridden."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def train(self, mode: bool = True) -> _Training:
        super().train(mode)
        self.norm.train(True)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


values = Theme("shapes that depend on values")


def _branch(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x - 1


def _itemized(x: Tensor) -> Tensor:
    return x[: int(x[0, 0] > 0) + 1]


def _looped(x: Tensor) -> Tensor:
    for value in x[:, 0].tolist():
        x = x + value
    return x


values.functions(
    {
        "a branch on a sum": _branch,
        "a slice by a value": _itemized,
        "a loop over values": _looped,
        "item of a size": lambda x: x * torch.tensor(x.shape[0]).item(),
        "item of a value": lambda x: x * x.max().item(),
        "unique of values": lambda x: torch.unique(x > 0),
        "unique with counts": lambda x: torch.unique((x * 2).round(), return_counts=True),
        "nonzero counted": lambda x: torch.nonzero(x > 0).shape[0] * x,
        "rows kept by a mask, then a product": lambda x: x[x[:, 0] > 0] @ x.T,
        "numpy": lambda x: torch.from_numpy(x.numpy() * 2),
        "numpy functions": lambda x: torch.as_tensor(x.numpy().mean()) + x,
        "random numbers": lambda x: x + torch.rand_like(x) * 0,
        "dropout that is always on": lambda x: nn.functional.dropout(x, 0.0, training=True),
        "where of one row at least": lambda x: x[torch.where(x[:, 0] > -9)[0]],
        "a list comprehension over a mask": lambda x: torch.stack(
            [row for row, keep in zip(x, x[:, 0] > 0, strict=True) if keep] or [x[0]]
        ),
        "torch.equal": lambda x: x * 2 if torch.equal(x, x.flip(0)) else x,
        "assertion on values": lambda x: _asserted(x),
        "try and except": lambda x: _tried(x),
        "len of nonzero": lambda x: x[: len(torch.nonzero(x[:, 0] > -9))],
    },
    x=real("n", 5),
    blames=("themes/",),
)


def _asserted(x: Tensor) -> Tensor:
    assert bool((x.abs() < 100).all()), "too large"
    return x * 2


def _tried(x: Tensor) -> Tensor:
    try:
        return x.view(3, -1).sum(0)
    except RuntimeError:
        return x.flatten()


values.function(
    "torch.cond", lambda x: torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (x,)),
    blames=("runs on a condition",),
)  # fmt: skip
values.module("the longest sequence", lambda: With(
    lambda m, x, mask: x[:, : int(mask.sum(1).max())]), x=real("n", 6, 5), mask=bools("n", 6),
    blames=("themes/",))  # fmt: skip

THEMES = (state, values)
