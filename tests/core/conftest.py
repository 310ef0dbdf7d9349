"""A small trained-looking model in the forms that the command line takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw


class Net(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        return self.fc(nn.functional.max_pool2d(h, 2).flatten(1))


@pytest.fixture(scope="session")
def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture(scope="session")
def models(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `program.pt2` (ours), `state.pt` (a state dict) and `module.pt` (a pickle)."""
    folder = tmp_path_factory.mktemp("models")
    program = gw.trace(net, (torch.randn(4, 1, 8, 8),), {"x": {0: "batch"}})
    program.save(folder / "program.pt2")
    torch.save(net.state_dict(), folder / "state.pt")
    torch.save(net, folder / "module.pt")
    return folder
