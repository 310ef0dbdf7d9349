"""sample.classifier_confusion: the formula step by step, fewer confused samples, refusals."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from models import denoisers
from models.mixture import Mixture
from models.shown_file import shown_file
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.check.precision import run_in_double
from graphwright.ir.errors import ModelError, SpecError
from graphwright.ir.sampling.confusion import Confusion
from graphwright.ir.sampling.sampler import Sampler


class Classifier(nn.Module):
    """Logits of 2 x 8 x 8 images."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 3, stride=2), nn.Linear(54, classes)

    def forward(self, image: Tensor) -> Tensor:
        return 2 * self.last(torch.relu(self.first(image)).flatten(1))


@cache
def net(classes: int = 4) -> Classifier:
    torch.manual_seed(1)
    return Classifier(classes).eval()


def traced(model: nn.Module, shape: tuple[int, ...], name: str = "image") -> gw.Program:
    return gw.trace(model, {name: torch.randn(3, *shape)}, {name: {0: "batch"}})


FILE = shown_file("classifier.pt2", lambda path: traced(net(), (2, 8, 8)).save(path))
DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("denoiser", [DENOISER, ("sample.classifier_confusion", {"classifier": str(FILE)})])
GIVEN = {"label": torch.tensor([0, 1, 3])}


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.conv_denoiser(grid={"spacing": "leading"})


def guided(denoiser: gw.Program, **options: object) -> gw.Program:
    return gw.passes.sample.ClassifierConfusion(**{"classifier": str(FILE), **options})(denoiser)


def noise(rows: int = 3) -> Tensor:
    return torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("measure", ["missing", "against_reference"])
def test_it_is_the_formula_row_by_row(denoiser: gw.Program, measure: str) -> None:
    made = guided(denoiser, gfcg_reconstruction_h=measure, input_scale=0.5, input_shift=0.25)
    judge = copy.deepcopy(net()).double()
    for rows in (1, 2, 5):
        g = torch.Generator().manual_seed(rows)
        levels = torch.rand(2, rows, generator=g) / 2 + 0.25
        x, t, label = noise(rows), 999 * levels[0], torch.arange(rows) % 4
        found = run_in_double(made, (x, t, label, *levels, torch.tensor(5.0)))
        for i in range(rows):

            def asked(k: int, i: int = i, x: Tensor = x, t: Tensor = t, levels: Tensor = levels
                      ) -> list[Tensor]:  # fmt: skip
                one = (x[i : i + 1], t[i : i + 1], torch.tensor([k]), *levels[:, i : i + 1])
                return list(run_in_double(denoiser, one))

            own = asked(int(label[i]))
            with torch.no_grad():
                p = judge(0.5 * own[0] + 0.25).softmax(1)[0].tolist()
            other_classes = [k for k in range(4) if k != int(label[i])]
            reference = max(other_classes, key=p.__getitem__)
            h = 1 - p[int(label[i])]
            if measure == "against_reference":
                h = p[reference] / (p[int(label[i])] + p[reference])
            other = asked(reference)
            for k in (0, 1):
                right = other[k] + (1 + 4 * h) * (own[k] - other[k])
                torch.testing.assert_close(found[k][i : i + 1], right, rtol=1e-10, atol=1e-10)


def test_the_reference_is_never_the_label_and_confusion_is_a_share() -> None:
    g = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(200, 4, generator=g)
    logits[0] = torch.tensor([500.0, -500.0, -500.0, -500.0])
    label = torch.arange(200) % 4
    for measure in ("missing", "against_reference"):
        reference, h = Confusion(measure)(logits, label)
        assert bool((reference != label).all())
        assert bool(((h >= 0) & (h <= 1)).all())
        assert float(h[0]) == 0
        sure = logits.argmax(1) == label
        assert float(h[sure].mean()) < 0.2 < 0.8 < float(h[~sure].mean())


def test_without_scale_it_is_the_denoiser(denoiser: gw.Program) -> None:
    sampler = Sampler.of(guided(denoiser))
    with torch.inference_mode():  # no gradients
        mine = sampler.sample(noise(), GIVEN, steps=4, max_scale=1.0)
    assert sampler.evaluations == 8
    right = Sampler.of(denoiser).sample(noise(), GIVEN, steps=4)
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    half = Sampler.of(guided(denoiser, stop=0.5))
    half.sample(noise(), GIVEN, steps=4)
    assert half.calls == {"full": 2, "conditioned": 2}
    assert half.evaluations == 6


def test_what_the_label_does_not_reach_is_computed_once() -> None:
    def count(program: gw.Program) -> int:
        target = torch.ops.aten.conv2d.default
        return sum(node.target is target for node in program.graph.nodes)

    class Late(nn.Module):
        """The label is read behind two convolutions of three."""

        def __init__(self) -> None:
            super().__init__()
            self.label = nn.Embedding(5, 2)
            self.layers = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            h = self.layers[1](torch.relu(self.layers[0](x))) + t[:, None, None, None] / 1000
            return self.layers[2](h + self.label(label)[:, :, None, None])

    inputs = {"x": noise(), "t": torch.rand(3), "label": GIVEN["label"]}
    free = {name: {0: "batch"} for name in inputs}
    program = gw.trace(Late().eval(), inputs, free, ranges={"label": (0, 5)})
    denoiser = gw.passes.sample.Denoiser(unconditional={"label": 4})(program)
    assert count(guided(denoiser)) == count(denoiser) + 1 + 1  # the last one, and the classifier's


class Wide(nn.Module):
    """The noise of three wide spots that overlap; label 3 is all of them."""

    def __init__(self) -> None:
        super().__init__()
        means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]])
        self.oracle = Mixture(means, torch.full((3,), 0.6), torch.full((3,), 1 / 3))
        shares = torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)]).clamp_min(1e-30)
        self.register_buffer("logs", shares.log())

    def forward(self, sample: Tensor, sigma_in: Tensor, label: Tensor) -> Tensor:
        s = sigma_in[:, None]
        data = self.oracle.denoised(sample, torch.ones_like(s), s, self.logs[label])
        return (sample - data) / s


class Bayes(nn.Module):
    """Logits of the class of a point."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", Wide().oracle.means)

    def forward(self, image: Tensor) -> Tensor:
        return -((image[:, None] - self.means) ** 2).sum(-1) / (2 * 0.6)


def test_fewer_samples_are_taken_for_another_class(tmp_path: Path) -> None:
    inputs = {
        "sample": torch.randn(3, 2),
        "sigma_in": torch.tensor([0.3, 1.0, 4.0]),
        "label": torch.tensor([0, 1, 2]),
    }
    free = {name: {0: "batch"} for name in inputs}
    ranges = {"label": (0, 4), "sigma_in": (0.1, 10.0)}
    program = gw.trace(Wide().eval(), inputs, free, ranges=ranges)
    schedule = {"kind": "edm", "sigma_min": 0.05, "sigma_max": 10.0, "time": "sigma"}
    denoiser = gw.passes.sample.Denoiser(
        schedule=schedule, grid={"spacing": "log_snr"}, unconditional={"label": 3}
    )(program)
    traced(Bayes(), (2,)).save(tmp_path / "bayes.pt2")
    label = torch.arange(600) % 3
    z = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    programs = {
        "plain": denoiser,
        "confusion": guided(denoiser, classifier=str(tmp_path / "bayes.pt2"), max_scale=2.0),
    }
    right = {}
    for name, each in programs.items():
        made = Sampler.of(each).sample(z, {"label": label}, steps=12)
        right[name] = float((Bayes()(made).argmax(1) == label).double().mean())
    assert right["plain"] < 0.92
    assert right["confusion"] > right["plain"] + 0.04
    assert right["confusion"] > 0.97


SPEC = """
version: 1
passes:
  - sample.denoiser: {unconditional: {label: 4}, grid: {spacing: leading}}
  - sample.classifier_confusion: {classifier: judge.pt2, max_scale: 4.0, stop: 0.5}
lower: [onnxruntime]
"""


def test_a_spec_becomes_a_bundle(tmp_path: Path) -> None:
    denoisers.conv().save(tmp_path / "net.pt2")
    traced(net(), (2, 8, 8)).save(tmp_path / "judge.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    bundle = gw.load(tmp_path / "out")
    mine = bundle.sample(noise(), GIVEN, steps=4)
    assert bundle.sampler.calls == {"full": 2, "conditioned": 2}
    right = Sampler.of(done.program).sample(noise(), GIVEN, steps=4)
    torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)
    (tmp_path / "spec.yaml").write_text(
        SPEC.replace("lower:", "  - sample.reuse: {modules: [up]}\nlower:")
    )
    with pytest.raises(SpecError, match="cannot be in a chain with"):
        gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "other")


def test_refusals(denoiser: gw.Program, tmp_path: Path) -> None:
    def judge(model: nn.Module, shape: tuple[int, ...], **free: object) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt2"
        gw.trace(model, {"image": torch.randn(3, *shape)}, free).save(path)
        return str(path)

    batch = {"image": {0: "batch"}}
    with pytest.raises(ModelError, match=r"has 3 classes, and 'label' has other labels: 0 to 3"):
        guided(denoiser, classifier=judge(Classifier(3).eval(), (2, 8, 8), **batch))
    with pytest.raises(ModelError, match=r"has 5 classes.* beside 4 for none"):
        guided(denoiser, classifier=judge(Classifier(5).eval(), (2, 8, 8), **batch))
    with pytest.raises(ModelError, match="the classifier's batch is fixed at 3"):
        guided(denoiser, classifier=judge(Classifier(4).eval(), (2, 8, 8)))
    flat = nn.Sequential(nn.Linear(5, 4))
    wrong = gw.trace(flat.eval(), (torch.randn(3, 5),), {"input": {0: "batch"}})
    wrong.save(tmp_path / "flat.pt2")
    with pytest.raises(ModelError, match="has to take data alone, without a level of noise"):
        guided(denoiser, classifier=str(tmp_path / "flat.pt2"))
    with pytest.raises(ModelError, match="one condition has to be the label"):
        guided(denoiser, label="sample")
    with pytest.raises(ModelError, match=r"sample\.cfg has put guidance around"):
        guided(gw.passes.sample.Cfg()(denoiser))
