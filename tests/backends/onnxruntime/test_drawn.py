from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.backends.onnxruntime import translate
from graphwright.backends.onnxruntime.drawn import drawn_cases
from graphwright.ir.errors import LoweringError


class Positive(nn.Module):
    """A zero pad in front of a pooling, on features that the examples leave positive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(x + 0.5, (1, 1, 1, 1))
        return nn.functional.max_pool2d(padded, 3, 2)


def test_a_fault_that_the_examples_do_not_show_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "guard_pads", lambda model: 0)
    program = gw.trace(Positive().eval(), {"x": torch.rand(2, 3, 8, 8)})
    with pytest.raises(LoweringError, match=r"moved down.*graph optimizations make it differ"):
        gw.lower(program, "onnxruntime")


def test_both_signs_are_reached() -> None:
    program = gw.trace(Positive().eval(), {"x": torch.rand(2, 3, 8, 8)})
    up, down, wide = drawn_cases(program)
    assert bool((up.inputs[0] > 0).all())
    assert bool((down.inputs[0] < 0).all())
    rms = program.examples[0].square().mean().sqrt()
    spikes = wide.inputs[0].flatten(1)
    assert torch.equal(spikes.amax(1) / rms, torch.full((2,), 40.0))
    assert torch.equal(spikes.amin(1) / rms, torch.full((2,), -40.0))


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


def test_inputs_without_finite_outputs_are_left_out() -> None:
    program = gw.trace(Root().eval(), {"x": torch.rand(2, 3)})
    assert [case.drawn for case in drawn_cases(program)] == ["moved up"]


def test_tables_are_not_read_beside_their_rows() -> None:
    program = gw.trace(nn.Embedding(4, 3).eval(), {"input": torch.randint(0, 4, (5,))})
    assert drawn_cases(program) == []


def test_a_file_that_is_wrong_without_optimizations_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from graphwright.backends.onnxruntime.optimized import OptimizedGraph

    read = OptimizedGraph.read

    def wrong(self: OptimizedGraph, *args: object) -> object:
        found, outputs = read(self, *args)  # type: ignore[arg-type]
        return found, tuple(output * 1.01 for output in outputs)

    monkeypatch.setattr(OptimizedGraph, "read", wrong)
    with pytest.raises(LoweringError, match=r"differs: relative error 0\.01"):
        gw.lower(gw.trace(nn.Linear(4, 3).eval(), {"input": torch.rand(2, 4)}), "onnxruntime")
