"""Declaring an op: what is registered, which face runs, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.ops import OPS, declare, kernels_enabled
from graphwright.ir.ops.registry import SWITCH

CPU = torch.device("cpu")


def declare_double(schema: str, **changes: Any) -> Any:
    faces: dict[str, Any] = {
        "eager": lambda x, factor=2.0: x * factor,
        "meta": lambda x, factor=2.0: torch.empty(x.shape, dtype=x.dtype, device=x.device),
        "onnx": lambda x, factor=2.0: x,
        "kernel": "graphwright.ir.kernels.activation:bias_act",
        "samples": lambda: [(torch.ones(2), 2.0)],
    }
    return declare(schema, **{**faces, **changes})


@pytest.fixture
def forget() -> Any:
    """Ops declared by a test leave the table again, which other tests walk."""
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)


def test_defaults_reach_the_faces(forget: None) -> None:
    double = declare_double("test_double(Tensor x, float factor=2.0) -> Tensor")
    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.equal(double(torch.ones(3), factor=4.0), torch.full((3,), 4.0))


def test_a_name_can_be_declared_once(forget: None) -> None:
    declare_double("test_twice(Tensor x, float factor=2.0) -> Tensor")
    with pytest.raises(ValueError, match="'test_twice' is declared twice"):
        declare_double("test_twice(Tensor x, float factor=2.0) -> Tensor")


def test_own_gradient_replaces_that_of_eager(forget: None) -> None:
    rounding = declare_double(
        "test_round(Tensor x, float factor=1.0) -> Tensor",
        eager=lambda x, factor=1.0: torch.round(x),
        backward=lambda ctx, grad: (grad, None),
    )
    x = torch.rand(5, requires_grad=True)
    rounding(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(5))  # type: ignore[arg-type]


def test_the_switch_decides_which_face_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "eager")
    assert not kernels_enabled(CPU)
    monkeypatch.setenv(SWITCH, "fast")
    with pytest.raises(ArgumentError, match="GRAPHWRIGHT_KERNELS is 'fast'"):
        kernels_enabled(CPU)
    monkeypatch.delenv(SWITCH)
    assert not kernels_enabled(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_the_switch_runs_kernels_on_a_cpu_through_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    launched: list[str] = []
    op = OPS["rms_norm"]
    kernel = op.load_kernel()

    def launch(*arguments: Any) -> Tensor:
        launched.append(op.name)
        return kernel.launch(*arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr("graphwright.ir.kernels.norm.rms_norm", kernel._replace(launch=launch))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.randn(2, 7)
    eager = op.overload(x, None, 1e-6)
    assert not launched
    monkeypatch.setenv(SWITCH, "triton")
    torch.testing.assert_close(op.overload(x, None, 1e-6), eager)
    assert launched == ["rms_norm"]


def test_ops_run_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from graphwright.ir.ops import OPS
for op in OPS.values():
    for sample in op.samples():
        op.overload(*sample)
print(len(OPS))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(OPS)
