"""resize.module_distill: P44's slots of a meta model, its loss, modules that are independent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import digits
from models.tune_net import images, table
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.trunk.slot import Slot, imitation
from graphwright.ir.trunk.trunk import split_trunk, spread
from graphwright.ir.tune import TuneOptions, tune
from graphwright.passes.resize import ModuleDistill

CHAIN = (
    "trunk",
    [
        (
            "resize.module_distill",
            {
                "modules": 2,
                "meta": {"steps": 1, "loss": "teacher_mse"},
                "tune": {"steps": 1, "loss": "teacher_mse"},
            },
        )
    ],
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.mlp = nn.Sequential(nn.Conv2d(6, 12, 1), nn.ReLU(), nn.Conv2d(12, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(torch.relu(self.norm(x)))
        return x + self.mlp(x)


class Net(nn.Module):
    """A stem, six blocks of two units, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), (images()[0][:4],), {"x": {0: "batch"}})


@pytest.fixture(scope="module")
def data(program: gw.Program) -> Batches:
    x, labels = images()
    return table(program.signature, x, labels, 16)


def test_a_trunk_is_cut_at_its_blocks(program: gw.Program) -> None:
    trunk = split_trunk(program, 3)
    names = [[block[0].block for block in module] for module in trunk.modules]
    assert names == [["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"], ["blocks.4", "blocks.5"]]
    assert all(len(block) == 2 for module in trunk.modules for block in module)
    assert trunk.owner["stem.weight"] == 0
    assert trunk.owner["blocks.3.norm.running_mean"] == 1
    assert trunk.owner["head.bias"] == 2
    assert spread(6, 2) == [0, 3]
    assert spread(4, 3) == [0, 1, 2]


def test_the_meta_model_with_its_own_module_is_itself(program: gw.Program) -> None:
    trunk = split_trunk(program, 3)
    meta = trunk.reduced([1, 1, 1], "test")
    x = images()[0]
    for place in range(3):
        hybrid = trunk.hybrid(meta, place, 1, 1, "test")
        assert torch.equal(hybrid(x), meta(x))


def test_a_hybrid_has_the_meta_models_tensors_elsewhere(program: gw.Program) -> None:
    """By hand: the teacher's second module between the trained stem and the trained rest."""
    trunk = split_trunk(program, 3)
    start = trunk.reduced([1, 1, 1], "test")
    moved = {n: nn.Parameter(t + 0.1) if isinstance(t, nn.Parameter) else t
             for n, t in start.state.items()}  # fmt: skip
    meta = start.replace(state=moved)
    hybrid = trunk.hybrid(meta, 1, 2, 1, "test")
    torch.manual_seed(0)
    net = Net().eval()
    other = Net().eval()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1
    x = images()[0]
    h = other.blocks[0](other.stem(x))
    h = net.blocks[3](net.blocks[2](h))
    expected = other.head(other.blocks[4](h).mean((2, 3)))
    torch.testing.assert_close(hybrid(x), expected, rtol=1e-5, atol=1e-6)


def test_imitation_is_the_formula() -> None:
    s, t = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (t / 2).softmax(1), (s / 2).softmax(1)
    expected = 4 * (p * (p.log() - q.log())).sum() / 35
    torch.testing.assert_close(imitation(s, t, 2.0), expected)
    assert float(imitation(t, t, 2.0)) == pytest.approx(0, abs=1e-12)


def test_only_the_module_is_trained_and_the_rest_runs_as_in_inference(
    program: gw.Program, data: Batches
) -> None:
    trunk = split_trunk(program, 3)
    meta = trunk.reduced([1, 1, 1], "test")
    student = trunk.hybrid(meta, 1, 1, 1, "test")
    own = trunk.names(student, 1)
    norms: dict[str, bool] = {}

    class Watched(Slot):
        def on_graph(self, graph) -> None:
            super().on_graph(graph)
            for node in graph.nodes:
                if node.target is torch.ops.aten.batch_norm.default:
                    norms[str(node.args[3].target)] = node.args[5]

    names = [name for name in own if name in student.trainable()]
    hook = Watched(trunk.hybrid(meta, 1, 2, 1, "test"), own, 0.5, 1.0)
    tuned = tune(student, data, TuneOptions(steps=3), Context(), hooks=[hook], names=names)
    assert norms == {
        "blocks.0.norm.running_mean": False,
        "blocks.2.norm.running_mean": True,
        "blocks.4.norm.running_mean": False,
    }
    for name, tensor in tuned.program.state.items():
        same = torch.equal(tensor, student.state[name])
        assert same != (name in own), name


def test_modules_do_not_depend_on_each_other(program: gw.Program, data: Batches) -> None:
    chosen = ModuleDistill(modules=3, meta={"steps": 2}, tune={"steps": 3})
    run = Context(training=data, scope=("resize.module_distill",))
    trunk = split_trunk(program, 3)
    meta = chosen._meta(trunk, run)
    alone = chosen._module(trunk, meta, 2, run.within("module", 2), {})
    whole = chosen.execute(program, run).program
    for name, tensor in alone.items():
        assert torch.equal(tensor, whole.state[name])
    assert {name.split(".")[1] for name in whole.state if name.startswith("blocks")} == set("024")


def test_digits_net_distilled_by_modules() -> None:
    """The assembled student is better than the teacher with as few blocks, and trained no more."""
    program = digits.traced(digits.trained("resnet"))
    trunk = split_trunk(program, 2)
    tune = {"epochs": 2, "lr": 1e-3}
    student = ModuleDistill(modules=2, meta=tune, tune=tune)(
        program, training=digits.training(program)
    )
    cut = trunk.reduced([1, 1], "test")
    assert sum(len(module) for module in trunk.modules) >= 4
    assert set(student.state) == set(cut.state)
    assert digits.accuracy(cut) < 0.93 < 0.95 < digits.accuracy(student)


def test_refusals(program: gw.Program, data: Batches) -> None:
    coded = gw.passes.quantize.Rtn(bits=8, block=16, targets=["head"])(program)
    with pytest.raises(ModelError, match="head is stored in codes"):
        ModuleDistill(modules=3)(coded, training=data)
    with pytest.raises(ModelError, match="7 modules need as many blocks"):
        ModuleDistill(modules=7)(program, training=data)
    with pytest.raises(ArgumentError, match="leaves all 2 blocks"):
        ModuleDistill(modules=3, depth=2)(program, training=data)


def test_loss_of_a_copy_is_the_task_alone(program: gw.Program, data: Batches) -> None:
    """Student and teacher alike: the imitation is zero, and half of the task's loss is left."""
    trunk = split_trunk(program, 3)
    whole = trunk.hybrid(program, 1, 2, 2, "test")
    hook = Slot(whole, [], 0.5, 1.0)
    x, labels = images()
    logits = program(x).detach()
    loss = F.cross_entropy(logits, labels)
    found = hook.on_loss(None, loss, logits, {"x": x})  # type: ignore[arg-type]
    torch.testing.assert_close(found, loss / 2)
