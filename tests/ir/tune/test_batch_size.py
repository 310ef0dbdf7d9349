"""Batches that grow: the tests against loops over samples in float64, and the loop around them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tune_net as lab
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune import Hook, TuneOptions, tune
from graphwright.ir.tune.batch_size import KEPT, Kept, Spread
from graphwright.ir.tune.options import BatchSizeOptions

POLICIES = ("norm_test", "inner_product", "augmented", "coordinate")


def options(policy: str, **given) -> BatchSizeOptions:
    return BatchSizeOptions.model_validate({"policy": policy, **given})


def by_hand(policy: str, gradients: Tensor, samples: float, bound: float) -> float:
    """The samples that a step should have, entry by entry and sample by sample."""
    rows = [row.numpy() for row in gradients]
    mean = sum(rows) / len(rows)
    size = float((mean**2).sum())

    def variance(values: list[float]) -> float:
        middle = sum(values) / len(values)
        return sum((value - middle) ** 2 for value in values) / (len(values) - 1)

    entries = [samples * variance([float(r[j]) for r in rows]) for j in range(len(mean))]
    along = [float(r @ mean) for r in rows]
    inner = samples * variance(along) / (bound**2 * size**2)
    across = [r - a / size * mean for r, a in zip(rows, along, strict=True)]
    outer = sum(samples * variance([float(r[j]) for r in across]) for j in range(len(mean)))
    return {
        "norm_test": sum(entries) / (bound**2 * size),
        "coordinate": max(e / (bound**2 * m**2) for e, m in zip(entries, mean, strict=True)),
        "inner_product": inner,
        "augmented": max(inner, outer / (bound**2 * size)),
    }[policy]


def wanted(policy: str, gradients: Tensor, samples: float, bound: float) -> float:
    names = {"norm_test": ("eta",), "coordinate": ("eta",), "inner_product": ("theta",),
             "augmented": ("theta", "nu")}[policy]  # fmt: skip
    seen: Spread | Kept = Spread() if names == ("eta",) else Kept()
    for gradient in gradients:
        seen.add(gradient)
    return seen.wanted(options(policy, **dict.fromkeys(names, bound)), samples)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("samples", [1, 4])
def test_tests_are_their_formulas(policy: str, samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = 0.5 + torch.randn(9, 13, generator=generator, dtype=torch.float64)
    expected = by_hand(policy, gradients, samples, 0.3)
    assert wanted(policy, gradients, samples, 0.3) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("policy", POLICIES[:3])
@pytest.mark.parametrize("samples", [1, 8])
def test_known_noise_asks_for_the_batch_that_it_needs(policy: str, samples: int) -> None:
    """g_i = g + sigma z: d sigma^2 / (eta^2 ||g||^2), and along g 1 / d of that."""
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(400, generator=generator, dtype=torch.float64)
    sigma, eta = 2.0, 0.5
    noise = torch.randn(4000, 400, generator=generator, dtype=torch.float64)
    gradients = g + sigma * noise / samples**0.5  # means of so many samples
    expected = sigma**2 / (eta**2 * float(g @ g))
    expected *= {"norm_test": 400, "inner_product": 1, "augmented": 399}[policy]
    found = wanted(policy, gradients, samples, eta)
    # a variance of 4000 numbers, or of 32 to 64 groups: its own deviation is sqrt(2 / n)
    assert found == pytest.approx(expected, rel=0.1 if policy != "inner_product" else 0.6)


def test_few_gradients_are_kept_however_many_there_are() -> None:
    """Groups of equal numbers of batches: their variance counts that much more."""
    generator = torch.Generator().manual_seed(2)
    gradients = 1 + torch.randn(5 * KEPT, 7, generator=generator, dtype=torch.float64)
    seen = Kept()
    for gradient in gradients:
        seen.add(gradient)
        assert len(seen.rows) < 2 * KEPT
    groups = gradients.view(-1, 4, 7).mean(1)
    expected = by_hand("augmented", groups, 4, 0.1)
    assert seen.wanted(options("augmented"), 1) == pytest.approx(expected, rel=1e-9)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.flatten(1))))


def plain() -> tuple[Plain, gw.Program]:
    torch.manual_seed(0)
    model = Plain().double().eval()
    x = torch.randn(4, 1, 4, 4).double()
    return model, gw.trace(model, (x,), {"x": {0: "batch"}})


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_is_that_of_a_plain_loop(policy: str) -> None:
    """Sizes of all steps and the result, one sample in a batch, with a rate that falls by them."""
    model, program = plain()
    x, labels = lab.images(40)
    x = x.double()
    bound = {"norm_test": 1.0, "coordinate": 1000.0, "inner_product": 0.2, "augmented": 1.0}[policy]
    names = {"inner_product": ["theta"], "augmented": ["theta", "nu"]}.get(policy, ["eta"])
    given = TuneOptions.model_validate({
        "epochs": 2, "accumulate": 3, "lr": 0.05, "optimizer": "sgd", "momentum": 0.0,
        "schedule": "linear", "shuffle": False,
        "batch_size": {"policy": policy, "max": 24, **dict.fromkeys(names, bound)},
    })  # fmt: skip
    tuned = tune(program, lab.table(program.signature, x, labels, 1), given, Context())
    order = [*range(40), *range(40)][: 80 // 3 * 3]
    sizes, size, read = [], 3, 0
    while read < len(order):
        rows = order[read : read + size]
        gradients = []
        for row in rows:
            model.zero_grad()
            F.cross_entropy(model(x[row : row + 1]), labels[row : row + 1]).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        rate, start = 0.05 * (1 - read / len(order)), 0
        mean = torch.stack(gradients).mean(0)
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * mean[start : start + p.numel()].view(p.shape)
                start += p.numel()
        asked = by_hand(policy, torch.stack(gradients), 1, bound) if len(rows) > 1 else 0
        sizes.append(len(rows))
        read += len(rows)
        size = max(size, min(24, math.ceil(asked)))
    assert tuned.history.batch_sizes == tuple(sizes)
    assert len(set(sizes)) > 2, "it has to grow for this to say anything"
    for name, tensor in tuned.program.state.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_equal_samples_never_grow_a_batch() -> None:
    _, program = plain()
    x, labels = torch.ones(32, 1, 4, 4).double(), torch.zeros(32, dtype=torch.int64)
    given = TuneOptions(epochs=2, accumulate=2, batch_size=options("norm_test"))
    tuned = tune(program, lab.table(program.signature, x, labels, 2), given, Context())
    assert set(tuned.history.batch_sizes) == {4}


class Bowl(nn.Module):
    """|w|^2 / 2 + w z, whose gradient is w with the noise z."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(20))

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.w + self.w.square().sum() / 2


def test_near_a_minimum_it_grows_to_the_cap() -> None:
    program = gw.trace(Bowl().eval(), (torch.randn(4, 20),), {"z": {0: "batch"}})
    z = 2 * torch.randn(2048, 20, generator=torch.Generator().manual_seed(0))
    given = TuneOptions(
        epochs=1, accumulate=2, lr=0.3, optimizer="sgd", momentum=0.0, schedule="constant",
        batch_size=options("norm_test", eta=0.5, max=128),
    )  # fmt: skip
    data = [{"z": part} for part in z.split(8)]
    tuned = tune(program, data, given, Context(), loss=lambda flat, batch: flat[0].mean())
    sizes = tuned.history.batch_sizes[:-1]  # the last step takes what is left
    assert list(sizes) == sorted(sizes)
    assert sizes[0] == 16
    assert sizes[-1] == 128
    assert sum(tuned.history.batch_sizes) == 2048
    assert float(tuned.program.state["w"].detach().norm()) < 0.25 * 20**0.5


class Stop(Hook):
    """Ends the run in a step."""

    def __init__(self, step: int | None) -> None:
        self.at = step

    def before_step(self, at) -> None:
        if at.step == self.at:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_with_its_batches(tmp_path: Path) -> None:
    program = lab.traced(lab.fresh(dropout=0.3), 4, 1, 4, 4)
    x, labels = lab.images()
    given = TuneOptions(epochs=2, accumulate=2, optimizer="adagrad_norm", lr=0.1,
                        batch_size=options("norm_test", eta=0.8, max=16))  # fmt: skip

    def run(folder: str, step: int | None):
        context = Context(seed=3, work=tmp_path / folder, checkpoint_seconds=0.0)
        data = lab.table(program.signature, x, labels, 2)
        return tune(program, data, given, context, hooks=[Stop(step)])

    straight = run("straight", None)
    sizes = straight.history.batch_sizes
    assert len(set(sizes)) > 1
    with pytest.raises(KeyboardInterrupt):
        run("killed", len(sizes) - 2)
    again = run("killed", None)
    assert again.history == straight.history
    for name, tensor in straight.program.state.items():
        assert torch.equal(again.program.state[name], tensor)


class Counting(Hook):
    counts_steps = True


def test_refusals() -> None:
    _, program = plain()
    x, labels = lab.images(16)
    data = lab.table(program.signature, x.double(), labels, 8)
    grows = {"policy": "norm_test"}
    with pytest.raises(ValueError, match="set accumulate to 2 or more"):
        TuneOptions.model_validate({"batch_size": grows})
    with pytest.raises(ValueError, match="theta has no part in policy norm_test"):
        options("norm_test", theta=0.2)
    given = TuneOptions(accumulate=2, batch_size=options("norm_test"))
    with pytest.raises(ArgumentError, match="fewer steps, and Counting is spread over all of them"):
        tune(program, data, given, Context(), hooks=[Counting()])
    small = TuneOptions(accumulate=2, batch_size=options("norm_test", max=12))
    with pytest.raises(ArgumentError, match=r"max 12 is less than the 16 samples of the first"):
        tune(program, data, small, Context())


SPEC = """
version: 1
training: {data: train.npz, batch_size: 4}
passes:
  - tune.finetune:
      tune:
        epochs: 3
        accumulate: 2
        optimizer: adagrad_norm
        lr: 0.5
        batch_size: {policy: norm_test, eta: 0.5, max: 24}
lower: []
"""


def test_from_a_spec(tmp_path: Path) -> None:
    lab.traced(lab.fresh(), 4, 1, 4, 4).save(tmp_path / "net.pt2")
    x, labels = lab.images()
    np.savez(tmp_path / "train.npz", x=x.numpy(), labels=labels.numpy())
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    metrics = done.report["passes"][0]["metrics"]
    assert metrics["steps"] < 3 * 48 // 8
    assert metrics["last_loss"] < metrics["first_loss"]
