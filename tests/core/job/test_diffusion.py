"""A diffusers pipeline from a folder to images, by its bundle and in the pipeline itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import denoisers, pipelines
from torch import Tensor

import graphwright as gw
from graphwright.backends.stand_in import DenoiserStandIn, TextStandIn
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.detect import detect

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*batch.*"
)
STEPS, SCALE = 4, 3.0
SPEC = f"""
version: 1
parts:
  text_encoder:
    passes: [{{quantize.rtn: {{bits: 8, block: 16}}}}]
  unet:
    passes:
      - sample.denoiser: {{scheduler: pipeline}}
      - sample.cfg: {{guidance_scale: {SCALE}}}
lower: [onnxruntime]
"""
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
FLOW = """
version: 1
parts:
  transformer:
    passes: [{sample.denoiser: {scheduler: pipeline}}, {sample.cfg: {guider: pipeline}}]
lower: [onnxruntime]
"""


def optimized(source: Path, text: str, place: Path) -> Any:
    (place / "spec.yaml").write_text(text)
    return gw.optimize(source, place / "spec.yaml", out=place / "out")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def diffusion(place: Path) -> tuple[Any, Any]:
    """The pipeline, and what its folder was compiled to."""
    pipe = pipelines.stable_diffusion(place / "sd")
    return pipe, optimized(place / "sd", SPEC, place)


def asked(seed: int = 0) -> dict[str, Any]:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {
        "prompt": ["a cat", "two dog"], "negative_prompt": ["no", "bad"], "latents": noise,
        "num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "pt",
    }  # fmt: skip


def decoded(parts: Any, pipe: Any, latent: Tensor) -> Tensor:
    config = pipe.vae.config
    image = parts["vae_decoder"](latent / config.scaling_factor + (config.shift_factor or 0.0))
    return (image / 2 + 0.5).clamp(0, 1)


def test_the_bundle_gives_the_images_of_the_pipeline(diffusion: Any) -> None:
    pipe, outcome = diffusion
    given, parts = asked(), gw.load(outcome.folder)
    assert list(parts) == ["text_encoder", "unet", "vae_decoder"]
    text, negative = pipe.encode_prompt(given["prompt"], "cpu", 1, True, given["negative_prompt"])
    name = "encoder_hidden_states"
    latent = parts["unet"].sample(
        given["latents"], {name: text}, negative={name: negative}, steps=STEPS
    )
    wanted = pipe(**given).images
    assert float(wanted.std()) > 0.05
    assert float((decoded(parts, pipe, latent) - wanted).abs().max()) < 1e-3


def test_parts_stand_in_for_the_networks(diffusion: Any) -> None:
    pipe, outcome = diffusion
    parts, wanted = gw.load(outcome.folder), pipe(**asked(1)).images
    import diffusers

    mine = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    gw.stand_in(mine, {name: parts[name] for name in ("unet", "vae_decoder")})
    assert isinstance(mine.unet, DenoiserStandIn)
    assert float((mine(**asked(1)).images - wanted).abs().max()) < 1e-3
    gw.stand_in(mine, {"text_encoder": parts["text_encoder"]})
    assert isinstance(mine.text_encoder, TextStandIn)
    found = mine(**asked(1)).images
    # what 8 bits of the text encoder lose, and no more
    assert 1e-7 < float((found - wanted).abs().max()) < 0.02
    for skip, what in ((2, "hidden state -3"), (1, "norm behind its last layer")):
        with pytest.raises(ArgumentError, match=f"gives no {what}"):
            mine(**asked(1), clip_skip=skip)
    with pytest.raises(ArgumentError, match="without a prediction to lead away from"):
        mine(**{**asked(1), "guidance_scale": 1.0, "prompt": "a", "latents": None})
    with pytest.raises(ArgumentError, match="compiled for"):
        mine(**{**asked(1), "latents": None}, height=16, width=16)


def test_each_part_has_its_own_chain_and_the_report_says_so(diffusion: Any) -> None:
    _, outcome = diffusion
    rows = [(row["part"], row["id"]) for row in outcome.report["passes"]]
    assert rows == [
        ("text_encoder", "quantize.rtn"),
        ("unet", "sample.denoiser"),
        ("unet", "sample.cfg"),
    ]
    sizes = {n: (r["weight_bytes"], r["weight_bytes_after"])
             for n, r in outcome.report["parts"].items()}  # fmt: skip
    assert sizes["text_encoder"][1] < 0.5 * sizes["text_encoder"][0]
    assert sizes["unet"][1] == sizes["unet"][0]
    # the lock repeats it, part by part
    lock = gw.load_spec(outcome.folder / "spec.lock.yaml")
    assert {n: [c.id for c in p.passes] for n, p in lock.parts.items()} == {
        "text_encoder": ["quantize.rtn"], "unet": ["sample.denoiser", "sample.cfg"],
    }  # fmt: skip


def test_the_batch_does_not_change_on_the_way(diffusion: Any) -> None:
    bundle = gw.load(diffusion[1].folder)["unet"]
    text = {"encoder_hidden_states": torch.randn(2, 8, 16)}
    plan = bundle.plan(2, text, negative=text, steps=STEPS)
    x, state = bundle.step(plan, 0, torch.randn(2, 4, 8, 8), {})
    with pytest.raises(ArgumentError, match="the batch is 1, and the trajectory was begun with 2"):
        bundle.step(plan, 1, x[:1], state)


def test_flow_matching_with_a_guider_of_the_folder(tmp_path: Path) -> None:
    """A transformer of Stable Diffusion 3; guidance is what `guider_config.json` says."""
    from diffusers.guiders import ClassifierFreeGuidance

    pipe = pipelines.stable_diffusion_3(tmp_path / "sd3")
    ClassifierFreeGuidance(guidance_scale=SCALE).save_pretrained(tmp_path / "sd3" / "guider")
    outcome = optimized(tmp_path / "sd3", FLOW, tmp_path)
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 4, 8, 8, generator=g)
    text, away = (torch.randn(2, 6, 8, generator=g) for _ in range(2))
    pooled, away_pooled = (torch.randn(2, 6, generator=g) for _ in range(2))
    given = {
        "prompt_embeds": text, "negative_prompt_embeds": away, "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": away_pooled, "latents": noise, "output_type": "pt",
        "num_inference_steps": STEPS, "guidance_scale": SCALE, "height": 8, "width": 8,
    }  # fmt: skip
    wanted, parts = pipe(**given).images, gw.load(outcome.folder)
    latent = parts["transformer"].sample(
        noise, {"encoder_hidden_states": text, "pooled_projections": pooled}, steps=STEPS,
        negative={"encoder_hidden_states": away, "pooled_projections": away_pooled},
    )  # fmt: skip
    assert float((decoded(parts, pipe, latent) - wanted).abs().max()) < 1e-3
    found = gw.stand_in(pipe, parts)(**{**given, "guidance_scale": 9.0}).images
    assert float((found - wanted).abs().max()) < 1e-3  # its own scale leads nowhere


# ---- what cannot be, before a network is opened or traced


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The index of a pipeline, without the networks."""
    made = tmp_path / "empty"
    made.mkdir()
    (made / "model_index.json").write_text(json.dumps(INDEX))
    return made


def test_a_part_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    text = SPEC.replace("  unet:", "  unett:")
    with pytest.raises(ArgumentError, match="no part 'unett', but text_encoder, unet") as found:
        optimized(folder, text, tmp_path)
    assert found.value.exit_code == 2


def test_weights_that_are_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights of its text_encoder") as found:
        optimized(folder, SPEC, tmp_path)
    assert found.value.exit_code == 3


def test_a_network_that_is_not_known(folder: Path, tmp_path: Path) -> None:
    index = INDEX | {"unet": ["diffusers", "Other"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="unet is a Other, whose inputs are not known"):
        optimized(folder, SPEC, tmp_path)


def test_inputs_are_not_declared_twice(folder: Path, tmp_path: Path) -> None:
    text = SPEC + "model: {inputs: {x: {dtype: float32, shape: [1]}}}\n"
    with pytest.raises(ArgumentError, match="say themselves what they take"):
        optimized(folder, text, tmp_path)


def test_other_commands_still_name_the_folders(folder: Path) -> None:
    with pytest.raises(ModelError, match="pipeline of several models"):
        detect(folder)


def test_one_program_has_no_parts(tmp_path: Path) -> None:
    denoisers.conv().save(tmp_path / "net.pt2")
    with pytest.raises(ArgumentError, match="is one program, and has no parts"):
        optimized(tmp_path / "net.pt2", SPEC, tmp_path)
