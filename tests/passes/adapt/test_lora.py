from __future__ import annotations

from typing import Any

import pytest
import torch
from models.every_pass import UNTIED
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.selectors import layers

CHAIN = ("text", [("adapt.lora", {"targets": UNTIED, "rank": 2})])


class Kinds(nn.Module):
    """One layer of every kind that an adapter goes beside."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.plain = nn.Conv1d(8, 8, 3, stride=2, padding=2, dilation=2)
        self.grouped = nn.Conv1d(8, 12, 3, groups=4, padding="same")
        self.fc = nn.Linear(12, 6)
        self.turned = nn.Parameter(torch.randn(6, 5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.plain(self.table(ids).transpose(1, 2)).relu())
        return self.fc(x.transpose(1, 2)) @ self.turned


def program() -> Any:
    torch.manual_seed(0)
    example = torch.randint(0, 11, (2, 9))
    return gw.trace(Kinds().eval(), {"ids": example}, dynamic={"ids": {0: "batch"}})


def moved(adapted: Any, seed: int = 1) -> Any:
    """The program with other values in all that can be trained."""
    torch.manual_seed(seed)
    state = dict(adapted.state)
    for name, p in adapted.trainable().items():
        state[name] = nn.Parameter(p.detach() + 0.3 * torch.randn_like(p))
    return adapted.replace(state=state)


ALL = ("*",)


def test_the_function_does_not_change_until_it_is_trained() -> None:
    before = program()
    after = gw.passes.adapt.Lora(targets=ALL, rank=4)(before)
    ids = torch.randint(0, 11, (5, 9))
    torch.testing.assert_close(after(ids), before(ids), rtol=1e-6, atol=1e-6)
    assert [layer.name for layer in layers(after)] == [layer.name for layer in layers(before)]


def test_only_the_adapter_is_trained_and_its_size_is_the_formula() -> None:
    before = program()
    after = gw.passes.adapt.Lora(targets=ALL, rank=4)(before)
    sizes = {"table": 4 * (11 + 8), "plain": 4 * (8 * 3 + 8), "grouped": 4 * 2 * 3 + 12,
             "fc": 4 * (12 + 6), "turned": 4 * (6 + 5)}  # fmt: skip
    for layer, size in sizes.items():
        own = [
            p.numel()
            for name, p in after.trainable().items()
            if name.startswith((f"{layer}.", f"{layer}_"))
        ]
        assert sum(own) == size, layer
    assert sum(p.numel() for p in after.trainable().values()) == sum(sizes.values())
    one = gw.passes.adapt.Lora(targets=["fc"], rank=4, also_train=["turned"])(before)
    assert set(one.trainable()) == {"fc.lora_a.default", "fc.lora_b.default", "turned"}


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
def test_every_kind_of_layer_merges_into_its_weight(scaling: str) -> None:
    before = program()
    options = {"rank": 4, "alpha": 6.0, "scaling": scaling}
    adapted = moved(gw.passes.adapt.Lora(targets=ALL, **options)(before))
    merged = gw.passes.adapt.Merge()(adapted)
    ids = torch.randint(0, 11, (5, 9))
    assert not torch.allclose(adapted(ids), before(ids), rtol=0.05, atol=0.05)
    torch.testing.assert_close(merged(ids), adapted(ids), rtol=1e-5, atol=1e-5)
    assert [n.name for n in merged.graph.nodes] == [n.name for n in before.graph.nodes]
    assert set(merged.state) == set(before.state)
    assert set(merged.trainable()) == set(before.trainable())
    a, b = (adapted.state[f"fc.lora_{x}.default"].detach() for x in "ab")
    s = 6 / (4 if scaling == "standard" else 2)
    wanted = before.state["fc.weight"] + s * b @ a
    torch.testing.assert_close(merged.state["fc.weight"], wanted)


def test_gradients_reach_the_adapter_alone_and_are_those_of_the_formula() -> None:
    adapted = moved(gw.passes.adapt.Lora(targets=["fc"], rank=2, alpha=3.0)(program()))
    ids = torch.randint(0, 11, (3, 9))
    adapted.module(ids)[0].square().sum().backward()
    with_gradient = {n for n, p in adapted.parameters().items() if p.grad is not None}
    assert with_gradient == {"fc.lora_a.default", "fc.lora_b.default"}
    a, b = (adapted.state[f"fc.lora_{x}.default"] for x in "ab")
    plain = gw.passes.adapt.Merge()(adapted)
    weight = plain.state["fc.weight"].detach().clone()
    module = plain.replace(state={**plain.state, "fc.weight": (w := nn.Parameter(weight))}).module
    module(ids)[0].square().sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(a.grad, 1.5 * b.detach().T @ w.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.grad, 1.5 * w.grad @ a.detach().T, rtol=1e-4, atol=1e-4)


def test_a_second_adapter_leaves_trainable_what_the_first_one_did() -> None:
    first = gw.passes.adapt.Lora(targets=["fc"], rank=2, also_train=["turned"])(program())
    both = gw.passes.adapt.Lora(targets=["plain"], rank=2, name="two")(first)
    assert set(both.trainable()) - set(first.trainable()) == {
        "plain.lora_a.two", "plain.lora_b.two"}  # fmt: skip
    assert "turned" in both.trainable()
    behind = gw.passes.adapt.WtaCrs(targets=["fc"])(program())
    made = gw.passes.adapt.Lora(targets=["fc"], rank=2)(behind)
    assert set(made.trainable()) == {"fc.lora_a.default", "fc.lora_b.default"}


def test_dropout_is_on_the_adapter_alone_and_only_in_training() -> None:
    adapted = moved(gw.passes.adapt.Lora(targets=["fc"], rank=2, dropout=0.5)(program()))
    ids = torch.randint(0, 11, (3, 9))
    assert torch.equal(adapted(ids), adapted(ids))
    training = adapted.train()
    dropouts = training.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    (dropout,) = dropouts
    (reader,) = dropout.users
    assert "lora_a" in str(reader.args[1])
    assert training.eval()(ids).equal(adapted(ids))
    merged = gw.passes.adapt.Merge()(adapted).train()
    assert not merged.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)


def test_several_adapters_add_up_and_merge_one_by_one() -> None:
    before = program()
    first = moved(gw.passes.adapt.Lora(targets=["fc"], name="one", rank=2)(before), 1)
    both = moved(gw.passes.adapt.Lora(targets=["fc", "grouped"], name="two", rank=4)(first), 2)
    ids = torch.randint(0, 11, (3, 9))
    with pytest.raises(ModelError, match="'one' under 'two'"):
        gw.passes.adapt.Merge(names=["two"])(both)
    half = gw.passes.adapt.Merge(names=["one"])(both)
    torch.testing.assert_close(half(ids), both(ids), rtol=1e-5, atol=1e-5)
    assert not {"fc.weight", "grouped.weight"} & set(half.trainable())
    whole = gw.passes.adapt.Merge()(half)
    torch.testing.assert_close(whole(ids), both(ids), rtol=1e-5, atol=1e-5)
    assert set(whole.trainable()) == set(before.trainable())
    with pytest.raises(ArgumentError, match="already"):
        gw.passes.adapt.Lora(targets=["fc"], name="one")(both)


def test_it_is_saved_quantized_under_and_lowered(tmp_path: Any) -> None:
    adapted = moved(gw.passes.adapt.Lora(targets=["fc", "plain"], rank=2)(program()))
    ids = torch.randint(0, 11, (3, 9))
    adapted.save(tmp_path / "a.pt2")
    loaded = gw.load(tmp_path / "a.pt2")
    assert torch.equal(loaded(ids), adapted(ids))
    assert set(loaded.trainable()) == set(adapted.trainable())
    torch.testing.assert_close(gw.passes.adapt.Merge()(loaded)(ids), adapted(ids))
    low = gw.passes.quantize.Rtn(bits=8, block=16, targets=["fc"])(adapted)
    assert {"fc.weight_codes", "fc.lora_a.default"} <= set(low.state)
    torch.testing.assert_close(low(ids), adapted(ids), rtol=0.05, atol=0.05)
    with pytest.raises(ModelError, match="codes"):
        gw.passes.adapt.Merge()(low)
    for backend in ("onnxruntime", "triton"):
        for found, rounding in ((adapted, 1e-5), (low, 0.03)):  # MatMulNBits rounds its inputs
            wanted = found(ids).detach()
            error = float((gw.lower(found, backend)(ids).detach() - wanted).norm() / wanted.norm())
            assert error < rounding, (backend, error)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": ["fc"], "rank": 7}, "rank 7 is larger than layer 'fc' allows"),
        ({"targets": ["grouped"], "rank": 6}, "no multiple of its 4 groups"),
        ({"targets": ["nothing"]}, "matches no layer"),
    ],
)
def test_what_no_layer_can_have_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        gw.passes.adapt.Lora(**options)(program())


def test_a_tied_weight_is_not_merged_for_one_reader_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    torch.manual_seed(0)
    tied = gw.trace(Tied().eval(), {"ids": torch.randint(0, 7, (2, 3))})
    adapted = moved(gw.passes.adapt.Lora(targets=["head"], rank=2)(tied))
    ids = torch.randint(0, 7, (2, 3))
    assert not torch.allclose(adapted(ids), tied(ids))
    with pytest.raises(ModelError, match="also read by"):
        gw.passes.adapt.Merge()(adapted)
