"""The transductive head: the fixed point and its energy, K-means, couplings, both artifacts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.modules.transductive import LogitAssignment, PrototypeAssignment, affinity

Head = gw.passes.insert.TransductiveHead

CHAIN = (
    "conv",
    [("insert.transductive_head", {"cost": "logits", "steps": 2, "allow_batch_coupling": True})],
)


def unit(n: int, d: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def clusters(per_class: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three clusters in 8 dimensions, float64, and their labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(per_class)
    noise = spread * torch.randn(len(labels), 8, generator=g, dtype=torch.float64)
    return 3 * torch.eye(8, dtype=torch.float64)[labels] + 1 + noise, labels


def slow_graph(z: np.ndarray, k: int) -> np.ndarray:
    n = len(z)
    w = np.zeros((n, n))
    for i in range(n):
        others = sorted((float(((z[i] - z[j]) ** 2).sum()), j) for j in range(n) if j != i)
        for _, j in others[:k]:
            w[i, j] = 1
    return (w + w.T) / 2


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize(("n", "k"), [(1, 3), (2, 3), (4, 3), (17, 1), (30, 5)])
def test_the_graph_is_the_symmetric_one_of_nearest_neighbours(n: int, k: int) -> None:
    z = unit(n, 6)
    found = affinity(z, k)
    np.testing.assert_array_equal(found.numpy(), slow_graph(z.numpy(), k))
    half = affinity(z.half(), k)
    assert torch.isfinite(half).all()
    assert not half.diagonal().any()


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_the_energy_never_rises(weight: float) -> None:
    z, prototypes = unit(60, 5), unit(3, 5, seed=1)
    w = affinity(z, 3)
    cost = torch.cdist(z, prototypes).square()
    energies = []
    for steps in range(21):
        head = PrototypeAssignment(
            prototypes, torch.ones(3).double(), torch.zeros(5).double(), weight=weight, steps=steps
        )
        y = head(z).softmax(1)
        smooth = (y * (w @ y)).sum()
        energies.append(float((y * y.log() + cost * y).sum() - weight / 2 * smooth))
    assert max(np.diff(energies)) < 1e-9
    assert energies[0] - energies[-1] > 1


def test_without_neighbours_it_is_the_softmax_of_distances() -> None:
    features, labels = clusters(5, 0.5)
    before = features.mean(0)
    z = nn.functional.normalize(features - before)
    sums = torch.stack([z[labels == k].sum(0) for k in range(3)])
    counts = torch.bincount(labels).double()
    head = PrototypeAssignment(sums, counts, before, weight=0.0, sharpness=2.0)
    new, _ = clusters(4, 0.5, seed=1)
    cost = torch.cdist(nn.functional.normalize(new - before), sums / counts[:, None]).square()
    torch.testing.assert_close(head(new).softmax(1), (-2 * cost).softmax(1))
    logits = torch.randn(12, 3).double()
    assert torch.equal(LogitAssignment(3, 0.0, 20)(new, logits), logits)


def test_hard_assignments_with_moving_prototypes_are_k_means() -> None:
    from sklearn.cluster import KMeans

    support, labels = clusters(2, 0.8)
    batch, _ = clusters(20, 1.5, seed=2)
    mean = support.mean(0)
    z, q = (nn.functional.normalize(part - mean) for part in (support, batch))
    sums = torch.stack([z[labels == k].sum(0) for k in range(3)])
    head = PrototypeAssignment(
        sums, torch.full((3,), 2.0).double(), mean,
        weight=0.0, sharpness=1e5, refine=True, steps=30,
    )  # fmt: skip
    found = head(batch).argmax(1)
    both = torch.cat([z, q]).numpy()
    means = KMeans(3, init=(sums / 2).numpy(), n_init=1, tol=0, algorithm="lloyd").fit(both)
    assert means.labels_[:6].tolist() == labels.tolist()  # the support stays where it is labelled
    assert found.tolist() == means.labels_[6:].tolist()
    first = PrototypeAssignment(sums, torch.full((3,), 2.0).double(), mean, weight=0.0, steps=1)
    assert (first(batch).argmax(1) != found).any()  # the means have moved


# ---- the pass


class Classifier(nn.Module):
    """A linear feature extractor and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def classifier(batch: int | None = None) -> gw.Program:
    torch.manual_seed(0)
    free = None if batch else {"x": {0: "batch"}}
    return gw.trace(Classifier().eval(), (torch.randn(batch or 4, 8),), free)


def labelled() -> list[dict[str, Tensor]]:
    x, labels = clusters(8, 0.4)
    return [{"x": a, "labels": b} for a, b in zip(x.float().split(9), labels.split(9), strict=True)]


def by_hand(program: gw.Program, x: Tensor, *, refine: bool) -> np.ndarray:
    """The assignment by loops, in float64."""
    s = {name: t.detach().double().numpy() for name, t in program.state.items()}

    def features(x: Tensor) -> np.ndarray:
        return np.tanh(x.double().numpy() @ s["body.weight"].T + s["body.bias"])

    data, labels = (torch.cat([b[k] for b in labelled()]) for k in ("x", "labels"))
    mean = features(data).mean(0)

    def normal(f: np.ndarray) -> np.ndarray:
        return (f - mean) / np.linalg.norm(f - mean, axis=1, keepdims=True)

    support, z = normal(features(data)), normal(features(x))
    sums = np.stack([support[labels.numpy() == k].sum(0) for k in range(3)])
    counts = np.full(3, 8.0)
    w = slow_graph(z, 3)

    def cost(c: np.ndarray) -> np.ndarray:
        return np.array([[((p - k) ** 2).sum() for k in c] for p in z])

    a = cost(sums / counts[:, None])
    y = softmax(-a)
    for _ in range(4):
        if refine:
            a = cost((sums + y.T @ z) / (counts + y.sum(0))[:, None])
        y = softmax(0.7 * w @ y - a)
    return y


@pytest.mark.parametrize("refine", [False, True])
def test_the_pass_is_the_formula_in_both_artifacts(refine: bool) -> None:
    program = classifier()
    head = Head(weight=0.7, steps=4, refine=refine, allow_batch_coupling=True)
    made = head(program, training=labelled())
    for size in (1, 24):
        x = clusters(8, 1.0, seed=3)[0].float()[:size]
        wanted = by_hand(program, x, refine=refine)
        np.testing.assert_allclose(made(x).softmax(1).detach(), wanted, atol=1e-5)
        for backend in ("onnxruntime", "triton"):
            found = gw.lower(made, backend)(x).detach().softmax(1)
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_order_of_a_batch_does_not_matter_and_its_members_do() -> None:
    made = Head(steps=3, allow_batch_coupling=True)(classifier(), training=labelled())
    x = clusters(6, 1.5, seed=4)[0].float()
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made(x[order]), made(x)[order])
    assert (made(x)[:9] - made(x[:9])).abs().max() > 1e-2


def test_logits_need_no_data_and_no_weight_leaves_them() -> None:
    program = classifier()
    made = Head(cost="logits", weight=0.0, steps=2, allow_batch_coupling=True)(program)
    x = torch.randn(5, 8)
    assert torch.equal(made(x), program(x))
    fixed = Head(cost="logits", steps=2)(
        classifier(batch=6)
    )  # whole batches alone: nothing to allow
    assert fixed(torch.randn(6, 8)).shape == (6, 3)


def test_what_it_cannot_be_right_about_is_refused() -> None:
    program, data = classifier(), labelled()
    with pytest.raises(ModelError, match="any batch size"):
        Head()(program, training=data)
    with pytest.raises(ArgumentError, match="one sample, which has no neighbours"):
        Head(cost="logits")(classifier(batch=1))
    allowed = Head(allow_batch_coupling=True)
    with pytest.raises(ArgumentError, match="has no labels"):
        allowed(program, training=[{"x": data[0]["x"]}])
    with pytest.raises(ArgumentError, match="no class numbers from 0 to 2"):
        allowed(program, training=[{"x": data[0]["x"], "labels": torch.full((9,), 3)}])
    few = [{"x": data[0]["x"], "labels": torch.zeros(9, dtype=torch.int64)}]
    with pytest.raises(ArgumentError, match="no sample of class 1, 2"):
        allowed(program, training=few)
    with pytest.raises(ArgumentError, match="needs training data"):
        allowed(program)
    soft = gw.trace(nn.Sequential(Classifier(), nn.Softmax(1)).eval(), (torch.randn(4, 8),))
    with pytest.raises(ModelError, match="no output is what a linear layer makes"):
        Head(cost="logits")(soft)
    for wrong in ({"refine": True}, {"sharpness": 2.0}):
        with pytest.raises(ArgumentError, match="cost logits"):
            Head(cost="logits", **wrong)
