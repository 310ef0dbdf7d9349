"""Sampling programs of a denoiser of digits: quality, evaluations and time, one table.

    python tests/benchmarks/sampling.py

Accuracy is of a classifier that was trained on real digits; the distance is Frechet's between its
features of samples and of the held-out images.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import _paths  # noqa: F401
import numpy as np
import scipy.linalg
import torch
from models import digit_denoiser, digits
from torch import Tensor

import graphwright as gw

SAMPLES, STEPS, SCALE = 500, 20, 2.0
DEEP = ["down", "deep", "up"]


def features(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the classifier's head reads, and its classes."""
    kept: list[Tensor] = []
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        classes = model(x).argmax(1)
    hook.remove()
    return kept[0], classes


def frechet(a: Tensor, b: Tensor) -> float:
    """Between normal distributions of the moments of two sets, [n, features]."""
    means = [x.double().mean(0).numpy() for x in (a, b)]
    spreads = [np.cov(x.double().numpy().T) for x in (a, b)]
    root = scipy.linalg.sqrtm(spreads[0] @ spreads[1]).real
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(sum(spreads) - 2 * root))


def programs(denoiser: gw.Program) -> dict[str, tuple[gw.Program, dict[str, Any]]]:
    """The programs by name, and how they are sampled."""
    sample = gw.passes.sample
    deep = sample.Reuse(modules=DEEP, interval=2)
    return {
        "no guidance": (denoiser, {}),
        "cfg, Euler": (sample.Cfg(guidance_scale=SCALE)(denoiser), {"solver": "euler"}),
        "cfg": (sample.Cfg(guidance_scale=SCALE)(denoiser), {}),
        "cfg, first half": (sample.Cfg(guidance_scale=SCALE, stop=0.5)(denoiser), {}),
        "apg": (sample.Apg(guidance_scale=SCALE)(denoiser), {}),
        "cfgpp": (sample.Cfgpp(guidance_scale=0.3)(denoiser), {}),
        "adaptive_guidance": (
            sample.AdaptiveGuidance(
                guidance_scale=SCALE, similarity_space="x0", threshold=0.99
            )(denoiser), {},
        ),
        "linear_guidance": (
            sample.LinearGuidance(guidance_scale=SCALE, steps=STEPS)(denoiser), {}
        ),
        "cfg, reuse": (sample.Cfg(guidance_scale=SCALE)(deep(denoiser)), {}),
        "cfg, 10 steps": (sample.Cfg(guidance_scale=SCALE)(denoiser), {"steps": STEPS // 2}),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    denoiser = digit_denoiser.traced(digit_denoiser.trained())
    judge = digits.trained("resnet")
    real, _ = features(judge, digits.data()[2])
    noise = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(SAMPLES) % 10
    print("| program | evaluations | accuracy | Frechet distance | ms per image |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (program, settings) in programs(denoiser).items():
        with tempfile.TemporaryDirectory() as folder:
            gw.lower(program, "onnxruntime").save(folder)
            bundle = gw.load(folder)
            given = {"steps": STEPS, **settings}
            bundle.sample(noise[:10], {"label": labels[:10]}, **given)
            begin = time.process_time()
            made = bundle.sample(noise, {"label": labels}, **given)
            spent = 1000 * (time.process_time() - begin) / SAMPLES
        found, classes = features(judge, (made.clamp(-1, 1) + 1) / 2)
        right = 100 * float((classes == labels).double().mean())
        count = bundle.sampler.evaluations
        print(f"| {name} | {count} | {right:.1f} % | {frechet(found, real):.2f} | {spent:.2f} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
