"""sample.stream: n slots are every frame alone, residual guidance by its definition, queues."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models import denoisers
from torch import Tensor

import graphwright as gw
from graphwright.ir.check.precision import run_in_double
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.sampler import Sampler
from graphwright.ir.sampling.stream import SimilarityFilter

DENOISER = ("sample.denoiser", {"unconditional": {"label": 4}})
CHAIN = ("denoiser", [DENOISER, ("sample.stream", {"steps": [500, 100], "guidance": "initialize"})])
STEPS = [900.0, 500.0, 100.0]
LABEL = {"label": torch.tensor([2])}
MODES = [("none", 3), ("self", 3), ("initialize", 4), ("full", 6)]


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return denoisers.conv_denoiser()


def streamed(denoiser: gw.Program, check: bool = False, **options: Any) -> gw.Program:
    given = {"steps": STEPS, "guidance_scale": 1.4, **options}
    return gw.passes.sample.Stream(**given)(denoiser, check=check)


def drawn(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def alone(
    denoiser: gw.Program, frame: Tensor, z: Tensor, mode: str, w: float, tracked: bool = False
) -> Tensor:
    """One frame through all steps in float64; the residual noise by definition, or tracked."""
    schedule = Sampler.of(denoiser).record.noise_schedule
    levels = [schedule.level(t) for t in STEPS]
    frame, z = frame.double(), z.double()
    x, v = levels[0].a * frame + levels[0].s * z[:1], z[:1]
    for i, at in enumerate(levels):

        def noise(label: int, x: Tensor = x, at: Any = at) -> Tensor:
            told = [torch.tensor([v], dtype=torch.float64) for v in (at.time, at.a, at.s)]
            inputs = (x, told[0], torch.tensor([label]), *told[1:])
            return run_in_double(denoiser, inputs)[1]

        e = noise(2)
        if mode == "initialize" and i == 0:
            v = noise(4)
            frame = (x - at.s * v) / at.a
        if mode != "none":
            v = v if tracked else (x - at.a * frame) / at.s
            other = noise(4) if mode == "full" else v
            e = other + w * (e - other)
        # the boundary scaling of consistency models, sigma_data 0.5 and ten times the step
        square = (10 * at.t) ** 2 + 0.25
        skip, out = (0.0, 1.0) if tracked else (0.25 / square, 10 * at.t / square**0.5)
        data = out * (x - at.s * e) / at.a + skip * x
        if i + 1 < len(levels):
            after = levels[i + 1]
            # what the released code carries, with the noise of the next slot put in
            v = z[i + 1 : i + 2] + after.a * (at.s * (v - e) / at.a) / after.s
            x = after.a * data + after.s * z[i + 1 : i + 2]
    return data


def ticks(stream: Any, frames: Tensor) -> list[Tensor | None]:
    state, found = {}, []
    for frame in frames:
        done, state = stream.tick(frame[None], state)
        found.append(done)
    return found


@pytest.mark.parametrize(("mode", "rows"), MODES)
def test_a_stream_is_every_frame_alone(denoiser: gw.Program, mode: str, rows: int) -> None:
    program = streamed(denoiser, check=True, guidance=mode)
    # one call of the network on as many rows
    first = next(n for n in program.graph.nodes if n.target is torch.ops.aten.conv2d.default)
    batch = next(n for n in program.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    assert first.meta["val"].shape[0] == rows * batch
    z, frames = drawn(3, 0), drawn(6, 1)
    found = ticks(Sampler.of(program).stream(z, LABEL), frames)
    assert found[:2] == [None, None]
    for k in range(4):
        wanted = alone(denoiser, frames[k : k + 1], z, mode, 1.4)
        error = (found[k + 2] - wanted).abs().max() / wanted.abs().max()
        assert float(error) < 1e-4, (mode, k)


@pytest.mark.parametrize("mode", ["self", "initialize"])
def test_the_noise_that_is_tracked_is_the_definition(denoiser: gw.Program, mode: str) -> None:
    program = streamed(denoiser, guidance=mode, boundary=False)
    z, frames = drawn(3, 0), drawn(3, 1)
    found = ticks(Sampler.of(program).stream(z, LABEL), frames)[-1]
    wanted = alone(denoiser, frames[:1], z, mode, 1.4, tracked=True)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_a_scale_of_one_is_no_guidance(denoiser: gw.Program) -> None:
    plain = Sampler.of(streamed(denoiser, guidance="none")).stream(drawn(3, 0), LABEL)
    wanted = ticks(plain, drawn(3, 1))[-1]
    for mode in ("self", "full"):
        stream = Sampler.of(streamed(denoiser, guidance=mode)).stream(drawn(3, 0), LABEL)
        stream.parameters["guidance_scale"] = 1.0
        torch.testing.assert_close(ticks(stream, drawn(3, 1))[-1], wanted, rtol=1e-3, atol=1e-4)


def test_one_slot_and_frames_side_by_side(denoiser: gw.Program) -> None:
    program = streamed(denoiser, steps=[400], guidance="self")
    z, frames = drawn(2, 0), drawn(2, 1)
    labels = {"label": torch.tensor([1, 3])}
    both, _ = Sampler.of(program).stream(z[None], labels).tick(frames, {})
    for k in range(2):
        one = Sampler.of(program).stream(z[k : k + 1], {"label": labels["label"][k : k + 1]})
        mine, state = one.tick(frames[k : k + 1], {})
        torch.testing.assert_close(mine, both[k : k + 1], rtol=1e-4, atol=1e-5)
        assert set(state) == {"filled"}


def test_a_wrong_formula_breaks_the_contract(
    denoiser: gw.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphwright.ir.errors import ContractError
    from graphwright.ir.sampling import slots

    real = slots.Leave.forward

    def wrong(self: Any, noise: Tensor, frame: Tensor, noises: Tensor, one: Tensor) -> Any:
        return real(self, 1.001 * noise, frame, noises, one)

    monkeypatch.setattr(slots.Leave, "forward", wrong)
    with pytest.raises(ContractError, match="is off by"):
        streamed(denoiser, check=True, guidance="none")


SPEC = """
version: 1
passes:
  - sample.denoiser: {unconditional: {label: 4}}
  - sample.stream: {steps: [900, 500, 100], guidance: initialize, guidance_scale: 1.4}
lower: [onnxruntime]
"""


def test_a_spec_becomes_a_bundle_that_streams(denoiser: gw.Program, tmp_path: Path) -> None:
    denoisers.conv().save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC)
    gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    bundle = gw.load(tmp_path / "out")
    z, frames = drawn(3, 0), drawn(5, 1)
    threads = set()

    def prepared(frame: Tensor) -> Tensor:
        threads.add(threading.get_ident())
        return frame[None]

    mine = list(bundle.stream(z, LABEL).run(frames, before=prepared, ahead=2))
    assert mine[:2] == [None, None]
    assert threading.get_ident() not in threads
    for k in range(3):
        wanted = alone(denoiser, frames[k : k + 1], z, "initialize", 1.4)
        assert float((mine[k + 2] - wanted).abs().max() / wanted.abs().max()) < 1e-3
    with pytest.raises(ArgumentError, match="a stream has no trajectories"):
        bundle.sample(drawn(1, 0), LABEL, steps=3)


def test_queues_pass_on_what_goes_wrong_and_frames_that_are_skipped(denoiser: gw.Program) -> None:
    stream = Sampler.of(streamed(denoiser, steps=[400])).stream(drawn(1, 0), LABEL)
    still = [drawn(1, 1)] * 4
    shown = list(stream.run(still, similar=SimilarityFilter(most=2), after=lambda x: x))
    # a picture that is the same is asked about again behind two that were skipped
    assert shown[0] is shown[1] is shown[2]
    assert shown[3] is not shown[0]
    with pytest.raises(ArgumentError, match="the frame has the shape"):
        list(stream.run([drawn(1, 1), drawn(2, 1)]))


def test_similar_frames_are_skipped_by_chance() -> None:
    still, frame = SimilarityFilter(most=10), drawn(1, 0)
    assert [still.skips(frame, 0.5) for _ in range(13)] == [False, *[True] * 10, False, True]
    moving = SimilarityFilter()
    assert not any(moving.skips(drawn(1, seed), 0.0) for seed in range(20))
    off = SimilarityFilter(threshold=1.0)
    assert not any(off.skips(frame, 0.0) for _ in range(3))
    flat = torch.zeros(1, 2)
    flat[0, 0] = 1.0
    turned = torch.tensor([[0.99, (1 - 0.99**2) ** 0.5]])
    g, count = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        half = SimilarityFilter()
        half.skips(flat, 0.0)
        count += half.skips(turned, float(torch.rand((), generator=g)))
    assert 160 < count < 240  # 0.5 of 400, 4 standard deviations
    with pytest.raises(ArgumentError, match="a cosine is -1 to 1"):
        SimilarityFilter(threshold=1.5)


def test_refusals(denoiser: gw.Program) -> None:
    with pytest.raises(ArgumentError, match="steps have to fall"):
        gw.passes.sample.Stream(steps=[100, 500])
    with pytest.raises(ArgumentError, match="step 1200 is not on the schedule, 0 to 999"):
        streamed(denoiser, steps=[1200])
    with pytest.raises(ModelError, match=r"a stream guides by itself, and sample\.cfg"):
        streamed(gw.passes.sample.Cfg()(denoiser))
    with pytest.raises(ModelError, match="dpmpp_2m carries last_denoised from step to step"):
        streamed(denoisers.conv_denoiser(solver="dpmpp_2m"))
    with pytest.raises(ModelError, match="makes some steps differ"):
        streamed(gw.passes.sample.Reuse(modules=["middle", "up"])(denoiser, check=False))
    with pytest.raises(ModelError, match="leads away from no condition"):
        streamed(denoisers.conv_denoiser(conditions=[], unconditional={}), guidance="full")
    with pytest.raises(ModelError, match="distilled from guided predictions"):
        streamed(denoisers.conv_denoiser(distilled="label"), guidance="full")
    edm = denoisers.labelled()
    with pytest.raises(ArgumentError, match="boundary scaling is of the steps of a table"):
        streamed(edm, steps=[5.0, 1.0])
    with pytest.raises(ArgumentError, match="this program is no stream"):
        Sampler.of(edm).stream(torch.randn(2, 2), LABEL)
    tick = streamed(denoisers.conv_denoiser(unconditional={}), guidance="full")
    for behind in (
        gw.passes.sample.Reuse(modules=["up"]),
        gw.passes.sample.Switch(network="none.pt2"),
        gw.passes.sample.Retrieve(index="none.npy"),
    ):
        with pytest.raises(ModelError, match="a tick of a stream is all steps at once"):
            behind(tick)
    sampler = Sampler.of(tick)
    with pytest.raises(ArgumentError, match=r"missing .'negative_label'"):
        sampler.stream(drawn(3, 0), LABEL)
    with pytest.raises(ArgumentError, match="3 slots"):
        sampler.stream(drawn(2, 0), LABEL)
    stream = sampler.stream(drawn(3, 0), LABEL, LABEL)
    with pytest.raises(ArgumentError, match="no parameter named 'delta'"):
        stream.tick(drawn(1, 0), {}, delta=2.0)
