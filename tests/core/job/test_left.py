"""Weights that quantizing passes leave as they are get a line in the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError


class Mixed(nn.Module):
    """A recurrent layer, weights of experts in one tensor, a transposed convolution, linears."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.LSTM(16, 32, batch_first=True)
        self.up = nn.ConvTranspose1d(32, 32, 3, padding=1)
        self.gate, self.o = nn.Linear(32, 4), nn.Linear(32, 10)
        self.w = nn.Parameter(torch.randn(4, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.r(x)[0].transpose(1, 2)).transpose(1, 2)
        y = torch.einsum("btd,edf->btef", x, self.w)
        return self.o((y * self.gate(x).softmax(-1)[..., None]).sum(2))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r = nn.GRU(16, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.r(x)[0]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


def warnings(module: nn.Module, passes: str, folder: Path) -> list[str]:
    torch.manual_seed(0)
    gw.trace(module.eval(), {"x": torch.randn(2, 5, 16)}).save(folder / "m.pt2")
    (folder / "spec.yaml").write_text(f"version: 1\npasses: [{passes}]\n")
    report: dict[str, Any] = gw.optimize(
        folder / "m.pt2", folder / "spec.yaml", out=folder / "out"
    ).report
    return [text for text in report["warnings"] if "not quantized" in text]


def test_the_line_names_layers_and_their_share(tmp_path: Path) -> None:
    (line,) = warnings(Mixed(), "quantize.rtn: {bits: 4, block: 16}", tmp_path)
    total = 4 * sum(p.numel() for p in Mixed().parameters())
    lstm = 4 * sum(p.numel() for p in Mixed().r.parameters())
    assert line.startswith("quantize.rtn: 9")
    assert "r (lstm)" in line
    assert "w (einsum)" in line
    assert "up (conv_transpose1d: " in line
    assert "gate" not in line
    assert lstm / total < float(line.split()[1].rstrip("%")) / 100 < 1


def test_what_the_spec_leaves_out_is_not_named(tmp_path: Path) -> None:
    assert warnings(Plain(), "quantize.rtn: {targets: ['*', '!b'], block: 16}", tmp_path) == []


def test_a_chain_without_quantizing_passes_says_nothing(tmp_path: Path) -> None:
    assert warnings(Mixed(), "prune.magnitude", tmp_path) == []


def test_a_model_without_layers_of_a_known_kind_is_refused_by_the_names_it_has(
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError) as caught:
        warnings(Recurrent(), "quantize.rtn", tmp_path)
    assert "r (gru)" in str(caught.value)
