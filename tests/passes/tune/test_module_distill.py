"""P44's modules between frozen blocks: borders, stitches, gradients, and what training gives."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.trunk.slot import Slot, imitation
from graphwright.ir.trunk.stages import Border, Stitch, fitted, stitched, transplanted
from graphwright.ir.trunk.trunk import split_like, split_trunk
from graphwright.ir.tune import TuneOptions, tune
from graphwright.passes.tune import ModuleDistill

CHAIN = (
    "trunk",
    [
        ("prune.magnitude", {"sparsity": 0.5}),
        (
            "tune.module_distill",
            {
                "modules": 2,
                "meta": {"steps": 1, "loss": "teacher_mse"},
                "tune": {"steps": 1, "loss": "teacher_mse"},
            },
        ),
    ],
)


class Block(nn.Module):
    def __init__(self, width: int, conv: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if conv else nn.LayerNorm(width)
        layer = nn.Conv2d if conv else nn.Linear
        extra = (1,) if conv else ()
        self.a, self.b = layer(width, 2 * width, *extra), layer(2 * width, width, *extra)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(self.norm(x))))


class Net(nn.Module):
    """A stem, blocks, a head: over images, or over rows of features."""

    def __init__(self, width: int, blocks: int = 8, conv: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1) if conv else nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width, conv) for _ in range(blocks))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean((2, 3)) if h.dim() == 4 else h)


@cache
def net(width: int, blocks: int = 8, conv: bool = False, seed: int = 0) -> gw.Program:
    torch.manual_seed(seed)
    shape = (4, 1, 5, 6) if conv else (4, 8)
    model = Net(width, blocks, conv).eval()
    return gw.trace(model, (torch.randn(*shape),), {"x": {0: "batch"}})


@cache
def samples(conv: bool = False) -> list[dict[str, Tensor]]:
    """Rows whose class is that of the nearest of five points."""
    g = torch.Generator().manual_seed(3)
    shape = (1, 5, 6) if conv else (8,)
    middles = torch.randn(5, *shape, generator=g)
    found = []
    for _ in range(8):
        labels = torch.randint(0, 5, (32,), generator=g)
        found.append({"x": middles[labels] + 0.8 * torch.randn(32, *shape, generator=g),
                      "labels": labels})  # fmt: skip
    return found


def x(conv: bool = False) -> Tensor:
    return samples(conv)[0]["x"]


@cache
def teacher() -> gw.Program:
    """Trained for a while."""
    start = net(16, seed=1)
    return tune(start, samples(), TuneOptions(steps=60, lr=3e-3), Context()).program


def plain_borders(trunk, other, depths) -> list[Border]:
    return [Border(a, b) for a, b in zip(trunk.ends(), other.ends(depths), strict=True)]


# ---- modules and borders


def test_modules_joined_again_are_the_program_to_the_bit() -> None:
    program = net(12, 4)
    trunk = split_trunk(program, 3)
    for place in range(3):
        borders = plain_borders(trunk, trunk, [len(module) for module in trunk.modules])
        whole = transplanted(program, program, borders, place, "test")
        assert any(name.startswith("student.") for name in whole.state)
        assert torch.equal(whole(x()), program(x()))
    assert torch.equal(stitched(program, borders, "test")(x()), program(x()))


@pytest.mark.parametrize("place", range(3))
def test_a_module_in_the_meta_model_by_hand(place: int) -> None:
    """Six blocks in modules of two; the meta model has the first of each; dropouts have no part."""
    program, student = net(12, 6, conv=True, seed=1), net(12, 6, conv=True, seed=2)
    trunk = split_trunk(program, 3)
    meta = trunk.reduced([1] * 3, "test")
    borders = plain_borders(split_like(student, trunk), trunk, [1] * 3)
    found = transplanted(meta, student, borders, place, "test")
    theirs, ours = (Net(12, 6, True).eval() for _ in range(2))
    theirs.load_state_dict(program.state, strict=False)
    ours.load_state_dict(student.state, strict=False)
    parts = [(theirs, [0]), (theirs, [2]), (theirs, [4])]
    parts[place] = (ours, [2 * place, 2 * place + 1])
    with torch.no_grad():
        h = parts[0][0].stem(x(True))
        for model, numbers in parts:
            for number in numbers:
                h = model.blocks[number](h)
        expected = parts[2][0].head(h.mean((2, 3)))
        torch.testing.assert_close(found(x(True)), expected, rtol=1e-4, atol=1e-5)
    own = {name for name in found.state if name.startswith("student.")}
    assert {n.split(".")[2] for n in own if "blocks" in n} == {str(2 * place), str(2 * place + 1)}


def test_programs_are_cut_behind_the_same_blocks() -> None:
    program = net(12, 8)
    trunk = split_trunk(program, 4)
    fewer = gw.passes.resize.Assemble(drop=["blocks.1", "blocks.4"], tune={"steps": 1})(
        program, training=samples(), check=False
    )
    names = [[block[0].block for block in module] for module in split_like(fewer, trunk).modules]
    assert names == [["blocks.0"], ["blocks.2", "blocks.3"], ["blocks.5"], ["blocks.6", "blocks.7"]]


# ---- the loss


def test_the_divisor_is_rows_times_classes() -> None:
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 6, 10, generator=g, dtype=torch.float64)
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    by_hand = 9 * float((p * (p / q).log()).sum()) / 60
    assert float(imitation(s, t, 3.0)) == pytest.approx(by_hand, rel=1e-10)
    batchmean = 9 * F.kl_div(q.log(), p, reduction="batchmean")
    torch.testing.assert_close(batchmean, 10 * imitation(s, t, 3.0), rtol=1e-10, atol=0)


def test_the_teachers_own_module_has_no_loss_and_no_gradient() -> None:
    program = net(12)
    trunk = split_trunk(program, 4)
    meta = trunk.reduced([1] * 4, "test")
    for place in (0, 2, 3):
        reference = trunk.hybrid(meta, place, 2, 1, "test")
        borders = plain_borders(trunk, trunk, [1] * 4)
        start = transplanted(meta, program, borders, place, "test")
        own = [n for n in start.state if n.startswith("student.")]
        hook = Slot(reference, own, 1.0, 1.0)
        logits = start(x())
        loss = hook.on_loss(None, logits.new_zeros(()), logits, {"x": x()})  # type: ignore[arg-type]
        assert abs(float(loss.detach())) < 1e-7
        found = torch.autograd.grad(loss, [start.state[n] for n in own if n in start.trainable()])
        assert max(float(gradient.abs().max()) for gradient in found) < 1e-7


# ---- stitches


@pytest.mark.parametrize("shape", [(6, 7, 4, 5), (6, 4, 7), (20, 7)])
def test_a_folded_pair_is_the_pair(shape: tuple[int, ...]) -> None:
    """Leaving 7 channels for 9 and entering 7 again, as two layers and as one."""
    g = torch.Generator().manual_seed(0)
    axis = 1 if len(shape) == 4 else len(shape) - 1
    leave = Stitch(torch.randn(9, 7, generator=g), torch.randn(9, generator=g))
    enter = Stitch(torch.randn(7, 9, generator=g), torch.randn(7, generator=g))

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    value = torch.randn(*shape, generator=g)
    outputs = []
    for maps in ((leave, enter), (enter.after(leave),)):
        editor = Editor(gw.trace(Plain(), (value,), {"x": {0: "batch"}}), "test")
        node = editor.graph.output_node().args[0][0]
        for number, stitch in enumerate(maps):
            before = editor.graph.output_node()
            node = stitch.put(editor, f"s{number}", node, axis, before)
        editor.set_args(editor.graph.output_node(), (node,))
        outputs.append(editor.finish(propagate=True)(value).detach())
    torch.testing.assert_close(
        outputs[1], outputs[0], rtol=1e-5, atol=1e-5 * float(outputs[0].abs().max())
    )
    rows = value.relu().movedim(axis, -1)
    by_hand = F.linear(F.linear(rows, leave.weight, leave.bias), enter.weight, enter.bias)
    torch.testing.assert_close(outputs[0].movedim(axis, -1), by_hand, rtol=1e-4, atol=1e-4)


def test_stitches_start_as_least_squares() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(30, 4, 3, generator=g, dtype=torch.float64)
    b = torch.randn(30, 6, 3, generator=g, dtype=torch.float64)
    found = fitted(a, b, 1)
    rows, targets = (v.movedim(1, -1).flatten(0, -2).numpy() for v in (a, b))
    ones = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    solution = np.linalg.lstsq(ones, targets, rcond=None)[0]
    np.testing.assert_allclose(found.weight.numpy(), solution[:-1].T, atol=1e-10)
    np.testing.assert_allclose(found.bias.numpy(), solution[-1], atol=1e-10)
    dead = torch.cat([a, torch.zeros(30, 1, 3, dtype=torch.float64)], 1)
    assert torch.isfinite(fitted(dead, b, 1).weight).all()


# ---- training


def test_only_the_module_and_its_stitches_are_trained() -> None:
    big = net(12, 8, conv=True)
    trunk = split_trunk(big, 4)
    meta = trunk.reduced([1] * 4, "test")
    small = net(7, 8, conv=True, seed=5)
    step = ModuleDistill(tune={"steps": 2})
    context = Context(training=samples(True), teacher=big)
    borders = step._borders(trunk, split_like(small, trunk), meta, context)
    assert [border.axis for border in borders] == [1, 1, 1]
    start = transplanted(meta, small, borders, 1, "test")
    trained = step._module(trunk, meta, small, borders, 1, context, {})
    changed = {n for n, t in trained.state.items() if not torch.equal(t, start.state[n])}
    own = {n for n in start.state if n.startswith(("student.", "stitch."))}
    assert {"stitch.enter.weight", "stitch.leave.bias", "student.blocks.3.a.weight"} <= own
    assert {n.split(".")[2] for n in own if "blocks" in n} == {"2", "3"}
    assert changed == own


def test_modules_do_not_depend_on_each_other() -> None:
    small = net(10, 4, seed=5)
    step = ModuleDistill(modules=2, meta=None, tune={"steps": 2})
    context = Context(training=samples(), teacher=teacher())
    whole = step.execute(small, context).program
    trunk, student = step._trunks(small, context)
    meta = step._meta(trunk, context)
    borders = step._borders(trunk, student, meta, context)
    run = context.within("module", 1)
    alone = step._module(trunk, meta, small, borders, 1, run, {})
    for name in ("blocks.2.a.weight", "head.bias"):
        assert torch.equal(alone.state[f"student.{name}"], whole.state[name])
    assert {"stitch.0.weight", "stitch.0.bias"} <= set(whole.state)
    assert whole.state["stitch.0.weight"].shape == (10, 10)
    dropped = ModuleDistill(modules=2, meta=None, stitches="dropped", tune={"steps": 2})
    assert set(dropped.execute(small, context).program.state) == set(small.state)


def divergence(program: gw.Program) -> float:
    with torch.no_grad():
        rows = torch.cat([batch["x"] for batch in samples()])
        t, s = teacher()(rows).log_softmax(1), program(rows).log_softmax(1)
        return float((t.exp() * (t - s)).sum(1).mean())


def test_modules_learned_apart_come_nearer_to_the_teacher() -> None:
    """A pruned network; and one of another width, whose stitches are a part of what it learns."""
    context = Context(training=samples(), teacher=teacher())
    options = {"steps": 20, "lr": 3e-3}
    pruned = gw.passes.prune.Magnitude(sparsity=0.8)(teacher(), check=False)
    found = ModuleDistill(modules=2, meta=None, tune=options).execute(pruned, context).program
    assert divergence(found) < 0.8 * divergence(pruned)
    narrow = net(10, 4, seed=7)
    steps = [
        ModuleDistill(modules=2, meta=None, stitches=stitches, tune=options)
        for stitches in ("folded", "dropped")
    ]
    folded, dropped = (divergence(step.execute(narrow, context).program) for step in steps)
    assert folded < 0.9 * dropped
    assert dropped < divergence(narrow)


SPEC = """
version: 1
training: {data: train.npz, batch_size: 32}
passes:
  - prune.magnitude: {sparsity: 0.5}
  - tune.module_distill:
      meta: {steps: 3}
      tune: {steps: 5, lr: 0.003}
lower: [onnxruntime]
"""


def test_from_a_spec_to_an_artifact(tmp_path: Path) -> None:
    """Zeros of a mask stay."""
    teacher().save(tmp_path / "net.pt2")
    data = {key: torch.cat([batch[key] for batch in samples()]).numpy() for key in ("x", "labels")}
    np.savez(tmp_path / "train.npz", **data)
    (tmp_path / "spec.yaml").write_text(SPEC)
    outcome = gw.optimize(
        tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out", quiet=True
    )
    assert list((tmp_path / "out").rglob("*.onnx"))
    metrics = outcome.report["passes"][1]["metrics"]
    assert all(metrics[f"module_{n}_last_loss"] > 0 for n in range(4))
    assert float((outcome.program.state["blocks.2.a.weight"] == 0).float().mean()) > 0.45


# ---- what cannot be


class Around(Net):
    """The stem's values go past the first modules."""

    def forward(self, x: Tensor) -> Tensor:
        h = first = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h * torch.sigmoid(first))


def test_refusals() -> None:
    context = Context(training=samples(), teacher=teacher())
    step = ModuleDistill(meta=None, tune={"steps": 1})
    with pytest.raises(ArgumentError, match="needs a teacher"):
        step.execute(teacher(), context.replace(teacher=None))
    coded = gw.passes.quantize.Rtn(bits=8, block=16, targets=["head"])(teacher(), check=False)
    with pytest.raises(ModelError, match="head is stored in codes"):
        step.execute(coded, context)
    with pytest.raises(ModelError, match="4 modules need as many blocks"):
        step.execute(net(16, 3), context)
    torch.manual_seed(0)
    around = gw.trace(Around(16).eval(), (x(),), {"x": {0: "batch"}})
    with pytest.raises(ModelError, match=r"module \d uses 'stem.* of module 0 past the border"):
        step.execute(around, context)
