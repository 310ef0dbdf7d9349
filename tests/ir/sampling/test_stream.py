"""A stream of n slots is every frame alone; residual guidance by its definition; the filter."""

from __future__ import annotations

import pytest
import torch
from models import denoisers
from torch import Tensor

import graphwright as gw
from graphwright.ir.errors import ArgumentError
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.solvers.first import Lcm
from graphwright.ir.sampling.stream import SimilarityFilter, Stream, StreamSettings

STEPS = (900.0, 500.0, 100.0)
LABEL = {"label": torch.tensor([2])}


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.conv_denoiser()


def drawn(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def alone(denoiser: gw.Program, frame: Tensor, noises: Tensor, mode: str, w: float) -> Tensor:
    """One frame through all steps, by the formulas of the paper."""
    record = Sampler.of(denoiser).record
    levels = [record.noise_schedule.level(t) for t in STEPS]
    x, reference = levels[0].a * frame + levels[0].s * noises[:1], frame
    for i, level in enumerate(levels):
        one = [torch.tensor([v]) for v in (level.time, level.a, level.s)]

        def noise(label: int, x=x, one=one) -> Tensor:
            return denoiser(x, one[0], torch.tensor([label]), one[1], one[2])["noise"]

        e = noise(2)
        if mode != "none":
            if mode == "initialize" and i == 0:
                reference = (x - level.s * noise(4)) / level.a
            other = noise(4) if mode == "full" else (x - level.a * reference) / level.s
            e = other + w * (e - other)
        skip, out = Lcm().boundary(level.t)
        data = out * (x - level.s * e) / level.a + skip * x
        if i + 1 < len(levels):
            x = levels[i + 1].a * data + levels[i + 1].s * noises[i + 1 : i + 2]
    return data


@pytest.mark.parametrize(
    ("mode", "rows"), [("none", 3), ("self", 3), ("initialize", 4), ("full", 6)]
)
def test_a_stream_is_every_frame_alone(denoiser: gw.Program, mode: str, rows: int) -> None:
    noises, frames = drawn(3, 0), drawn(6, 1)
    settings = StreamSettings(STEPS, guidance=mode, guidance_scale=1.4)
    stream = Stream(Sampler.of(denoiser), settings, noises, LABEL)
    assert stream.rows == rows
    state, found = {}, []
    for k in range(6):
        done, state = stream.tick(frames[k : k + 1], state)
        found.append(done)
    assert found[:2] == [None, None]
    for k in range(4):
        wanted = alone(denoiser, frames[k : k + 1], noises, mode, 1.4)
        torch.testing.assert_close(found[k + 2], wanted, rtol=1e-4, atol=1e-5)


def test_a_scale_of_one_is_no_guidance(denoiser: gw.Program) -> None:
    made = []
    for settings in (
        StreamSettings(STEPS), StreamSettings(STEPS, guidance="self", guidance_scale=1.0)
    ):  # fmt: skip
        stream, state = Stream(Sampler.of(denoiser), settings, drawn(3, 0), LABEL), {}
        for k in range(3):
            done, state = stream.tick(drawn(3, 1)[k : k + 1], state)
        made.append(done)
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


def test_similar_frames_are_skipped_by_chance() -> None:
    still, frame = SimilarityFilter(most=10), drawn(1, 0)
    assert [still.skips(frame, 0.5) for _ in range(13)] == [False, *[True] * 10, False, True]
    moving = SimilarityFilter()
    assert not any(moving.skips(drawn(1, seed), 0.0) for seed in range(20))
    flat = torch.zeros(1, 2)
    flat[0, 0] = 1.0
    turned = torch.tensor([[0.99, (1 - 0.99**2) ** 0.5]])
    g, count = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        half = SimilarityFilter()
        half.skips(flat, 0.0)
        count += half.skips(turned, float(torch.rand((), generator=g)))
    assert 160 < count < 240  # 0.5 of 400, 4 standard deviations


def test_refusals(denoiser: gw.Program) -> None:
    plain = Sampler.of(denoiser)
    with pytest.raises(ArgumentError, match="3 slots, and noise for 2"):
        Stream(plain, StreamSettings(STEPS), drawn(2, 0), LABEL)
    with pytest.raises(ArgumentError, match="no guidance of a stream is named 'half'"):
        Stream(plain, StreamSettings(STEPS, guidance="half"), drawn(3, 0), LABEL)
    guided = Sampler.of(gw.passes.sample.Cfg()(denoiser))
    with pytest.raises(ArgumentError, match="a stream guides by itself"):
        Stream(guided, StreamSettings(STEPS), drawn(3, 0), LABEL)
    several = Sampler.of(denoisers.conv_denoiser(solver="dpmpp_2m"))
    with pytest.raises(ArgumentError, match="dpmpp_2m carries last_denoised from step to step"):
        Stream(several, StreamSettings(STEPS), drawn(3, 0), LABEL)
    text = Sampler.of(denoisers.conv_denoiser(unconditional={}))
    with pytest.raises(ArgumentError, match="needs `negative` for 'label'"):
        Stream(text, StreamSettings(STEPS, guidance="full"), drawn(3, 0), LABEL)
