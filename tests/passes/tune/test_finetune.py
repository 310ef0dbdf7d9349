from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from models.every_pass import TUNE
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.tune import TuneOptions
from graphwright.passes.prune.magnitude import Magnitude
from graphwright.passes.tune.finetune import Finetune

CHAIN = ("conv", [("tune.finetune", {"tune": TUNE})])


class DigitsNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2)
        h = nn.functional.max_pool2d(torch.relu(self.norm2(self.conv2(h))), 2)
        return self.fc(self.drop(h.flatten(1)))


Split = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    """Training and held-out images (n, 1, 8, 8) in [0, 1] with their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1400], order[1400:]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


@pytest.fixture(scope="module")
def batches(digits) -> list[Split]:
    (x, labels), _ = digits
    return list(zip(x.split(64), labels.split(64), strict=True))


@pytest.fixture(scope="module")
def trained(batches) -> gw.Program:
    """Trained by the pass itself, from random weights."""
    torch.manual_seed(0)
    program = gw.trace(DigitsNet().eval(), (torch.rand(4, 1, 8, 8),), {"x": {0: "batch"}})
    return Finetune(tune={"epochs": 4, "lr": 3e-3})(program, training=batches, check=False)


@pytest.fixture(scope="module")
def pruned(trained: gw.Program) -> gw.Program:
    """Half of the channels of the second convolution set to zero, the ones with small norms."""
    state = dict(trained.state)
    weight = state["conv2.weight"].detach()
    small = weight.flatten(1).norm(dim=1).argsort()[:16]
    keep = torch.ones(32)
    keep[small] = 0
    state["conv2.weight"] = nn.Parameter(weight * keep[:, None, None, None])
    state["norm2.weight"] = nn.Parameter(state["norm2.weight"].detach() * keep)
    state["norm2.bias"] = nn.Parameter(state["norm2.bias"].detach() * keep)
    return trained.replace(state=state)


def accuracy(program: gw.Program, digits: tuple[Split, Split]) -> float:
    images, labels = digits[1]
    return (program(images).argmax(1) == labels).double().mean().item()


def test_training_from_scratch_learns_the_digits(trained, digits) -> None:
    assert accuracy(trained, digits) > 0.95


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_wins_back_what_pruning_lost(trained, pruned, digits, batches, loss: str) -> None:
    """With labels; and without, by following the model before it was pruned."""
    data = batches if loss == "cross_entropy" else [(images,) for images, _ in batches]
    step = Finetune(tune={"epochs": 2, "lr": 1e-3, "loss": loss, "warmup": 4})
    tuned = step(pruned, training=data, teacher=trained)
    before, after = accuracy(pruned, digits), accuracy(tuned, digits)
    assert before < accuracy(trained, digits) - 0.1, "pruning must hurt for this to say anything"
    assert after > accuracy(trained, digits) - 0.02
    assert [record.id for record in tuned.provenance] == ["tune.finetune", "tune.finetune"]


def test_only_the_targets_move(pruned, batches) -> None:
    step = Finetune(targets=["fc", "kind:batch_norm", "!norm1"], tune={"steps": 3})
    result = step.execute(pruned, Context(training=batches))
    moved = {n for n, t in result.program.state.items() if t is not pruned.state[n]}
    statistics = {f"norm{i}.running_{what}" for i in (1, 2) for what in ("mean", "var")}
    assert moved == {"fc.weight", "fc.bias", "norm2.weight", "norm2.bias"} | statistics
    what = {action.layer: action.what.split(",")[0] for action in result.actions}
    assert what == {
        "conv1": "left alone", "norm1": "left alone", "conv2": "left alone",
        "norm2": "trained", "fc": "trained",
    }  # fmt: skip
    assert result.metrics["steps"] == 3
    assert {a.reason for a in result.actions if a.what == "left alone"} == {"not among the targets"}


def test_ninety_percent_zeros_are_ninety_percent_after_it(trained, batches) -> None:
    """Magnitude then fine-tuning; the report says what was kept, and what was not."""
    targets = ["kind:conv2d", "fc"]
    pruned = Magnitude(sparsity=0.9, targets=targets)(trained, check=False)
    weights = ("conv1.weight", "conv2.weight", "fc.weight")
    step = Finetune(tune={"steps": 6, "lr": 1e-3}).execute(pruned, Context(training=batches))
    for name in weights:
        assert torch.equal(step.program.state[name] == 0, pruned.state[name] == 0)
    said = {a.layer: a for a in step.actions}
    assert said["fc"].what.endswith("90.0% zeros kept")
    assert "zeros" not in said["norm1"].what
    assert step.metrics["weights_with_kept_zeros"] == 3
    off = Finetune(tune={"steps": 6, "lr": 1e-3, "keep_zeros": False})
    filled = off.execute(pruned, Context(training=batches))
    reason = {a.layer: a.reason for a in filled.actions}["fc"]
    assert reason.startswith("it was 90.0% zeros and is ")
    assert reason.endswith("keep_zeros is off")
    assert (filled.program.state["fc.weight"] == 0).float().mean() < 0.5


class WithToken(nn.Module):
    """A parameter that no layer reads, and a weight of a layer that is tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(ids) + self.token))


def test_parameters_of_no_layer_and_tied_ones() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 12, (4, 6))
    program = gw.trace(WithToken().eval(), (ids,))

    def moved(*targets: str) -> set[str]:
        step = Finetune(targets=list(targets), tune={"steps": 2, "loss": "next_token"})
        after = step(program, training=[(ids, ids)])
        assert after.aliases == program.aliases
        return {n for n, t in after.state.items() if t is not program.state[n]}

    assert moved("*") == {"token", "embed.weight"}
    assert moved("*", "!token") == {"embed.weight"}
    assert moved("head") == {"embed.weight"}
    assert moved("token") == {"token"}


def test_frozen_weights_are_refused_by_name(pruned, batches) -> None:
    state = {n: t.detach() if n.startswith("fc") else t for n, t in pruned.state.items()}
    with pytest.raises(ModelError) as caught:
        Finetune(targets=["fc"])(pruned.replace(state=state), training=batches)
    assert str(caught.value) == (
        "tune.finetune: targets ['fc'] hold no trainable parameter. Their weights are frozen, or "
        "compressed by an earlier pass."
    )


def test_without_training_data_it_is_refused(pruned) -> None:
    with pytest.raises(ArgumentError) as caught:
        Finetune()(pruned)
    assert str(caught.value) == (
        "tune.finetune needs training data. Give the spec a `training` section, or pass "
        "training=batches."
    )


def test_options_are_checked() -> None:
    with pytest.raises(ArgumentError, match=r"tune\.lr: Input should be greater than 0"):
        Finetune(tune={"lr": 0.0})
    assert Finetune(tune={"steps": 5}).options.tune == TuneOptions(steps=5)


SPEC = """
version: 1
seed: 1
training: {data: train.npz, batch_size: 64}
evaluate: {data: held_out.npz, metric: accuracy}
passes:
  - tune.finetune: {tune: {epochs: 2, lr: 0.003, hold_out: 0.1, patience: 5}}
lower: [onnxruntime]
"""


def write_data(folder: Path, digits) -> None:
    for name, (images, labels) in zip(("train", "held_out"), digits, strict=True):
        np.savez(folder / f"{name}.npz", x=images.numpy(), labels=labels.numpy())


def test_from_a_spec_to_an_artifact(pruned, digits, tmp_path: Path) -> None:
    """The main job, twice: same bytes, accuracy won back on images that training has not seen."""
    pruned.save(tmp_path / "pruned.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC)
    write_data(tmp_path, digits)
    results = [
        gw.optimize(tmp_path / "pruned.pt2", tmp_path / "spec.yaml", out=tmp_path / out)
        for out in ("one", "two")
    ]
    found = results[0].report["evaluation"]
    assert found["after"] > found["before"] + 0.1
    assert found["after"] > 0.95
    first, second = (next((tmp_path / out).glob("*.onnx")).read_bytes() for out in ("one", "two"))
    assert first == second
    assert not list(tmp_path.glob(".*")), "no state of the training is left behind"


JOB = """
import sys, graphwright as gw
gw.optimize("pruned.pt2", "spec.yaml", out=sys.argv[1], checkpoint_seconds=0.01)
"""


@pytest.mark.slow
def test_a_job_killed_while_it_trains_goes_on_in_the_pass(pruned, digits, tmp_path: Path) -> None:
    pruned.save(tmp_path / "pruned.pt2")
    write_data(tmp_path, digits)
    spec = SPEC.replace("lower: [onnxruntime]", "lower: []").replace("epochs: 2", "steps: 150")
    (tmp_path / "spec.yaml").write_text(spec.replace(", patience: 5", ""))
    process = subprocess.Popen([sys.executable, "-c", JOB, "killed"], cwd=tmp_path)
    saved = tmp_path / ".killed.graphwright" / "passes" / "000"
    deadline = time.monotonic() + 120
    while not list(saved.glob("tune-*.pt")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = max(saved.glob("tune-*.pt"), key=lambda file: file.stat().st_mtime_ns)
    step = torch.load(state, weights_only=True)["state"]["step"]
    assert 0 < step < 150
    source, spec_file = tmp_path / "pruned.pt2", tmp_path / "spec.yaml"
    killed = gw.optimize(source, spec_file, out=tmp_path / "killed")
    straight = gw.optimize(source, spec_file, out=tmp_path / "straight")
    first, second = (outcome.folder / "program.pt2" for outcome in (killed, straight))
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob(".*")), "no state of the training is left behind"


@pytest.mark.slow
def test_two_processes_make_one_result(pruned, digits, tmp_path: Path) -> None:
    """The command under a launcher: both train, the first one writes."""
    pruned.save(tmp_path / "pruned.pt2")
    write_data(tmp_path, digits)
    (tmp_path / "spec.yaml").write_text(SPEC.replace("batch_size: 64", "batch_size: 32"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "graphwright", "optimize", "pruned.pt2", "--spec", "spec.yaml"]
    done = subprocess.run([*launch, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["evaluation"]["after"] > 0.95
    assert report["passes"][0]["metrics"]["steps"] == 2 * (1260 // 64)
    assert not list(tmp_path.glob(".*"))
