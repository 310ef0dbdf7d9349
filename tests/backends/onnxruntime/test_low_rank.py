from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.backends.onnxruntime.steps.low_rank import split_low_rank
from graphwright.ir.edit import Editor
from graphwright.ir.files.coded.forms import Blocks
from graphwright.ir.files.coded.layout import Layer
from graphwright.ir.files.coded.modules import coded_linear
from graphwright.ir.program import Program


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(32, 24)
        self.turned, self.bias = nn.Parameter(torch.randn(24, 12)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.adaptive_avg_pool2d(torch.relu(self.conv(x)), 2).flatten(1)
        return torch.addmm(self.bias, torch.relu(self.fc(h)), self.turned)


@pytest.fixture(scope="module")
def corrected() -> Program:
    torch.manual_seed(0)
    before = gw.trace(Net().eval(), {"x": torch.randn(4, 3, 8, 8)}, dynamic={"x": {0: "batch"}})
    rough = gw.passes.quantize.Rtn(bits=2, block=16)(before)
    return gw.passes.compensate.Svd(rank=5)(rough, teacher=before)


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_corrections_leave_the_weights_and_the_result_stays(corrected: Program) -> None:
    editor = Editor(corrected, by="test")
    assert split_low_rank(editor) == 3
    apart = editor.finish()
    assert not any("add_low_rank" in target for target in targets(apart))
    assert sum("dequantize_blocks" in target for target in targets(apart)) == 3
    for batch in (1, 4):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(apart(x), corrected(x), rtol=1e-4, atol=1e-4)


def test_the_artifact_holds_no_dense_weight(corrected: Program) -> None:
    compiled = gw.lower(corrected, "onnxruntime")
    assert compiled.notes["steps"]["low_rank"] == 3
    dense = sum(
        t.numel() * 4 for t in (torch.empty(8, 27), torch.empty(24, 32), torch.empty(12, 24))
    )
    import onnx

    model = onnx.load_from_string(compiled.model)
    stored = sum(
        len(init.raw_data) for init in model.graph.initializer if len(init.dims) == 2
        and init.data_type == onnx.TensorProto.FLOAT and init.dims[0] * init.dims[1] > 5 * 32
    )  # fmt: skip
    assert stored < dense / 2


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 16) for _ in range(3))
        self.table = nn.Embedding(16, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.c(torch.cat([self.a(x), self.b(x), x[..., :32]], -1))


def test_sums_of_blocks_are_shared_and_no_products() -> None:
    torch.manual_seed(0)
    net = Twins().eval()
    for name, old in net.named_children():
        q, scale = torch.randint(0, 16, (16, 64), dtype=torch.uint8), torch.rand(16, 2)
        zero = torch.randint(0, 16, (16, 2), dtype=torch.uint8)
        coded = coded_linear(Layer(Blocks(q, scale, zero, None, 4, 32, torch.randn(16, 2))))
        coded.bias = getattr(old, "bias", None)
        coded.row_dtype = torch.float32 if isinstance(old, nn.Embedding) else None  # type: ignore[union-attr]
        setattr(net, name, coded)
    inputs = {"ids": torch.arange(6).view(3, 2)}
    program = gw.trace(net, inputs, dynamic={"ids": {0: "batch"}}, ranges={"ids": (0, 16)})
    editor = Editor(program, by="test")
    assert split_low_rank(editor) == 4
    apart = editor.finish()
    assert sum("aten.sum" in target for target in targets(apart)) == 2
    for batch in (1, 5):
        ids = torch.randint(0, 16, (batch, 2))
        torch.testing.assert_close(apart(ids), program(ids), rtol=1e-4, atol=1e-3)
    compiled = gw.lower(program, "onnxruntime")
    assert compiled.notes["steps"]["low_rank"] == 4
