"""Nets of the papers on restoration and generation: own promises, and the compiler's on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.zoo import randomize_
from models import paper_nets
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import GraphwrightError
from graphwright.ir.graph.nodes import op_name


def made(model: nn.Module) -> Any:
    model.eval().requires_grad_(False)
    randomize_(model)
    return model


def drawn(*shape: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=g)


def cleaned(program: gw.Program) -> gw.Program:
    for step in (gw.passes.cleanup.FoldConstants(), gw.passes.cleanup.RemoveIdentities(),
                 gw.passes.cleanup.EliminateCommonSubexpressions()):  # fmt: skip
        program = step(program)
    return program


def tuple_of(found: Any) -> tuple[Tensor, ...]:
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def hold(program: gw.Program, given: tuple[Tensor, ...], bound: float = 1e-4) -> None:
    """Both artifacts give what the program gives, relative to its largest value."""
    wanted = tuple_of(program(*given))
    for backend in ("onnxruntime", "triton"):
        found = tuple_of(gw.lower(program, backend)(*given))
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).abs().max() <= bound * b.abs().max(), backend


def small(program: gw.Program, given: tuple[Tensor, ...]) -> gw.Program:
    names = [spec.name for spec in program.signature.inputs]
    batch = dict(zip(names, given, strict=True))
    return gw.passes.quantize.Int8(activations="static")(program, calibration=[batch])


# ---- P70, P11


@pytest.mark.parametrize(("enough", "passes"), [(1e3, 1), (0.5, 2), (0.0, 3)])
def test_a_masked_cleaning_is_the_loop(enough: float, passes: int) -> None:
    torch.manual_seed(0)
    masked, loop = (paper_nets.VideoSuperResolution(masked=m) for m in (True, False))
    loop.load_state_dict(masked.state_dict())
    count = 0
    residues = iter([1.0, 0.4, 0.3, 1.0, 0.4, 0.3])
    for net in (masked, loop):
        net.enough = enough

        def clean(x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return torch.full_like(x, next(residues))

        net.clean = nn.Identity()
        net.clean.forward = clean  # type: ignore[method-assign]
    x = drawn(2, 3, 8, 8)
    wanted = x + sum([1.0, 0.4, 0.3][:passes])
    torch.testing.assert_close(masked.cleaned(x), wanted)
    before = count
    residues = iter([1.0, 0.4, 0.3])
    torch.testing.assert_close(loop.cleaned(x), wanted)
    assert count - before == passes


def test_a_still_flow_moves_nothing_and_a_pixel_of_flow_one_pixel() -> None:
    x, flow = drawn(1, 2, 6, 7), torch.zeros(1, 2, 6, 7)
    torch.testing.assert_close(paper_nets.warp(x, flow), x, atol=1e-5, rtol=0)
    flow[:, 0] = 1
    moved = paper_nets.warp(x, flow)
    torch.testing.assert_close(moved[..., :-1], x[..., 1:], atol=1e-5, rtol=0)
    assert not moved[..., -1].any()


def test_recurrent_super_resolution_in_both_artifacts_and_in_eight_bits() -> None:
    torch.manual_seed(0)
    model = made(paper_nets.VideoSuperResolution())
    clip = drawn(1, 3, 3, 12, 16)
    program = cleaned(gw.trace(model, (clip,)))
    torch.testing.assert_close(program(clip), model(clip), rtol=1e-4, atol=1e-5)
    hold(program, (clip,))
    codes = small(program, (clip,))
    warps = [n for n in codes.graph.nodes if op_name(n) == "grid_sampler"]
    assert len(warps) == 4
    assert all(n.meta["val"].dtype == torch.float32 for n in warps)  # warping stays float


def test_a_loop_that_looks_at_values_is_refused_with_its_line() -> None:
    torch.manual_seed(0)
    model = made(paper_nets.VideoSuperResolution(masked=False))
    with pytest.raises(GraphwrightError, match=r"paper_nets\.py"):
        gw.trace(model, (drawn(1, 2, 3, 8, 8),))


# ---- P65


def test_a_whole_patch_is_the_image_resized() -> None:
    net = paper_nets.PatchDiscriminator()
    image = drawn(2, 3, 8, 8)
    grid = net.grid(torch.ones(2), torch.zeros(2, 2))
    found = torch.nn.functional.grid_sample(image, grid, align_corners=True)
    torch.testing.assert_close(found, image, atol=1e-5, rtol=0)
    scale = drawn(1000, low=0.25)
    offset = drawn(1000, 2, seed=1) * (1 - scale)[:, None]
    assert net.grid(scale, offset).abs().max() <= 1 + 1e-6


def test_a_discriminator_of_patches_in_both_artifacts() -> None:
    torch.manual_seed(0)
    model = made(paper_nets.PatchDiscriminator())
    given = (drawn(3, 3, 16, 16), drawn(3, low=0.3, high=0.6), drawn(3, 2, seed=1, high=0.3))
    program = cleaned(gw.trace(model, given, "batch"))
    torch.testing.assert_close(program(*given), model(*given), rtol=1e-4, atol=1e-5)
    hold(program, given)
    hold(small(program, given), given, 3e-2)


def test_a_ray_march_in_both_artifacts() -> None:
    torch.manual_seed(0)
    model = made(paper_nets.RayMarch())
    given = (drawn(2, 3, 4, 8, 8, low=-1), drawn(2, 5, 3, seed=1, low=-0.3, high=0.3),
             drawn(2, 5, 3, seed=2, low=-0.4, high=0.4))  # fmt: skip
    program = cleaned(gw.trace(model, given, "batch"))
    torch.testing.assert_close(program(*given), model(*given), rtol=1e-4, atol=1e-5)
    hold(program, given)


# ---- P57


def test_children_are_smaller_and_inside_their_parents() -> None:
    torch.manual_seed(0)
    model = made(paper_nets.GaussianDecoder())
    x = drawn(2, 8, 16, low=-1)
    centre, scale, turn, _ = model(x)
    assert centre.shape == (2, 8 + 32 + 128, 3)
    turned = paper_nets.rotation(turn)
    torch.testing.assert_close(turned @ turned.mT, torch.eye(3).expand_as(turned), atol=1e-5,
                               rtol=0)  # fmt: skip
    for begin, count in ((0, 8), (8, 32)):
        parents = slice(begin, begin + count)
        children = slice(begin + count, begin + 5 * count)
        above = scale[:, parents].repeat_interleave(4, 1)
        assert (scale[:, children] <= above + 1e-6).all()
        moved = (centre[:, children] - centre[:, parents].repeat_interleave(4, 1)).norm(dim=-1)
        assert (moved <= above.exp().norm(dim=-1) + 1e-5).all()


def test_a_decoder_of_gaussians_in_both_artifacts() -> None:
    torch.manual_seed(0)
    model = made(paper_nets.GaussianDecoder())
    x = drawn(2, 8, 16, low=-1)
    program = cleaned(gw.trace(model, (x,), "batch"))
    for a, b in zip(program(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    hold(program, (x,))


@torch.library.custom_op("tests_paper_nets::rasterize", mutates_args=())
def rasterize(points: Tensor) -> Tensor:
    return points.sum(1)


@rasterize.register_fake
def _(points: Tensor) -> Tensor:
    return points.new_empty(points.shape[0], points.shape[2])


class Rendered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = paper_nets.GaussianDecoder()

    def forward(self, x: Tensor) -> Tensor:
        return rasterize(self.decoder(x)[0])


def test_a_rasterizer_of_ones_own_is_refused_by_its_name() -> None:
    torch.manual_seed(0)
    program = gw.trace(made(Rendered()), (drawn(2, 8, 16, low=-1),))
    with pytest.raises(GraphwrightError, match="rasterize"):
        gw.lower(program, "onnxruntime")


# ---- P56


def test_given_noise_makes_the_autoencoder_a_function() -> None:
    torch.manual_seed(0)
    model = made(paper_nets.ConditionalVae())
    given = (drawn(3, 1, 8, 8), drawn(3, 3, seed=1), drawn(3, 4, seed=2, low=-1))
    program = cleaned(gw.trace(model, given, "batch"))
    for a, b in zip(program(*given), model(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    hold(program, given)
    hold(small(program, given), given, 5e-2)


class TwoDraws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vae = paper_nets.ConditionalVae()

    def forward(self, image: Tensor, attributes: Tensor) -> Tensor:
        return self.vae(image, attributes)[0] - self.vae(image, attributes)[0]


def test_two_draws_stay_two_and_are_refused_by_name_where_nothing_can_be_compared() -> None:
    torch.manual_seed(0)
    given = (drawn(3, 1, 8, 8), drawn(3, 3, seed=1))
    with pytest.warns(UserWarning, match="random numbers"):
        program = gw.trace(made(TwoDraws()), given, "batch")
    program = cleaned(program)
    assert sum(op_name(n) == "randn_like" for n in program.graph.nodes) == 2
    assert program(*given).abs().max() > 1e-3
    with pytest.raises(GraphwrightError, match="randn_like"):
        gw.lower(program, "onnxruntime")


# ---- P68


def test_a_camera_is_inverted_away_from_the_ends() -> None:
    torch.manual_seed(0)
    net = paper_nets.Camera().double()
    rgb = drawn(2, 3, 6, 8, low=0.1, high=0.9).double()
    gains, matrix = net.parameters_of(rgb)
    torch.testing.assert_close(matrix.sum(2), torch.ones_like(gains))  # grey stays grey
    linear = net.to_linear(rgb, gains, matrix)
    inside = linear.amin(1, keepdim=True) > 0
    back = net.to_rgb(linear, gains, matrix)
    kept = inside.expand_as(rgb)
    torch.testing.assert_close(back[kept], rgb[kept], rtol=0, atol=1e-6)
    one = torch.eye(4, dtype=torch.float64)[[2]]
    assert torch.equal((one @ net.gains)[0], net.gains[2])


def test_a_camera_in_both_artifacts() -> None:
    torch.manual_seed(0)
    model = paper_nets.Camera().eval().requires_grad_(False)
    light = drawn(2, 3, 8, 12, low=0.1, high=0.9)
    program = cleaned(gw.trace(model, (light,), "batch"))
    rgb, mosaic = program(light)
    torch.testing.assert_close(rgb, model(light)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(mosaic[:, 0, ::2, ::2], light[:, 0, ::2, ::2])
    assert torch.equal(mosaic[:, 0, 1::2, 1::2], light[:, 2, 1::2, 1::2])
    hold(program, (light,))
