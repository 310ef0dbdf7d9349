from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.adapters import check_merge, gradients, moved
from models.every_pass import UNTIED
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.adapters.save import save_adapter
from graphwright.ir.errors import ModelError

CHAIN = ("text", [("adapt.s2ft", {"targets": UNTIED})])


class Block(nn.Module):
    """A gated feed-forward block and attention of two heads, with residual sums."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(
            (torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v).transpose(1, 2).flatten(2)
        )
        x = x + self.down(self.up(x) * torch.nn.functional.silu(self.gate(x)))
        return self.head(x)


def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Block().eval(), {"x": torch.randn(2, 5, 8)}, dynamic={"x": {0: "batch"}})


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(4))


def test_blocks_start_as_the_program_and_merge_into_the_chosen_columns_alone() -> None:
    before = program()
    made = gw.passes.adapt.S2ft(targets=["down", "o"], share=0.3)(before)
    torch.testing.assert_close(made(X), before(X), rtol=1e-6, atol=1e-6)
    merged = check_merge(before, made, X)
    chosen = {n.split(".")[0]: made.state[n] for n in made.state if "columns" in n}
    assert chosen
    for layer in ("down", "o"):
        moved_columns = (merged.state[f"{layer}.weight"] != before.state[f"{layer}.weight"]).any(0)
        wanted = torch.zeros_like(moved_columns)
        if layer in chosen:
            wanted[chosen[layer]] = True
        assert torch.equal(moved_columns, wanted)
    heads = chosen.get("o")
    assert heads is None or len(heads) % 4 == 0  # whole heads
    count = 22 if heads is None else 20 + 2
    assert round(0.3 * count) == sum(len(c) for n, c in chosen.items() if n == "down") + (
        0 if heads is None else len(heads) // 4
    )


@pytest.mark.parametrize("choice", ["largest", "smallest"])
def test_channels_are_chosen_by_the_norm_of_all_that_belongs_to_them(choice: str) -> None:
    before = program()
    made = gw.passes.adapt.S2ft(targets=["down"], share=0.2, choice=choice)(before)
    rows = sum(
        before.state[f"{n}.weight"].detach().double().square().sum(1) for n in ("up", "gate")
    )
    norms = rows + before.state["down.weight"].detach().double().square().sum(0)
    order = norms.argsort(descending=choice == "largest")
    assert torch.equal(made.state["down.columns.default"], order[:4].sort().values)


def test_rows_are_trained_in_the_layers_that_make_the_channels() -> None:
    before = program()
    made = gw.passes.adapt.S2ft(targets=["up", "gate", "down"], side="both", share=0.2)(before)
    places = {
        n: t for n, t in made.state.items() if n.endswith((".rows.default", ".columns.default"))
    }
    assert set(places) == {"up.rows.default", "gate.rows.default", "down.columns.default"}
    assert all(torch.equal(p, places["up.rows.default"]) for p in places.values())
    check_merge(before, made, X)
    assert set(gradients(moved(made), X)) == set(made.trainable())


def test_the_gradient_remembers_the_chosen_channels_alone() -> None:
    made = gw.passes.adapt.S2ft(targets=["down"], share=0.15)(program())
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made.module(X)
    assert not any(shape[-1] == 20 and len(shape) == 3 for shape in kept)
    assert any(shape[-1] == 3 for shape in kept)


def test_adapters_of_one_model_add_up_and_are_written_for_peft(tmp_path: Path) -> None:
    before = program()
    one = moved(gw.passes.adapt.S2ft(targets=["down"], side="columns", share=0.2)(before))
    two = gw.passes.adapt.S2ft(targets=["up"], side="rows", share=0.3, name="two")(one)
    both = moved(two, seed=3)
    merged = gw.passes.adapt.Merge()(both)
    torch.testing.assert_close(merged(X), both(X), rtol=1e-5, atol=1e-5)
    save_adapter(one, tmp_path)
    again = gw.passes.adapt.Load(path=str(tmp_path))(before)
    torch.testing.assert_close(again(X).detach(), one(X).detach(), rtol=1e-5, atol=1e-5)


def test_layers_on_the_residual_stream_alone_are_refused() -> None:
    with pytest.raises(ModelError, match="inner channels"):
        gw.passes.adapt.S2ft(targets=["head"])(program())
