"""prune.zig: what can be compared, what stays whole, rounds, measures, and warnings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.channels import channel_groups
from graphwright.ir.channels.families import families
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.prune import Zig
from graphwright.passes.prune._units import measures
from graphwright.passes.prune._units.activations import mean_squares
from graphwright.passes.prune._units.median import distances


class Block(nn.Module):
    """Attention of four heads and a gated network, both behind norms, both on the stream."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (m(h).unflatten(-1, (4, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """A language model whose table outweighs its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 32)
        self.blocks = nn.ModuleList(Block(32, 88) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(32), nn.Linear(32, 500, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def decoder() -> Any:
    torch.manual_seed(0)
    return gw.trace(Decoder().eval(), (torch.randint(0, 500, (2, 9)),), dynamic="batch")


def texts() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [{"ids": torch.randint(0, 500, (4, 9), generator=g)} for _ in range(3)]


def lost(result: Any) -> dict[str, float]:
    """Share of its units that every group lost, by the layer that makes it."""
    shares = {}
    for action in result.actions:
        if action.what.startswith("cut to"):
            left, whole = (int(w) for w in action.what.split() if w.isdigit())
            shares[action.layer] = 1 - left / whole
    return shares


@pytest.mark.parametrize(
    "score", ["magnitude", "l1", "normalized_magnitude", "geometric_median", "activation"]
)
def test_unlike_groups_are_comparable(score: str) -> None:
    """Random weights: no kind of unit is better than another, so all of them lose alike."""
    result = Zig(score=score, sparsity=0.3).execute(decoder(), Context(calibration=texts()))
    assert result.metrics["parameters_left"] > 0.5
    shares = lost(result)
    assert {"blocks.0.o.weight:0", "blocks.0.gate.weight:0"} <= set(shares), "stream and hidden"
    assert max(shares.values()) < 0.6


def test_without_normalization_the_size_of_a_unit_decides() -> None:
    """Why it is there: the table's columns are long, so that the stream would lose nothing."""
    o = {"score": "magnitude", "sparsity": 0.3, "normalize": "none"}
    assert "blocks.0.o.weight:0" not in lost(Zig(**o).execute(decoder(), Context()))


def test_a_gutted_group_is_a_warning() -> None:
    o = {"sparsity": 0.8, "scope": "group"}
    result = Zig(**o).execute(decoder(), Context())
    shares = lost(result)
    assert result.metrics["largest_share_of_a_group"] == pytest.approx(max(shares.values()))
    (warning,) = result.warnings
    assert warning.startswith("3 channel groups lost more than 75% of their units: ")
    assert "blocks.0.gate.weight:0 (17 of 88 units left)" in warning
    with pytest.warns(UserWarning, match="may not recover"):
        Zig(**o)(decoder(), check=False)
    assert Zig(**o, warn_above=0.85).execute(decoder(), Context()).warnings == ()


def test_families_are_told_apart_and_spared() -> None:
    program = decoder()
    kinds = {g.name: kind for g, kind in families(channel_groups(program)).items() if g.prunable}
    assert kinds["blocks.0.q.weight:0"] == ("heads",)
    assert kinds["blocks.1.gate.weight:0"] == ("hidden",)
    stream = next(name for name, kind in kinds.items() if "residual" in kind)
    assert kinds[stream] == ("residual", "embeddings")
    for kind, names in (("residual", {stream}), ("embeddings", {stream}),
                        ("heads", {f"blocks.{i}.q.weight:0" for i in (0, 1)}),
                        ("hidden", {f"blocks.{i}.gate.weight:0" for i in (0, 1)})):  # fmt: skip
        result = Zig(sparsity=0.2, spare=[kind]).execute(program, Context())
        said = {a.layer: a.reason for a in result.actions if a.reason.startswith("spare: ")}
        assert set(said) == names
        assert names.isdisjoint(lost(result))
    with pytest.raises(ModelError, match="no channel group can be pruned"):
        Zig(spare=["residual", "heads", "hidden"]).execute(program, Context())


def test_limits_by_group_and_by_layer() -> None:
    o = {"sparsity": 0.4, "score": "random"}
    capped = Zig(**o, max_ratio=0.55).execute(decoder(), Context())
    assert max(lost(capped).values()) <= 0.55
    layers = {"blocks.0.up": 0.1, "kind:embedding": 0.25}
    by_layer = lost(Zig(**o, max_ratios=layers).execute(decoder(), Context()))
    assert by_layer["blocks.0.o.weight:0"] <= 0.25, "the stream is the table's width"
    assert by_layer["blocks.0.gate.weight:0"] <= 0.1, "gate and up are one group"
    assert by_layer["blocks.1.gate.weight:0"] > 0.3
    with pytest.raises(ArgumentError, match="raise max_ratio"):
        Zig(sparsity=0.5, max_ratio=0.2).execute(decoder(), Context())


@pytest.mark.parametrize("of", ["groups", "parameters", "macs", "bytes"])
def test_rounds_end_where_one_does(of: str) -> None:
    """The share is of the first program, whatever the rounds before have taken."""
    one, three = (
        Zig(sparsity=0.4, of=of, rounds=rounds).execute(decoder(), Context()) for rounds in (1, 3)
    )
    key = {"groups": "units_removed", "macs": "macs_left"}.get(of, "parameters_left")
    assert three.metrics[key] == pytest.approx(one.metrics[key], rel=0.06)
    assert three.metrics["cut_error"] < 1e-5
    assert sum(lost(three).values()) > 0


def test_latency_is_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With time in proportion to the parameters of what really runs, the share is met."""

    def size(program: Any, runs: int = 0) -> float:
        return 1e-9 * sum(p.numel() for p in program.parameters().values())

    monkeypatch.setattr(measures, "seconds", size)
    result = Zig(sparsity=0.3, of="latency").execute(decoder(), Context())
    assert result.metrics["parameters_left"] == pytest.approx(0.7, abs=0.03)


def test_seconds_of_a_larger_program_are_more() -> None:
    def wide(size: int) -> Any:
        return gw.trace(nn.Linear(size, size).eval(), (torch.randn(64, size),))

    assert measures.seconds(wide(1024)) > 2 * measures.seconds(wide(64))


# ---- scores, each against its formula


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x)))).mean((2, 3))


def small() -> tuple[nn.Module, Any, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = Small().eval()
    model.norm.weight.data.uniform_(0.5, 2)
    g = torch.Generator().manual_seed(1)
    data = [
        {
            "x": torch.randn(5, 3, 9, 9, generator=g),
            "labels": torch.randint(0, 4, (5,), generator=g),
        }
        for _ in range(3)
    ]
    return model, gw.trace(model, (data[0]["x"],), dynamic="batch"), data


def kept(result: Any, model: nn.Module) -> list[int]:
    """Filters of the first convolution that are left."""
    left = result.program.state["a.weight"].detach()
    return [
        i for i, w in enumerate(model.a.weight.detach()) if any(torch.equal(w, v) for v in left)
    ]


def test_taylor_per_batch_is_the_mean_square_over_batches() -> None:
    model, program, data = small()
    expected = np.zeros(8)
    for batch in data:
        model.zero_grad()
        nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        terms = [(model.a.weight, 0), (model.norm.weight, 0), (model.norm.bias, 0),
                 (model.b.weight, 1)]  # fmt: skip
        sums = sum((p.detach().double() * p.grad.double()).transpose(0, d).reshape(8, -1).sum(1)
                   for p, d in terms)  # fmt: skip
        expected += sums.square().numpy()
    o = {"sparsity": 0.5, "score": "taylor_per_batch", "rounds": 1}
    result = Zig(**o).execute(program, Context(calibration=data))
    assert kept(result, model) == sorted(np.argsort(expected)[4:].tolist())


def test_auto_looks_at_data_where_there_is_some() -> None:
    model, program, data = small()
    for context, score, rounds in ((Context(calibration=data), "taylor_per_batch", 5),
                                   (Context(), "magnitude", 1)):  # fmt: skip
        auto = Zig(sparsity=0.5).execute(program, context)
        named = Zig(sparsity=0.5, score=score, rounds=rounds).execute(program, context)
        assert kept(auto, model) == kept(named, model)


def test_auto_needs_no_gradient_through_codes() -> None:
    _, program, data = small()
    inputs = [{"x": batch["x"]} for batch in data]
    coded = gw.passes.quantize.Int8(activations="static")(program, calibration=inputs, check=False)
    result = Zig(sparsity=0.25).execute(coded, Context(calibration=data))
    named = Zig(sparsity=0.25, score="magnitude").execute(coded, Context())
    assert result.metrics["units_removed"] == named.metrics["units_removed"] == 2


def test_scales_of_batch_norm() -> None:
    model, program, _ = small()
    result = Zig(sparsity=0.5, score="bn_scale").execute(program, Context())
    order = model.norm.weight.detach().abs().argsort()
    assert kept(result, model) == sorted(order[4:].tolist())


def test_what_no_batch_norm_scales_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3),
                          nn.ReLU(), nn.Conv2d(6, 4, 3))  # fmt: skip
    model[1].weight.data.uniform_(0.5, 2)
    program = gw.trace(model.eval(), (torch.randn(2, 3, 9, 9),))
    result = Zig(sparsity=0.5, score="bn_scale").execute(program, Context())
    said = {a.layer: a for a in result.actions}
    assert said["3.weight:0"].reason == "no batch norm scales its channels"
    assert said["0.weight:0"].what.startswith("cut to 4 of 8")


def test_distances_are_those_of_all_slices() -> None:
    model, program, _ = small()
    group = next(g for g in channel_groups(program) if g.prunable)
    rows = torch.cat(
        [model.a.weight.detach().flatten(1), model.norm.weight.detach()[:, None],
         model.norm.bias.detach()[:, None], model.b.weight.detach().transpose(0, 1).flatten(1)], 1,
    ).double()  # fmt: skip
    np.testing.assert_allclose(distances(group), torch.cdist(rows, rows).sum(1), rtol=1e-6)


def test_activations_are_what_the_next_layer_reads() -> None:
    model, program, data = small()
    group = next(g for g in channel_groups(program) if g.prunable)
    with torch.no_grad():
        read = torch.cat([torch.relu(model.norm(model.a(batch["x"]))) for batch in data])
    root = read.double().square().mean((0, 2, 3)).sqrt().numpy()
    found = mean_squares(group.analysis, Context(calibration=data))[group.classes]
    np.testing.assert_allclose(found, root / root.mean(), rtol=1e-6)
