"""`program.train()` behaves as `model.train()`, and `eval()` takes it back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.graph.nodes import op_name


class Net(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop, self.drop2d = nn.Dropout(p), nn.Dropout2d(p)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.drop2d(F.relu(self.norm(self.conv(x)))).mean((2, 3))
        return self.head(self.drop(h)), h


def traced(model: nn.Module, *inputs: Tensor) -> gw.Program:
    names = {"x": {0: "batch"}}
    return gw.trace(model, inputs, names)


def test_batch_statistics_and_their_update_are_the_models() -> None:
    torch.manual_seed(0)
    model, x = Net(0.0), torch.randn(8, 3, 5, 5)
    program = traced(model, x)
    training = program.train()
    model.train()
    torch.testing.assert_close(training(x), model(x))
    torch.testing.assert_close(training.state["norm.running_mean"], model.norm.running_mean)
    torch.testing.assert_close(training.state["norm.running_var"], model.norm.running_var)


def test_running_a_training_program_leaves_the_inference_program_alone() -> None:
    torch.manual_seed(0)
    model, x = Net(0.3), torch.randn(8, 3, 5, 5)
    program = traced(model, x)
    before = program(x)
    program.train()(x)
    torch.testing.assert_close(program(x), before, rtol=0, atol=0)


def test_eval_after_train_is_the_inference_program_again() -> None:
    torch.manual_seed(0)
    model, x = Net(0.5), torch.randn(8, 3, 5, 5)
    program = traced(model, x)
    again = program.train().eval()
    assert [n.target for n in again.graph.nodes] == [n.target for n in program.graph.nodes]
    torch.testing.assert_close(again(x), program(x))


def test_dropout_is_out_of_inference_and_back_in_training_for_its_own_readers_only() -> None:
    model, x = Net(0.5), torch.randn(8, 3, 5, 5)
    program = traced(model, x)
    ops = [op_name(n) for n in program.graph.nodes]
    assert "dropout" not in ops
    assert "feature_dropout" not in ops
    training = program.train()
    ops = [op_name(n) for n in training.graph.nodes]
    assert ops.count("dropout") == ops.count("feature_dropout") == 1
    # `h` itself is returned without dropout.
    names = {node.name: op_name(node) for node in training.graph.nodes}
    returned = training.graph.output_node().args[0]
    assert [names[node.name] for node in returned] == ["linear", "mean"]


@pytest.mark.parametrize(
    "drop",
    [
        lambda x, on: F.dropout(x, 0.5, on),
        lambda x, on: F.dropout(input=x, p=0.5, training=on),
        lambda x, on: torch.dropout(x, 0.5, on),
        lambda x, on: F.alpha_dropout(x, 0.5, on),
        lambda x, on: F.dropout2d(x, 0.5, on),
        lambda x, on: F.feature_alpha_dropout(x, 0.5, on),
    ],
)
def test_a_residual_stream_goes_past_the_dropout(drop: Callable[[Tensor, bool], Tensor]) -> None:
    class Residual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return y + torch.sin(drop(y, self.training))

    training = traced(Residual(), torch.randn(2, 3, 4, 4)).train()
    dropped = [n for n in training.graph.nodes if "dropout" in op_name(n)]
    assert [[op_name(user) for user in node.users] for node in dropped] == [["sin"]]


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropped_share_and_scale_are_the_models(p: float) -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, p, self.training) + 0.0

    torch.manual_seed(0)
    x = torch.ones(200, 500)
    out = traced(Drops(), x).train()(x)
    kept = out != 0
    # 100,000 draws: the share lies within 4 standard deviations.
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))


def test_dropout_of_fused_attention_comes_back() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = 0.4

        def forward(self, x: Tensor) -> Tensor:
            p = self.dropout if self.training else 0.0
            q = x[:, None]
            return F.scaled_dot_product_attention(q, q, q, dropout_p=p)

    torch.manual_seed(0)
    x = torch.randn(2, 64, 8)
    program = traced(Attends(), x)
    torch.testing.assert_close(program(x), program(x), rtol=0, atol=0)
    (node,) = [n for n in program.train().graph.nodes if "attention" in op_name(n)]
    assert node.args[4] == 0.4
    assert not torch.equal(program.train()(x), program(x))
    torch.testing.assert_close(program.train().eval()(x), program(x))


def test_a_norm_without_running_statistics_keeps_using_the_inputs() -> None:
    class Standardized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.norm = nn.InstanceNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            w = F.batch_norm(self.conv.weight.reshape(1, 6, -1), None, None, training=True)
            return self.norm(F.conv2d(x, w.view_as(self.conv.weight)))

    torch.manual_seed(0)
    model, x = Standardized(), torch.randn(2, 3, 6, 6)
    program = traced(model, x)
    torch.testing.assert_close(program(x), model(x))
    torch.testing.assert_close(program.train()(x), model.train()(x))
    torch.testing.assert_close(program.train().eval()(x), model.eval()(x))
