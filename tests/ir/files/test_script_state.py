"""State of TorchScript modules: attributes that forward assigns are buffers in a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.torchscript import ScriptedModule, read_torchscript


class Stream(nn.Module):
    """A moving average over calls; its state is made by the first call, in an attribute."""

    def __init__(self, first: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.first = first
        self.calls = 0
        self._last = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self._last) == 0:
            self._last = torch.full([x.shape[0], 3], self.first)
        self._last = self.scale * self._last + x
        self.calls = x.shape[0]
        return self._last * 2


class Assigned(nn.Module):
    """A buffer that is assigned, in a submodule."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.mean: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean = 0.5 * self.mean + x.mean(0)
            return x - self.mean

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.fixture
def chunks() -> list[torch.Tensor]:
    return list(torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)))


def scripted(module: nn.Module, folder: Path) -> ScriptedModule:
    path = folder / "m.pt"
    torch.jit.script(module.eval()).save(str(path))
    return read_torchscript(path, allow_pickle=False)


NETS = [Stream, Assigned]


@pytest.mark.parametrize("net", NETS)
def test_calls_go_on_as_those_of_the_archived_module(
    net: type[nn.Module], chunks: list[torch.Tensor], tmp_path: Path
) -> None:
    ours, theirs = scripted(net(), tmp_path), torch.jit.load(str(tmp_path / "m.pt"))
    with torch.no_grad():
        for chunk in chunks:
            assert torch.equal(ours(chunk), theirs(chunk))


@pytest.mark.parametrize("net", NETS)
def test_an_exported_module_shows_its_state_and_keeps_it(
    net: type[nn.Module], chunks: list[torch.Tensor], tmp_path: Path
) -> None:
    ours, theirs = scripted(net(), tmp_path), torch.jit.load(str(tmp_path / "m.pt"))
    ours.settle(chunks[0])
    with torch.no_grad():
        exported = torch.export.export(ours, (chunks[0],)).module()
        assert any("copy_" in str(n.target) for n in exported.graph.nodes)
        for chunk in chunks:
            assert torch.allclose(exported(chunk), theirs(chunk))


def test_settling_leaves_the_first_call_the_first(
    chunks: list[torch.Tensor], tmp_path: Path
) -> None:
    ours, theirs = scripted(Stream(), tmp_path), torch.jit.load(str(tmp_path / "m.pt"))
    ours.settle(x=chunks[0])
    assert ours._last.tolist() == [[0.0] * 3] * 2
    assert set(ours.state_dict()) == {"scale"}
    with torch.no_grad():
        assert torch.equal(ours(chunks[1]), theirs(chunks[1]))


def test_a_first_call_that_does_not_begin_with_zeros_is_refused(
    chunks: list[torch.Tensor], tmp_path: Path
) -> None:
    ours = scripted(Stream(first=1.0), tmp_path)
    with pytest.raises(ModelError, match="makes its state") as caught:
        ours.settle(chunks[0])
    assert caught.value.where == "_last"


class Twice(nn.Module):
    """Calls the same part twice; its own part does so too, and so on."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.part = Twice(depth - 1) if depth else Assigned()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(self.part(x))


def test_calls_are_followed_and_not_inlined(tmp_path: Path) -> None:
    """Inlined, the code would be two to the power of 24 times as long."""
    assert next(iter(scripted(Twice(24), tmp_path).state_dict())).endswith("inner.mean")


def test_a_module_without_state_is_not_called(tmp_path: Path) -> None:
    linear = scripted(nn.Linear(3, 2), tmp_path)
    linear.settle("no tensor at all")
    assert list(linear.buffers()) == []
