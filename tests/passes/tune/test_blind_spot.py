"""A denoiser from noisy images alone: the losses, the blindness of training, and what results."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError, SpecError
from graphwright.ir.tune.hooks import Moment
from graphwright.passes.tune._images.sub_images import join, pick, random_order, split
from graphwright.passes.tune.blind_spot import BlindSpot, Invariance, cyclic_loss, risen

CHAIN = ("restorer", [
    ("insert.blind_spot", {}),
    ("tune.blind_spot", {"stride": 3, "tune": {"epochs": 1, "lr": 0.001}}),
])  # fmt: skip

FREE = {"x": {0: "batch", 2: "height", 3: "width"}}
ADAM = {"optimizer": "adam", "lr": 0.01}


class Denoiser(nn.Module):
    """Two convolutions, of which the first is masked and the second dilated."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.silu(self.middle(nn.functional.silu(self.first(x)))))


@cache
def blind(width: int = 12, dtype: torch.dtype = torch.float32) -> gw.Program:
    torch.manual_seed(0)
    net = Denoiser(width).eval().to(dtype)
    program = gw.trace(net, (torch.randn(2, 1, 12, 14, dtype=dtype),), FREE)
    return gw.passes.insert.BlindSpot()(program)


@cache
def images() -> tuple[Tensor, Tensor]:
    """Smooth images (48, 1, 20, 20), and with noise of deviation 0.2."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(48, 1, 3, 3, generator=generator)
    clean = nn.functional.interpolate(coarse, (20, 20), mode="bilinear", align_corners=True)
    return clean, clean + 0.2 * torch.randn(clean.shape, generator=generator)


def batches() -> list[tuple[Tensor]]:
    return [(part,) for part in images()[1].split(8)]


def psnr(shown: Tensor, wanted: Tensor) -> float:
    return float(-10 * torch.log10((shown - wanted).square().mean()))


@cache
def trained(loss: str) -> gw.Program:
    steps = 250 if loss == "invariance" else 20
    step = BlindSpot(loss=loss, stride=2, tune={**ADAM, "steps": steps})
    return step(blind(), training=batches(), check=False)


def seen(program: gw.Program, row: int, column: int) -> Tensor:
    """(height, width): where the output at a place depends on the image."""
    image = torch.randn(1, 1, 13, 11, requires_grad=True)
    output = program.run_flat((image,))[0]
    (gradient,) = torch.autograd.grad(output[0, 0, row, column], image)
    return gradient.abs()[0, 0]


# ---- sub-images


def test_sub_images_are_a_partition_and_join_puts_them_back() -> None:
    image = torch.arange(2 * 3 * 6 * 9.0).reshape(2, 3, 6, 9)
    torch.manual_seed(1)
    for order in (None, random_order(image, 3)):
        parts = split(image, 3, order)
        assert parts.shape == (18, 3, 2, 3)
        assert torch.equal(join(parts, 3, order), image)
        for number, channel in product(range(2), range(3)):
            own = parts[9 * number : 9 * number + 9, channel].flatten().sort().values
            assert torch.equal(own, image[number, channel].flatten())
        one = parts.reshape(2, 9, 3, 2, 3)  # channels of one place belong to one pixel
        assert torch.equal(one[:, :, 1] - one[:, :, 0], torch.full((2, 9, 2, 3), 54.0))
    assert torch.equal(split(image, 3)[4], image[0, :, 1::3, 1::3])
    other = random_order(torch.zeros(1, 1, 60, 60), 3)[0].reshape(-1, 9)
    assert len({tuple(row) for row in other.tolist()}) > 350, "cells have orders of their own"


def test_pick_takes_the_named_pixel_of_every_cell() -> None:
    image = torch.randn(2, 3, 4, 6)
    which = torch.randint(4, (2, 2, 3))
    found = pick(image, 2, which)
    for b, c, i, j in product(range(2), range(3), range(2), range(3)):
        down, right = divmod(int(which[b, i, j]), 2)
        assert found[b, c, i, j] == image[b, c, 2 * i + down, 2 * j + right]


def test_the_cyclic_loss_is_the_papers_sum() -> None:
    parts = torch.randn(2 * 4, 3, 5, 5, dtype=torch.float64)
    foretold = torch.randn_like(parts)
    wanted = sum(
        np.abs(foretold.numpy()[j::4] - parts.numpy()[(j + 1) % 4 :: 4]).mean() for j in range(4)
    )
    assert cyclic_loss(foretold, parts, 4) == pytest.approx(wanted, rel=1e-12)

    def turned(x: Tensor) -> Tensor:
        return x.unflatten(0, (2, 4)).roll(1, 1).flatten(0, 1)

    again = cyclic_loss(turned(foretold), turned(parts), 4)
    torch.testing.assert_close(again, cyclic_loss(foretold, parts, 4), rtol=1e-12, atol=0)
    assert cyclic_loss(parts, parts, 4) > 1, "a network that copies its input pays for it"


# ---- the invariance loss


def moment(step: int, total: int = 10) -> Moment:
    weight = nn.Parameter(torch.zeros(1))
    return Moment(step, total, 0, {}, torch.optim.SGD([weight], 0.1))


def test_the_losses_of_the_seeing_network_rise_from_nothing() -> None:
    assert [risen(moment(t), 0.4) for t in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert risen(moment(0), 0.0) == 1


def test_the_invariance_loss_is_the_papers_formula() -> None:
    """Against loops over pixels, in float64, on outputs that no network made."""
    program = blind(dtype=torch.float64)
    hook = Invariance(program, {}, "x", 3, False, 2.0, 0.5)
    image = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    seeing = torch.randn_like(image)
    torch.manual_seed(3)
    parts, few = (
        {"x": torch.randn_like(run["x"])} for run in hook.also_run(moment(0), {"x": image})
    )
    at = Moment(1, 4, 0, {}, moment(0).optimizer, also=(parts["x"], few["x"]))
    found = float(hook.on_loss(at, torch.zeros(()), seeing, {"x": image}))
    of_blind = of_self = 0.0
    for i, j in product(range(12), range(12)):
        part = parts["x"][3 * (i % 3) + j % 3, 0, i // 3, j // 3]
        of_blind += abs(float(part - image[0, 0, i, j])) / 144
        of_self += abs(float(seeing[0, 0, i, j] - image[0, 0, i, j])) / 144
    agreement = 0.0
    for i, j in product(range(6), range(6)):
        down, right = divmod(int(hook._which[0, i, j]), 2)
        pixel = seeing[0, 0, 2 * i + down, 2 * j + right]
        agreement += abs(float(pixel - few["x"][0, 0, i, j])) / 36
    assert found == pytest.approx(of_blind + 0.5 * (of_self + 2 * agreement), rel=1e-12)


@pytest.mark.parametrize("rise", [0.5, 0.0])
def test_a_step_is_the_gradient_of_the_formula(rise: float) -> None:
    """At step 0 the blind loss alone counts, unless nothing rises; masked runs are masked."""
    program = blind(4, torch.float64)
    image = images()[1][:2].double()
    tune = {"steps": 1, "optimizer": "sgd", "lr": 0.1, "schedule": "constant"}
    step = BlindSpot(rise=rise, invariance=0.0, tune=tune)
    tuned = step(program, training=[(image,)], check=False)
    module = program.module
    weights = dict(module.named_parameters())
    rows = torch.stack([image[:, :, i::5, j::5] for i in range(5) for j in range(5)])
    loss = (module(rows.flatten(0, 1))[0] - rows.flatten(0, 1)).abs().mean()
    if not rise:
        seeing = gw.passes.insert.BlindSpot(blind=False)(program)
        values = {name: weights[name] for name in seeing.state}
        output = torch.func.functional_call(seeing.module, values, (image,))[0]
        loss = loss + (output - image).abs().mean()
    for name, gradient in zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True):
        wanted = program.state[name].detach() - 0.1 * gradient
        torch.testing.assert_close(tuned.state[name].detach(), wanted, rtol=1e-9, atol=1e-12)


# ---- the result


def test_denoises_from_noisy_images_alone() -> None:
    clean, noisy = images()
    shown = trained("invariance")(noisy).detach()
    assert psnr(shown, clean) > psnr(noisy, clean) + 3


def test_the_result_sees_again_or_stays_blind_in_plain_convolutions() -> None:
    seeing, cyclic = trained("invariance"), trained("cyclic")
    for program in (seeing, cyclic):
        assert not any("mul" in str(node.target) for node in program.graph.nodes)
        assert not any("mask" in name for name in program.state)
    assert seen(seeing, 6, 5)[6, 5] > 0
    for place in ((6, 5), (0, 0), (12, 4)):
        found = seen(cyclic, *place)
        assert found[place] == 0
        assert found.count_nonzero() > 4
    assert (cyclic.state["first.weight"][:, :, 1, 1] == 0).all()


def test_training_is_blind_where_the_loss_is() -> None:
    """The middle of the masked kernel moves by the losses of the seeing network alone."""
    before = blind().state["first.weight"]
    never = BlindSpot(rise=1.0, tune={"steps": 1})(blind(), training=batches(), check=False)
    moved = (never.state["first.weight"] - before).abs()
    assert moved[:, :, 1, 1].max() == 0
    assert moved[:, :, 0, 0].min() > 0
    assert (trained("invariance").state["first.weight"] - before)[:, :, 1, 1].abs().min() > 0


SPEC = """
version: 1
training: {data: noisy.npz, batch_size: 8}
passes:
  - insert.blind_spot
  - tune.blind_spot: {tune: {steps: 4, lr: 0.001}}
lower: [onnxruntime]
"""


def test_from_a_spec_to_an_artifact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = gw.trace(Denoiser().eval(), (torch.randn(2, 1, 12, 14),), FREE)
    program.save(tmp_path / "denoiser.pt2")
    np.savez(tmp_path / "noisy.npz", x=images()[1].numpy())
    (tmp_path / "spec.yaml").write_text(SPEC)
    gw.optimize(tmp_path / "denoiser.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    import onnx

    (file,) = (tmp_path / "out").rglob("*.onnx")
    graph = onnx.load(file).graph
    stored = {value.name for value in graph.initializer}
    convolutions = [node for node in graph.node if "Conv" in node.op_type]
    assert len(convolutions) == 3
    assert all(node.input[1] in stored for node in convolutions)
    (tmp_path / "spec.yaml").write_text(SPEC.replace("  - insert.blind_spot\n", ""))
    with pytest.raises(SpecError, match=r"insert\.blind_spot"):
        gw.load_spec(tmp_path / "spec.yaml")


def test_what_cannot_be_right_is_refused() -> None:
    data = batches()
    torch.manual_seed(0)
    plain = gw.trace(Denoiser().eval(), (torch.randn(2, 1, 12, 14),), FREE)
    with pytest.raises(ModelError, match=r"has no blind spot. Put `insert\.blind_spot`"):
        BlindSpot()(plain, training=data)
    with pytest.raises(ArgumentError, match="images of 18 x 20 are no two or more whole cells of"):
        BlindSpot()(blind(), training=[(images()[1][:, :, :18],)])
    fixed = gw.trace(Denoiser().eval(), (torch.randn(2, 1, 20, 20),), {"x": {0: "batch"}})
    fixed = gw.passes.insert.BlindSpot()(fixed)
    with pytest.raises(ModelError, match="the height and width are fixed"):
        BlindSpot()(fixed, training=data)
    with pytest.raises(ArgumentError, match="invariance has no part in loss cyclic"):
        BlindSpot(loss="cyclic", invariance=1.0)
    with pytest.raises(ArgumentError, match="of training alone"):
        BlindSpot(tune={"hold_out": 0.5})
    with pytest.raises(ArgumentError, match="stride"):
        BlindSpot(stride=1)
    # a later batch of another size
    other = [data[0], (images()[1][:, :, :18],)]
    with pytest.raises(ArgumentError, match="images of 18 x 20"):
        BlindSpot(tune={"steps": 2}).execute(blind(), Context(training=other))
