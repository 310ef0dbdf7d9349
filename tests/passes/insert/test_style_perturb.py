"""Style noise: in training alone, of the statistics it says, with scales that climb the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.insert._form.style import Style, StyleHook, restyled, statistics
from graphwright.passes.training import training_hooks

CHAIN = ("conv", [("insert.style_perturb", {"at": ["first", "norm"]})])
TUNE = {"epochs": 3, "lr": 0.05, "optimizer": "sgd", "loss": "cross_entropy"}


class Net(nn.Module):
    """Two stages and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


def net() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), (torch.randn(2, 1, 6, 6),), {"x": {0: "batch"}})


def batches() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x, labels = torch.randn(32, 1, 6, 6, generator=g), torch.randint(0, 3, (32,), generator=g)
    return [{"x": x[i : i + 8], "labels": labels[i : i + 8]} for i in range(0, 32, 8)]


def test_the_program_stays_node_by_node() -> None:
    before = net()
    made = gw.passes.insert.StylePerturb(at=["layer[12]"])(before)
    assert [n.name for n in made.graph.nodes] == [n.name for n in before.graph.nodes]
    x = torch.randn(3, 1, 6, 6)
    assert torch.equal(made(x), before(x))
    assert made.state == before.state


def test_statistics_become_those_with_the_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 7, dtype=torch.float64) * 3 + 1
    a, b = torch.randn(2, 4, 3, 1, 1, dtype=torch.float64)
    mean, deviation = statistics(x)
    found = restyled(x, a, b.abs())
    torch.testing.assert_close(found.mean((2, 3), keepdim=True), mean + a)
    torch.testing.assert_close(
        found.std((2, 3), keepdim=True), deviation + b.abs(), rtol=1e-5, atol=1e-6
    )


def drawn(style: Style, x: Tensor, seed: int = 0) -> Tensor:
    """The same noise at every call."""
    torch.manual_seed(seed)
    return style(x)


def test_scales_start_at_the_deviations_over_the_batch() -> None:
    style = Style("layer1", 3, ["learned"], 1.0)
    x = torch.randn(6, 3, 5, 5)
    drawn(style, x)
    mu, sigma = x.mean((2, 3)), (x.var((2, 3)) + 1e-6).sqrt()
    torch.testing.assert_close(style.mean.detach().flatten(), (mu.var(0) + 1e-6).sqrt())
    torch.testing.assert_close(style.deviation.detach().flatten(), (sigma.var(0) + 1e-6).sqrt())
    first = style.mean.detach().clone()
    drawn(style, 5 * torch.randn(6, 3, 5, 5))
    assert torch.equal(style.mean, first)  # the first batch alone


def test_a_step_of_the_scales_raises_the_loss_and_one_of_the_network_lowers_it() -> None:
    torch.manual_seed(0)
    model, style = nn.Conv2d(3, 2, 3), Style("layer1", 3, ["learned"], 1.0)
    x = torch.randn(6, 3, 6, 6)

    def loss() -> Tensor:
        return model(drawn(style, x, 4)).square().mean()

    start = loss()
    start.backward()
    hook = StyleHook({"layer1": style})
    plain = Style("layer1", 3, ["learned"], -1.0)  # turned twice: the gradient itself
    plain.mean.data, plain.deviation.data, plain.is_set = style.mean, style.deviation, True
    model(drawn(plain, x, 4)).square().mean().backward()
    torch.testing.assert_close(style.mean.grad, -plain.mean.grad)
    with torch.no_grad():
        for scale in hook.own().values():
            scale -= 0.01 * scale.grad
        assert loss() > start
        higher = loss()
        model.zero_grad()
    loss().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
        assert loss() < higher


def test_methods_of_noise() -> None:
    x = torch.randn(5, 3, 6, 6)
    assert drawn(Style("a", 3, ["none"], 1.0), x) is x
    changed = drawn(Style("a", 3, ["batch"], 1.0), x)
    assert not torch.equal(changed, x)
    with pytest.raises(ArgumentError, match="two samples or more"):
        Style("a", 3, ["batch"], 1.0)(x[:1])


def test_tuning_trains_with_it_and_nothing_is_left_behind() -> None:
    before = net()
    made = gw.passes.insert.StylePerturb(at=["layer1", "layer2"], methods=["learned"])(before)
    (hook,) = training_hooks(made)
    assert set(hook.own()) == {
        f"style_perturb.layer{i}.{part}" for i in (1, 2) for part in ("mean", "deviation")
    }
    tuned = gw.passes.tune.Finetune(tune=TUNE)(made, training=batches())
    plain = gw.passes.tune.Finetune(tune=TUNE)(before, training=batches())
    assert [n.name for n in tuned.graph.nodes] == [n.name for n in before.graph.nodes]
    assert set(tuned.state) == set(before.state)
    # the noise did act: the same training without it ends elsewhere
    assert (tuned.state["head.weight"] - plain.state["head.weight"]).abs().max() > 1e-4
    x = torch.randn(3, 1, 6, 6)
    for backend in ("onnxruntime", "triton"):
        found = gw.lower(tuned, backend)(x).detach()
        torch.testing.assert_close(found, tuned(x).detach(), rtol=1e-4, atol=1e-5)


def test_what_it_cannot_take_is_said() -> None:
    with pytest.raises(ModelError, match=r"matches no module.*'layer1'"):
        gw.passes.insert.StylePerturb(at=["layr1"])(net())
    with pytest.raises(ModelError, match="no feature map"):
        gw.passes.insert.StylePerturb(at=["head"])(net())
    made = gw.passes.insert.StylePerturb(at=["layer1"])(net())
    with pytest.raises(ArgumentError, match="already"):
        gw.passes.insert.StylePerturb(at=["layer2"])(made)
