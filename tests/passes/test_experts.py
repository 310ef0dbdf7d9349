"""Stacks of experts are layers: for every pass that looks at weights, and for both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from models.experts import BEST, COUNT, HIDDEN, WIDTH, Mixture, batches, mixture
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.context import Context
from graphwright.ir.graph.constants import constant_value
from graphwright.ir.layers.kinds import EXPERTS
from graphwright.ir.layers.selectors import layers
from graphwright.ir.stored.read import is_coded
from graphwright.passes.quantize._activations.folding import find_groups
from graphwright.passes.quantize.awq import Choice, apply_factors

STACKS = ["experts.up", "experts.down"]

COMPRESSING = [
    gw.passes.quantize.Rtn(block=16),
    gw.passes.quantize.Gptq(block=16),
    gw.passes.quantize.Awq(block=16),
    gw.passes.quantize.Nf4(block=16),
    gw.passes.quantize.Fp8(),
    gw.passes.quantize.Int8(),
    gw.passes.quantize.Vptq(centroids=64, vector_length=2),
    gw.passes.quantize.Adaquant(iterations=5, block=16),
]
PRUNING = [
    gw.passes.prune.Magnitude(sparsity=0.5),
    gw.passes.prune.Wanda(sparsity=0.5),
    gw.passes.prune.Sparsegpt(sparsity=0.5),
    gw.passes.prune.Dsnot(sparsity=0.5),
    gw.passes.prune.Magnitude(pattern="2:4"),
]


def error(program: gw.Program, original: gw.Program) -> float:
    x = batches(1, seed=9)[0]
    with torch.no_grad():
        exact = original(*x)
        return float((program(*x) - exact).norm() / exact.norm())


def stacks(program: gw.Program) -> list[str]:
    return [layer.name for layer in layers(program, EXPERTS)]


def named(given: gw.Pass) -> str:
    return f"{given.id}-{getattr(given.options, 'pattern', '')}"


def test_gathered_products_are_traced_as_layers_with_their_bias() -> None:
    net, program = mixture()
    found = layers(program, EXPERTS)
    assert [(layer.name, layer.kind) for layer in found] == [
        ("experts.up", "expert_linear"), ("experts.down", "expert_matmul"),
    ]  # fmt: skip
    assert str(found[1].node.args[3].target) == "experts.down_bias"  # type: ignore[union-attr]
    x = batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(program(*x), net(*x))


def test_an_expert_that_does_not_exist_is_an_error() -> None:
    op = torch.ops.graphwright.expert_linear
    x, weight = torch.randn(2, 3), torch.randn(4, 5, 3)
    torch.testing.assert_close(
        op(x, weight, torch.tensor([-1, 0]), None), op(x, weight, torch.tensor([3, 0]), None)
    )
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            op(x, weight, torch.tensor([0, wrong]), None)


@pytest.mark.parametrize("given", COMPRESSING, ids=named)
def test_codes_stand_in_the_place_of_every_stack(given: gw.Pass) -> None:
    _, program = mixture()
    made = given(program, calibration=batches())
    assert stacks(made) == STACKS
    assert all(is_coded(layer.node.args[1]) for layer in layers(made, EXPERTS))  # type: ignore[arg-type]
    assert error(made, program) < 0.2


@pytest.mark.parametrize("given", PRUNING, ids=named)
def test_every_stack_is_pruned(given: gw.Pass) -> None:
    _, program = mixture()
    made = given(program, calibration=batches())
    for name in STACKS:
        for expert in made.state[name]:
            assert float((expert == 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    kept = made.state["experts.up"] != 0
    if given.id != "prune.sparsegpt":
        assert torch.equal(made.state["experts.up"][kept], program.state["experts.up"][kept])


class _Means:
    """Gives every expert the mean of its rows as its bias, and keeps the rows."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}

    def gather(self, site: Site) -> Tensor:
        rows = torch.cat([r[0] for r in site.rows()])
        self.rows[site.layers[0].name] = rows
        return rows

    def solve(self, task: Task) -> Solved:
        return Solved(task.weight * 2, state={"sum": task.stats.sum(0)})


def test_a_method_sees_the_rows_of_each_expert_and_no_padding() -> None:
    net, program = mixture()
    method, data = _Means(), batches(padded=3)
    first = [x for x in layers(program, EXPERTS) if x.kind == "expert_linear"]
    found = sweep(program, first, data, method, Context(), follow="program")
    for expert in range(COUNT):
        expected = []
        for x, mask in data:
            flat = (net.stem(x) * mask.unsqueeze(-1)).reshape(-1, WIDTH)
            which = net.router(flat).softmax(-1).topk(BEST, -1).indices
            own = (which == expert).any(-1) & (mask.reshape(-1) == 1)
            expected.append(flat[own])
        torch.testing.assert_close(method.rows[f"experts.up.{expert}"], torch.cat(expected))
        total = found[first[0].node.name].state["sum"][expert]
        torch.testing.assert_close(total, torch.cat(expected).sum(0))


def test_gptq_of_a_stack_is_gptq_of_each_expert_alone() -> None:
    """The first stack, in front of which nothing is quantized."""
    _, program = mixture()
    data = batches()
    method = _Means()
    sweep(program, layers(program, EXPERTS)[:1], data, method, Context(), follow="program")
    made = gw.passes.quantize.Gptq(block=16, targets=("experts.up",))(program, calibration=data)
    for expert in range(COUNT):
        rows = method.rows[f"experts.up.{expert}"]
        alone = torch.nn.Linear(WIDTH, HIDDEN, bias=False)
        alone.weight = torch.nn.Parameter(program.state["experts.up"][expert].detach().clone())
        traced = gw.trace(alone.eval(), {"input": rows[:2]}, dynamic={"input": {0: "n"}})
        single = gw.passes.quantize.Gptq(block=16)(traced, calibration=[(rows,)])
        part = slice(expert * HIDDEN, (expert + 1) * HIDDEN)
        assert torch.equal(made.state["experts.up_codes"][part], single.state["weight.codes"])


@pytest.mark.parametrize(
    "given",
    [
        gw.passes.quantize.Gptq(block=16),
        gw.passes.quantize.Vptq(centroids=8),
        gw.passes.quantize.Adaquant(iterations=3),
        gw.passes.prune.Wanda(sparsity=0.5),
        gw.passes.prune.Sparsegpt(sparsity=0.5),
        gw.passes.prune.Dsnot(sparsity=0.5, base="sparsegpt"),
    ],
    ids=named,
)
def test_an_expert_that_no_token_goes_to_is_compressed_without_data(given: gw.Pass) -> None:
    net, _ = mixture()
    with torch.no_grad():
        net.router.bias[1] = -100.0
    names = {"x": torch.randn(2, 5, WIDTH), "attention_mask": torch.ones(2, 5)}
    program = gw.trace(net, names)
    made = given(program, calibration=[(x[:2, :5], m[:2, :5]) for x, m in batches()])
    assert all(bool(torch.isfinite(t).all()) for t in made.state.values() if t.is_floating_point())
    if given.id.startswith("prune."):  # then the smallest weights go
        size = program.state["experts.up"][1].detach().abs()
        compared = size.flatten() if given.id == "prune.sparsegpt" else size
        limit = compared.median(-1, keepdim=True).values
        assert torch.equal(made.state["experts.up"][1] == 0, size <= limit)


@pytest.mark.parametrize("name", ["Eora", "Svd"])
def test_every_stack_is_compensated(name: str) -> None:
    _, program = mixture()
    rough = gw.passes.quantize.Rtn(bits=2, block=16)(program)
    given = getattr(gw.passes.compensate, name)(rank=8)
    made = given(rough, calibration=batches(), teacher=program)
    assert stacks(made) == STACKS
    assert error(made, program) < error(rough, program)


def test_the_mean_that_an_expert_has_lost_goes_into_its_bias() -> None:
    _, program = mixture()
    data, only, method = batches(padded=2), ("experts.*",), _Means()
    rough = gw.passes.quantize.Rtn(bits=2, block=16, targets=only)(program)
    given = gw.passes.compensate.BiasCorrection(targets=only)
    made = given(rough, calibration=data, teacher=program)
    sweep(program, layers(program, EXPERTS)[:1], data, method, Context(), follow="program")
    stack = layers(rough, EXPERTS)[0]
    lost = program.state["experts.up"] - constant_value(rough, stack.node.args[1])  # type: ignore[arg-type]
    for expert in range(COUNT):
        mean = method.rows[f"experts.up.{expert}"].mean(0)
        bias = made.state["experts.up_bias"][expert]
        torch.testing.assert_close(bias, lost[expert] @ mean, rtol=1e-4, atol=1e-6)


def test_full_rank_gives_every_expert_its_weight_back() -> None:
    _, program = mixture()
    rough = gw.passes.quantize.Rtn(bits=2, block=16)(program)
    made = gw.passes.compensate.Svd(rank=WIDTH)(rough, teacher=program)
    assert error(made, program) < 1e-5


def _onnx_of(program: gw.Program, folder: Path, **options: Any) -> onnx.ModelProto:
    compiled = gw.lower(program, "onnxruntime", **options)
    x = batches(1, seed=9)[0]
    with torch.no_grad():
        torch.testing.assert_close(compiled(*x), program(*x), rtol=1e-4, atol=2e-5)
    compiled.save(folder)
    return onnx.load(next(Path(folder).rglob("*.onnx")))


def test_onnx_runtime_multiplies_each_expert_by_its_codes(tmp_path: Path) -> None:
    """Weights of 4 and of 3 bits, the corrections beside; no dense weight is stored."""
    _, program = mixture()
    targets = ("experts.*",)
    for bits in (4, 3):
        coded = gw.passes.quantize.Rtn(bits=bits, block=16, targets=targets)(program)
        made = gw.passes.compensate.Svd(rank=2, targets=targets)(coded, teacher=program)
        model = _onnx_of(made, tmp_path / str(bits))
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("MatMulNBits") == 2 * COUNT
        largest = max(onnx.numpy_helper.to_array(t).nbytes for t in model.graph.initializer
                      if t.data_type == onnx.TensorProto.FLOAT)  # fmt: skip
        assert largest <= 4 * max(WIDTH * WIDTH, COUNT * HIDDEN * (WIDTH // 16))


def test_triton_keeps_the_codes_of_experts() -> None:
    _, program = mixture()
    coded = gw.passes.quantize.Rtn(block=16)(program)
    made = gw.passes.compensate.Svd(rank=2)(coded, teacher=program)
    compiled = gw.lower(made, "triton")
    x = batches(1, seed=9)[0]
    with torch.no_grad():
        torch.testing.assert_close(compiled(*x), made(*x), rtol=1e-5, atol=1e-6)
    fused = compiled.notes["fused"]
    assert (fused["expert_blocks_linear"], fused["expert_linear"]) == (2, 4)


def test_experts_train() -> None:
    """The gradient of the routed call is that of the gathered product."""
    net, program = mixture()
    x = batches(1)[0]
    (net(*x) ** 2).sum().backward()
    module = program.module
    (module(*x)[0] ** 2).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, net.get_parameter(name).grad)
    assert isinstance(net, Mixture)


class Gated(Mixture):
    """Experts with a gate: what the second stack reads is a product with a part of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(COUNT, 2 * HIDDEN, WIDTH) / WIDTH**0.5)
        # two channels are far larger than the others, as in trained transformers
        self.stem.weight.data[:2] *= 20

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.stem(x) * attention_mask.unsqueeze(-1)
        flat = x.reshape(-1, WIDTH)
        share, which = self.router(flat).softmax(-1).topk(BEST, -1)
        rows, ids = flat.repeat_interleave(BEST, 0), which.reshape(-1)
        y = torch.bmm(self.both[ids], rows.unsqueeze(-1)).squeeze(-1)
        gate, value = y.chunk(2, -1)
        y = (F.silu(gate) * value).unsqueeze(1)
        y = torch.bmm(y, self.experts.down[ids]).squeeze(1) + self.experts.down_bias[ids]
        return x + (y * share.reshape(-1, 1)).reshape(-1, BEST, WIDTH).sum(1).reshape(x.shape)


def gated() -> gw.Program:
    torch.manual_seed(0)
    example = {"x": torch.randn(2, 5, WIDTH), "attention_mask": torch.ones(2, 5)}
    dims = {0: "batch", 1: "length"}
    return gw.trace(Gated().eval(), example, dict.fromkeys(example, dims))


def test_awq_gives_each_expert_factors_of_its_own() -> None:
    program = gated()
    only = ("both", "experts.*")
    found = find_groups(program, layers(program, EXPERTS))
    torch.manual_seed(1)
    factors = [torch.rand(COUNT, size) + 0.5 for size in (WIDTH, HIDDEN)]
    choices = [Choice(0.5, f, 0.5) for f in factors]
    scaled, how = apply_factors(program, "test", found, choices, insert=True)
    assert how == ["scaled", "folded"]
    for x, mask in batches(2, padded=2):
        torch.testing.assert_close(scaled(x, mask), program(x, mask), atol=2e-5, rtol=1e-4)
    both = program.state["both"] * factors[0][:, None]
    both[:, HIDDEN:] /= factors[1][..., None]
    torch.testing.assert_close(scaled.state["both"].detach(), both.detach())
    plain = gw.passes.quantize.Rtn(bits=3, block=16, targets=only)(program)
    result = gw.passes.quantize.Awq(bits=3, block=16, targets=only).execute(
        program, Context(calibration=batches(6))
    )
    assert all(", scaled, alpha" in a.what or ", folded, alpha" in a.what for a in result.actions)
    assert error(result.program, program) < 0.9 * error(plain, program)
    compiled = gw.lower(result.program, "onnxruntime", accuracy_level=1)
    x, mask = batches(1)[0]
    torch.testing.assert_close(compiled(x, mask), result.program(x, mask), atol=1e-4, rtol=1e-4)


def test_smoothquant_leaves_experts_unless_it_is_asked() -> None:
    program = gated()
    data = batches(3)
    smooth = gw.passes.quantize.Smoothquant
    left = smooth(alpha=0.5).execute(program, Context(calibration=data))
    said = {a.layer: a for a in left.actions}
    assert "experts: false" in said["both"].reason
    result = smooth(alpha=0.5, experts=True).execute(program, Context(calibration=data))
    assert {a.layer for a in result.actions if a.changed} >= {"both", "experts.down"}
    for x, mask in batches(2, seed=4):
        torch.testing.assert_close(result.program(x, mask), program(x, mask), atol=5e-5, rtol=1e-4)
    # equation 4, with the largest weights over all experts
    rows = torch.cat([(program.state["stem.weight"] @ x.flatten(0, 1).T).T for x, _ in data])
    rows = rows + program.state["stem.bias"]
    reach = program.state["both"].abs().amax((0, 1))
    expected = (rows.abs().amax(0).sqrt() / reach.sqrt()).detach()
    moved = (result.program.state["both"] / program.state["both"])[0, 0].detach()
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
