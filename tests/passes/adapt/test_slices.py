"""Adapters on slices of a fused projection, and on single heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.adapters import gradients, moved
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.passes.adapt.pego import penalty
from graphwright.passes.training import training_hooks

HEADS, WIDTH = 4, 4
SIZE = HEADS * WIDTH
Q, K, V = (slice(i * SIZE, (i + 1) * SIZE) for i in range(3))


class Fused(nn.Module):
    """Attention on a fused projection; `turned` stores its weight as GPT-2 does."""

    def __init__(self, *, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        self.qkv = nn.Linear(SIZE, 3 * SIZE)
        self.weight = nn.Parameter(self.qkv.weight.detach().t().clone())
        self.proj = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.addmm(self.qkv.bias, x.flatten(0, 1), self.weight).unflatten(
            0, x.shape[:2]) if self.turned else self.qkv(x)  # fmt: skip
        q, k, v = (p.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for p in made.chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def program(*, turned: bool = False) -> gw.Program:
    torch.manual_seed(0)
    net = Fused(turned=turned).eval()
    return gw.trace(net, {"x": torch.randn(3, 5, SIZE)}, dynamic={"x": {0: "batch"}})


def change(before: gw.Program, made: gw.Program) -> Tensor:
    """What merging adds to the projection (out, in)."""
    merged = gw.passes.adapt.Merge()(made)
    name = "weight" if "weight" in before.state else "qkv.weight"
    delta = merged.state[name].detach() - before.state[name].detach()
    return delta.t() if name == "weight" else delta


@pytest.mark.parametrize("turned", [False, True])
def test_each_slice_has_a_change_of_its_own_and_the_rest_stays(
    turned: bool, tmp_path: Path
) -> None:
    before = program(turned=turned)
    targets = ["weight"] if turned else ["qkv"]
    made = gw.passes.adapt.Lora(targets=targets, rank=3, alpha=6.0, outputs=["q", "v.1-2"])(before)
    x = torch.randn(4, 5, SIZE)
    assert torch.equal(made(x), before(x))
    assert sum(p.numel() for p in made.trainable().values()) == 3 * (2 * SIZE + SIZE + 2 * WIDTH)
    changed = moved(made)
    a, b = (changed.state[n].detach() for n in sorted(made.trainable()))
    delta = change(before, changed)
    torch.testing.assert_close(delta[Q], 2.0 * b[:SIZE] @ a[:3], rtol=1e-4, atol=1e-5)
    v = torch.zeros(SIZE, SIZE)
    v[WIDTH : 3 * WIDTH] = 2.0 * b[SIZE:] @ a[3:]
    torch.testing.assert_close(delta[V], v, rtol=1e-4, atol=1e-5)
    assert not delta[K].any()
    wanted = changed(x).detach()
    torch.testing.assert_close(gw.passes.adapt.Merge()(changed)(x).detach(), wanted,
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    found = gradients(changed, x)
    assert set(found) == set(made.trainable())
    assert all(float(g.abs().max()) > 0 for g in found.values())
    changed.save(tmp_path / "a.pt2")
    assert torch.equal(gw.load(tmp_path / "a.pt2")(x).detach(), wanted)
    for backend in ("onnxruntime", "triton"):
        torch.testing.assert_close(gw.lower(changed, backend)(x).detach(), wanted,
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_it_is_what_separate_projections_would_learn() -> None:
    """The gradient of a's and b's on slices is that of plain LoRA on layers cut apart."""

    class Apart(nn.Module):
        def __init__(self, fused: Fused) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(SIZE, SIZE) for _ in range(3))
            for f, part in zip((self.q, self.k, self.v), (Q, K, V), strict=True):
                f.weight = nn.Parameter(fused.qkv.weight[part].detach().clone())
                f.bias = nn.Parameter(fused.qkv.bias[part].detach().clone())
            self.proj = fused.proj

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
                       for f in (self.q, self.k, self.v))  # fmt: skip
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = Fused().eval().double()
    x = torch.randn(3, 5, SIZE, dtype=torch.float64)
    one = moved(gw.passes.adapt.Lora(targets=["qkv"], rank=2, outputs=["q", "v"])(
        gw.trace(net, {"x": x})))  # fmt: skip
    two = gw.passes.adapt.Lora(targets=["q", "v"], rank=2)(gw.trace(Apart(net).eval(), {"x": x}))
    cut = {"q": slice(0, 2), "v": slice(2, 4)}, {"q": slice(0, SIZE), "v": slice(SIZE, None)}
    state: dict[str, Any] = dict(two.state)
    for name in "qv":
        for part, where in zip("ab", cut, strict=True):
            own = one.state[f"qkv.lora_{part}.default"].detach()[where[name]]
            state[f"{name}.lora_{part}.default"] = nn.Parameter(own.clone())
    two = two.replace(state=state)
    torch.testing.assert_close(one(x), two(x))
    fused, apart = gradients(one, x), gradients(two, x)
    for name in "qv":
        for part, where in zip("ab", cut, strict=True):
            torch.testing.assert_close(fused[f"qkv.lora_{part}.default"][where[name]],
                                       apart[f"{name}.lora_{part}.default"])  # fmt: skip


def test_pissa_takes_the_largest_triplets_of_each_slice() -> None:
    before = program()
    made = gw.passes.adapt.Pissa(targets=["qkv"], rank=2, outputs=["q.0-1", "v"])(before)
    x = torch.randn(4, 5, SIZE)
    torch.testing.assert_close(made(x), before(x), rtol=1e-5, atol=1e-6)
    old, rest = (p.state["qkv.weight"].detach() for p in (before, made))
    assert torch.equal(old[K], rest[K])
    assert torch.equal(old[2 * WIDTH : SIZE], rest[2 * WIDTH : SIZE])
    for rows in (slice(0, 2 * WIDTH), V):
        values = torch.linalg.svdvals(rest[rows].double())
        wanted = torch.linalg.svdvals(old[rows].double())[2:]
        torch.testing.assert_close(values[: len(wanted)], wanted, rtol=1e-4, atol=1e-5)
    changed = moved(made)
    torch.testing.assert_close(gw.passes.adapt.Merge()(changed)(x), changed(x),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_pego_keeps_the_changes_of_each_slice_from_its_own_rows() -> None:
    before = program()
    made = moved(gw.passes.adapt.Pego(
        targets=["qkv"], rank=1, count=2, weight=0.5, outputs=["q", "v"])(before))  # fmt: skip
    a, b = (made.state[f"qkv.lora_{x}.default"].detach() for x in "ab")
    weight = before.state["qkv.weight"].detach()
    wanted = penalty(weight[Q], a[:2], b[:SIZE], 2) + penalty(weight[V], a[2:], b[SIZE:], 2)
    (hook,) = training_hooks(made)
    at: Any = type("At", (), {"parameters": made.trainable()})()
    found = hook.on_loss(at, torch.zeros(()), None, {}).detach()
    torch.testing.assert_close(found, 0.5 * wanted)
    x = torch.randn(4, 5, SIZE)
    torch.testing.assert_close(gw.passes.adapt.Merge()(made)(x), made(x), rtol=1e-4, atol=1e-5)


def test_ia3_scales_keys_and_values_alone() -> None:
    before = program()
    made = gw.passes.adapt.Ia3(targets=["qkv"], outputs=["k", "v"])(before)
    x = torch.randn(4, 5, SIZE)
    assert torch.equal(made(x), before(x))
    assert {n: p.numel() for n, p in made.trainable().items()} == {"qkv.ia3_out.default": 2 * SIZE}
    changed = moved(made)
    merged = gw.passes.adapt.Merge()(changed)
    torch.testing.assert_close(merged(x), changed(x), rtol=1e-5, atol=1e-5)
    factors = torch.cat([torch.ones(SIZE), changed.state["qkv.ia3_out.default"].detach()])
    for name in ("weight", "bias"):
        old, new = (p.state[f"qkv.{name}"].detach() for p in (before, merged))
        torch.testing.assert_close(new, (old.t() * factors).t())


def test_other_tools_get_the_whole_factor(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    before = program()
    made = moved(gw.passes.adapt.Lora(targets=["qkv"], rank=2, outputs=["q", "v"])(before))
    gw.save_adapter(made, tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.qkv.lora_{x}.weight"] for x in "AB")
    assert a.shape == (4, SIZE)
    assert b.shape == (3 * SIZE, 4)
    assert not b[K].any()
    x = torch.randn(4, 5, SIZE)
    again = gw.passes.adapt.Load(path=str(tmp_path / "peft"))(before)
    torch.testing.assert_close(again(x), made(x), rtol=1e-5, atol=1e-6)
    served = gw.lower(made, "onnxruntime", adapters="switchable")
    torch.testing.assert_close(served(x), made(x).detach(), rtol=1e-4, atol=1e-5)


def test_it_goes_over_codes_and_finds_heads_after_pruning() -> None:
    coded = gw.passes.quantize.Nf4(block=16, targets=["qkv"])(program())
    made = moved(gw.passes.adapt.Lora(targets=["qkv"], rank=2, outputs=["v.3"])(coded))
    assert set(gradients(made, torch.randn(2, 5, SIZE))) == set(made.trainable())
    whole = program()
    heads = next(g for g in gw.channel_groups(whole) if g.prunable and g.units == HEADS)
    cut = gw.cut(whole, {heads: [1]})
    made = gw.passes.adapt.Lora(targets=["qkv"], rank=2, outputs=["v"])(cut)
    assert made.state["qkv.lora_b.default"].shape == (3 * WIDTH, 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"outputs": ["q.4"]}, "has heads q.0-3, and no q.4"),
        ({"outputs": ["0:99"]}, "has outputs 0:48, and no 0:99"),
        ({"outputs": ["q", "q.1"]}, "overlap"),
        ({"outputs": ["q.1"], "rank": 5}, "rank 5 is larger than a slice .* allows: 4 outputs"),
        ({"outputs": ["v"], "targets": ["proj"]}, "attention reads no v"),
    ],
)
def test_slices_that_are_not_there_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        gw.passes.adapt.Lora(**{"targets": ["qkv"], "rank": 2, **options})(program())
