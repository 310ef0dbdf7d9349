"""tune.distill: distances against their formulas, places by name, P33's ensemble and its judge."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.tune import Distill
from graphwright.passes.tune._distill import distances
from graphwright.passes.tune._distill.discriminator import Discriminator, Judged
from graphwright.passes.tune._distill.following import Teaching
from graphwright.passes.tune._distill.pairs import find_places

CHAIN = (
    "conv",
    [("tune.distill", {"features": 0.5, "attention": 0.5,
                       "discriminator": {"reduction": 2}, "tune": {"epochs": 1}})],
)  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- formulas


def test_gradient_of_soft_labels_is_the_difference_of_probabilities() -> None:
    s = drawn(6, 5).requires_grad_()
    p = distances.mean_probabilities([drawn(6, 5, seed=k) for k in (1, 2, 3)])
    distances.soft_labels(s, p).backward()
    torch.testing.assert_close(s.grad, (s.detach().softmax(1) - p) / 6, rtol=1e-12, atol=1e-14)


def test_soft_labels_are_the_cross_entropy_up_to_the_teachers_entropy() -> None:
    s, t = drawn(4, 3, 5), [drawn(4, 3, 5, seed=k) for k in (1, 2)]
    p = distances.mean_probabilities(t, 2.0)
    expected = 0.0
    for row, own in zip(p.flatten(0, 1), s.flatten(0, 1), strict=True):
        q = (own / 2).softmax(0)
        expected += 4 * sum(float(a * math.log(a) - a * math.log(b))
                            for a, b in zip(row, q, strict=True)) / 12  # fmt: skip
    assert float(distances.soft_labels(s, p, 2.0)) == pytest.approx(expected, rel=1e-12)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    kept = mask.bool()
    masked = distances.soft_labels(s, p, 2.0, mask)
    assert float(masked) == pytest.approx(float(distances.soft_labels(s[kept], p[kept], 2.0)))


def test_one_teacher_that_is_the_student_gives_no_gradient() -> None:
    s = drawn(6, 5).requires_grad_()
    loss = distances.soft_labels(s, distances.mean_probabilities([s.detach()]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-15)
    assert float(s.grad.abs().max()) < 1e-16


def test_teachers_are_averaged_as_probabilities_and_not_as_logits() -> None:
    a, b = torch.tensor([[8.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]])
    found = distances.mean_probabilities([a, b])
    torch.testing.assert_close(found, (a.softmax(1) + b.softmax(1)) / 2)
    assert float((found - ((a + b) / 2).softmax(1)).abs().max()) > 0.1


def test_attention_maps_of_any_number_of_channels() -> None:
    a, b = drawn(2, 3, 4, 5), drawn(2, 7, 4, 5, seed=1)
    expected = 0.0
    for n in range(2):
        maps = [(x[n] ** 2).sum(0).flatten() for x in (a, b)]
        one, two = (m / (m * m).sum().sqrt() for m in maps)
        expected += float(((one - two) ** 2).sum()) / 2
    assert float(distances.map_distance([a], [b], None)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_attention_of_a_fused_call(causal: bool, kind: str) -> None:
    """Its probabilities, taken out of torch's own call by values that are the identity."""
    q, k = drawn(2, 4, 5, 8), drawn(2, 2, 5, 8, seed=1)
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    seen[1, :, :, 3:] = False
    mask = {"none": None, "bool": seen, "added": drawn(2, 1, 5, 5, seed=2)}[kind]
    if causal and mask is not None:  # torch takes one of the two
        lower = torch.ones(5, 5, dtype=torch.bool).tril()
        given = mask & lower if kind == "bool" else mask.masked_fill(~lower, -math.inf)
        expected = F.scaled_dot_product_attention(
            q, k, torch.eye(5, dtype=q.dtype).expand(2, 2, 5, 5), given, enable_gqa=True, scale=0.3
        )
    else:
        expected = F.scaled_dot_product_attention(
            q, k, torch.eye(5, dtype=q.dtype).expand(2, 2, 5, 5), mask, is_causal=causal,
            enable_gqa=True, scale=0.3,
        )  # fmt: skip
    found = distances.attention_logs(q, k, mask, causal, 0.3).exp()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    values = [q, k] if mask is None else [q, k, mask]
    other = [q + 1e-2 * drawn(2, 4, 5, 8, seed=5), *values[1:]]
    same = distances.attention_distance(values, values, None, causal=causal, scales=(0.3, 0.3))
    apart = distances.attention_distance(other, values, None, causal=causal, scales=(0.3, 0.3))
    assert abs(float(same)) < 1e-12 < float(apart)


def test_the_released_judge_cannot_be_better_than_half_a_bit() -> None:
    """The last ReLU holds logits at 0 and above, so that each row costs ln 2 / 2 or more."""
    judge = Judged(None, None, 27, "as_released", 3, 1.0, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(judge.net.parameters(), lr=1e-2)
    s, t = drawn(64, 27).float() - 3, drawn(64, 27, seed=1).float() + 3
    for _ in range(60):
        optimizer.zero_grad()
        loss = judge.loss(s, t)
        loss.backward()
        optimizer.step()
        assert float(loss.detach()) >= math.log(2) / 2 - 1e-6


def test_modes_of_the_judge_differ_in_the_students_gradient() -> None:
    s, t = drawn(8, 27).float(), drawn(8, 27, seed=1).float()
    gradients = {}
    for mode in ("adversarial", "as_released"):
        judge = Judged(None, None, 27, mode, 3, 1.0, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        own = s.clone().requires_grad_()
        judge.loss(own, t).backward()
        plain = Discriminator(27, 3, mode == "as_released", torch.Generator().manual_seed(0))
        by_hand = s.clone().requires_grad_()
        found = plain(torch.cat([by_hand, t]))
        rows = torch.tensor([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 8)
        loss = -(rows * found.sigmoid().log() + (1 - rows) * (-found).sigmoid().log()).mean()
        loss.backward()
        sign = -1 if mode == "adversarial" else 1
        torch.testing.assert_close(own.grad, sign * by_hand.grad, rtol=1e-4, atol=1e-7)
        for a, b in zip(judge.net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)
        gradients[mode] = own.grad
    assert float(gradients["adversarial"].abs().max()) > 0


# ---- networks


class Net(nn.Module):
    def __init__(self, middle: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, middle, 3, padding=1)
        self.norm = nn.BatchNorm2d(middle)
        self.second = nn.Conv2d(middle, 8, 3, padding=1)
        self.head = nn.Linear(8, 9)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(h)).mean((2, 3)))


@cache
def traced(seed: int = 0, middle: int = 12, net: type[nn.Module] = Net) -> gw.Program:
    torch.manual_seed(seed)
    model = net(middle).double().eval()
    return gw.trace(model, (torch.randn(4, 1, 6, 6).double(),), {"x": {0: "batch"}})


@cache
def images() -> list[dict[str, Tensor]]:
    return [{"x": drawn(16, 1, 6, 6, seed=k)} for k in range(8)]


def test_a_step_is_that_of_a_plain_loop() -> None:
    """All terms together, against the modules themselves: two teachers, labels, values inside."""
    torch.manual_seed(0)
    student, first, second = (Net().double().eval() for _ in range(3))
    programs = [gw.trace(m, (images()[0]["x"],), {"x": {0: "batch"}})
                for m in (student, first, second)]  # fmt: skip
    labels = torch.arange(16) % 9
    batch = {**images()[0], "labels": labels}
    step = Distill(
        output=0.7, labels=0.3, features=0.2, attention=0.1, temperature=2.0,
        nodes=["first", "second"], teachers=["reference", "two.pt2"],
        tune={"steps": 1, "lr": 0.1, "optimizer": "sgd", "momentum": 0.0, "schedule": "constant"},
    )  # fmt: skip
    step._teacher = lambda name, *_: programs[1 if name == "reference" else 2]  # type: ignore[method-assign]
    found = step.execute(programs[0], Context(training=[batch], teacher=programs[1])).program

    def inside(net: nn.Module, x: Tensor) -> list[Tensor]:
        one = net.first(x)
        two = net.second(torch.relu(net.norm(one)))
        return [one, two, net.head(torch.relu(two).mean((2, 3)))]

    student.train()
    *own, logits = inside(student, batch["x"])
    with torch.no_grad():
        *theirs, one = inside(first, batch["x"])
        two = second(batch["x"])
    p = ((one / 2).softmax(1) + (two / 2).softmax(1)) / 2
    loss = 0.7 * 4 * F.kl_div((logits / 2).log_softmax(1), p, reduction="batchmean")
    loss = loss + 0.3 * F.cross_entropy(logits, labels)
    for a, b in zip(own, theirs, strict=True):
        loss = loss + 0.1 * ((a - b) ** 2).sum() / (b**2).sum()
        maps = [F.normalize((t**2).sum(1).flatten(1), dim=1) for t in (a, b)]
        loss = loss + 0.05 * ((maps[0] - maps[1]) ** 2).sum(1).mean()
    loss.backward()
    for name, parameter in student.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(found.state[name], expected, rtol=1e-9, atol=1e-11)


def test_places_are_found_by_the_names_that_both_have() -> None:
    """Channels pruned in the middle: attention maps are compared there, values are not."""
    found = find_places(traced(1, 10), traced(0), ("*",))
    assert [place.name for place in found.features] == ["second"]
    assert [place.name for place in found.attention] == ["first", "second"]
    said = "is [any, 10, 6, 6], and the teacher's [any, 12, 6, 6]"
    assert found.left == {"first": said, "norm": said}
    pair = find_places(traced(1), traced(0), ("relu_1=relu",))
    assert [place.name for place in pair.attention] == ["relu_1=relu"]
    assert not pair.features


def test_named_pairs_and_what_they_refuse() -> None:
    student, teacher = traced(1), traced(0)
    (place,) = find_places(student, teacher, ("norm=first",)).features
    assert (place.name, place.theirs) == ("norm=first", ("conv2d",))
    with pytest.raises(ModelError, match=r"'relu=mean' cannot be compared: it is \[any, 12, 6"):
        find_places(student, teacher, ("relu=mean",))
    with pytest.raises(ModelError, match="teacher has no layer or node 'nowhere'"):
        find_places(student, teacher, ("first=nowhere",))
    with pytest.raises(ModelError, match=r"'x\*' names no layer that the model and its teacher"):
        find_places(student, teacher, ("x*",))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + mixed.transpose(1, 2).flatten(2))


def test_attention_of_a_transformer_is_followed() -> None:
    """Queries and keys come to the teacher's attention; nothing else is asked for."""
    torch.manual_seed(0)
    example = (drawn(4, 5, 8),)
    teacher, student = (gw.trace(Attending().double().eval(), example, {"x": {0: "batch"}})
                        for _ in range(2))  # fmt: skip
    step = Distill(output=0, attention=1, tune={"steps": 40, "lr": 0.03})
    data = [{"x": 2 * drawn(16, 5, 8, seed=k)} for k in range(4)]
    result = step.execute(student, Context(training=data, teacher=teacher))
    assert result.metrics["attention_compared"] == 1
    assert result.metrics["last_loss"] < 0.25 * result.metrics["first_loss"]
    rows = (result.program.state["qkv.weight"] - student.state["qkv.weight"]).detach()
    assert float(rows[:16].abs().max()) > 0
    assert float(rows[16:].abs().max()) == 0


def test_without_labels_it_undoes_half_of_what_four_bits_cost() -> None:
    """Codes stay; biases and norms are trained, on the soft labels alone."""
    torch.manual_seed(3)
    net = Net()
    with torch.no_grad():
        net.head.weight *= 12
    teacher = gw.trace(net.eval(), (torch.randn(4, 1, 6, 6),), {"x": {0: "batch"}})
    coded = gw.passes.quantize.Rtn(bits=3, block=16)(teacher)
    data = [{"x": batch["x"].float()[:8]} for batch in images()]
    step = Distill(tune={"steps": 200, "lr": 0.01})
    found = step(coded, training=data, teacher=teacher)
    assert found.state["second.weight_codes"] is coded.state["second.weight_codes"]

    def cost(program: gw.Program) -> float:
        x = drawn(256, 1, 6, 6, seed=99).float()
        p, q = (each(x).detach().log_softmax(1) for each in (teacher, program))
        return float((p.exp() * (p - q)).sum(1).mean())

    assert cost(found) < 0.5 * cost(coded)


class Wide(Net):
    def __init__(self, middle: int = 12) -> None:
        super().__init__(middle)
        self.head = nn.Linear(8, 11)


def test_teachers_run_in_inference_and_stay_as_they_are() -> None:
    teacher = traced(1)
    before = {name: tensor.clone() for name, tensor in teacher.state.items()}
    teaching = Teaching([teacher.train(), teacher], ["conv2d"], torch.device("cpu"))
    batch = images()[0]
    taught = teaching(batch)
    assert teaching(batch) is taught, "run once for a batch"
    torch.testing.assert_close(taught.outputs[0], teacher(batch["x"]).detach())
    assert all(torch.equal(teacher.state[name], tensor) for name, tensor in before.items())


def test_refusals() -> None:
    student = traced()
    context = Context(training=images(), teacher=student)

    def refused(kind: type[Exception], text: str, given: Context = context, **options) -> None:
        with pytest.raises(kind, match=text):
            Distill(**options).execute(student, given)

    refused(ArgumentError, "nothing is compared", output=0)
    refused(ArgumentError, "tune.loss is the loss on labels", tune={"loss": "mse"})
    refused(ArgumentError, "temperature is of soft labels", match="mse", temperature=2.0)
    refused(ArgumentError, "nodes are for features and attention", nodes=["first"])
    refused(ArgumentError, "cross_entropy needs labels", labels=1.0)
    refused(ModelError, r"9 logits with reduction 8 .* Set reduction to 3 or less",
            discriminator={})  # fmt: skip
    other = context.replace(teacher=traced(0, 12, Wide))
    refused(
        ModelError, "'reference' gives 11 numbers for each prediction, and the program 9", other
    )
    refused(ArgumentError, "needs a teacher", context.replace(teacher=None))
    refused(ModelError, "names no layer", features=1.0, nodes=["*.nothing"])


SPEC = """
version: 1
training: {data: train.npz, batch_size: 16}
passes:
  - prune.magnitude: {sparsity: 0.6, targets: [second]}
  - tune.distill:
      teachers: [reference, other.pt2]
      features: 0.1
      discriminator: {mode: as_released, reduction: 3}
      tune: {steps: 6, optimizer: sgd, lr: 0.01}
lower: []
"""


def test_from_a_spec_with_a_second_teacher(tmp_path: Path) -> None:
    program = gw.trace(Net().eval(), (torch.randn(4, 1, 6, 6),), {"x": {0: "batch"}})
    program.save(tmp_path / "net.pt2")
    gw.trace(Net().eval(), (torch.randn(4, 1, 6, 6),), {"x": {0: "batch"}}).save(
        tmp_path / "other.pt2"
    )
    x = torch.cat([batch["x"] for batch in images()]).float()
    np.savez(tmp_path / "train.npz", x=x.numpy())
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    step = done.report["passes"][1]
    assert step["metrics"]["features_compared"] == 3
    trained = gw.load(tmp_path / "out" / "program.pt2").state["second.weight"]
    assert float((trained == 0).float().mean()) == pytest.approx(0.6, abs=0.01)
