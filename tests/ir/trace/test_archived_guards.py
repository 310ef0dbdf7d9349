"""What another's export archive says about its sizes becomes ranges; nothing else of it is lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models.function import Function
from torch import Tensor
from torch.nn import functional as F

import graphwright as gw
from graphwright.ir.files import load_model
from graphwright.ir.trace.capture import TraceWarning

NARROWED = {
    "a number": (lambda y: y.topk(int(y.shape[1] * 0.5), 1)[0].sum(1), (16, 17)),
    "a root": (lambda y: y[:, : int(y.shape[1] ** 0.5)].sum(1), (16, 24)),
    "a branch": (lambda y: y.sum(1) if y.shape[1] // 4 == 4 else y.amax(1), (16, 19)),
    "pieces": (lambda y: torch.stack([p.sum(1) for p in y.split(4, 1)]).amax(0), (13, 16)),
}
FREE = {
    "an expression": lambda y: y[:, : y.shape[1] // 2].sum(1),
    "resized": lambda y: F.interpolate(y.mT, scale_factor=2.5).mT,
    "nothing": lambda y: y * 2,
    "reshaped": lambda y: y.reshape(y.shape[0], y.shape[1] * 2, 3).transpose(1, 2).flatten(1),
}


def from_archive(
    function: Callable[[Tensor], Tensor], folder: Path
) -> tuple[gw.Program, list[str]]:
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        exported = torch.export.export(
            Function(function), (torch.randn(2, 16, 6),), dynamic_shapes=({0: auto, 1: auto},)
        )
    torch.export.save(exported, folder / "m.pt2")
    module = load_model(folder / "m.pt2").module
    assert module is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TraceWarning)
        program = gw.trace(module, (torch.randn(2, 16, 6),), {"x": {0: "b", 1: "t"}})
    return program, [str(w.message) for w in caught]


@pytest.mark.parametrize("name", NARROWED)
def test_a_guard_of_the_archive_becomes_a_range(name: str, tmp_path: Path) -> None:
    function, ends = NARROWED[name]
    program, said = from_archive(function, tmp_path)
    bounds = program.signature.dims["t"]
    assert (bounds.min, bounds.max) == ends
    assert any("the export archive" in line and "dimension 't' is" in line for line in said)
    for size in range(ends[0], ends[1] + 1):
        x = torch.randn(3, size, 6)
        torch.testing.assert_close(program(x), function(x))


@pytest.mark.parametrize("name", FREE)
def test_conditions_on_strides_narrow_nothing(name: str, tmp_path: Path) -> None:
    program, _ = from_archive(FREE[name], tmp_path)
    assert program.signature.dims["b"].max is None
    assert program.signature.dims["t"].max is None
    for size in (5, 8, 17, 33):
        x = torch.randn(3, size, 6)
        torch.testing.assert_close(program(x), FREE[name](x))
