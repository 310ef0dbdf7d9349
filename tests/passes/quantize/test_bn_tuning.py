from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program

CHAIN = (
    "conv",
    [("cleanup.fold_batch_norm", {}), ("quantize.rtn", {"block": 16}), ("quantize.bn_tuning", {})],
)


class Net(nn.Module):
    """Two convolutions with a batch norm each, and a classifier without one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        h = torch.relu(self.norm2(self.conv2(h)))
        return self.fc(h.mean((2, 3)))


def batches(count: int = 6, seed: int = 1) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 3, 8, 8, generator=generator),) for _ in range(count)]


@pytest.fixture(scope="module")
def folded() -> Program:
    """A network whose norms have seen data, folded."""
    torch.manual_seed(0)
    net = Net()
    for norm in (net.norm1, net.norm2):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    for (x,) in batches(30, seed=7):
        net(x)
    program = gw.trace(net.eval(), {"x": torch.randn(4, 3, 8, 8)}, dynamic={"x": {0: "batch"}})
    return gw.passes.cleanup.FoldBatchNorm()(program)


def statistics(program: Program, data: list[tuple[Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of every convolution's channels over all data, by a plain run."""
    nodes = {layer.node: layer.name for layer in layers(program) if layer.kind == "conv2d"}
    found: dict[str, list[Tensor]] = {}

    class Tap(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n in nodes:
                found.setdefault(nodes[n], []).append(value.double().movedim(1, 0).flatten(1))
            return value

    with torch.no_grad():
        for (x,) in data:
            Tap(program.module).run(x)
    joined = {name: torch.cat(parts, 1) for name, parts in found.items()}
    return {name: (rows.mean(1), rows.var(1)) for name, rows in joined.items()}


def test_the_quantized_channels_have_the_norms_statistics_again(folded: Program) -> None:
    rough = gw.passes.quantize.Rtn(bits=2, block=-1, targets=["conv*"])(folded)
    tuned = gw.passes.quantize.BnTuning(momentum=None)(rough, calibration=batches())
    known = folded.facts["cleanup.fold_batch_norm"]
    before, after = statistics(rough, batches()), statistics(tuned, batches())
    for name in ("conv1", "conv2"):
        gamma, beta = (torch.tensor(known[name][k]).double() for k in ("gamma", "beta"))
        shifted = float((before[name][0] - beta).norm())
        assert float((after[name][0] - beta).norm()) < 0.1 * shifted
        spread = float((before[name][1] - gamma.square()).norm())
        assert float((after[name][1] - gamma.square()).norm()) < 0.2 * spread


def test_the_outputs_come_closer(folded: Program) -> None:
    rough = gw.passes.quantize.Adaquant(bits=2, activation_bits=4, iterations=0)(
        folded, calibration=batches()
    )
    (x,) = batches(1, seed=9)[0]
    errors = []
    for program in (rough, gw.passes.quantize.BnTuning()(rough, calibration=batches())):
        with torch.no_grad():
            errors.append(float((program(x) - folded(x)).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_on_the_float_program_next_to_nothing_changes(folded: Program) -> None:
    """Its statistics are the norms' own, up to the sample."""
    tuned = gw.passes.quantize.BnTuning()(folded, calibration=batches())
    (x,) = batches(1, seed=9)[0]
    with torch.no_grad():
        assert float((tuned(x) - folded(x)).norm() / folded(x).norm()) < 0.05


def test_the_norm_that_is_put_back_changes_nothing_until_it_sees_data(folded: Program) -> None:
    from graphwright.ir.edit import Editor
    from graphwright.ir.layers.selectors import select
    from graphwright.passes.quantize.bn_tuning import _fold, _Norms

    chosen = select(folded, ["conv*"])
    norms = _Norms(folded, chosen, dict(folded.facts["cleanup.fold_batch_norm"]), "test")
    editor = Editor(folded, by="test")
    for layer in chosen:
        factor, shift = norms.affine(layer)
        torch.testing.assert_close(factor, torch.ones_like(factor), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(shift, torch.zeros_like(shift), rtol=1e-6, atol=1e-6)
        _fold(editor, layer, factor, shift)
    (x,) = batches(1)[0]
    torch.testing.assert_close(editor.finish()(x), folded(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", ["rtn", "int8"])
def test_the_folded_norm_is_the_norm(folded: Program, make: str) -> None:
    """Codes stay, scales and biases move: the result is the network with its norms in place."""
    data = batches(3)
    if make == "rtn":
        rough = gw.passes.quantize.Rtn(bits=3, block=8)(folded)
    else:
        rough = gw.passes.quantize.Int8(activations="static")(folded, calibration=data)
    tuned = gw.passes.quantize.BnTuning(targets=["conv2"])(rough, calibration=data)
    (x,) = data[0]
    node = next(layer.node for layer in layers(rough) if layer.name == "conv2")
    taken: dict[str, Tensor] = {}

    def tap(program: Program, at: str) -> Tensor:
        class Tap(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                value = super().run_node(n)
                if n.name == at:
                    taken[at] = value
                return value

        Tap(program.module).run(x)
        return taken[at]

    known = folded.facts["cleanup.fold_batch_norm"]["conv2"]
    gamma, beta, eps = (torch.tensor(known[k]) for k in ("gamma", "beta", "eps"))
    mean, variance = beta.clone(), gamma.square()
    with torch.no_grad():
        for (batch,) in data:  # the reference: torch's own running statistics
            x = batch
            y = tap(rough, node.name)
            torch.nn.functional.batch_norm(y, mean, variance, training=True, momentum=0.1)
        (x,) = data[0]
        y = tap(rough, node.name)
        expected = torch.nn.functional.batch_norm(
            y, mean, variance, (gamma.square() + eps).sqrt(), beta, False, 0.1, float(eps)
        )
        found = tap(tuned, node.name)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 if make == "int8" else 1e-4)
    compiled = gw.lower(tuned, "onnxruntime")
    torch.testing.assert_close(compiled(x), tuned(x).detach(), rtol=0.05, atol=0.05)
    if make == "int8":
        assert compiled.notes["kernels"]["QLinearConv"] == 2


def test_without_a_folded_norm_it_refuses(folded: Program) -> None:
    with pytest.raises(ModelError, match="no selected layer has a batch norm folded into it"):
        gw.passes.quantize.BnTuning(targets=["fc"])(folded, calibration=batches(1))
    smaller = gw.passes.prune.Zig(sparsity=0.4, targets=["conv1"])(folded)
    context = Context(calibration=batches(2))
    result = gw.passes.quantize.BnTuning().run(smaller, context)
    reasons = {a.layer: a.reason for a in result.actions if a.what == "left alone"}
    assert reasons["conv1"] == "its channels are no longer those of its norm"
