"""A denoiser as a bundle in ONNX Runtime against the loop of diffusers, on the same weights.

    python tests/benchmarks/pipeline_speed.py

A U-Net of Stable Diffusion's form with random weights, DDIM, guidance in every step. Times are
processor time of one thread, the median over trajectories. What the driver costs is the time of a
trajectory outside of its calls of the programs.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import graphwright as gw
from graphwright.ir.sampling.sampler import Part

STEPS, SCALE, RUNS, SIZE, WIDTH = 20, 3.0, 7, 16, 32
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip


def network() -> Any:
    """The U-Net, its mid block and two levels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIZE, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=WIDTH, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def theirs(unet: Any, noise: torch.Tensor, text: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
    """The loop of diffusers' pipelines."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(STEPS)
    both, x = torch.cat([away, text]), noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = unet(torch.cat([x, x]), t, encoder_hidden_states=both, return_dict=False)[0]
            without, told = out.chunk(2)
            guided = without + SCALE * (told - without)
            x = scheduler.step(guided, t, x, return_dict=False)[0]
    return x


def bundles(unet: Any, folder: Path) -> dict[str, Any]:
    """With and without reuse of the inner blocks, every second step."""
    inputs = {
        "sample": torch.randn(2, 4, SIZE, SIZE), "timestep": torch.tensor([1.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 8, WIDTH),
    }  # fmt: skip
    free = {name: {0: "batch"} for name in inputs}
    traced = gw.trace(unet, inputs, free, ranges={"timestep": (0.0, 1000.0)})
    (folder / "scheduler_config.json").write_text(
        json.dumps({**SCHEDULER, "_class_name": "DDIMScheduler"})
    )
    config = str(folder / "scheduler_config.json")
    guided = gw.passes.sample.Cfg(guidance_scale=SCALE)(
        gw.passes.sample.Denoiser(scheduler=config)(traced)
    )
    inner = ["down_blocks.1", "mid_block", "up_blocks.0"]
    reused = gw.passes.sample.Reuse(modules=inner, interval=2)(guided)
    made = {"bundle": guided, "bundle, reuse": reused}
    return {name: gw.lower(program, "onnxruntime") for name, program in made.items()}


class Clock:
    """Processor time inside of the programs of a bundle."""

    def __init__(self, bundle: Any) -> None:
        self.seconds = 0.0
        for name, part in bundle.sampler.parts.items():
            bundle.sampler.parts[name] = Part(part.signature, self._timed(part.call))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(inputs: Any) -> Any:
            begin = time.process_time()
            found = call(inputs)
            self.seconds += time.process_time() - begin
            return found

        return timed


def measured(run: Callable[[], Any], clock: Clock | None = None) -> tuple[float, float]:
    """Milliseconds of a trajectory, and of those outside of the programs: medians."""
    whole, outside = [], []
    for _ in range(RUNS + 1):
        inside = clock.seconds if clock is not None else 0.0
        begin = time.process_time()
        run()
        spent = time.process_time() - begin
        whole.append(1000 * spent)
        outside.append(1000 * (spent - ((clock.seconds if clock is not None else 0.0) - inside)))
    return statistics.median(whole[1:]), statistics.median(outside[1:])


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    unet = network()
    noise = torch.randn(1, 4, SIZE, SIZE)
    text, away = (torch.randn(1, 8, WIDTH) for _ in range(2))
    name = "encoder_hidden_states"
    wanted = theirs(unet, noise, text, away)
    print("| program | ms per image | ms per step | driver per step | difference |")
    print("| --- | ---: | ---: | ---: | ---: |")
    spent, _ = measured(lambda: theirs(unet, noise, text, away))
    print(f"| loop of diffusers | {spent:.0f} | {spent / STEPS:.2f} | - | - |")
    with tempfile.TemporaryDirectory() as folder:
        made = bundles(unet, Path(folder))
    for label, bundle in made.items():

        def run(bundle: Any = bundle) -> torch.Tensor:
            found: torch.Tensor = bundle.sample(
                noise, {name: text}, negative={name: away}, steps=STEPS
            )
            return found

        off = float((run() - wanted).abs().max())
        spent, driver = measured(run, Clock(bundle))
        print(f"| {label} | {spent:.0f} | {spent / STEPS:.2f} | {driver / STEPS:.3f} ms "
              f"| {off:.1e} |")  # fmt: skip


if __name__ == "__main__":
    main()
