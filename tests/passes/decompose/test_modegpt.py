from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import arguments, set_gw_meta
from graphwright.ir.layers.factors import eigenspace
from graphwright.ir.ops.attention import attention as capped_attention
from graphwright.passes.decompose._attention.rebuild import Rebuild
from graphwright.passes.decompose._attention.solve import (
    chosen_columns,
    factored_scores,
    factored_values,
)
from graphwright.passes.decompose._blocks.blocks import find_blocks
from graphwright.passes.decompose._blocks.moments import gather
from graphwright.passes.decompose._math.modular import allocate, nystrom, svd_pair
from graphwright.passes.decompose.modegpt import Modegpt

CHAIN = ("text", [("decompose.modegpt", {"ratio": 0.25, "allocation": "uniform"})])
WIDTH, HEADS, HIDDEN, VOCABULARY = 32, 4, 48, 40


class Block(nn.Module):
    """One block of a decoder, in the ways that decoders are written."""

    def __init__(
        self, rotary: str = "", own: int = 4, form: str = "call", bias: bool = False, **more: Any
    ) -> None:
        super().__init__()
        self.rotary, self.own, self.form, self.more = rotary, own, form, more
        d = self.d = WIDTH // HEADS
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        if more.get("fused"):
            self.qkv = nn.Linear(WIDTH, (HEADS + 2 * own) * d, bias=bias)
        else:
            self.q = nn.Linear(WIDTH, WIDTH, bias=bias)
            self.k, self.v = (nn.Linear(WIDTH, own * d, bias=bias) for _ in range(2))
        self.o = nn.Linear(WIDTH, WIDTH, bias=bias)
        if form == "capped":
            self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=bias) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=bias)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.rotary == "half":
            a, b = x[..., : self.d // 2], x[..., self.d // 2 :]
            return x * cos + torch.cat([-b, a], -1) * sin
        a, b = x[..., ::2], x[..., 1::2]
        return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        angle = torch.arange(length)[:, None] * 0.7 ** torch.arange(self.d // 2)
        twice = torch.cat([angle, angle], -1)
        if self.rotary != "half":
            twice = angle.repeat_interleave(2, -1)
        return twice.cos()[None, None], twice.sin()[None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        if self.form == "call":
            return nn.functional.scaled_dot_product_attention(q, k, v, mask)
        if self.form == "scaled":
            q = q * 0.3
            return nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=1.1)
        if self.form == "capped":
            return capped_attention(q, k, v, mask, 0.3, 2.0, self.sinks)
        scores = q @ k.transpose(2, 3) / math.sqrt(self.d)
        return scores.masked_fill(~mask, -1e9).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        h, (batch, length, _) = self.norm1(x), x.shape
        if self.more.get("fused"):
            q, k, v = self.qkv(h).split([WIDTH, self.own * self.d, self.own * self.d], -1)
        else:
            q, k, v = self.q(h), self.k(h), self.v(h)
        q, k, v = (t.view(batch, length, -1, self.d).transpose(1, 2) for t in (q, k, v))
        if self.more.get("norms"):
            q, k = (nn.functional.normalize(t, dim=-1) for t in (q, k))
        if self.rotary:
            tables = self.tables(length)
            q, k = self.turn(q, *tables), self.turn(k, *tables)
        if self.own < HEADS and self.form != "capped":
            k, v = (t.repeat_interleave(HEADS // self.own, 1) for t in (k, v))
        y = self.attend(q, k, v).transpose(1, 2).reshape(batch, length, WIDTH)
        x = x + self.o(y)
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Blocks between a table and a head."""

    def __init__(self, count: int = 1, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(count))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def decoder(count: int = 1, **options: Any) -> Decoder:
    torch.manual_seed(0)
    net = Decoder(count, **options).eval()
    for name, parameter in net.named_parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
        if name.endswith("bias"):
            parameter.data.normal_()
    return net


def traced(net: nn.Module) -> gw.Program:
    ids = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    return gw.trace(net, (ids,), {"ids": {0: "batch", 1: "length"}})


def data(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"ids": torch.randint(0, VOCABULARY, (4, 16), generator=generator)}
            for _ in range(count)]  # fmt: skip


IDS = torch.randint(0, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(3))

WAYS: list[dict[str, Any]] = [
    {},
    {"bias": True, "form": "scaled"},
    {"rotary": "half", "own": 2, "bias": True},
    {"rotary": "interleaved", "own": 1},
    {"rotary": "half", "form": "written"},
    {"own": 2, "form": "written", "bias": True},
    {"own": 2, "form": "capped", "rotary": "half"},
    {"fused": True, "bias": True, "own": 2, "rotary": "half"},
]


def rebuilt(program: gw.Program, width: int, inner: int, how: Any = chosen_columns) -> gw.Program:
    """All attentions with that width of scores and of values."""
    blocks, _ = find_blocks(program, ["*"])
    moments, _ = gather(program, blocks, {part.down.name: 8 for b in blocks
                        for part in b.feed_forwards}, Context(calibration=data()))  # fmt: skip
    editor = Editor(program, by="test")
    rebuild = Rebuild(editor)
    for attention in (a for block in blocks for a in block.attentions):
        scores = how(program, attention, moments, width)
        scores = scores[0] if isinstance(scores, tuple) else scores
        rebuild(attention, scores, factored_values(program, attention, moments, inner)[0])
    return editor.finish()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_channels_that_do_nothing_go_without_a_trace(way: dict[str, Any]) -> None:
    """Also at positions above 0, where every pair has turned by another angle; the scale of the
    scores stays that of the original width, heads share keys, biases move: nothing may change."""
    net = decoder(**way)
    block, d = net.blocks[0], 8
    pairs = {"half": [(1, 5), (2, 6)], "interleaved": [(0, 1), (4, 5)]}
    dead = [c for pair in pairs.get(way.get("rotary", ""), [(1, 3), (4, 6)]) for c in pair]
    for head in range(way.get("own", 4)):
        for channel in dead:
            for name, rows in (("q", [g * d + channel for g in range(HEADS)]),
                               ("k", [head * d + channel])):  # fmt: skip
                layer = block.qkv if way.get("fused") else getattr(block, name)
                rows = [r + (WIDTH if way.get("fused") and name == "k" else 0) for r in rows]
                layer.weight.data[rows] = 0
                if layer.bias is not None:
                    layer.bias.data[rows] = 0
    program = traced(net)
    exact, made = program(IDS).detach(), rebuilt(program, 4, 8)
    gathers = [str(node.target) for node in made.graph.nodes].count("aten.index_select.default")
    assert gathers == (4 if way.get("rotary") else 0)
    assert gw.compare(exact, made(IDS).detach()).relative < 1e-5
    if not way.get("rotary"):
        factored = rebuilt(program, 4, 8, factored_scores)
        assert gw.compare(exact, factored(IDS).detach()).relative < 1e-4


def test_attention_of_torch_itself_is_parted_and_keeps_its_dropout() -> None:
    """Its one projection has the length in front of the batch."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            h = self.norm(x)
            return x + self.attention(h, h, h, need_weights=False)[0]

    torch.manual_seed(0)
    net = Encoder().eval()
    net.attention.in_proj_bias.data.normal_()
    program = traced(net)
    for node in program.graph.nodes:
        if "scaled_dot" in str(node.target):
            set_gw_meta(node, attention_dropout=0.1)  # as tracing notes it
    made = rebuilt(program, 8, 8)
    assert gw.compare(program(IDS).detach(), made(IDS).detach()).relative < 1e-5
    assert len(made.parameters()) == len(program.parameters()) + 3  # no bias of values
    result = Modegpt(ratio=0.5, allocation="uniform").run(program, Context(calibration=data()))
    shapes = {tuple(p.shape) for p in result.program.parameters().values()}
    assert (HEADS * 4, WIDTH) in shapes
    assert (WIDTH, HEADS * 4) in shapes
    drops = [[arguments(node)["dropout_p"] for node in p.train().graph.nodes
              if "scaled_dot" in str(node.target)] for p in (program, result.program)]  # fmt: skip
    assert drops[0] == drops[1] == [0.1]


def test_the_hidden_units_are_solved_as_least_squares_does_it() -> None:
    torch.manual_seed(0)
    h = torch.randn(500, 40, dtype=torch.float64) @ torch.randn(40, 40, dtype=torch.float64)
    h = h.relu() + 0.1 * torch.randn(500, 40, dtype=torch.float64)
    down = torch.randn(12, 40, dtype=torch.float64)
    kept, weight = nystrom(h.t() @ h / 500, down, 25)
    exact = h @ down.t()
    best = torch.linalg.lstsq(h[:, kept], exact).solution
    left, least = ((exact - h[:, kept] @ w).norm() for w in (weight.t(), best))
    sliced = (exact - h[:, kept] @ down[:, kept].t()).norm()
    assert float(left / least) - 1 < 1e-6
    assert float(left) < float(sliced)
    c = h.t() @ h / 500
    ridge = 1e-2 * c.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    scores = (c @ torch.linalg.inv(c + ridge)).diagonal()
    assert kept.tolist() == sorted(scores.topk(25).indices.tolist())


@pytest.mark.parametrize("shared", [1, 3])
def test_values_and_output_reach_the_bound_of_eckart_and_young(shared: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(600, 24, dtype=torch.float64) * torch.linspace(0.1, 3, 24)
    wv = torch.randn(10, 24, dtype=torch.float64)
    wo = torch.randn(shared * 24, 10, dtype=torch.float64)
    root, inverse = eigenspace(x.t() @ x / 600)
    first, second = svd_pair(wv, wo, root, inverse, 5)
    exact = x @ wv.t() @ wo.t()
    left = float((exact - x @ first.t() @ second.t()).norm())
    assert left == pytest.approx(float(torch.linalg.svdvals(exact)[5:].norm()), rel=1e-4)

    def cut(w: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        return u[:, :5] * s[:5] @ vh[:5]

    assert left < float((exact - x @ cut(wv).t() @ cut(wo).t()).norm())
    u, s, vh = torch.linalg.svd(root.t() @ wv.t(), full_matrices=False)  # of the values alone
    alone = inverse.t() @ (u[:, :5] * s[:5] @ vh[:5]) @ wo.t()
    assert left <= float((exact - x @ alone).norm())


def test_svd_of_the_scores_is_better_than_picking_channels() -> None:
    program = traced(decoder(bias=True))
    exact = program(IDS).detach()
    errors = [gw.compare(exact, rebuilt(program, 3, 8, how)(IDS).detach()).relative
              for how in (chosen_columns, factored_scores)]  # fmt: skip
    assert errors[1] < errors[0]


@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
def test_shares_of_the_blocks(temperature: float) -> None:
    influence = [0.9, 0.3, 0.1, 0.05, 0.2, 0.6]
    shares = allocate(influence, 0.3, temperature, 0.8)
    assert sum(shares) / 6 == pytest.approx(0.3, abs=1e-6)
    assert max(shares) <= 0.8 + 1e-12
    assert sorted(range(6), key=shares.__getitem__) == sorted(
        range(6), key=lambda i: (-influence[i], i)
    ) or max(shares) == pytest.approx(0.8)
    if temperature == 10.0:
        assert max(shares) - min(shares) < 0.03
    free = allocate([0.4, 0.5], 0.3, 1.0, 0.8)
    weights = [math.exp(-0.4), math.exp(-0.5)]
    assert free == pytest.approx([0.6 * w / sum(weights) for w in weights])


def test_a_whole_decoder_gets_smaller_and_says_by_how_much() -> None:
    program = traced(decoder(3, rotary="half", own=2, bias=True))
    result = Modegpt(ratio=0.25, temperature=0.3).run(program, Context(calibration=data()))
    made = result.program
    told = {action.layer: action for action in result.actions}
    assert told["head"].reason == "no part of a block"
    assert "pairs of the rotation" in told["blocks.2.q, blocks.2.k"].what
    assert told["blocks.0.v, blocks.0.o"].reason == (
        "its share of the channels is less than one per head"
    )
    shapes = {n: tuple(p.shape) for n, p in made.parameters().items()}
    for index in range(3):
        hidden = shapes[f"blocks.{index}.down.weight"][1]
        assert (
            shapes[f"blocks.{index}.up.weight"][0]
            == hidden
            == len(made.state[f"blocks.{index}.gate.bias"])
        )
        assert shapes[f"blocks.{index}.o.weight"][1] == 2 * shapes[f"blocks.{index}.v.weight"][0]
    assert "blocks.0.v.bias" in shapes
    assert "blocks.2.v.bias" not in shapes
    assert result.metrics["blocks"] == 3
    assert result.metrics["smallest_share"] < 0.25 < result.metrics["largest_share"]
    assert made(IDS).shape == program(IDS).shape
    error = gw.compare(program(IDS).detach(), made(IDS).detach())
    assert 0.01 < error.relative < 0.8
    again = Modegpt(ratio=0.25, allocation="uniform", multiple_of=4).run(
        program, Context(calibration=data())
    )
    assert again.program.state["blocks.0.up.weight"].shape[0] == 36
    assert again.program.state["blocks.0.k.weight"].shape[0] == 2 * 8  # pairs by fours: all stay


def test_what_cannot_be_is_told_by_block() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(norms=True), Block(own=4)
            self.second.k = self.second.q

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    torch.manual_seed(0)
    program = gw.trace(Mixed().eval(), (torch.randn(2, 6, WIDTH),), {"x": {0: "batch"}})
    batches = [{"x": torch.randn(2, 6, WIDTH)}]
    result = Modegpt(allocation="uniform").run(program, Context(calibration=batches))
    reasons = [action.reason for action in result.actions if not action.changed]
    assert any("its queries go through" in reason for reason in reasons)
    assert any("read more than once" in r or "made alike" in r or "parts" in r for r in reasons)
    changed = [action.layer for action in result.actions if action.changed]
    assert sum("down" in name for name in changed) == 2
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    plain = gw.trace(net, (torch.randn(2, 8),))
    with pytest.raises(ModelError, match="no block can be decomposed"):
        Modegpt()(plain, calibration=[(torch.randn(2, 8),)])


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_it_lowers_quantizes_and_comes_back_from_a_file(backend: str, tmp_path: object) -> None:
    program = traced(decoder(rotary="half", own=2, bias=True))
    made = Modegpt(ratio=0.3)(program, calibration=data())
    made.save(f"{tmp_path}/made.pt2")
    made = gw.load(f"{tmp_path}/made.pt2")
    coder = (
        gw.passes.quantize.Int8()
        if backend == "onnxruntime"
        else gw.passes.quantize.Rtn(bits=4, block=8)
    )
    zeros = gw.passes.prune.Magnitude(sparsity=0.5)(made)
    for each in (made, coder(zeros)):
        compiled = gw.lower(each, backend)
        assert gw.compare(each(IDS).detach(), compiled(IDS).detach()).relative < 0.05
