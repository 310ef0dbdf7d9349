from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.backends.onnxruntime.steps.low_rank import split_low_rank
from graphwright.ir.edit import Editor
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
