"""P31's contrast: bands, versions, the loss by loops, where gradients go, and training."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import convolve
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.modules.haar import haar_kernels
from graphwright.ir.tune.hooks import Moment
from graphwright.passes.tune import ContrastiveSr
from graphwright.passes.tune._images import contrast as formulas
from graphwright.passes.tune._images import versions
from graphwright.passes.tune._images.bands import Embedding, high_bands
from graphwright.passes.tune.contrastive_sr import Contrast, ContrastiveSrOptions

CHAIN = ("restorer", [("tune.contrastive_sr", {
    "pixel_range": [-1.0, 1.0], "embedding": {"width": 2}, "tune": {"epochs": 1, "lr": 0.001},
})])  # fmt: skip

FREE = {"x": {0: "batch", 2: "height", 3: "width"}}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- bands


def test_high_bands_are_the_haar_transform_without_its_mean() -> None:
    x = drawn(2, 3, 6, 8)
    a, b = x[:, :, ::2, ::2], x[:, :, ::2, 1::2]
    c, d = x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2]
    wanted = torch.stack([a - b + c - d, a + b - c - d, a - b - c + d], 2).flatten(1, 2) / 2
    torch.testing.assert_close(high_bands(x), wanted, rtol=1e-6, atol=1e-7)  # kernels are float32
    flat = torch.full((1, 3, 5, 7), 0.3)
    assert high_bands(flat).shape == (1, 9, 3, 4)
    assert high_bands(flat).abs().max() < 1e-6
    kernels = haar_kernels((True, True), 4).double()
    bands = F.conv2d(x[:, :1], kernels, stride=2)
    back = F.conv_transpose2d(bands, kernels, stride=2)
    torch.testing.assert_close(back, x[:, :1], rtol=1e-6, atol=1e-6)


def test_the_embedding_has_the_papers_sizes() -> None:
    net = Embedding(3, 64)
    assert [conv.out_channels for conv in net.convs] == [64, 64, 128, 128, 256, 256, 512, 512]
    logits, features = Embedding(1, 2)(torch.rand(3, 1, 32, 48))
    assert logits.shape == (3,)
    assert [tuple(x.shape[1:]) for x in features] == [
        (2, 16, 24), (4, 8, 12), (8, 4, 6), (16, 2, 3),
    ]  # fmt: skip


# ---- the loss


def features(seed: int) -> list[Tensor]:
    return [drawn(2, 3, 4, 5, seed=seed), drawn(2, 5, 2, 3, seed=seed + 50)]


def by_loops(form: str, made, better, worse) -> float:
    total = []
    for layer, own in enumerate(made):
        for positive in better:
            for n in range(len(own)):

                def cosine(other, n=n, own=own, layer=layer) -> float:
                    a, b = own[n].flatten(1), other[layer][n].flatten(1)
                    return float(np.mean([float(a[:, i] @ b[:, i] / a[:, i].norm() / b[:, i].norm())
                                          for i in range(a.shape[1])]))  # fmt: skip

                def gap(other, n=n, own=own, layer=layer) -> float:
                    return float((own[n] - other[layer][n]).abs().mean())

                if form == "ratio":
                    total.append(gap(positive) / np.mean([gap(w) for w in worse]))
                else:
                    scores = [math.exp(cosine(x)) for x in (positive, *worse)]
                    total.append(-math.log(scores[0] / sum(scores)))
    return float(np.mean(total))


@pytest.mark.parametrize("form", ["cross_entropy", "ratio"])
def test_the_contrast_is_its_formula(form: str) -> None:
    made, better, worse = features(0), [features(1), features(2)], [features(k) for k in (3, 4, 5)]
    function = getattr(formulas, f"{form}_contrast")
    assert float(function(made, better, worse)) == pytest.approx(
        by_loops(form, made, better, worse), rel=1e-10
    )


def test_a_map_is_like_itself_alone() -> None:
    a = drawn(3, 4, 5, 6)
    torch.testing.assert_close(formulas.similarity(a, a), torch.ones(3).double())
    torch.testing.assert_close(formulas.similarity(a, -2 * a), -torch.ones(3).double())
    same = [a]
    # alike to all: log of their number
    value = formulas.cross_entropy_contrast(same, [same], [same, same])
    assert float(value) == pytest.approx(math.log(3), rel=1e-10)


@pytest.mark.parametrize("form", ["cross_entropy", "ratio"])
def test_it_falls_towards_a_positive_and_rises_towards_a_negative(form: str) -> None:
    function = getattr(formulas, f"{form}_contrast")
    made, better, worse = features(0), features(1), features(2)

    def at(target: list[Tensor], step: float) -> float:
        moved = [m + step * (t - m) for m, t in zip(made, target, strict=True)]
        return float(function(moved, [better], [worse]))

    for step in (1e-4, 0.3):
        assert at(better, step) < at(better, 0) < at(worse, step)


# ---- versions


def test_sharpening_is_a_blend_with_the_smoothed_image() -> None:
    x = torch.rand(4, 2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = torch.tensor([0.5, 1.0, 2.0, 5.5]).double()
    found = versions.sharpened(x, factors, (-9.0, 9.0))
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    for n in range(4):
        for c in range(2):
            image = x[n, c].numpy()
            smooth = image.copy()
            smooth[1:-1, 1:-1] = convolve(image, kernel)[1:-1, 1:-1]
            wanted = smooth + float(factors[n]) * (image - smooth)
            np.testing.assert_allclose(found[n, c].numpy(), wanted, rtol=1e-10, atol=1e-12)
    clamped = versions.sharpened(x, factors, (0.0, 1.0))
    assert clamped.min() >= 0
    assert clamped.max() <= 1


def test_blurs_and_noise() -> None:
    for kernel in (versions.gaussian(3, 2.0), versions.gaussian(11, 10.0), versions.motion(7, 0.4)):
        assert float(kernel.sum()) == pytest.approx(1)
    assert int((versions.gaussian(3, 2.0) > 0).sum()) == 9
    g = versions.gaussian(5, 2.0)
    assert float(g[5, 5] / g[3, 5]) == pytest.approx(math.exp(4 / 8))
    assert (versions.motion(5, 0.0)[5] > 0).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert (versions.motion(5, math.pi / 2)[:, 5] > 0).nonzero().flatten().tolist() == [
        3,
        4,
        5,
        6,
        7,
    ]
    image = drawn(2, 1, 14, 15)
    kernels = torch.stack([versions.motion(5, 0.0), versions.gaussian(5, 2.0)])
    found = versions._filtered(image, kernels, 5)
    for n in range(2):
        wanted = convolve(image[n, 0].numpy(), kernels[n].numpy(), mode="nearest")
        np.testing.assert_allclose(found[n, 0].numpy(), wanted, atol=1e-12)


def test_what_is_drawn() -> None:
    torch.manual_seed(0)
    sides, lines = set(), 0
    for _ in range(300):
        kernel = versions._drawn_kernel()
        rows = int((kernel.sum(1) > 0).sum())
        columns = int((kernel.sum(0) > 0).sum())
        is_gaussian = int((kernel > 0).sum()) == rows * columns and rows == columns
        lines += not is_gaussian
        sides |= {rows} if is_gaussian else set()
    assert sides == {3, 5, 7, 9, 11}
    assert 0.27 < lines / 300 < 0.43, "0.35 of them are lines"
    flat = torch.full((400, 1, 12, 12), 0.5)
    noise = (versions.degraded(flat, (0.0, 1.0)) - 0.5) * 255
    spread = noise.flatten(1).std(1)
    assert 0.7 < float(spread.min()) < 1.5
    assert 12 < float(spread.max()) < 17
    assert float(spread.square().mean()) == pytest.approx(np.mean(np.arange(1, 15) ** 2), rel=0.1)


# ---- the pass


class Twice(nn.Module):
    """Twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        large = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        return large + nn.functional.pixel_shuffle(self.b(torch.relu(self.a(x))), 2)


@cache
def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Twice().eval(), (torch.rand(2, 1, 12, 12),), FREE)


@cache
def pairs(count: int = 8) -> tuple[Tensor, Tensor]:
    """Images of steps and stripes, and their halves."""
    g = torch.Generator().manual_seed(1)
    a, b, phase = torch.rand(3, count, 1, 1, 1, generator=g)
    y = torch.linspace(0, 1, 24)
    wave = torch.sin(12 * (a * y[:, None] + b * y[None, :]) + 6 * phase)
    large = 0.5 + 0.4 * torch.tanh(6 * wave)
    return F.avg_pool2d(large, 2), large


def moment() -> Moment:
    weight = nn.Parameter(torch.zeros(1))
    return Moment(0, 10, 0, {}, torch.optim.SGD([weight], 0.1))


def test_gradients_reach_the_image_and_not_the_embedding() -> None:
    small, large = pairs()
    torch.manual_seed(0)
    embedding = Embedding(1, 4)
    recipe = Contrast(program(), "x", embedding, ContrastiveSrOptions(factor=1e6),
                      torch.device("cpu"))  # fmt: skip
    made = program()(small).detach().requires_grad_()
    loss = recipe.on_loss(moment(), made.new_zeros(()), made, {"x": small, "labels": large})
    before = {name: p.detach().clone() for name, p in embedding.named_parameters()}
    loss.backward()
    # beyond what the mean absolute difference gives: 1 / numel
    assert float(made.grad.abs().max()) > 100 / made.numel()
    assert all(p.grad is None for p in embedding.parameters())
    assert all(torch.equal(p, before[name]) for name, p in embedding.named_parameters())
    assert all(p.requires_grad for p in embedding.parameters())


def test_positives_and_negatives_of_a_batch() -> None:
    small, large = pairs()
    options = ContrastiveSrOptions(positives=2, negatives=4)
    recipe = Contrast(program(), "x", Embedding(1, 2), options, torch.device("cpu"))
    torch.manual_seed(0)
    better, worse = recipe.versions(small, large)
    assert (len(better), len(worse)) == (3, 5)
    assert better[0] is large
    bicubic = F.interpolate(small, scale_factor=2, mode="bicubic").clamp(0, 1)
    torch.testing.assert_close(worse[0], bicubic)
    assert len({float(x.sum()) for x in (*better, *worse)}) == 8
    assert all(x.shape == large.shape for x in (*better, *worse))
    blur = versions.gaussian(9, 5.0).float().expand(8, 11, 11)
    blurred = versions._filtered(large, blur, 5)
    *edges, soft = (float(high_bands(x).abs().mean()) for x in (better[1], better[2], blurred))
    assert min(edges) > 2 * soft


def test_the_embedding_learns_to_tell_labels_from_outputs() -> None:
    small, large = pairs()
    torch.manual_seed(0)
    options = ContrastiveSrOptions(embedding={"lr": 3e-3, "width": 8})
    recipe = Contrast(program(), "x", Embedding(1, 8), options, torch.device("cpu"))
    made = program()(small).detach()

    def gap() -> float:
        with torch.no_grad():
            return float((recipe.player.network(large)[0] - recipe.player.network(made)[0]).mean())

    before = gap()
    for _ in range(15):
        recipe.on_loss(moment(), made.new_zeros(()), made, {"x": small, "labels": large})
    assert gap() > before + 0.5


SPEC = """
version: 1
training: {data: train.npz, batch_size: 8}
passes:
  - tune.contrastive_sr:
      form: CONTRAST
      embedding: {width: 4}
      tune: {epochs: 25, lr: 0.03}
lower: [onnxruntime]
"""


@pytest.mark.parametrize("form", ["cross_entropy", "ratio"])
def test_from_a_spec_to_an_artifact(tmp_path: Path, form: str) -> None:
    """The images come nearer to the labels, which nothing but the loss asks for."""
    program().save(tmp_path / "net.pt2")
    small, large = pairs()
    np.savez(tmp_path / "train.npz", x=small.numpy(), labels=large.numpy())
    (tmp_path / "spec.yaml").write_text(SPEC.replace("CONTRAST", form))
    outcome = gw.optimize(
        tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out", quiet=True
    )
    assert list((tmp_path / "out").rglob("*.onnx"))
    tuned = outcome.program
    with torch.no_grad():
        before, after = (float(F.l1_loss(p(small), large)) for p in (program(), tuned))
    assert after < 0.85 * before


def test_what_cannot_be_right_is_refused() -> None:
    small, large = pairs()
    step = ContrastiveSr(embedding={"width": 2}, tune={"steps": 1})
    with pytest.raises(ArgumentError, match="needs labels, the images that the network should"):
        step.execute(program(), Context(training=[{"x": small}]))
    with pytest.raises(ArgumentError, match=r"makes images \[8, 1, 24, 24\], and the labels are"):
        step.execute(program(), Context(training=[{"x": small, "labels": small}]))
    with pytest.raises(ArgumentError, match="beyond 0 to 1"):
        step.execute(program(), Context(training=[{"x": 255 * small, "labels": 255 * large}]))
    torch.manual_seed(0)
    wide = gw.trace(nn.Conv2d(1, 2, 3, padding=1).eval(), (small,), {"input": {0: "batch"}})
    with pytest.raises(ModelError, match="make an image of an image with as many channels"):
        step.execute(wide, Context(training=[{"input": small, "labels": small}]))
    with pytest.raises(ArgumentError, match="pixel_range has to rise"):
        ContrastiveSr(pixel_range=(1.0, 0.0))
