from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.adapters import moved
from models.transformers_nets import HEADS, INNER, LAYERS, WIDTH, WORDS, llama, program
from torch import fx, nn

import graphwright as gw
from graphwright.ir.adapters.merging import bare
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.nodes import adapter_of
from graphwright.ir.program import Program

CHAIN = ("chain", [("adapt.side_network", {"reduction": 4})])
KINDS = ("llama", "gpt2", "bert")
FACTOR, RANK = 4, 6
NARROW = WIDTH // FACTOR


def side(given: Program, check: bool = False, **options: Any) -> Program:
    made = gw.passes.adapt.SideNetwork(reduction=FACTOR, rank=RANK, **options)
    result: Program = made(given, check=check)
    return result


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, WORDS, (3, 11), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("kind", "mix"), [("llama", "convex"), ("gpt2", "added"), ("bert", "convex")]
)
def test_it_starts_as_the_model_bit_by_bit(kind: str, mix: str) -> None:
    before = program(kind)
    after = side(before, check=kind == "bert", mix=mix)
    with torch.no_grad():
        assert torch.equal(before.run_flat(batch())[0], after.run_flat(batch())[0])
        assert not torch.equal(before.run_flat(batch())[0], moved(after).run_flat(batch())[0])
    assert all(name.startswith("side.") for name in after.trainable())


DOWN = {
    "adapter": WIDTH * RANK + RANK * NARROW + 2 * NARROW, "linear": WIDTH * NARROW,
    "low_rank": WIDTH * RANK + RANK * NARROW, "max_pool": 0, "avg_pool": 0,
}  # fmt: skip


@pytest.mark.parametrize("downsample", DOWN)
def test_parameters_are_as_many_as_the_formula_says(downsample: str) -> None:
    trained = side(program("llama"), downsample=downsample).trainable()
    inner, keys = INNER // FACTOR, NARROW // HEADS
    block = 2 * NARROW**2 + 2 * keys * NARROW + 3 * inner * NARROW + 2 * NARROW
    own = LAYERS * (block + NARROW + DOWN[downsample])
    assert sum(p.numel() for p in trained.values()) == own + NARROW + NARROW * WIDTH + 2 * WIDTH


def test_a_side_block_is_the_models_own_class_at_its_width() -> None:
    """transformers' own decoder of the narrow width, with the side network's parameters."""
    after = moved(side(program("llama"), downsample="avg_pool"), size=0.2)
    narrow = llama(hidden_size=NARROW, intermediate_size=INNER // FACTOR,
                   head_dim=NARROW // HEADS).model  # fmt: skip
    names = {n.removeprefix("side."): p.detach() for n, p in after.trainable().items()}
    given = {f"layers.{n}": p for n, p in names.items() if n[0].isdigit() and "gate" not in n[2:7]}
    narrow.load_state_dict(given, strict=False)
    narrow.norm.weight.data.copy_(names["norm.model.norm.weight"])

    ids, mask = batch()
    original = _same_weights()
    with torch.no_grad():
        states = original.model(ids, mask, output_hidden_states=True).hidden_states[:-1]
        last: list[torch.Tensor] = []
        hook = original.model.norm.register_forward_pre_hook(lambda m, a: last.append(a[0]))
        final = original.model(ids, mask).last_hidden_state
        hook.remove()
        rows = [*states[1:], last[0]]
        pooled = [h.unflatten(-1, (NARROW, FACTOR)).mean(-1) for h in rows]
        state = states[0].unflatten(-1, (NARROW, FACTOR)).mean(-1)
        for index, low in enumerate(pooled):
            z = names[f"{index}.gate"].sigmoid()
            state = _one_layer(narrow, index, (1 - z) * low + z * state, mask)
        up = narrow.norm(state) @ names["up"].T + names["up_bias"]
        a = names["mix"]
        wanted = original.lm_head(a * final + (1 - a) * up)
    torch.testing.assert_close(after(ids, mask).logits.detach(), wanted, rtol=1e-4, atol=1e-5)


def _same_weights() -> Any:
    net = llama()
    net.load_state_dict(program("llama").original_state_dict(), strict=False)
    return net


def _one_layer(net: Any, index: int, state: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What layer `index` of a decoder makes of a state; the others are left out, and its norm."""
    kept, norm = net.layers, net.norm
    net.layers, net.norm = nn.ModuleList([kept[index]]), nn.Identity()
    net.config.num_hidden_layers = 1
    kept[index].self_attn.layer_idx = 0
    found: torch.Tensor = net(inputs_embeds=state, attention_mask=mask).last_hidden_state
    net.layers, net.norm = kept, norm
    return found


@pytest.mark.parametrize(("kind", "coded"), [("llama", True), ("gpt2", False), ("bert", False)])
def test_no_gradient_goes_through_the_model(kind: str, coded: bool) -> None:
    base = program(kind)
    if coded:
        base = gw.passes.quantize.Nf4(block=16)(base)
    after = moved(side(base), size=0.1)
    own = set(after.trainable())

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            needs = isinstance(value, torch.Tensor) and value.requires_grad
            if needs and not adapter_of(n) and n.op == "call_function":
                behind.append(n.name)
            return value

    behind: list[str] = []
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = Watched(after.train().module).run(*batch())[0].square().mean()
    # of the model's own calls only the head reads what has a gradient
    assert set(behind) <= {"linear", "lm_head"} | {n for n in behind if _is_behind_mix(after, n)}
    assert _leaves(loss.grad_fn) <= {id(p) for n, p in after.train().state.items() if n in own}
    loss.backward()
    assert {n for n, p in after.parameters().items() if p.grad is not None} == own
    # nothing of the size of the model's inner layers is kept for the backward
    assert all(t.shape[-1] < INNER for t in kept if t.dim() == 3 and t.shape[:2] == (3, 11)
               and t.shape[-1] != WORDS)  # fmt: skip


def _is_behind_mix(after: Program, name: str) -> bool:
    node = next(n for n in after.graph.nodes if n.name == name)
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if adapter_of(current):
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def _leaves(function: Any) -> set[int]:
    """Ids of the tensors that the backward of a value ends in."""
    found, stack, seen = set(), [function], set()
    while stack:
        current = stack.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        if hasattr(current, "variable"):
            found.add(id(current.variable))
        stack.extend(after for after, _ in current.next_functions)
    return found


def test_what_is_kept_does_not_grow_with_the_models_width() -> None:
    """LoRA keeps the inputs of all layers; here the kept bytes are a third of them or less."""
    given = program("gpt2")
    lora = gw.passes.adapt.Lora(rank=4, targets=["transformer.h.*"])(given)

    def kept(adapted: Program) -> int:
        sizes: dict[int, int] = {}
        stored = {t.untyped_storage().data_ptr() for t in adapted.state.values()}

        def pack(t: torch.Tensor) -> torch.Tensor:
            at = t.untyped_storage().data_ptr()
            if at not in stored:
                sizes[at] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = adapted.train().module(*batch())[0]
            out.square().mean()
        return sum(sizes.values())

    assert kept(side(given, downsample="avg_pool")) < kept(lora) / 3


def test_it_learns_beside_a_model_in_4_bits_whose_bytes_stay() -> None:
    base = gw.passes.quantize.Nf4(block=16)(program("llama"))
    rows = torch.arange(8)[:, None] + torch.arange(11)  # each token is the one before, plus one
    data = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)}]
    losses = {}
    for mix in ("convex", "added"):
        adapted = side(base, mix=mix)
        tuned = gw.passes.tune.Finetune(
            tune={"steps": 60, "lr": 0.03, "loss": "next_token", "schedule": "constant"}
        )(adapted, training=data, check=False)
        first, last = (
            float(nn.functional.cross_entropy(
                p(**data[0]).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).detach())
            for p in (adapted, tuned)
        )  # fmt: skip
        losses[mix] = last / first
        assert all(tuned.state[n].equal(t) for n, t in base.state.items())
        assert all(not tuned.state[n].equal(adapted.state[n]) for n in adapted.trainable())
    assert max(losses.values()) < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_lowered_and_taken_out(kind: str, tmp_path: Path) -> None:
    after = moved(side(program(kind)), size=0.1)
    wanted = after.run_flat(batch())[0].detach()
    after.save(tmp_path / "a.pt2")
    assert torch.equal(gw.load(tmp_path / "a.pt2").run_flat(batch())[0], wanted)
    for backend in ("onnxruntime", "triton"):
        out = gw.lower(after, backend)(*batch())
        found = out.logits if hasattr(out, "logits") else out.last_hidden_state
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-3, atol=1e-4)
    without = bare(after)
    assert set(without.state) == set(program(kind).state)
    assert torch.equal(without.run_flat(batch())[0], program(kind).run_flat(batch())[0])


def test_a_classifier_behind_the_mix_can_be_trained_too() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU())
                                          for _ in range(3)))  # fmt: skip
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.blocks(x))

    given = gw.trace(Classifier().eval(), (torch.randn(4, 8),))
    after = gw.passes.adapt.SideNetwork(reduction=2, also_train=["head"])(given)
    assert {n for n in after.trainable() if not n.startswith("side.")} == {
        "head.weight", "head.bias"}  # fmt: skip


def test_refusals() -> None:
    given = program("llama")
    with pytest.raises(ModelError, match="width 32 is no multiple of the reduction 5"):
        gw.passes.adapt.SideNetwork(reduction=5)(given)
    with pytest.raises(ModelError, match="no multiple of the reduction 32"):
        gw.passes.adapt.SideNetwork(reduction=32)(given)
    with pytest.raises(ModelError, match=r"no chain of blocks 'layers'\. It has model.layers"):
        side(given, blocks="layers")
    with pytest.raises(ModelError, match="no chain of numbered blocks"):
        side(gw.trace(nn.Linear(4, 4), (torch.ones(2, 4),)))
    with pytest.raises(ModelError, match="has the adapter 'default' beside its layers"):
        side(gw.passes.adapt.Lora(rank=2, targets=["*q_proj"])(given))
    for inside in ("*q_proj", "lm_head"):  # the head is the embedding's table
        with pytest.raises(ModelError, match="would be trained through the model"):
            side(given, also_train=[inside])
    after = side(given)
    with pytest.raises(ArgumentError, match="has an adapter 'side' already"):
        side(after)
    with pytest.raises(ModelError, match="a network of its own"):
        gw.passes.adapt.Merge()(after)
    with pytest.raises(ModelError, match="PEFT has no form"):
        gw.save_adapter(after, "nowhere", "side")
    wide = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 16)).eval()
    with pytest.raises(ModelError, match=r"gives|changes|reads"):
        gw.passes.adapt.SideNetwork(reduction=2)(gw.trace(wide, (torch.ones(2, 8),)))
