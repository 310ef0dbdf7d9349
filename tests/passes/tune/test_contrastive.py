"""tune.contrastive: P22's contrast against dense formulas, and what it keeps of an encoder."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.tune import Contrastive
from graphwright.passes.tune._contrast import meta_nodes as formulas

CHAIN = (
    "conv",
    [("tune.contrastive", {"clusters": 2, "neighbours": 1,
                           "tune": {"epochs": 1, "loss": "teacher_mse"}})],
)  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(z: Tensor, a: Tensor, m: Tensor, tau: float) -> Tensor:
    """The loss with matrices of all pairs."""

    def cosines(rows: Tensor) -> Tensor:
        norms = rows.norm(dim=1).clamp_min(1e-30)  # of an empty cluster, a row of zeros
        return (rows @ rows.T / norms / norms[:, None]).fill_diagonal_(0)

    positive = (a * (tau * cosines(z)).exp()).sum(1)
    negative = (tau * cosines(m)).exp().sum(1)
    return -(positive + 1e-10).log().mean() + (negative + 1e-10).log().mean()


def graph(nodes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random weighted graph with loops, as a matrix and as edges with weights."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(nodes, nodes, generator=generator, dtype=torch.float64)
    a = a * (torch.rand(nodes, nodes, generator=generator) < 0.4)
    return a, a.nonzero().T


def test_edges_and_clusters_are_the_dense_formula() -> None:
    z, (a, edges) = drawn(12, 5), graph(12)
    assigned = torch.arange(12) % 4
    m = torch.stack([z[assigned == k].sum(0) for k in range(4)])
    found = formulas.contrast(z, edges, a[tuple(edges)], assigned, 4, 0.7)
    torch.testing.assert_close(found, dense(z, a, m, 0.7), rtol=1e-12, atol=1e-14)


def test_a_cluster_for_every_node_gives_all_pairs_as_negatives() -> None:
    z, (a, edges) = drawn(9, 4), graph(9)
    found = formulas.contrast(z, edges, a[tuple(edges)], torch.arange(9), 9, 1.3)
    torch.testing.assert_close(found, dense(z, a, z, 1.3), rtol=1e-12, atol=1e-14)


def test_the_order_of_nodes_does_not_matter() -> None:
    z, (a, edges) = drawn(12, 5), graph(12)
    assigned, order = torch.arange(12) % 4, torch.randperm(12, generator=torch.Generator())
    first = formulas.contrast(z, edges, a[tuple(edges)], assigned, 4, 1.0)
    moved = a[order][:, order]
    places = moved.nonzero().T
    second = formulas.contrast(z[order], places, moved[tuple(places)], assigned[order], 4, 1.0)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


def test_gradients_pass_through_neighbours_and_meta_nodes_alone() -> None:
    z, (a, edges) = drawn(8, 4).requires_grad_(), graph(8)
    centres = drawn(3, 4, seed=1).requires_grad_()
    assigned = formulas.soft_assignment(z, centres).detach().argmax(1)
    none = torch.zeros(2, 0, dtype=torch.int64)
    apart = formulas.contrast(z, none, torch.zeros(0), assigned, 3, 1.0)
    by_meta = torch.autograd.grad(apart, z, retain_graph=True)[0]
    near = formulas.contrast(z, edges, a[tuple(edges)], assigned, 3, 1.0) - apart
    by_near = torch.autograd.grad(near, (z, centres), allow_unused=True)
    assert float(by_meta.abs().max()) > 1e-4 < float(by_near[0].abs().max())
    assert by_near[1] is None
    assert not formulas.sharpened(formulas.soft_assignment(z, centres)).requires_grad


def test_empty_clusters_and_zero_embeddings_are_numbers() -> None:
    """Clusters that nothing is in count, and a row of zeros has cosines of 0."""
    z = torch.cat([torch.zeros(1, 3), drawn(3, 3).float()]).requires_grad_()
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    loss = formulas.contrast(z, edges, torch.ones(4), torch.tensor([0, 1, 1, 1]), 5, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_assignments_are_their_formulas() -> None:
    z, centres = drawn(6, 3), drawn(2, 3, seed=1)
    q = formulas.soft_assignment(z, centres)
    near = [[1 / (1 + float(((r - c) ** 2).sum())) for c in centres] for r in z]
    expected = torch.tensor([[v / sum(row) for v in row] for row in near], dtype=z.dtype)
    torch.testing.assert_close(q, expected)
    p = torch.tensor([[float(v) ** 2 / float(q[:, k].sum()) for k, v in enumerate(row)]
                      for row in q], dtype=z.dtype)  # fmt: skip
    torch.testing.assert_close(formulas.sharpened(q), p / p.sum(1, keepdim=True))


def test_neighbours_and_paths() -> None:
    z = drawn(30, 3)
    near = formulas.neighbours(z, 4)
    distances = torch.cdist(z, z).fill_diagonal_(float("inf"))
    a = torch.zeros(30, 30)
    for i in range(30):
        assert set(near[i].tolist()) == set(distances[i].argsort()[:4].tolist())
        a[i, near[i]] = 1
    total = torch.zeros(30, 30)
    for i, j in formulas.reach(near, 3).T:
        total[i, j] += 1
    torch.testing.assert_close(total, a + a @ a + a @ a @ a)


def test_many_nodes_take_no_matrix_of_all_pairs() -> None:
    """20000 nodes: a float32 matrix of pairs would be 1.6 GB; the largest tensor here is small."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else (out,))
                         if isinstance(t, Tensor))  # fmt: skip
            return out

    z = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    edges = torch.randint(0, 20000, (2, 60000), generator=torch.Generator().manual_seed(1))
    with Watch():
        formulas.contrast(z, edges, torch.ones(60000), torch.arange(20000) % 10, 10, 1.0).backward()
    assert max(sizes) <= 60000 * 4


# ---- the pass


class Encoder(nn.Module):
    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 24), nn.Linear(24, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@cache
def encoder(size: int = 6) -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Encoder(size).eval(), (torch.randn(4, 8),), {"x": {0: "batch"}})


@cache
def samples() -> list[dict[str, Tensor]]:
    """Four clouds."""
    middles = 3 * drawn(4, 8, seed=7).float()
    return [{"x": middles[torch.arange(16) % 4] + 0.5 * drawn(16, 8, seed=k).float()}
            for k in range(6)]  # fmt: skip


def test_it_adds_its_terms_to_the_loss_of_a_plain_loop() -> None:
    teacher = encoder()
    given = {"steps": 1, "lr": 0.1, "optimizer": "sgd", "momentum": 0.0, "schedule": "constant",
             "loss": "teacher_mse"}  # fmt: skip
    pruned = gw.passes.prune.Magnitude(sparsity=0.5)(teacher, check=False)
    step = Contrastive(clusters=4, neighbours=3, contrast=2.0, cluster=1.5, tune=given)
    context = Context(training=samples()[:1], teacher=teacher)
    result = step.execute(pruned, context)
    without = Contrastive(clusters=4, neighbours=3, contrast=0, cluster=0, tune=given)
    plain = without.execute(pruned, context)
    x = samples()[0]["x"]
    with torch.no_grad():
        t, z = teacher(x), pruned(x)
    from graphwright.ir.data.kmeans import kmeans

    centres = kmeans(t, torch.ones(16), 4, context.generator("clusters")).centroids
    a = torch.zeros(16, 16)
    a.scatter_(1, formulas.neighbours(t, 3), 1.0)
    q = formulas.soft_assignment(z, centres)
    m = torch.stack([z[q.argmax(1) == k].sum(0) for k in range(4)])
    p = formulas.sharpened(q)
    added = 2.0 * float(dense(z, a, m, 0.5)) + 1.5 * float((p * (p / q).log()).sum(1).mean())
    found = result.metrics["first_loss"] - plain.metrics["first_loss"]
    assert found == pytest.approx(added, rel=1e-4)


def test_the_factors_are_those_of_acm() -> None:
    """alpha, beta, r and tau, as the released commands give them for that data set."""
    o = Contrastive().options
    assert (o.contrast, o.cluster, o.hops, o.tau) == (0.5, 0.5, 1, 0.5)


def test_refusals() -> None:
    context = Context(training=samples(), teacher=encoder())
    with pytest.raises(ArgumentError, match="needs the model as it was"):
        Contrastive().execute(encoder(), context.replace(teacher=None))
    with pytest.raises(ArgumentError, match="96 samples have no 96 clusters"):
        Contrastive(clusters=96).execute(encoder(), context)
    with pytest.raises(ArgumentError, match="16 samples has no 16 neighbours"):
        Contrastive(clusters=4, neighbours=16).execute(encoder(), context)
    with pytest.raises(ModelError, match=r"output is \['batch', 6\], the teacher's \['batch', 5\]"):
        Contrastive().execute(encoder(), context.replace(teacher=encoder(5)))
