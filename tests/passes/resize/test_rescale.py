"""resize.rescale: autograd's gradient, the steps by hand, images that come back better."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.check.precision import run_in_double
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.resize._descent.encoder import Descent, Stored, error_and_gradient

FOLDER = Path(tempfile.mkdtemp(prefix="graphwright-rescale-"))


def saved(net: nn.Module, example: Tensor, free: Any = "batch") -> str:
    """The file of an upscaler."""
    path = FOLDER / f"{len(list(FOLDER.iterdir()))}.pt2"
    gw.trace(net.eval(), (example,), free).save(path)
    return str(path)


torch.manual_seed(0)
CHAIN = ("stages", [("resize.rescale", {
    "up": saved(nn.ConvTranspose2d(8, 2, 3, 3), torch.randn(2, 8, 2, 2)),
    "hr_steps": 1, "lr_steps": 1, "levels": None,
})])  # fmt: skip


class Down(nn.Module):
    """To a quarter of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) + self.last(F.silu(self.norm(self.conv(x))))


class Up(nn.Module):
    """Back to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, y: Tensor) -> Tensor:
        more = F.pixel_shuffle(self.second(F.leaky_relu(self.first(y), 0.1)), 2)
        return F.interpolate(y, scale_factor=2.0, mode="nearest") + more


def images(count: int, seed: int = 0, size: int = 8) -> Tensor:
    """Waves and an edge, between 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    where = torch.arange(size) / size
    a, b, phase, edge = torch.rand(4, count, 1, 1, 1, generator=g)
    row, column = where[:, None], where[None]
    wave = torch.sin(6.3 * ((0.2 + 0.8 * a) * row + (0.2 + 0.8 * b) * column + phase))
    return (0.5 + 0.3 * wave + 0.2 * (column > edge)).clamp(0, 1)


@cache
def pair() -> tuple[Down, Up]:
    """A pair that was trained together."""
    torch.manual_seed(0)
    down, up, x = Down(), Up(), images(64)
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (up(down(x)) - x).square().mean().backward()
        optimizer.step()
    return down.eval().requires_grad_(False), up.eval().requires_grad_(False)


@cache
def traced() -> tuple[gw.Program, str]:
    down, up = pair()
    x = images(3, seed=1)
    return gw.trace(down, (x,), "batch"), saved(up, down(x))


def rescaled(**options: Any) -> gw.Program:
    program, up = traced()
    return gw.passes.resize.Rescale(**{"up": up, "hr_steps": 1, "lr_steps": 2, **options})(program)


# ---- the gradient


class Mixed(nn.Module):
    """Groups, dilation, a transposed convolution, norms and resizing."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.a = nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2)
        self.b = nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1, groups=2)
        self.norm, self.c = nn.GroupNorm(2, 4), nn.Conv2d(4, 2, (3, 2), (2, 3), (1, 0))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.b(F.gelu(self.a(x)))))
        h = F.avg_pool2d(F.pixel_unshuffle(F.pixel_shuffle(h, 2), 2), 3, 2, 1)
        return F.interpolate(self.c(h), scale_factor=2.0, mode=self.mode)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_the_traced_gradient_is_autograds(norm: Any, mode: str) -> None:
    """In float64, at another batch than the traced one."""
    torch.manual_seed(0)
    net = Mixed(mode).double().eval().requires_grad_(False)
    at, image = torch.rand(5, 2, 6, 7).double(), torch.rand(5, 2, 6, 4).double()
    traced = error_and_gradient(net, at, image, norm, dict(net.named_parameters()))
    assert not any("backward" in str(node.target) for node in traced.graph.nodes)
    for rows in (1, 3):
        at, image = torch.rand(rows, 2, 6, 7).double(), torch.rand(rows, 2, 6, 4).double()
        x = at.clone().requires_grad_()
        apart = net(x) - image
        wanted = (apart.abs() if norm == "l1" else apart.square()).sum((1, 2, 3))
        wanted.sum().backward()
        errors, gradient = traced(at, image)
        torch.testing.assert_close(errors, wanted.detach(), rtol=1e-12, atol=1e-12)
        assert x.grad is not None
        assert x.grad.abs().max() > 0.1
        torch.testing.assert_close(gradient, x.grad, rtol=1e-11, atol=1e-12)


# ---- the steps


def by_hand(x: Tensor, o: dict[str, Any]) -> Tensor:
    """The stored image of one image [1, 1, H, W], by autograd, in float64."""
    import copy

    down, up = (copy.deepcopy(net).double() for net in pair())
    low, high = o["range"]

    def stored(y: Tensor) -> Tensor:
        count = o["levels"] - 1
        code = ((y.clamp(low, high) - low) / (high - low) * count).round()
        return low + code / count * (high - low)

    def restored(y: Tensor) -> Tensor:
        kept = stored(y) if o["round_in_loop"] else y.clamp(low, high)
        return up(y + (kept - y).detach())

    def steps(
        net: Callable[[Tensor], Tensor], at: Tensor, count: int, rate: float, limit: bool
    ) -> Tensor:
        def error(z: Tensor) -> Tensor:
            apart = net(z) - x
            return apart.abs().sum() if o["norm"] == "l1" else (apart**2).sum()

        at = at.clamp(low, high) if limit else at
        for _ in range(count):
            z = at.clone().requires_grad_()
            before = error(z)
            (g,) = torch.autograd.grad(before, z)
            moved = at - rate * (g.sign() if o["direction"] == "sign" else g)
            moved = moved.clamp(low, high) if limit else moved
            if o["backtrack"] and error(moved) > before:
                rate /= 2
            else:
                at = moved
        return at

    better = steps(lambda z: restored(down(z)), x, o["hr_steps"], o["hr_rate"], limit=False)
    return stored(steps(restored, down(better), o["lr_steps"], o["lr_rate"], limit=True))


OWN = {"hr_steps": 2, "lr_steps": 2, "hr_rate": 0.1, "lr_rate": 0.1, "norm": "l2",
       "direction": "gradient", "backtrack": True, "levels": 65536, "range": (0.0, 1.0),
       "round_in_loop": False}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_rate": 1.0, "hr_rate": 1.0},  # so far that steps are taken back
        {"norm": "l1", "direction": "sign", "backtrack": False, "levels": 256, "lr_rate": 0.013,
         "hr_rate": 0.007, "round_in_loop": True, "range": (-0.1, 1.2)},
    ],
)  # fmt: skip
def test_the_steps_are_those_by_hand(changes: dict[str, Any]) -> None:
    o = {**OWN, **changes}
    encoder = rescaled(**o)
    x = images(4, seed=2)
    found = run_in_double(encoder, (x,))[0]
    wanted = torch.cat([by_hand(one[None].double(), o) for one in x])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    plain = run_in_double(traced()[0], (x,))[0]
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize(("rate", "backtrack"), [(0.01, False), (5.0, True)])
def test_errors_do_not_rise_along_the_steps(rate: float, backtrack: bool) -> None:
    down, up = (net.double() for net in (Down().eval(), Up().eval()))
    down.load_state_dict(pair()[0].state_dict())
    up.load_state_dict(pair()[1].state_dict())
    x = images(5, seed=3).double()
    y = down(x).detach()
    for net, start in ((up, y), (nn.Sequential(down, up), x)):
        net.requires_grad_(False)
        tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        step = error_and_gradient(net, start, x, "l2", tensors)
        errors = []
        for steps in (0, 1, 2, 4, 8, 16):
            at = Descent(step, steps, rate, "gradient", backtrack)(start, x)
            errors.append((net(at) - x).square().sum((1, 2, 3)))
        for before, after in pairwise(errors):
            assert (after <= before).all()
        assert (errors[-1] < 0.99 * errors[0]).all()


def test_values_are_rounded_to_those_that_can_be_stored() -> None:
    stored = Stored(-1.0, 1.0, 5)
    y = torch.tensor([-3.0, -0.8, -0.7, 0.2, 0.3, 7.0])
    assert stored.nearest(y).tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 1.0]
    assert stored.inside(y).tolist() == pytest.approx([-1.0, -0.8, -0.7, 0.2, 0.3, 1.0])
    assert Stored(-1.0, 1.0, None).nearest(y) is y


# ---- the program


def psnr(y: Tensor, x: Tensor) -> Tensor:
    return -10 * (pair()[1](y) - x).square().mean((1, 2, 3)).log10()


@cache
def encoder() -> gw.Program:
    return rescaled(hr_steps=1, lr_steps=3)


def test_images_come_back_better_from_eight_bits() -> None:
    x = images(40, seed=4)
    with torch.no_grad():
        plain = psnr(Stored(0, 1, 256).nearest(traced()[0](x)), x)
        small = encoder()(x)
        found = psnr(small, x)
    codes = 255 * small
    assert (codes - codes.round()).abs().max() < 1e-4
    assert small.min() >= 0
    assert small.max() <= 1
    assert (found - plain).mean() > 0.3, (plain.mean(), found.mean())
    assert ((found > plain).double().mean()) > 0.9


def test_no_steps_are_the_pair() -> None:
    x = images(4, seed=5)
    none = rescaled(hr_steps=0, lr_steps=0, levels=None)
    assert torch.equal(none(x), traced()[0](x))


def test_weights_are_there_once() -> None:
    program, _ = traced()
    own = dict(program.state)
    up = {f"up.{name}": t for name, t in pair()[1].state_dict().items()}
    assert set(encoder().state) == {*own, *up}
    for name, tensor in own.items():
        assert encoder().state[name] is tensor
    for name, tensor in up.items():
        assert torch.equal(encoder().state[name], tensor)
    assert not any("backward" in str(node.target) for node in encoder().graph.nodes)


@cache
def smooth() -> gw.Program:
    return rescaled(lr_steps=1, levels=None)


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_both_artifacts_take_the_steps(backend: str) -> None:
    artifact = gw.lower(smooth(), backend)
    for count in (1, 5):
        x = images(count, seed=6)
        torch.testing.assert_close(artifact(x), smooth()(x), rtol=1e-5, atol=1e-5)


SPEC = """
version: 1
passes:
  - resize.rescale: {up: up.pt2, hr_steps: 1, lr_steps: 1}
lower: [onnxruntime]
"""


def test_a_spec_becomes_an_encoder(tmp_path: Path) -> None:
    program, up = traced()
    program.save(tmp_path / "down.pt2")
    (tmp_path / "up.pt2").write_bytes(Path(up).read_bytes())
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = gw.optimize(tmp_path / "down.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    x = images(3, seed=7)
    found = gw.load(tmp_path / "out")(x)
    # a value on the edge between two may fall to either
    assert (found - done.program(x)).abs().max() <= 1.001 / 255
    assert psnr(found, x).mean() > psnr(program(x), x).mean()


def test_it_says_where_nothing_is_gained() -> None:
    with pytest.warns(UserWarning, match="the steps gain nothing on the example inputs"):
        rescaled(hr_steps=0, lr_steps=1, lr_rate=100.0, backtrack=False)


class Rounded(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return F.interpolate(torch.round(y), scale_factor=2.0)


def test_refusals(tmp_path: Path) -> None:
    program, up = traced()
    y = program(images(3))

    def refused(net: nn.Module, example: Tensor, free: Any = "batch") -> gw.Program:
        return rescaled(up=saved(net, example, free))

    with pytest.raises(ArgumentError, match=r"there is no file of the upscaler"):
        rescaled(up=str(tmp_path / "none.pt2"))
    with pytest.raises(ModelError, match="the upscaler rounds or chooses"):
        refused(Rounded(), y)
    with pytest.raises(ModelError, match=r"has no gradient|written with forward calls"):
        refused(nn.Sequential(nn.MaxPool2d(3, 1, 1), pair()[1]), y)
    with pytest.raises(ModelError, match=r"the upscaler returns float32 \['batch', 1, 4, 4\]"):
        refused(nn.Conv2d(1, 1, 1), y)
    with pytest.raises(ModelError, match=r"the upscaler takes float32 \['batch', 1, 8, 8\]"):
        refused(nn.Conv2d(1, 1, 1), images(3))
    with pytest.raises(ModelError, match=r"the upscaler takes float32 \[3, 1, 4, 4\]"):
        refused(pair()[1], y, None)
    free = gw.trace(nn.AvgPool2d(2), (images(3),), {"input": {0: "b", 2: "h", 3: "w"}})
    with pytest.raises(ModelError, match="does not give back every size"):
        gw.passes.resize.Rescale(up=up)(free)
    with pytest.raises(ArgumentError, match=r"range .* does not rise"):
        rescaled(range=(1.0, 0.0))
    with pytest.raises(ArgumentError, match="nothing to round in the loop"):
        rescaled(levels=None, round_in_loop=True)
    with pytest.raises(ArgumentError, match="less than or equal to 32"):
        rescaled(lr_steps=33)
