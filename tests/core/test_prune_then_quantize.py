"""One spec prunes to half of the multiply-accumulates, quantizes, and lowers to both backends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.cli import optimize_main

SPEC = """
version: 1
calibration: {data: images.npz, samples: 8, batch_size: 4}
passes:
  - cleanup.fold_batch_norm
  - prune.zig: {sparsity: 0.5, of: macs}
  - quantize.int8: {activations: static}
lower:
  - onnxruntime
  - triton
"""


class Bottleneck(nn.Module):
    def __init__(self, i: int, m: int, o: int, stride: int) -> None:
        super().__init__()
        sizes = ((i, m, 1, 1), (m, m, 3, stride), (m, o, 1, 1))
        self.main = nn.Sequential(*(layer for s in sizes for layer in self.convolution(*s)))
        self.skip = nn.Sequential(*self.convolution(i, o, 1, stride)[:2])
        self.main[-1] = nn.Identity()

    @staticmethod
    def convolution(i: int, o: int, k: int, s: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.skip(x))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    stem = Bottleneck.convolution(3, 16, 3, 1)
    body = (Bottleneck(16, 16, 32, 1), Bottleneck(32, 16, 32, 1), Bottleneck(32, 32, 64, 2))
    return nn.Sequential(
        *stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    ).eval()


def test_half_of_the_work_in_integers_on_both_backends(tmp_path: Path) -> None:
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    program = gw.trace(resnet(), (images[:4],), dynamic="batch")
    name = program.signature.inputs[0].name
    program.save(tmp_path / "resnet.pt2")
    np.savez(tmp_path / "images.npz", **{name: images.numpy()})
    (tmp_path / "spec.yaml").write_text(SPEC)
    out = tmp_path / "out"
    arguments = [str(tmp_path / "resnet.pt2"), "--spec", str(tmp_path / "spec.yaml")]
    assert optimize_main([*arguments, "--out", str(out), "--quiet"]) == 0
    report = json.loads((out / "report.json").read_text())
    left = report["result"]["macs"] / report["model"]["macs"]
    assert abs(left - 0.5) <= 0.02
    assert {a["backend"] for a in report["result"]["artifacts"]} == {"onnxruntime", "triton"}
    opened = [gw.load(out / a["path"]) for a in report["result"]["artifacts"]]
    first, second = (compiled(images[:3]) for compiled in opened)
    assert (first - second).norm() < 0.1 * second.norm()  # a code apart here and there
