"""reparameterize.activation_free: P77's gates, their fit, and what distillation makes of them."""

from __future__ import annotations

import pytest
import torch
from models import digits
from models.function import Function
from models.tune_net import images, table
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ContractError, ModelError
from graphwright.ir.graph.nodes import op_name
from graphwright.passes.reparameterize import ActivationFree
from graphwright.passes.reparameterize._activation_free import (
    find_attention,
    find_gated,
    mean_gates,
)

CHAIN = (
    "text",
    [
        (
            "reparameterize.activation_free",
            {"tune": {"epochs": 1, "lr": 0.001, "loss": "teacher_mse"}},
        )
    ],
)


class Net(nn.Module):
    """Activations behind a convolution, a depthwise one and a linear layer; channel attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.wise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(self.wise(torch.relu(self.stem(x))))
        pooled = x.mean((2, 3), keepdim=True)
        x = x * self.excite(torch.relu(self.squeeze(pooled))).sigmoid()
        return self.head(torch.nn.functional.gelu(self.hidden(x.mean((2, 3)))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def program(net: Net) -> gw.Program:
    return gw.trace(net, (images()[0][:4],), {"x": {0: "batch"}})


def start(program: gw.Program, **options: object) -> gw.Program:
    """After one step so small that it does not move."""
    x, labels = images()
    data = table(program.signature, x, labels, 48)
    tune = {"steps": 1, "lr": 1e-12, "loss": "teacher_mse"}
    run = Context(training=data, teacher=program, scope=("x",))
    return ActivationFree(tune=tune, **options).execute(program, run).program


def test_no_activation_is_left(program: gw.Program) -> None:
    free = start(program)
    names = {op_name(node) for node in free.graph.nodes}
    assert not names & {"relu", "gelu", "silu", "sigmoid"}
    assert free.state["stem.weight"].shape == (12, 1, 3, 3)
    assert free.state["stem.bias"].shape == (12,)
    assert free.state["wise.gate_weight"].shape == (6, 1, 3, 3)
    assert free.state["hidden.weight"].shape == (16, 6)
    assert "squeeze.weight" not in free.state  # what made the gate is gone


def test_the_gate_is_the_least_squares_fit(program: gw.Program, net: Net) -> None:
    """Against numpy's own solver, per channel, on the values of the stem's activation."""
    import numpy as np

    x, _ = images()
    free = start(program, targets=["stem"], attention=False)
    with torch.no_grad():
        z = net.stem(x).double()
        wide = torch.nn.functional.conv2d(
            x, free.state["stem.weight"], free.state["stem.bias"], padding=1
        )
        first, gate = wide.double().chunk(2, 1)
    torch.testing.assert_close(first, z, rtol=1e-5, atol=1e-6)
    for channel in range(6):
        values = z[:, channel].flatten().numpy()
        design = np.stack([values, values**2], 1)
        (a, b), *_ = np.linalg.lstsq(design, np.maximum(values, 0), rcond=None)
        expected = torch.from_numpy(a + b * z[:, channel].numpy())
        torch.testing.assert_close(gate[:, channel], expected, rtol=1e-3, atol=1e-4)


def test_attention_is_found_and_starts_at_its_mean(program: gw.Program, net: Net) -> None:
    (pool,) = find_attention(program)
    means = mean_gates(program, [pool], [{"x": images()[0]}])
    x, _ = images()
    with torch.no_grad():
        h = torch.nn.functional.silu(net.wise(torch.relu(net.stem(x))))
        gate = net.excite(torch.relu(net.squeeze(h.mean((2, 3), keepdim=True)))).sigmoid()
    torch.testing.assert_close(means[pool.node].float(), gate.mean((0, 2, 3)))
    free = start(program, targets=["head"])
    kept = [n for n in free.state if n.endswith("attention.weight")]
    assert len(kept) == 1
    assert float(free.state[kept[0]].detach().abs().max()) < 1e-9


def test_layers_that_keep_their_activation_are_named(program: gw.Program) -> None:
    from graphwright.ir.layers.selectors import select

    found, left = find_gated(program, select(program, ("*",)))
    assert [one.layer.name for one in found] == ["stem", "wise", "squeeze", "excite", "hidden"]
    assert left == {"head": "no activation is right behind it"}
    with pytest.raises(ModelError, match="no activation can become a gate") as caught:
        start(program, targets=["head"], attention=False)
    assert "head: no activation" in str(caught.value.fix)


def test_a_batch_norm_between_is_named() -> None:
    net = Function(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    program = gw.trace(net, (images()[0][:2],), {"x": {0: "batch"}})
    with pytest.raises(ModelError, match="no activation") as caught:
        start(program)
    assert "cleanup.fold_batch_norm" in str(caught.value.fix)


def test_artifacts_and_a_further_pass(program: gw.Program) -> None:
    free = start(program)
    x = images()[0][:3]
    for made in (free, gw.passes.quantize.Rtn(bits=8, block=16)(free)):
        for backend in ("onnxruntime", "triton"):
            got = torch.as_tensor(gw.lower(made, backend)(x))
            torch.testing.assert_close(got, made(x).detach(), rtol=1e-3, atol=1e-4)


def test_a_trained_net_without_activations() -> None:
    """Digits: the fit alone keeps most, and distillation without labels brings the rest back."""
    program = gw.passes.cleanup.FoldBatchNorm()(digits.traced(digits.trained("resnet")))
    accuracy, data = digits.accuracy(program), digits.training(program)
    small = {"loss": "teacher_mse", "clip_norm": 1.0}
    found = []
    for tune in ({"steps": 1, "lr": 1e-9}, {"epochs": 3, "lr": 1e-4}):
        chosen = ActivationFree(tune={**small, **tune}, feature=0.1, targets=["7.*", "8.*"])
        found.append(chosen(program, training=data, teacher=program))
    fit, distilled = found
    before, after = (sum(op_name(n) == "relu" for n in p.graph.nodes) for p in (program, distilled))
    assert after == before - 2
    assert digits.accuracy(fit) > accuracy - 0.06
    assert digits.accuracy(distilled) > accuracy - 0.02
    x = digits.data()[2]
    gaps = [gw.compare(program(x), made(x)).relative for made in found]
    assert gaps[1] < 0.7 * gaps[0]


def test_gates_that_overflow_are_refused() -> None:
    """Seven in a row, without a norm between: larger inputs are a polynomial of degree 128."""
    program = gw.passes.cleanup.FoldBatchNorm()(digits.traced(digits.trained("resnet")))
    tune = {"steps": 1, "lr": 1e-9, "loss": "teacher_mse"}
    with pytest.raises(ContractError, match="NaN or infinity"):
        ActivationFree(tune=tune)(program, training=digits.training(program), teacher=program)
