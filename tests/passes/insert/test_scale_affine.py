"""Scale affine layers: the network at the start, the formula when trained, both artifacts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError

CHAIN = ("conv", [("insert.scale_affine", {"targets": ["first"]})])


class Codec(nn.Module):
    """An encoder with a norm and a decoder; one convolution is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 5, stride=2, padding=2)
        self.norm = nn.GroupNorm(2, 6)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.down(x)))
        return self.up(self.twice(F.relu(self.twice(x))))


def codec() -> gw.Program:
    torch.manual_seed(0)
    free = {"x": {0: "batch", 2: "height", 3: "width"}}
    return gw.trace(Codec().eval(), (torch.randn(2, 3, 8, 12),), free)


def moved(program: gw.Program) -> gw.Program:
    g = torch.Generator().manual_seed(3)
    state = {
        name: nn.Parameter(t + 0.3 * torch.randn(t.shape, generator=g))
        if "scale_affine" in name else t
        for name, t in program.state.items()
    }  # fmt: skip
    return program.replace(state=state)


def test_it_starts_as_the_network_and_becomes_the_formula() -> None:
    before = codec()
    made = gw.passes.insert.ScaleAffine(targets=["down"])(before)
    made = gw.passes.insert.ScaleAffine(targets=["up"], place="input")(made)
    x = torch.randn(1, 3, 10, 6)
    torch.testing.assert_close(made(x), before(x))
    changed = moved(made)
    s = {name: t.detach().double() for name, t in changed.state.items()}

    def affine(y: Tensor, name: str) -> Tensor:
        w = {part: s[f"{name}.scale_affine.{part}.weight"][:, :, 0, 0]
             for part in ("reads", "affine")}  # fmt: skip
        b = {part: s[f"{name}.scale_affine.{part}.bias"][:, None, None]
             for part in ("reads", "affine")}  # fmt: skip
        hidden = torch.einsum("oc,bchw->bohw", w["reads"], y) + b["reads"]
        q = torch.einsum("oc,bchw->bohw", w["affine"], F.gelu(hidden)) + b["affine"]
        return y * (1 + q[:, :6]) + q[:, 6:]

    y = F.conv2d(x.double(), s["down.weight"], s["down.bias"], 2, 2)
    y = affine(F.group_norm(y, 2, s["norm.weight"], s["norm.bias"]), "down")
    y = F.relu(y)
    for _ in range(2):
        y = F.conv2d(y if _ == 0 else F.relu(y), s["twice.weight"], s["twice.bias"], padding=1)
    wanted = F.conv_transpose2d(affine(y, "up"), s["up.weight"], s["up.bias"], 2)
    torch.testing.assert_close(changed(x).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_artifacts_are_the_program_behind_pruning_and_int8(backend: str) -> None:
    made = moved(gw.passes.insert.ScaleAffine(targets=["down"])(codec()))
    x = torch.randn(3, 3, 12, 8)
    small = gw.passes.prune.Magnitude(sparsity=0.3)(made)
    small = gw.passes.quantize.Int8(activations="static")(small, calibration=[{"x": x}])
    for program, bound in ((made, 1e-5), (small, 2e-2)):  # rounding may move a code of 8 bits
        found, wanted = gw.lower(program, backend)(x).detach(), program(x).detach()
        assert (found - wanted).norm() < bound * wanted.norm()


def test_what_it_leaves_alone_is_said() -> None:
    with pytest.raises(ModelError, match="no chosen convolution") as failed:
        gw.passes.insert.ScaleAffine(targets=["twice"])(codec())
    assert "called 2 times" in str(failed.value)


def test_freezing_leaves_the_layer_to_learn() -> None:
    made = gw.passes.insert.ScaleAffine(targets=["down"], freeze=True)(codec())
    assert sorted(made.trainable()) == [
        f"down.scale_affine.{part}.{kind}"
        for part in ("affine", "reads") for kind in ("bias", "weight")
    ]  # fmt: skip
