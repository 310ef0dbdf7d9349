"""Programs whose sizes go through floats are saved, come back whole, and mean the same to torch."""

from __future__ import annotations

import math
import operator
from pathlib import Path

import pytest
import torch
from models.function import Function
from torch.nn import functional as F

import graphwright as gw
from graphwright.ir.errors import ArgumentError
from graphwright.ir.files import load_model
from graphwright.ir.program import Program

SIZES = {
    "ceil": lambda y: y[:, : math.ceil(y.shape[1] / 2)],
    "ceil of a tenth": lambda y: y[:, : math.ceil(y.shape[1] * 0.1)],
    "floor": lambda y: y[:, : math.floor(y.shape[1] * 0.75) + 1],
    "floor below zero": lambda y: y[:, : 40 + math.floor(-0.3 * y.shape[1])],
    "round": lambda y: y[:, : round(y.shape[1] * 0.5) + 1],
    "round to a digit": lambda y: y * round(y.shape[1] * 0.3, 1),
    "absolute": lambda y: y * abs(y.shape[1] - 20),
    "truncated": lambda y: y[:, : math.trunc(y.shape[1] * 0.3) + 1],
    "divided": lambda y: y * (y.shape[1] / 3.7),
    "root": lambda y: y * y.shape[1] ** 0.5,
    "torch's root": lambda y: y * torch.sym_sqrt(y.shape[1]),
    "choice": lambda y: y * torch.sym_ite(y.shape[1] > 8, 1, 2),
    "bits": lambda y: y * (y.shape[1] & 3),
    "bilinear": lambda y: F.interpolate(y[None], scale_factor=0.5, mode="bilinear"),
    "bicubic": lambda y: F.interpolate(y[None], scale_factor=2.0, mode="bicubic"),
    "nearest": lambda y: F.interpolate(y.mT, scale_factor=1.7),
    "recomputed": lambda y: F.interpolate(y.mT, scale_factor=2.5, recompute_scale_factor=True),
}
LENGTHS = (2, 3, 5, 9, 10, 15, 16, 25, 30, 31)
WITHOUT_TORCH = {"torch's root", "choice", "bits"}
"""Torch cannot read back what it writes for these."""


def traced(name: str) -> Program:
    example = (torch.randn(2, 9, 6),)
    return gw.trace(Function(SIZES[name]), example, {"x": {0: "b", 1: "t"}}, check=False)


@pytest.mark.parametrize("name", SIZES)
def test_a_program_with_such_sizes_comes_back_whole(name: str, tmp_path: Path) -> None:
    program = traced(name)
    program.save(tmp_path / "p.pt2")
    loaded = gw.load(tmp_path / "p.pt2")
    calls = [(n.name, n.op, str(n.target)) for n in program.graph.nodes]
    assert [(n.name, n.op, str(n.target)) for n in loaded.graph.nodes] == calls
    for length in LENGTHS:
        x = torch.randn(3, length, 6)
        torch.testing.assert_close(loaded(x), SIZES[name](x), rtol=1e-5, atol=1e-5)
    loaded.save(tmp_path / "again.pt2")
    assert (tmp_path / "again.pt2").read_bytes() == (tmp_path / "p.pt2").read_bytes()


@pytest.mark.parametrize("name", sorted(SIZES.keys() - WITHOUT_TORCH))
def test_torch_reads_the_same_arithmetic(name: str, tmp_path: Path) -> None:
    traced(name).save(tmp_path / "p.pt2")
    module = torch.export.load(tmp_path / "p.pt2").module()
    for length in LENGTHS:
        x = torch.randn(3, length, 6)
        torch.testing.assert_close(module(x), SIZES[name](x), rtol=1e-5, atol=1e-5)


def test_an_archive_of_the_users_own_with_float_factors_is_opened(tmp_path: Path) -> None:
    height = torch.export.Dim("h", min=4, max=512)
    exported = torch.export.export(
        Function(lambda y: F.interpolate(y, scale_factor=0.5, mode="bilinear")).eval(),
        (torch.randn(2, 3, 32, 40),),
        dynamic_shapes=({2: height},),
    )
    torch.export.save(exported, tmp_path / "m.pt2")
    loaded = load_model(tmp_path / "m.pt2").module
    assert loaded is not None
    x = torch.randn(2, 3, 50, 40)
    torch.testing.assert_close(loaded(x), F.interpolate(x, scale_factor=0.5, mode="bilinear"))


def test_a_call_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    program = traced("ceil of a tenth")
    node = next(n for n in program.graph.nodes if n.target is math.ceil)
    node.target = operator.not_  # torch's verifier lets it pass, its serializer does not
    with pytest.raises(ArgumentError, match=r"cannot be written: .*ceil"):
        program.save(tmp_path / "p.pt2")
    assert not list(tmp_path.iterdir())
