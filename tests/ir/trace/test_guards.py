"""A dimension that is called free is right at every size; else it is narrowed or fixed, and said.

Every model here computes with a size as a number, which a trace answers for the example only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.ir.errors import ArgumentError
from graphwright.ir.program import Program
from graphwright.ir.trace.capture import TraceWarning

CLOSE = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}  # the mean of no token is not a number
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 18, 19, 20, 23, 24, 25, 31, 32, 33, 63, 64, 65)


class Sized(nn.Module):
    """A linear layer and a function of its output that uses the length as a number."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def keep(share: Callable[[int], float]) -> Callable[[Tensor], Tensor]:
    """Mean of the tokens with the largest norm, `share` of the length of them."""

    def function(y: Tensor) -> Tensor:
        index = y.norm(dim=2).topk(int(share(y.shape[1])), 1)[1]  # top
        return y.gather(1, index[..., None].expand(-1, -1, 6)).mean(1)

    return function


def branch(condition: Callable[[int], bool]) -> Callable[[Tensor], Tensor]:
    def function(y: Tensor) -> Tensor:
        return y.sum(1) if condition(y.shape[1]) else y.amax(1)

    return function


def looped(share: Callable[[int], float]) -> Callable[[Tensor], Tensor]:
    """A number that Python itself counts with."""

    def function(y: Tensor) -> Tensor:
        return torch.stack([y[:, i] for i in range(int(share(y.shape[1])))]).sum(0)

    return function


NUMBERS = {
    "half": keep(lambda t: t * 0.5),
    "quarter": keep(lambda t: t * 0.25),
    "root": keep(lambda t: t**0.5),
    "divided": keep(lambda t: t / 4),
    "tenth": keep(lambda t: t * 0.1),
    "scale": lambda y: y * (int(y.shape[1] * 0.5) + 1),
}
BRANCHES = {
    "float product": branch(lambda t: t * 0.5 > 6),
    "quotient": branch(lambda t: t / 4 > 3),
    "whole quotient": branch(lambda t: t // 4 == 4),
    "whole quotient at another": branch(lambda t: t // 4 == 2),
    "remainder": branch(lambda t: t % 4 in (1, 2)),
    "even": branch(lambda t: t % 2 == 0),
    "int of a product": branch(lambda t: int(t * 0.25) > 2),
    "one size": branch(lambda t: t == 64),
    "power of two": branch(lambda t: t & (t - 1) == 0),
    "far away": branch(lambda t: t * 0.5 > 30),
    "chunks": lambda y: torch.stack([part.sum(1) for part in y.split(4, 1)]).amax(0),
    "parts": lambda y: torch.cat([part.amax(1) for part in y.chunk(3, 1)], 1),
}
FREE = {
    "whole half": lambda y: y[:, : y.shape[1] // 2].sum(1),
    "ceiling": lambda y: y[:, : math.ceil(y.shape[1] / 2)].sum(1),
    "floor": lambda y: y[:, : math.floor(y.shape[1] * 0.75) + 1].sum(1),
    "round": lambda y: y[:, : round(y.shape[1] * 0.3) + 1].sum(1),
    "padded": lambda y: F.pad(y, (0, 0, 0, -y.shape[1] % 4)).reshape(y.shape[0], -1, 24).amax(1),
    "resized": lambda y: F.interpolate(y.mT, scale_factor=2.5).mT,
    "divided by the length": lambda y: y.sum(1) / y.shape[1],
    "arange": lambda y: y * torch.arange(y.shape[1])[:, None],
}  # fmt: skip


def traced(function: Callable[[Tensor], Tensor], **options: bool) -> tuple[nn.Module, Program, str]:
    model = Sized(function).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TraceWarning)
        program = gw.trace(model, (torch.randn(2, 16, 6),), {"x": {0: "b", 1: "t"}}, **options)
    return model, program, "\n".join(str(w.message) for w in caught)


def assert_right_at_every_size(model: nn.Module, program: Program) -> list[int]:
    """Sizes that the program takes, at each of which it gives the model's own result."""
    taken = []
    for size in SIZES:
        x = torch.randn(3, size, 6)
        try:
            expected = model(x)
        except (RuntimeError, IndexError):
            continue
        try:
            inputs = program.bind(x)
        except ArgumentError:
            continue
        taken.append(size)
        torch.testing.assert_close(program.run_flat(inputs)[0], expected, **CLOSE)
    assert 16 in taken
    return taken


LOOPS = {
    "half": (looped(lambda t: t * 0.5), (16, 17), "int(0.5*t) == 8"),
    "quarter": (looped(lambda t: t / 4), (16, 19), "int(t / 4) == 4"),
    "root": (looped(lambda t: t**0.5), (16, 24), "int(t ** 0.5) == 4"),
    "tenth": (looped(lambda t: t * 0.1), (10, 19), "int(0.10000000000000001*t) == 1"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_made_of_a_size_is_kept_as_a_size(name: str) -> None:
    model, program, said = traced(NUMBERS[name])
    taken = assert_right_at_every_size(model, program)
    assert {16, 17, 31, 64, 65} <= set(taken)
    assert not said
    assert "int" not in globals()


@pytest.mark.parametrize("name", LOOPS)
def test_a_size_turned_into_a_number_narrows_the_dimension(name: str) -> None:
    function, ends, text = LOOPS[name]
    model, program, said = traced(function)
    assert_right_at_every_size(model, program)
    assert (program.signature.dims["t"].min, program.signature.dims["t"].max) == ends
    assert "dimension 't' is" in said
    assert "test_guards.py:" in said
    assert f"the trace holds where {text}" in said


def test_a_batch_counted_from_windows_stays_free() -> None:
    class Windows(nn.Module):
        """Attention windows taken apart and put together, as published image models do."""

        def forward(self, x: Tensor) -> Tensor:
            w = x.view(x.shape[0], 2, 4, 2, 4, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 4)
            batch = int(w.shape[0] / (8 * 8 / 4 / 4))
            w = w.view(batch, 2, 2, 4, 4, 4).permute(0, 1, 3, 2, 4, 5)
            return w.reshape(batch, 8, 8, 4) + x

    model = Windows()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TraceWarning)
        program = gw.trace(model, (torch.randn(2, 8, 8, 4),), {"x": {0: "b"}})
    assert program.signature.outputs[0].shape == ("b", 8, 8, 4)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 8, 8, 4)
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_a_size_narrows_the_dimension(name: str) -> None:
    model, program, said = traced(BRANCHES[name])
    taken = assert_right_at_every_size(model, program)
    assert len(taken) < len(SIZES)
    assert "dimension 't' is" in said


@pytest.mark.parametrize("name", FREE)
def test_a_size_that_stays_an_expression_stays_free(name: str) -> None:
    model, program, _ = traced(FREE[name])
    assert {1, 2, 3, 17, 64} - set(assert_right_at_every_size(model, program)) <= {1}


def test_a_guard_holds_without_a_check_too() -> None:
    model, program, said = traced(NUMBERS["half"], check=False)
    assert assert_right_at_every_size(model, program) == [16, 17]
    assert "int(0.5*t) == 8" in said


PAIRS = {
    "equal": lambda h, w: h == w,
    "ordered": lambda h, w: h >= w,
    "product": lambda h, w: h * w > 100,
    "multiple": lambda h, w: w == 2 * h,
    "float ratio": lambda h, w: h / w > 0.9,
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("example", [(12, 12), (8, 16)])
def test_a_branch_on_two_sizes_is_right_at_both(name: str, example: tuple[int, int]) -> None:
    class Plane(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum((1, 2)) if PAIRS[name](x.shape[1], x.shape[2]) else x.amax((1, 2))

    model, x = Plane(), torch.randn(2, *example)
    with pytest.warns(TraceWarning, match="dimension '[hw]' is"):
        program = gw.trace(model, (x,), {"x": {0: "b", 1: "h", 2: "w"}})
    assert program.signature.inputs[0].shape[0] == "b"
    for h in (2, 8, 9, 12, 13, 40):
        for w in (2, 8, 9, 12, 13, 16, 40):
            x = torch.randn(3, h, w)
            try:
                inputs = program.bind(x)
            except ArgumentError:
                continue
            torch.testing.assert_close(program.run_flat(inputs)[0], model(x))


def test_a_condition_that_changes_nothing_narrows_nothing() -> None:
    class Checks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] % 4:
                raise ValueError("the length must be a multiple of 4")
            return x.reshape(x.shape[0], -1, 4).sum(2)

    with warnings.catch_warnings():
        warnings.simplefilter("error", TraceWarning)
        program = gw.trace(Checks(), (torch.randn(2, 16),), {"x": {0: "b", 1: "t"}})
    assert program.signature.dims["t"].max is None


def test_a_branch_that_torch_makes_a_range_of_is_said() -> None:
    model, program, said = traced(branch(lambda t: t > 12))
    assert 12 not in assert_right_at_every_size(model, program)
    assert program.signature.dims["t"].min == 13
    assert "dimension 't' is 13 or more" in said
    assert "t > 12" in said


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.zeros(math.trunc(y.shape[1] / 5) + 1),
        lambda y: torch.arange(0, y.shape[1], 3),
        lambda y: torch.arange(y.shape[1] // 2),
        lambda y: y[:, -3:],
    ],
    ids=["quotient", "steps", "half", "from behind"],
)
def test_a_shape_rule_of_torch_narrows_nothing(function: Callable[[Tensor], Tensor]) -> None:
    model, program, said = traced(function)
    assert set(SIZES) == set(assert_right_at_every_size(model, program))
    assert not said


class Halves(nn.Module):
    """Runs a batch and its mirror as one, and keeps the size of the last call."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x, x.flip(1)])
        if self.rows != both.shape[0]:
            self.rows = both.shape[0]
        first, second = self.linear(both).chunk(2, 0)
        return first + second.flip(1)


class Table(nn.Module):
    """Keeps a table for the length of the last call, as positions are kept."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.length, self.table = length, torch.arange(length)

    def forward(self, x: Tensor) -> Tensor:
        if self.length != x.shape[1]:
            self.length, self.table = x.shape[1], torch.arange(x.shape[1])
        return self.linear(x) + self.table[:, None].float()


@pytest.mark.parametrize("model", [Halves(4), Halves(10), Table(5)])
def test_a_size_that_the_model_kept_from_an_earlier_call_fixes_nothing(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = gw.trace(model, {"x": torch.randn(2, 5, 6)}, {"x": {0: "batch", 1: "length"}})
    assert set(program.signature.dims) == {"batch", "length"}
    for batch, length in ((1, 5), (2, 5), (2, 2), (3, 8), (5, 1), (7, 64)):
        x = torch.randn(batch, length, 6)
        torch.testing.assert_close(program(x=x), model(x), **CLOSE)


def test_the_length_of_a_tensor_is_a_size() -> None:
    model = Sized(lambda y: y.reshape(len(y), -1) + torch.ones(len(y), 1) * len([1, 2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = gw.trace(model, {"x": torch.randn(2, 5, 6)}, {"x": {0: "batch"}})
    for batch in (1, 2, 5):
        x = torch.randn(batch, 5, 6)
        torch.testing.assert_close(program(x=x), model(x), **CLOSE)
