"""A dimension that is fixed is fixed by a line of the model, which the warning names."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.trace.capture import TraceWarning


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("three", torch.ones(3, 1))


class Loop(Net):
    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(4)
        for row in x:  # here
            total = total + self.fc(row)
        return total


class Unpacked(Net):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x  # here
        return self.fc(a + b) + c


class Unbound(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.fc(row) for row in x.unbind(0)])  # here


class Listed(Net):
    def forward(self, x: Tensor) -> Tensor:
        rows = list(x)  # here
        return self.fc(rows[1])


class Split(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.fc(part) for part in x.split(1)])  # here


class Counted(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.fc(x[i : i + 1]) for i in range(len(x))])  # here


class Broadcast(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.three  # here


@pytest.mark.parametrize("made", [Loop, Unpacked, Unbound, Listed, Split, Counted, Broadcast])
def test_the_line_that_fixes_a_dimension_is_named(made: type[nn.Module]) -> None:
    lines, first = inspect.getsourcelines(made)
    (line,) = (first + i for i, text in enumerate(lines) if "# here" in text)
    with pytest.warns(TraceWarning, match="'n' is fixed at 3") as caught:
        program = gw.trace(made().eval(), {"x": torch.randn(3, 4)}, dynamic={"x": {0: "n"}})
    assert program.signature.inputs[0].shape == (3, 4)
    assert any(f"{__file__}:{line}: " in str(warning.message) for warning in caught)
