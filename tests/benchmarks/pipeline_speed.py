"""A denoiser as a bundle in ONNX Runtime against the loop of diffusers, on the same weights.

    python tests/benchmarks/pipeline_speed.py

A U-Net of Stable Diffusion's form with random weights, DDIM, guidance in every step. Times are
processor time of one thread. What the driver costs is the time of a trajectory whose programs
answer at once.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import graphwright as gw
from graphwright.ir.sampling.sampler import Part

STEPS, SCALE, RUNS, SIZE, WIDTH = 20, 3.0, 5, 16, 32
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


def driver_alone(bundle: Any, run: Callable[[], Any]) -> float:
    """Milliseconds of a trajectory whose programs answer at once, with what they gave before."""
    real = dict(bundle.sampler.parts)

    def answering(part: Part) -> Part:
        known: list[Any] = []

        def call(inputs: Any) -> Any:
            known.extend([part.call(inputs)] if not known else [])
            return known[0]

        return Part(part.signature, call)

    bundle.sampler.parts.update({name: answering(part) for name, part in real.items()})
    try:
        return measured(run, 20)
    finally:
        bundle.sampler.parts.update(real)


def measured(run: Callable[[], Any], count: int = RUNS) -> float:
    """Milliseconds of processor time of a call, the mean of several behind a first one."""
    run()
    begin = time.process_time()
    for _ in range(count):
        run()
    return 1000 * (time.process_time() - begin) / count


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
    spent = measured(lambda: theirs(unet, noise, text, away))
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
        spent, driver = measured(run), driver_alone(bundle, run)
        print(f"| {label} | {spent:.0f} | {spent / STEPS:.2f} | {driver / STEPS:.3f} ms "
              f"| {off:.1e} |")  # fmt: skip


if __name__ == "__main__":
    main()
