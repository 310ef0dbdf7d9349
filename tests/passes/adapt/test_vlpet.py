from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.adapters import gradients, moved
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.selectors import layers

CHAIN = ("text", [("adapt.vlpet", {"targets": ["down"], "width": 4, "gate_width": 3})])

SIZE = 8
SUB = ["out", "down"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x: Tensor, e: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(s).unflatten(-1, (2, 4)).transpose(1, 2)
                   for f, s in ((self.query, x), (self.key, e), (self.value, e)))  # fmt: skip
        bias = None if mask is None else mask[:, None, None, :].bool()
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class Pair(nn.Module):
    """One block of an encoder, its norms behind the sums, and one of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.cross = Attention(), Attention()
        self.out, self.up, self.down = (
            nn.Linear(SIZE, SIZE),
            nn.Linear(SIZE, 16),
            nn.Linear(16, SIZE),
        )
        self.norm = nn.LayerNorm(SIZE)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x + self.out(self.attend(x, x, mask)))
        x = self.norm(x + self.down(self.up(x).relu()))
        return self.cross(y, x, mask)


@cache
def net() -> Pair:
    torch.manual_seed(0)
    return Pair().eval()


def inputs(batch: int = 2, tokens: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, -2:] = 0
    return {"x": torch.randn(batch, tokens, SIZE), "y": torch.randn(batch, 3, SIZE), "mask": mask}


@cache
def program() -> gw.Program:
    free = {"x": {0: "batch", 1: "tokens"}, "y": {0: "batch"}, "mask": {0: "batch", 1: "tokens"}}
    return gw.trace(net(), inputs(), free)


def made(**options: Any) -> gw.Program:
    given = {"targets": SUB, "width": 6, "gate_width": 3, "value_width": 4, **options}
    return gw.passes.adapt.Vlpet(**given)(program())


def reference(adapted: gw.Program, gate: str, given: dict[str, Tensor], *, masked: bool) -> Tensor:
    """The formulas of the paper, over the network's own modules."""
    state = {n.removesuffix(".default"): t.detach() for n, t in adapted.state.items()}
    mask = given["mask"]

    def linear(layer: str, part: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{layer}.{part}"], state[f"{layer}.{part}_bias"])

    def small_net(layer: str, prefix: str, x: Tensor) -> Tensor:
        hidden = F.gelu(linear(layer, f"{prefix}down", x), approximate="tanh")
        return linear(layer, f"{prefix}up", hidden)

    def sub_layer(layer: str, x: Tensor, h: Tensor) -> Tensor:
        h = h + small_net(layer, "", h)
        if gate == "large":
            g = small_net(layer, "gate_", x).sigmoid()
        elif gate == "middle_x":
            g = linear(layer, "gate", x + h).sigmoid()
        elif gate == "middle_y":
            g = 1 + state[f"{layer}.gate"]
        else:
            g = linear(layer, "gate", torch.cat([x, h], -1)).sigmoid()
            kept = mask[..., None].float() if masked else torch.ones_like(g)
            g = (g * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        assert gate == "middle_y" or bool(((g > 0) & (g < 1)).all())
        return net().norm(x + g * h)

    x = given["x"]
    x = sub_layer("out", x, net().out(net().attend(x, x, mask)))
    x = sub_layer("down", x, net().down(net().up(x).relu()))
    if "cross.value.down" not in state:
        return net().cross(given["y"], x, mask).detach()
    hook = net().cross.value.register_forward_hook(
        lambda _, args, v: v + small_net("cross.value", "", args[0]))  # fmt: skip
    try:
        return net().cross(given["y"], x, mask).detach()
    finally:
        hook.remove()


GATES = ["large", "middle_x", "middle_y", "small"]


@pytest.mark.parametrize("gate", GATES)
def test_it_is_the_formula_with_its_number_of_parameters(gate: str, tmp_path: Path) -> None:
    masked = gate == "small"
    options = {"mask": "mask"} if masked else {}
    adapted = made(gate=gate, values=["cross.value"], **options)
    beside = SIZE * 6 + 6 + 6 * SIZE + SIZE
    of_gate = {"large": SIZE * 3 + 3 + 3 * SIZE + SIZE, "middle_x": SIZE + 1, "middle_y": SIZE,
               "small": 2 * SIZE + 1}[gate]  # fmt: skip
    bypass = SIZE * 4 + 4 + 4 * SIZE + SIZE
    assert sum(p.numel() for p in adapted.trainable().values()) == 2 * (beside + of_gate) + bypass
    changed = moved(adapted)
    given = inputs(3, 7)
    wanted = reference(changed, gate, given, masked=masked)
    torch.testing.assert_close(changed(**given).detach(), wanted, rtol=1e-4, atol=1e-5)
    found = gradients(changed, **given)
    assert set(found) == set(adapted.trainable())
    changed.save(tmp_path / "a.pt2")
    assert torch.equal(gw.load(tmp_path / "a.pt2")(**given), changed(**given))
    for backend in ("onnxruntime", "triton"):
        lowered = gw.lower(changed, backend)(**given)
        torch.testing.assert_close(lowered.detach(), wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(ModelError, match="cannot be merged"):
        gw.passes.adapt.Merge()(changed)


def test_gates_start_at_a_half_and_a_gate_of_channels_near_one() -> None:
    """What a sub-layer gives is halved at the start, or kept within a few deviations."""
    given = inputs()
    with torch.no_grad():
        x = given["x"]
        h = net().out(net().attend(x, x, given["mask"]))
        for gate in ("large", "middle_x", "small", "middle_y"):
            state = {
                n.removesuffix(".default"): t.detach() for n, t in made(gate=gate).state.items()
            }
            low = F.gelu(F.linear(h, state["out.down"]), approximate="tanh")
            change = F.linear(low, state["out.up"])
            assert float(change.norm()) < 0.02 * float(h.norm())
        full, near = (made(gate=gate)(**given) for gate in ("large", "middle_y"))
        plain = program()(**given)
    assert float((near - plain).norm() / plain.norm()) < 0.1
    assert float((full - plain).norm() / plain.norm()) > 0.1


@pytest.mark.parametrize("gate", GATES)
def test_a_token_moves_its_own_gate_or_all_of_its_sample(gate: str) -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(x)

    torch.manual_seed(0)
    before = gw.trace(Alone().eval(), {"x": torch.randn(2, 5, SIZE)})
    adapted = moved(gw.passes.adapt.Vlpet(targets=["fc"], width=4, gate=gate)(before))
    x = torch.randn(2, 5, SIZE)
    other = x.clone()
    other[0, 2] += 1
    same = (adapted(x) == adapted(other)).all(-1)
    assert same[1].all()
    rest = [True, True, False, True, True]
    assert same[0].tolist() == ([False] * 5 if gate == "small" else rest)


def test_padding_has_no_part_in_the_gate_of_a_sample() -> None:
    adapted = moved(made(gate="small", mask="mask"))
    given = inputs()
    other = {**given, "x": given["x"].clone()}
    other["x"][0, -2:] += 3
    torch.testing.assert_close(adapted(**given), adapted(**other), rtol=1e-5, atol=1e-6)
    plain = moved(made(gate="small"))
    assert float((plain(**given) - plain(**other)).detach().abs().max()) > 1e-3


def test_it_goes_over_codes() -> None:
    coded = gw.passes.quantize.Nf4(block=16, targets=SUB)(program())
    adapted = gw.passes.adapt.Vlpet(targets=SUB, width=6)(coded)
    assert set(gradients(moved(adapted), **inputs())) == set(adapted.trainable())


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"targets": ["up"]}, ModelError, "no selected layer's output goes into a residual sum"),
        ({"values": ["attend.value"]}, ModelError, "values of self-attention"),
        ({"values": ["up"]}, ModelError, "no attention reads values from 'up'"),
        ({"gate": "small", "mask": "masks"}, ArgumentError, "no input 'masks'"),
        ({"gate": "small", "mask": "y"}, ArgumentError, "not a number for every token"),
        ({"mask": "mask"}, ArgumentError, "mask has no part in a large gate"),
    ],
)
def test_what_has_no_place_is_refused(
    options: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        made(**options)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_it_fits_the_models_that_the_paper_tunes(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "T5":
        config = transformers.T5Config(num_layers=1, num_heads=2, d_model=16, d_kv=8, d_ff=32,
                                       vocab_size=32, use_cache=False)  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config).eval()
        targets = ["encoder.*.SelfAttention.o", "encoder.*.wo"]
        values, count = ["decoder.*.EncDecAttention.v"], 3
    else:
        config = transformers.BartConfig(
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, d_model=16,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=32,
            use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=2)  # fmt: skip
        model = transformers.BartForConditionalGeneration(config).eval()
        targets = ["*encoder.*.self_attn.out_proj", "*encoder.*.fc2"]
        values, count = ["*decoder.*.encoder_attn.v_proj"], 3
    ids = torch.randint(3, 32, (2, 6))
    before = gw.trace(model, {"input_ids": ids, "decoder_input_ids": ids[:, :4]})
    adapted = gw.passes.adapt.Vlpet(targets=targets, values=values, width=4)(before)
    parts = adapted.facts["adapters"]["default"]["layers"]
    assert len(parts) == count
    assert all(name in {layer.name for layer in layers(before)} for name in parts)
    logits = moved(adapted)(ids, ids[:, :4])["logits"]
    assert logits.isfinite().all()
    plain = before(ids, ids[:, :4])["logits"]
    assert float((logits - plain).detach().norm()) > 1e-3 * float(plain.detach().norm())
