from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import degraded
from models.adapters import gradients, moved
from torch import Tensor, nn
from torch.func import functional_call

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.adapt._form.conditioned import block_of, matrices, number_blocks

ESTIMATOR = "models.degraded:estimator"
CHAIN = (
    "conv",
    [(
        "adapt.degradation_lora",
        {"targets": ["second"], "rank": 2, "estimator": "models.degraded:of_two_channels"},
    )],
)  # fmt: skip

ALL = ["*", "!conv_in"]
RANK = 3


@cache
def net() -> degraded.Restorer:
    torch.manual_seed(0)
    return degraded.Restorer().eval()


@cache
def program() -> gw.Program:
    return gw.trace(net(), {"x": torch.randn(2, 3, 6, 8)}, {"x": {0: "batch"}})


@cache
def given() -> gw.Program:
    torch.manual_seed(0)
    with_input = degraded.Given().eval()
    inputs = {"x": torch.randn(2, 3, 6, 8), "degradation": torch.rand(2, 2)}
    return gw.trace(with_input, inputs, {n: {0: "batch"} for n in inputs})


def made(**options: Any) -> gw.Program:
    choice = {"targets": ALL, "rank": RANK, "estimator": ESTIMATOR, **options}
    return gw.passes.adapt.DegradationLora(**choice)(program())


def shared_of(adapted: gw.Program) -> dict[str, Tensor]:
    names = adapted.facts["adapters"]["default"]["shared"]
    return {part: adapted.state[name].detach() for part, name in names.items()}


def by_hand(adapted: gw.Program, model: nn.Module, values: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Sample by sample, with the change of that sample merged into every weight."""
    cores = matrices(shared_of(adapted), values)
    parts = adapted.facts["adapters"]["default"]["layers"]
    blocks = number_blocks(parts)
    results = []
    for row in range(len(x)):
        state = {n: t.detach().clone() for n, t in model.named_parameters()}
        for layer, names in parts.items():
            a, b = (adapted.state[names[f"conditioned_{p}"]].detach().flatten(1) for p in "ab")
            core = cores[row, blocks[block_of(layer)]]
            change = 8.0 / RANK * b @ core.t() @ a
            weight = state[f"{layer}.weight"]
            state[f"{layer}.weight"] = weight + change.reshape(weight.shape)
        sample = tuple(tensor[row : row + 1] for tensor in (x, *rest))
        results.append(functional_call(model, state, sample))
    return torch.cat(results).detach()


def test_it_starts_as_the_program_with_the_formula_s_number_of_parameters() -> None:
    adapted = made()
    x = torch.randn(3, 3, 6, 8)
    torch.testing.assert_close(adapted(x), program()(x), rtol=0, atol=1e-6)
    convs = 3 * RANK * (6 * 9 + 6) + RANK * (6 + 3)
    linears = 10 * RANK * 12
    network = (256 * 256 + 256) + 4 * 64 + (64 * 64 + 64) + RANK**2 * (256 + 64 + 1)
    assert sum(p.numel() for p in adapted.trainable().values()) == convs + linears + network
    cores = matrices(shared_of(adapted), torch.rand(3, 2))
    torch.testing.assert_close(cores, torch.eye(RANK).expand(3, 4, RANK, RANK), rtol=0, atol=1e-3)


def strongly_moved(adapted: gw.Program) -> gw.Program:
    """Its outputs stay near 1: far larger moves make sums that cancel, and rounding decides."""
    changed = moved(adapted, size=0.07)
    cores = matrices(shared_of(changed), torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
    assert float((cores[0] - cores[1]).abs().max()) > 0.1
    return changed


def test_every_sample_has_the_change_of_its_own_degradation(tmp_path: Path) -> None:
    changed = strongly_moved(made())
    x = torch.randn(3, 3, 6, 8)
    values = degraded.estimator().eval()(x)
    wanted = by_hand(changed, net(), values, x)
    torch.testing.assert_close(changed(x).detach(), wanted, rtol=1e-4, atol=1e-4)
    other = x.clone()
    other[1] = torch.randn(3, 6, 8)
    assert torch.equal(changed(x)[[0, 2]], changed(other)[[0, 2]])
    changed.save(tmp_path / "a.pt2")
    assert torch.equal(gw.load(tmp_path / "a.pt2")(x), changed(x))
    for backend in ("onnxruntime", "triton"):
        lowered = gw.lower(changed, backend)
        torch.testing.assert_close(lowered(x).detach(), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="changes from sample to sample"):
        gw.passes.adapt.Merge()(changed)
    with pytest.raises(ModelError, match="no low-rank form"):
        gw.save_adapter(changed, tmp_path / "peft")


def test_the_degradation_may_be_an_input() -> None:
    adapted = strongly_moved(gw.passes.adapt.DegradationLora(
        targets=ALL, rank=RANK, degradation="degradation")(given()))  # fmt: skip
    x, values = torch.randn(2, 3, 6, 8), torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    torch.manual_seed(0)
    wanted = by_hand(adapted, degraded.Given().eval(), values, x, values)
    torch.testing.assert_close(adapted(x, values).detach(), wanted, rtol=1e-4, atol=1e-4)
    other = torch.tensor([[0.1, 0.9], [0.3, 0.3]])
    same = (adapted(x, values) == adapted(x, other)).flatten(1).all(1)
    assert same.tolist() == [True, False]


def test_training_reaches_all_of_it_but_the_estimator() -> None:
    adapted = strongly_moved(made())
    x = torch.randn(4, 3, 6, 8)
    found = gradients(adapted, x)
    assert set(found) == set(adapted.trainable())
    assert not [name for name, g in found.items() if not g.any()]
    assert not any(n.startswith("estimator") for n in found)
    data = [{"x": x, "labels": torch.randn(4, 3, 6, 8)}]
    tune = {"steps": 3, "loss": "mse", "lr": 0.01}
    trained = gw.passes.tune.Finetune(targets=["mid_block.*"], tune=tune)(adapted, training=data)
    for name, tensor in adapted.state.items():
        part = name.split(".")
        is_meant = name in adapted.trainable() and part[0] in ("mid_block", "degradation")
        assert torch.equal(trained.state[name], tensor) != is_meant, name


def test_it_goes_over_codes_and_leaves_the_estimator_out_of_later_passes() -> None:
    coded = gw.passes.quantize.Nf4(block=16, targets=["mid_block.*"])(program())
    adapted = gw.passes.adapt.DegradationLora(
        targets=["mid_block.*"], rank=2, estimator=ESTIMATOR)(coded)  # fmt: skip
    found = gradients(moved(adapted), torch.randn(2, 3, 6, 8))
    assert set(found) == set(adapted.trainable())
    low = gw.passes.quantize.Rtn(block=16)(made())
    assert not any("codes" in n for n in low.state if n.startswith(("estimator", "degradation")))


def test_blocks_are_those_of_a_diffusion_model_s_names() -> None:
    names = {
        "conv_in": "rest", "time_embedding.linear_1": "rest",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": "down_blocks.0",
        "down_blocks.3.resnets.0.conv1": "down_blocks.3",
        "mid_block.attentions.0.proj_in": "mid_block", "mid_block.resnets.1.conv2": "mid_block",
        "up_blocks.2.upsamplers.0.conv": "up_blocks.2", "conv_out": "rest",
        "encoder.down_blocks.1.resnets.0.conv1": "encoder.down_blocks.1",
        "encoder.mid_block.attentions.0.to_k": "encoder.mid_block",
        "model.layers.11.self_attn.q_proj": "model.layers.11",
    }  # fmt: skip
    assert {name: block_of(name) for name in names} == names
    unet = [n for n in names if not n.startswith(("encoder", "model"))]
    assert list(number_blocks(unet)) == [
        "down_blocks.0", "down_blocks.3", "mid_block", "up_blocks.2", "rest"]  # fmt: skip


def test_a_layer_of_another_batch_is_left_out() -> None:
    class Doubled(degraded.Restorer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.cat([x, -x]))

    before = gw.trace(Doubled().eval(), {"x": torch.randn(2, 3, 6, 6)}, {"x": {0: "batch"}})
    with pytest.raises(ModelError, match="no selected layer can be adapted") as caught:
        gw.passes.adapt.DegradationLora(targets=ALL, rank=2, estimator=ESTIMATOR)(before)
    assert "its input has a batch of" in str(caught.value.details)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"estimator": None}, ArgumentError, "give estimator, or degradation"),
        ({"degradation": "x"}, ArgumentError, "give estimator, or degradation"),
        ({"estimator": None, "degradation": "y"}, ArgumentError, "has no input 'y'"),
        ({"estimator": None, "degradation": "x"}, ModelError, "not numbers"),
        ({"estimator": "models.degraded:elsewhere"}, ArgumentError, "asks for 'y'"),
        ({"estimator": "models.degraded:flat"}, ModelError, "not one tensor"),
        ({"estimator": "models.degraded:nowhere"}, ArgumentError, "has no 'nowhere'"),
        ({"rank": 7}, ModelError, "rank 7 is larger than layer"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        made(**options)
