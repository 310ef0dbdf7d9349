"""One program is lowered to one file: again, from a file, and in another process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import every_pass
from torch import nn

import graphwright as gw

FILES = {"onnxruntime": "model.onnx", "triton": "program.pt2"}
PASSES = ("quantize.int8", "quantize.nf4", "compensate.eora", "prune.udfc")


class Decomposed(nn.Module):
    """Operators that torch takes apart for us, which asks what is known of the free size."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(x, y) + torch.sgn(x).rot90(1, [0, 1]).sum()


def program(name: str) -> gw.Program:
    if name == "decomposed":
        free = {"x": {0: "n"}, "y": {0: "n"}}
        return gw.trace(Decomposed().eval(), (torch.randn(4, 3), torch.randn(4, 3)), free)
    return every_pass.run_last(name, every_pass.before_last(name))


def lowered(given: gw.Program, backend: str, folder: Path) -> str:
    gw.lower(given, backend).save(folder)
    return hashlib.sha256((folder / FILES[backend]).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [*PASSES, "decomposed"])
def test_lowered_again_and_out_of_a_file(name: str, tmp_path: Path) -> None:
    given = program(name)
    given.save(tmp_path / "program.pt2")
    loaded = gw.load(tmp_path / "program.pt2")
    for backend in FILES:
        found = {lowered(p, backend, tmp_path / backend) for p in (given, given, given, loaded)}
        assert len(found) == 1, backend


def test_lowered_in_a_process_that_hashes_texts_in_another_way(tmp_path: Path) -> None:
    given = program("quantize.udfc")
    given.save(tmp_path / "program.pt2")
    code = "import graphwright as gw; gw.lower(gw.load('program.pt2'), 'onnxruntime').save('there')"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    there = hashlib.sha256((tmp_path / "there" / "model.onnx").read_bytes()).hexdigest()
    assert there == lowered(given, "onnxruntime", tmp_path / "here")
