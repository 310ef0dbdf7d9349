"""The compiled module: runs, saves and loads alone, moves, compiles, trains, and is checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.backends.base import find_backend
from graphwright.backends.triton import lowering
from graphwright.backends.triton.compiled import FusedModule, load
from graphwright.ir.context import Context
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, LoweringError
from graphwright.ir.graph.device import set_device
from graphwright.ir.program import Program
from graphwright.ir.trace.capture import trace

aten = torch.ops.aten


class Model(nn.Module):
    """Structured output, a baked device (`arange`), two fusions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = x + torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None]
        y = self.norm(y + self.down(nn.functional.gelu(self.up(y))))
        return {"hidden": y, "pooled": y.mean(1)}


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def program(model: Model) -> Program:
    with torch.no_grad():
        return trace(model, (torch.randn(2, 3, 8),), dynamic={"x": {0: "batch", 1: "seq"}})


@pytest.fixture
def compiled(program: Program) -> FusedModule:
    found = find_backend("triton")().lower(program, Context())
    assert isinstance(found, FusedModule)
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6)


def test_output_is_the_models_own(compiled: FusedModule, model: Model) -> None:
    x = torch.randn(4, 5, 8)
    assert_same(compiled(x), model(x))
    assert_same(compiled(x=x), model(x))
    assert compiled.notes["fused"] == {"add_layer_norm": 1, "bias_act": 1}
    with pytest.raises(ArgumentError, match="float64"):
        compiled(x.double())


def test_saves_and_loads_without_the_model(
    compiled: FusedModule, model: Model, tmp_path: Path
) -> None:
    artifact = compiled.save(tmp_path)
    assert artifact.file_bytes == artifact.path.stat().st_size
    x = torch.randn(4, 5, 8)
    torch.save((x, model(x)), tmp_path / "expected.pt")
    script = f"""
import torch
from graphwright.backends.triton.compiled import load
module = load({str(tmp_path)!r})
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
found = module(x)
assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in expected.items())
print(module.notes["fused"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "add_layer_norm" in done.stdout
    assert load(tmp_path).notes == compiled.notes


def test_composes_with_torch_compile(compiled: FusedModule, model: Model) -> None:
    torch._dynamo.reset()
    whole = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for shape in ((4, 5, 8), (3, 6, 8)):
        x = torch.randn(shape)
        assert_same(whole(x), model(x))


def test_trains_with_the_gradient_of_the_model(compiled: FusedModule, model: Model) -> None:
    x = torch.randn(4, 5, 8)
    compiled(x)["pooled"].square().sum().backward()
    model.zero_grad()
    model(x)["pooled"].square().sum().backward()
    found = dict(compiled.body.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_moving_it_leaves_the_program_alone(compiled: FusedModule, program: Program) -> None:
    compiled.to("meta")
    assert {t.device.type for t in program.state.values()} == {"cpu"}
    named = [n.kwargs["device"] for n in compiled.body.graph.nodes if "device" in n.kwargs]
    assert named
    assert all(device == torch.device("meta") for device in named)
    kept = [n.kwargs["device"] for n in program.graph.nodes if "device" in n.kwargs]
    assert all(device == torch.device("cpu") for device in kept)
    assert not set_device(compiled.body.graph, torch.device("meta"))


def test_a_wrong_fusion_is_refused(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(given: Program) -> Program:
        editor = Editor(given, by="lower.triton")
        (node,) = [n for n in editor.graph.nodes if n.target is aten.gelu.default]
        editor.replace(node, editor.call(aten.relu.default, node.args[0], before=node))
        return editor.finish()

    monkeypatch.setattr(lowering, "fuse", broken)
    with pytest.raises(LoweringError, match=r"lower\.triton") as caught:
        lowering.Lowering().lower(program, Context())
    assert "relu" in str(caught.value)


def test_a_fusion_that_holds_at_one_size_only_is_refused(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(given: Program) -> Program:
        editor = Editor(given, by="lower.triton")
        (node,) = [n for n in editor.graph.nodes if n.target is aten.mean.dim]
        total = editor.call(aten.sum.dim_IntList, node.args[0], [1], before=node)
        editor.replace(node, editor.call(aten.div.Tensor, total, 3, before=node))
        return editor.finish()

    monkeypatch.setattr(lowering, "fuse", broken)
    with pytest.raises(LoweringError, match=r"lower\.triton broke its contract"):
        lowering.Lowering().lower(program, Context())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_its_kernels_on_a_gpu(compiled: FusedModule, model: Model) -> None:
    x = torch.randn(4, 5, 8)
    found = compiled.to("cuda")(x.cuda())
    assert_same({name: value.cpu() for name, value in found.items()}, model(x))


class Halves(nn.Module):
    """Takes even batches only."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.fc, self.pairs = nn.Linear(8, 8), pairs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        if self.pairs:
            return h.reshape(x.shape[0] // 2, 2, 8).sum(1)
        left, right = h.chunk(2, 0)
        return left - right


@pytest.mark.parametrize("pairs", [True, False])
def test_a_net_of_even_batches_is_lowered(pairs: bool, capfd: pytest.CaptureFixture[str]) -> None:
    net = Halves(pairs).eval()
    program = gw.trace(net, {"x": torch.randn(4, 8)}, dynamic={"x": {0: "n"}})
    x = torch.randn(10, 8)
    torch.testing.assert_close(gw.lower(program, "triton")(x), net(x))
    assert capfd.readouterr().err == ""  # sizes that it does not take are tried in silence
