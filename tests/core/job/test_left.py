"""Weights that quantizing passes leave as they are get a line in the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.job.left import left_as_they_are


class Mixed(nn.Module):
    """A recurrent layer, weights of an einsum, a transposed convolution, linears."""

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


def warnings(module: nn.Module, passes: str, folder: Path, done: str = "quantized") -> list[str]:
    torch.manual_seed(0)
    gw.trace(module.eval(), {"x": torch.randn(2, 5, 16)}).save(folder / "m.pt2")
    (folder / "spec.yaml").write_text(f"version: 1\npasses: [{passes}]\n")
    report: dict[str, Any] = gw.optimize(
        folder / "m.pt2", folder / "spec.yaml", out=folder / "out"
    ).report
    return [text for text in report["warnings"] if f"not {done}" in text]


def test_the_line_names_layers_and_their_share(tmp_path: Path) -> None:
    (line,) = warnings(Mixed(), "quantize.int8", tmp_path)
    assert "up (conv_transpose1d: " in line
    assert "r (lstm)" not in line
    assert "w (einsum)" not in line
    assert "gate" not in line
    up = sum(p.numel() for p in Mixed().up.parameters())
    rest = sum(p.numel() for p in Mixed().parameters()) - up
    # what is left is floats, of the rest about a byte each is left
    share = 4 * up / (4 * up + rest)
    assert float(line.split()[1].rstrip("%")) / 100 == pytest.approx(share, abs=0.05)


def test_a_call_of_which_one_weight_is_left_is_named() -> None:
    program = gw.trace(Mixed().eval(), {"x": torch.randn(2, 5, 16)})
    done = ["gate", "o", "w", "up", "r.weight_ih_l0"]
    actions = [(name, "int4", "", True) for name in done]
    actions.append(("r.weight_hh_l0", "left", "its weight holds NaN or infinity", False))
    row = {"id": "quantize.rtn", "contract": "lossy", "actions": actions}
    (line,) = left_as_they_are(program, [row])
    assert line.endswith(": r (lstm: its weight holds NaN or infinity)")


def test_what_the_spec_leaves_out_is_not_named(tmp_path: Path) -> None:
    assert warnings(Plain(), "quantize.rtn: {targets: ['*', '!b'], block: 16}", tmp_path) == []


@pytest.mark.parametrize(
    ("passes", "done"),
    [
        ("prune.magnitude: {sparsity: 0.5}", "pruned"),
        ("prune.magnitude: {sparsity: 0.5}, compensate.svd: {rank: 2}", "compensated"),
    ],
)
def test_pruning_and_compensation_name_what_they_do_not_see(
    passes: str, done: str, tmp_path: Path
) -> None:
    """Every weight that is no product: recurrent layers, einsum, the transposed convolution."""
    listed = passes.replace("}, ", "}}, {")
    (line,) = warnings(Mixed(), f"{{{listed}}}", tmp_path, done)
    net = Mixed()
    seen = sum(p.numel() for part in (net.gate, net.o) for p in part.parameters())
    share = 1 - seen / sum(p.numel() for p in net.parameters())
    listed_share = float(line.split("(")[1].split("%")[0]) / 100
    if done == "pruned":
        assert "up (conv_transpose1d" in line
        assert listed_share == pytest.approx(share, abs=0.01)
    assert "r (lstm)" in line
    assert "w (einsum)" in line
    assert "gate" not in line


def test_a_chain_without_quantizing_passes_says_nothing(tmp_path: Path) -> None:
    assert warnings(Mixed(), "prune.magnitude", tmp_path) == []


def test_a_model_without_layers_of_a_known_kind_is_refused_by_the_names_it_has(
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError) as caught:
        warnings(Recurrent(), "prune.magnitude", tmp_path)
    assert "r.weight_ih_l0 (gru)" in str(caught.value)
