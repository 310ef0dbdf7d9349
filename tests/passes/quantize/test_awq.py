from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

import graphwright as gw
from graphwright.ir.calibration import spill
from graphwright.ir.calibration import walk as layerwise
from graphwright.ir.calibration.site import Solved, Task
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.graph.constants import constant_nodes
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import layers
from graphwright.ir.stored import grid
from graphwright.passes.quantize import awq
from graphwright.passes.quantize._activations import scaling
from graphwright.passes.quantize._activations.folding import Group, find_groups
from graphwright.passes.quantize._activations.region import Region, feeds_scores, region_of
from graphwright.passes.quantize._activations.scaling import spread_batches
from graphwright.passes.quantize._math import awq as awq_math
from graphwright.passes.quantize.awq import Awq, Choice, apply_factors

CHAIN = ("text", [("quantize.awq", {"block": 16})])

HEADS, WIDTH = 4, 32


class RmsNorm(nn.Module):
    """Written out, as models do; `shift` 1 for a weight that is stored less one."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5 - shift)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * (self.shift + self.weight) if self.shift else self.weight * x


class Attention(nn.Module):
    def __init__(self, groups: int = 1, packed: bool = False) -> None:
        super().__init__()
        self.packed, self.groups = packed, groups
        if packed:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.query = nn.Linear(WIDTH, WIDTH)
            self.key = nn.Linear(WIDTH, WIDTH // groups)
            self.value = nn.Linear(WIDTH, WIDTH // groups)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = (
            self.qkv(x).split(WIDTH, -1)
            if self.packed
            else (self.query(x), self.key(x), self.value(x))
        )
        q, k, v = (p.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in parts)
        y = scaled_dot_product_attention(q, k, v, enable_gqa=self.groups > 1)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A transformer block, in the forms that models have."""

    def __init__(self, norm: str = "layer", mlp: str = "gelu", post: bool = False,
                 groups: int = 1, packed: bool = False) -> None:  # fmt: skip
        super().__init__()
        make: Callable[[], nn.Module] = {
            "layer": lambda: nn.LayerNorm(WIDTH),
            "rms": lambda: RmsNorm(0.0),
            "shifted rms": lambda: RmsNorm(1.0),
        }[norm]
        self.norm1, self.norm2 = make(), make()
        self.attention = Attention(groups, packed)
        self.mlp, self.post = mlp, post
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        if mlp == "gated":
            self.gate = nn.Linear(WIDTH, 64)

    def feed_forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = silu(self.gate(x)) * h if self.mlp == "gated" else h
        h = {"gelu": gelu, "relu": torch.relu, "gated": lambda h: h}[self.mlp](h)
        out: Tensor = self.down(h)
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attention(x))
            y: Tensor = self.norm2(x + self.feed_forward(x))
            return y
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


def traced(module: nn.Module) -> tuple[gw.Program, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.rand_like(parameter)
    x = torch.randn(2, 6, WIDTH)
    program = gw.trace(module.eval(), (x,), {"x": {0: "batch", 1: "length"}})
    # A few channels that are large, as in trained transformers.
    size = torch.ones(WIDTH)
    size[[3, 17, 28]] = 12.0
    return program, [(torch.randn(3, 8, WIDTH) * size,) for _ in range(4)]


# ---- factors in the graph


@pytest.mark.parametrize(
    ("block", "inserted"),
    [
        (Block(), ["down"]),
        (Block(mlp="relu"), []),
        (Block("rms", "gated"), []),
        (Block("shifted rms", "gated"), []),
        (Block("rms", "gated", groups=2), ["attention.out"]),
        (Block(packed=True, mlp="relu"), []),
        (Block(post=True, mlp="relu"), ["attention.query", "up"]),
    ],
    ids=["gelu", "relu", "rms", "shifted", "shared values", "packed", "post norm"],
)
def test_factors_change_nothing_and_are_folded_where_they_can_be(
    block: Block, inserted: list[str]
) -> None:
    program, batches = traced(block)
    groups = find_groups(program, layers(program, {"linear"}))
    generator = torch.Generator().manual_seed(1)
    choices = [
        Choice(0.5, torch.rand(g.x.meta["val"].shape[-1], generator=generator) * 3 + 0.2, 1.0)
        for g in groups
    ]
    scaled, how = apply_factors(program, "quantize.awq", groups, choices, True)
    assert measure(program, scaled, batches).relative < 1e-5
    kinds = {g.layers[0].name: h for g, h in zip(groups, how, strict=True)}
    assert [name for name, kind in kinds.items() if kind == "scaled"] == inserted
    calls = [sum(n.op == "call_function" for n in p.graph.nodes) for p in (program, scaled)]
    assert calls[1] == calls[0] + len(inserted)
    left, how = apply_factors(program, "quantize.awq", groups, choices, False)
    assert measure(program, left, batches).relative < 1e-5
    assert how.count("") == len(inserted)


def test_an_activation_with_another_reader_is_not_folded() -> None:
    class Shared(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm2(x)
            return h + self.feed_forward(h)

    program, batches = traced(Shared(mlp="relu"))
    groups = find_groups(program, layers(program, {"linear"}))
    choices = [Choice(0.5, torch.full((g.x.meta["val"].shape[-1],), 2.0), 1.0) for g in groups]
    scaled, how = apply_factors(program, "quantize.awq", groups, choices, True)
    assert how == ["scaled", "folded"]
    assert measure(program, scaled, batches).relative < 1e-5


# ---- where results meet


def regions(program: gw.Program) -> dict[str, tuple[Group, Region]]:
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    constant = constant_nodes(program.graph)
    return {
        group.layers[0].name: (
            group, region_of([each.node for each in group.layers], order, constant)
        )
        for group in find_groups(program, layers(program, {"linear"}))
    }  # fmt: skip


def region_ends(program: gw.Program) -> dict[str, list[str]]:
    by_node = {layer.node: layer.name for layer in layers(program, {"linear"})}
    return {
        name: [by_node.get(end, end.name) for end in region.ends]
        for name, (_, region) in regions(program).items()
    }


def test_attention_and_mlp_are_judged_as_a_whole() -> None:
    program, _ = traced(Block("rms", "gated"))
    assert region_ends(program) == {
        "attention.query": ["attention.out"],
        "attention.out": ["attention.out"],
        "up": ["down"],
        "down": ["down"],
    }


def test_layers_whose_results_never_meet_are_judged_by_themselves() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    program = gw.trace(Two().eval(), (torch.randn(3, 8),))
    assert region_ends(program) == {"a": ["a", "b"]}


class Cross(nn.Module):
    """Keys and values are made before the queries and the mask that they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.query = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        k, v = self.key(h), self.value(h)
        q = self.query(x.flip(1))
        places = torch.arange(x.shape[1])
        scores = q @ k.transpose(1, 2) - (places[:, None] - places).abs()
        out: Tensor = self.out(scores.softmax(-1) @ v)
        return out


class Tap(fx.Interpreter):
    """Keeps every value of a run."""

    def __init__(self, program: gw.Program, *inputs: Tensor) -> None:
        super().__init__(program.module)
        self.values: dict[str, Any] = {}
        with torch.no_grad():
            self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@pytest.mark.parametrize("module", [Block("rms", "gated"), Block(groups=2), Cross()])
@pytest.mark.parametrize("travels", [False, True])
def test_a_region_computes_what_the_program_does_with_other_weights(
    module: nn.Module, travels: bool
) -> None:
    program, ((x,), *_) = traced(module)
    before = Tap(program, x).values
    nodes = list(program.graph.nodes)
    for group, region in regions(program).values():
        weights = [torch.randn(program.state[layer.weight].shape) for layer in group.layers]
        changes = {g.weight: w for g, w in zip(group.layers, weights, strict=True)}
        after = Tap(program.replace(state={**program.state, **changes}), x).values
        made = region.module(program, [weight_node(g) for g in group.layers], x.device)
        made = pickle.loads(pickle.dumps(made)) if travels else made
        with torch.no_grad():
            found = made(*(before[node.name] for node in region.reads), *weights)
        assert all(nodes.index(n) < nodes.index(group.layers[0].node) for n in region.reads)
        for end, value in zip(region.ends, found, strict=True):
            assert torch.equal(value, after[end.name])
            assert not torch.equal(value, before[end.name])


def test_keys_and_values_are_judged_with_queries_that_come_later() -> None:
    program, _ = traced(Cross())
    assert region_ends(program)["key"] == ["out"]
    assert [node.name for node in regions(program)["key"][1].reads][-1] == "layer_norm"


def test_queries_and_keys_are_known() -> None:
    class Written(nn.Module):
        """Attention in products, with a scale and a mask."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            scores = self.q(x) @ self.k(x).transpose(1, 2) / 8**0.5
            scores = scores.masked_fill(torch.ones(5, 5).tril() == 0, float("-inf"))
            out: Tensor = self.o(scores.softmax(-1) @ self.v(x))
            return out

    program, _ = traced(Block())
    found = {each.name for each in layers(program, {"linear"}) if feeds_scores(each.node)}
    assert found == {"attention.query", "attention.key"}
    written = gw.trace(Written().eval(), (torch.randn(2, 5, 8),))
    assert {each.name for each in layers(written, {"linear"}) if feeds_scores(each.node)} == {
        "q",
        "k",
    }


# ---- the arithmetic


def test_factors_follow_the_formula() -> None:
    mean = torch.tensor([0.0, 0.01, 1.0, 9.0])
    s = [max(m**0.5, 1e-4) for m in mean.tolist()]
    norm = (max(s) * min(s)) ** 0.5
    torch.testing.assert_close(awq_math.factors(mean, 0.5), torch.tensor([v / norm for v in s]))
    assert torch.equal(awq_math.factors(mean, 0.0), torch.ones(4))


def test_limits_are_the_best_of_all_by_the_sum_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 24, generator=generator) ** 3
    x = torch.randn(70, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    batches = [x[None, :20], x[None, 20:20], x[None, 20:]]
    mean, counts = awq_math.mean_size(batches)
    torch.testing.assert_close(mean, x.abs().mean(0))
    assert counts == [20, 0, 50]
    limit, gain = awq_math.limits(w, awq_math.moments(batches, 8), 3, symmetric=False)
    assert float(gain) > 0
    for row in range(5):
        for group in range(3):
            part, seen = w[row, group * 8 : group * 8 + 8], x[:, group * 8 : group * 8 + 8]
            best = (float("inf"), 0.0)
            for step in range(10):
                reach = float(part.abs().max()) * (1 - step / 20)
                clamped = part.clamp(-reach, reach)
                scale, zero = grid.fit(clamped, 3)
                q = grid.decode(grid.encode(clamped, scale, zero, 3), scale, zero)
                best = min(best, (float((seen @ (q - part)).square().sum()), reach))
            assert float(limit[row, group]) == pytest.approx(best[1], rel=1e-6)


def test_batches_are_spread_evenly_within_the_limit() -> None:
    assert spread_batches([10] * 8, 1000) == list(range(8))
    assert spread_batches([10] * 8, 40) == [1, 3, 5, 7]
    assert spread_batches([10] * 9, 5) == [4]


# ---- the pass


@pytest.mark.parametrize("post", [False, True])
def test_better_than_rounding_to_nearest(post: bool) -> None:
    program, batches = traced(Block(post=post))
    options = {"bits": 3, "block": 32}
    ours = Awq(**options)(program, calibration=batches)
    plain = gw.passes.quantize.Rtn(**options)(program)
    unclipped = Awq(clip=False, **options)(program, calibration=batches)
    errors = [measure(program, p, batches).relative for p in (ours, unclipped, plain)]
    assert errors[0] < 0.9 * errors[2]
    assert errors[1] < errors[2]


def test_what_was_done_is_reported() -> None:
    program, batches = traced(Block())
    result = Awq(block=32, insert_scales=False).execute(program, Context(calibration=batches))
    found = {a.layer: a for a in result.actions}
    assert "folded, alpha" in found["attention.query"].what
    assert "clipping" not in found["attention.query"].what
    assert "clipping" in found["up"].what
    assert found["down"].reason == "nothing before it can take the factors"
    assert result.metrics["loss_to_plain_rounding"] <= 1
    assert result.metrics["groups"] == 4


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, 8)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.down(gelu(self.up(x)))
        return out


def test_padding_has_no_say() -> None:
    torch.manual_seed(3)
    net = Masked().eval()
    mask = (torch.arange(8) < torch.tensor([[3], [8], [5]])).long()
    x = torch.randn(3, 8, WIDTH)
    program = gw.trace(net, (x, mask))
    other = torch.where(mask[..., None] == 1, x, 100 * torch.randn(3, 8, WIDTH))
    states = [Awq(block=16)(program, calibration=[(v, mask)]).state for v in (x, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_layers_that_no_data_reaches_are_rounded_to_nearest_and_say_so() -> None:
    x, mask = torch.randn(3, 8, WIDTH), torch.zeros(3, 8, dtype=torch.long)
    program = gw.trace(Masked().eval(), (x, mask))
    result = Awq(block=16).execute(program, Context(calibration=[(x, mask)]))
    plain = gw.passes.quantize.Rtn(block=16)(program)
    assert torch.equal(result.program(x, mask), plain(x, mask))
    assert {a.reason for a in result.actions} == {"no calibration data reaches it"}


def test_layers_without_factors_are_rounded_to_nearest() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 16)
            self.conv = nn.Conv1d(16, 16, 3, padding=1)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            h = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
            out: Tensor = self.head(h)
            return out

    torch.manual_seed(4)
    ids = torch.randint(0, 20, (2, 9))
    program = gw.trace(Mixed().eval(), (ids,))
    result = Awq(block=16).execute(program, Context(calibration=[(ids,)]))
    plain = gw.passes.quantize.Rtn(block=16)(program)
    assert torch.equal(result.program(ids), plain(ids))
    reasons = {a.layer: a.reason for a in result.actions}
    assert reasons["conv"] == "rounded to nearest: no factors for conv1d"
    assert reasons["head"] == "shares the weight of table"


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_lowers(backend: str) -> None:
    program, batches = traced(Block())
    rounded = Awq(block=16)(program, calibration=batches)
    compiled = gw.lower(rounded, backend)
    # ONNX Runtime's kernels of few bits round the activation to 8 bits.
    assert gw.compare(rounded(*batches[0]), compiled(*batches[0])).relative < 0.02


# ---- the engine


def states(program: gw.Program, context: Context) -> dict[str, Tensor]:
    return dict(Awq(bits=3, block=16).execute(program, context).program.state)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_result_is_the_same_with_more_jobs_and_with_less_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, batches = traced(Block("rms", "gated"))
    plain = states(program, Context(calibration=batches))
    assert_same(plain, states(program, Context(calibration=batches, jobs=2)))
    spills: list[spill.Spill] = []

    class Nothing(spill.Spill):
        def __init__(self, budget: int) -> None:
            super().__init__(0)
            spills.append(self)

    monkeypatch.setattr(spill, "SMALL", 1)
    monkeypatch.setattr(layerwise, "Spill", Nothing)
    assert_same(plain, states(program, Context(calibration=batches)))
    assert len(spills) == 2
    assert all(each.spilled > 0 == each.held for each in spills)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_the_result_is_the_same_on_a_local_ray() -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    program, batches = traced(Block("rms", "gated"))
    here = states(program, Context(calibration=batches))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        there = states(program, Context(calibration=batches, jobs="ray"))
    finally:
        ray.shutdown()
    assert_same(here, there)


def test_a_killed_run_goes_on_behind_the_last_finished_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program, batches = traced(Block("rms", "gated"))
    plain = states(program, Context(calibration=batches))
    context = Context(calibration=batches, work=tmp_path, key="one")
    search, clip = scaling.best_factors, awq.Clipping.solve
    searched: list[str] = []
    clipped: list[str] = []
    dies = {"up"}

    def counted(options: awq.AwqOptions, task: Task) -> Solved:
        if task.name in dies:
            raise KeyboardInterrupt
        searched.append(task.name)
        return search(options, task)

    def counted_clip(self: awq.Clipping, task: Task) -> Solved:
        if task.name in dies:
            raise KeyboardInterrupt
        clipped.append(task.name)
        return clip(self, task)

    monkeypatch.setattr(scaling, "best_factors", counted)
    monkeypatch.setattr(awq.Clipping, "solve", counted_clip)
    with pytest.raises(KeyboardInterrupt):
        states(program, context)
    assert (searched, clipped) == (["attention.query", "attention.out"], [])
    dies = {"gate"}  # of the group of `up`: first met when it is clipped
    with pytest.raises(KeyboardInterrupt):
        states(program, context)
    assert searched[2:] == ["up", "down"]
    assert clipped == ["attention.value", "attention.out", "up"]
    dies = set()
    assert_same(plain, states(program, context))
    assert len(searched) == 4
    assert clipped[3:] == ["gate", "down"]
    # All is known: nothing is searched, and no node of the program is run again.
    monkeypatch.setattr(layerwise._Sweep, "_step", lambda *_: pytest.fail("the walk began"))
    assert_same(plain, states(program, context))
    assert (len(searched), len(clipped)) == (4, 5)
