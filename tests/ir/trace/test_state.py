"""State that forward writes: left as it was in the model, frozen with a word, or made explicit."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model
from graphwright.ir.trace.capture import TraceWarning


class Center(nn.Module):
    """Subtracts a running mean that it updates in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.linear(x - self.mean)


class Stream(nn.Module):
    """Convolution over chunks of a stream, with the end of the last chunk kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)
        self.register_buffer("cache", torch.ones(1, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.cache, x], 2)
        self.cache = y[:, :, -2:].clone()
        return self.conv(y)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.tensor(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.n += 1
        return {"scaled": x * self.n}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Counter()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.part(x)["scaled"]


class Largest(nn.Module):
    """State that the same input twice does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("top", torch.tensor(-10.0))

    def forward(self, x: Tensor) -> Tensor:
        self.top = torch.maximum(self.top, x.max())
        return x - self.top


class Lazy(nn.Module):
    """State in a plain attribute that the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.last is None:
            self.last = torch.zeros_like(x)
        y = x + 0.5 * self.last
        self.last = y
        return y


STATEFUL: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "in place": (Center, "mean", (4, 8)),
    "assigned": (Stream, "cache", (1, 4, 8)),
    "counter": (Counter, "n", (4, 8)),
    "in a part": (Inner, "part.n", (4, 8)),
    "maximum": (Largest, "top", (4, 8)),
    "plain attribute": (Lazy, "last", (4, 8)),
}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("kind", STATEFUL)
def test_frozen_state_is_named_and_every_call_is_the_first(kind: str) -> None:
    build, name, shape = STATEFUL[kind]
    model, x = made(build), torch.randn(shape)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(TraceWarning, match=f"the model writes '{name}' as it runs"):
        program = gw.trace(model, (x,))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for _ in range(2):
        other = torch.randn(shape)
        torch.testing.assert_close(program(other), made(build)(other))


@pytest.mark.parametrize("kind", STATEFUL)
def test_explicit_state_goes_in_and_comes_out(kind: str) -> None:
    build, name, shape = STATEFUL[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error", TraceWarning)
        program = gw.trace(made(build), (torch.randn(shape),), state="explicit")
    key = name.replace(".", "_")
    assert [spec.name for spec in program.signature.inputs] == ["x", key]
    assert program.signature.outputs[-1].name == f"{key}_out"
    state = {key: program.examples[-1]}
    model = made(build)
    for _ in range(3):
        x = torch.randn(shape)
        output, state = program(x, **state)
        torch.testing.assert_close(output, model(x))


def test_explicit_state_lowers() -> None:
    program = gw.trace(made(Stream), (torch.randn(1, 4, 8),), {"x": {2: "t"}}, state="explicit")
    compiled = gw.lower(program, "onnxruntime")
    model, cache = made(Stream), program.examples[-1]
    for length in (8, 5, 9):
        x = torch.randn(1, 4, length)
        output, state = compiled(x, cache)
        cache = state["cache"]
        torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-5)


class Scripted(nn.Module):
    """State as published TorchScript models have it: empty before the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.last.numel() == 0:
            self.last = torch.zeros_like(x)
        y = x + 0.5 * self.last
        self.last = y
        return y


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_state_of_torchscript_goes_in_and_comes_out(tmp_path: Path) -> None:
    torch.jit.script(Scripted().eval()).save(str(tmp_path / "m.pt"))
    x = torch.randn(2, 3)
    program = gw.trace(load_model(tmp_path / "m.pt").module, (x,), state="explicit")
    model, state = Scripted().eval(), {"last": torch.zeros(2, 3)}
    for _ in range(3):
        output, state = program(x, **state)
        torch.testing.assert_close(output, model(x))


def test_a_cache_of_tables_is_no_state() -> None:
    @functools.lru_cache(maxsize=4)
    def window(size: int) -> Tensor:
        return torch.hann_window(size)

    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(0))
            self.by_size: dict[int, Tensor] = {}
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.table = torch.arange(8.0)
            self.by_size.setdefault(8, self.table * 2)
            self.kept.append(self.table)
            return x * window(8) + self.table + self.by_size[8]

    model, x = Caches().eval(), torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TraceWarning)
        program = gw.trace(model, (x,))
    assert not model.by_size
    assert not model.kept
    assert model.table.numel() == 0
    torch.testing.assert_close(model(x), program(x))


class Tables(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table") or self.table.shape[0] != x.shape[0]:
            self.table = torch.arange(x.shape[0]).float()
        return x * self.table[:, None]


class Calls(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.filterwarnings("ignore:the model writes 'calls'")
@pytest.mark.parametrize("kind", [Tables, Calls])
def test_what_the_traced_call_leaves_in_attributes_is_not_read_by_the_next(
    kind: type[nn.Module],
) -> None:
    program = gw.trace(kind(), (torch.randn(6, 5),), "batch")
    assert "batch" in program.signature.dims
    for size in (1, 6, 9):
        x = torch.randn(size, 5)
        torch.testing.assert_close(program(x), kind()(x))


def test_state_in_a_list_is_named_and_cannot_be_made_explicit() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.past: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.past.append(x)
            return sum(self.past[1:], self.past[0])

    with pytest.warns(TraceWarning, match="the model writes 'past'"):
        gw.trace(Remembers(), (torch.randn(2, 3),))
    with pytest.raises(ModelError, match="'past' is no tensor of a module"):
        gw.trace(Remembers(), (torch.randn(2, 3),), state="explicit")


def test_a_random_operator_is_named() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(3)  # noise

    with pytest.warns(TraceWarning, match=r"node 'randn' \(test_state.py:\d+\) draws random"):
        gw.trace(Noisy(), (torch.randn(2, 3),))
