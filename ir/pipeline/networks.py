"""The networks of diffusers pipelines: inputs of their programs, and how the networks are called.

A pipeline calls its networks with numbers, dictionaries and flags. A program takes one tensor per
input: the sample and the time first, then what the prediction depends on. Imports no diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphwright.ir.errors import ModelError

Inputs = dict[str, dict[str, Any]]
"""By name, as a spec declares them: dtype, shape, range."""

BATCH, SEQ = "batch", "seq"


@dataclass(frozen=True)
class Network:
    """What a network of a pipeline becomes.

    Attributes:
        inputs: of the program, of the configuration and the sizes of a latent image.
        call: runs the network on them; a tensor, or tensors by the names of the outputs.
        kind: `denoiser`, `text` or `autoencoder`.
    """

    inputs: Callable[[Mapping[str, Any], tuple[int, ...]], Inputs]
    call: Callable[..., Any]
    kind: str


# ---- denoisers


def _unet(config: Mapping[str, Any], sizes: tuple[int, ...]) -> Inputs:
    """UNet2DConditionModel."""
    width = config["cross_attention_dim"]
    if isinstance(width, list):
        (width,) = _one(set(width), "cross_attention_dim")
    found = {**_noisy("sample", config, sizes), "encoder_hidden_states": _floats(SEQ, width)}
    added = config.get("addition_embed_type")
    if added == "text_time":
        total, each = (
            config[f"{n}"]
            for n in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
        )
        found |= {"text_embeds": _floats(total - 6 * each), "time_ids": _floats(6)}
    elif added is not None:
        raise ModelError(f"a UNet2DConditionModel with addition_embed_type = {added!r} has inputs "
                         "that are not known to us")  # fmt: skip
    if config.get("time_cond_proj_dim") is not None:
        found["timestep_cond"] = _floats(config["time_cond_proj_dim"])
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise ModelError("a UNet2DConditionModel with class embeddings has inputs that are not "
                         "known to us")  # fmt: skip
    return found


def _call_unet(module: nn.Module, sample: Tensor, timestep: Tensor, **given: Tensor) -> Tensor:
    added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    more = {"added_cond_kwargs": added} if added else {}
    out: Tensor = module(sample, timestep, **given, **more, return_dict=False)[0]
    return out


def _plain_unet(config: Mapping[str, Any], sizes: tuple[int, ...]) -> Inputs:
    """UNet2DModel."""
    classes = config.get("num_class_embeds")
    return {**_noisy("sample", config, sizes), **(_labels(classes) if classes else {})}


def _sd3(config: Mapping[str, Any], sizes: tuple[int, ...]) -> Inputs:
    """SD3Transformer2DModel."""
    return {
        **_noisy("hidden_states", config, sizes),
        "encoder_hidden_states": _floats(SEQ, config["joint_attention_dim"]),
        "pooled_projections": _floats(config["pooled_projection_dim"]),
    }


def _pixart(config: Mapping[str, Any], sizes: tuple[int, ...]) -> Inputs:
    """PixArtTransformer2DModel."""
    found = {
        **_noisy("hidden_states", config, sizes),
        "encoder_hidden_states": _floats(SEQ, config["caption_channels"]),
        "encoder_attention_mask": {"dtype": "int64", "shape": (BATCH, SEQ), "range": (0, 2)},
    }
    more = config.get("use_additional_conditions")
    if more is None:
        more = config.get("sample_size") == 128  # as the model itself decides
    if more:
        found |= {"resolution": _floats(2), "aspect_ratio": _floats(1)}
    return found


def _call_pixart(
    module: nn.Module, hidden_states: Tensor, timestep: Tensor,
    resolution: Tensor | None = None, aspect_ratio: Tensor | None = None, **given: Tensor,
) -> Tensor:  # fmt: skip
    added = {"resolution": resolution, "aspect_ratio": aspect_ratio}
    out = module(hidden_states, timestep=timestep, added_cond_kwargs=added, **given,
                 return_dict=False)[0]  # fmt: skip
    return _without_variance(out, hidden_states)


def _dit(config: Mapping[str, Any], sizes: tuple[int, ...]) -> Inputs:
    """DiTTransformer2DModel; the class behind the last one stands for none."""
    classes = config.get("num_embeds_ada_norm") or 1000
    return {**_noisy("hidden_states", config, sizes), **_labels(classes + 1)}


def _call_transformer(
    module: nn.Module, hidden_states: Tensor, timestep: Tensor, **given: Tensor
) -> Tensor:
    out = module(hidden_states, timestep=timestep, **given, return_dict=False)[0]
    return _without_variance(out, hidden_states)


def _without_variance(out: Tensor, sample: Tensor) -> Tensor:
    """A prediction without the variance that some networks learn in channels behind it."""
    return out if out.shape[1] == sample.shape[1] else out[:, : sample.shape[1]]


def _noisy(name: str, config: Mapping[str, Any], sizes: tuple[int, ...]) -> Inputs:
    timestep = {"dtype": "float32", "shape": (BATCH,), "range": (0.0, 1000.0)}
    return {name: _floats(config["in_channels"], *sizes), "timestep": timestep}


def _labels(count: int) -> Inputs:
    return {"class_labels": {"dtype": "int64", "shape": (BATCH,), "range": (0, count)}}


def _floats(*sizes: int | str) -> dict[str, Any]:
    return {"dtype": "float32", "shape": (BATCH, *sizes)}


def _one(values: set[int], name: str) -> set[int]:
    if len(values) > 1:
        raise ModelError(f"a network of several {name} is not known to us: {sorted(values)}")
    return values


# ---- text encoders

LAST, POOLED, EMBEDS, NEXT_TO_LAST = (
    "last_hidden_state", "pooler_output", "text_embeds", "next_to_last_hidden_state",
)  # fmt: skip
"""Outputs of text encoders; pipelines read the layer before the last, too."""


def _ids(config: Mapping[str, Any], sizes: tuple[int, ...]) -> Inputs:
    """CLIP: the padding counts as text."""
    own = config.get("text_config") or config
    return {"input_ids": {"dtype": "int64", "shape": (BATCH, SEQ), "range": (0, own["vocab_size"])}}


def _call_clip(module: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    found = module(input_ids, output_hidden_states=True)
    pooled = EMBEDS if getattr(found, EMBEDS, None) is not None else POOLED
    return {
        LAST: found.last_hidden_state,
        pooled: getattr(found, pooled),
        NEXT_TO_LAST: found.hidden_states[-2].clone(),
    }


def _masked_ids(config: Mapping[str, Any], sizes: tuple[int, ...]) -> Inputs:
    """T5."""
    mask = {"dtype": "int64", "shape": (BATCH, SEQ), "range": (0, 2)}
    return {**_ids(config, sizes), "attention_mask": mask}


def _call_t5(module: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    return {LAST: module(input_ids, attention_mask=attention_mask).last_hidden_state}


# ---- autoencoders


def _latent(config: Mapping[str, Any], sizes: tuple[int, ...]) -> Inputs:
    return {"latent": _floats(config["latent_channels"], *sizes)}


def _call_decode(module: Any, latent: Tensor) -> Tensor:
    out: Tensor = module.decode(latent, return_dict=False)[0]
    return out


def _image(config: Mapping[str, Any], sizes: tuple[int, ...]) -> Inputs:
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return {"image": _floats(config["in_channels"], *(factor * size for size in sizes))}


def _call_encode(module: Any, image: Tensor) -> Tensor:
    """Mean and log-variance of the latent, one behind the other on the axis of channels."""
    out: Tensor = module.encode(image, return_dict=False)[0].parameters
    return out


DECODER, ENCODER = "vae_decoder", "vae_encoder"
"""Parts of an autoencoder; the encoder is made where a spec names it."""

NETWORKS = {
    "UNet2DConditionModel": Network(_unet, _call_unet, "denoiser"),
    "UNet2DModel": Network(_plain_unet, _call_unet, "denoiser"),
    "SD3Transformer2DModel": Network(_sd3, _call_transformer, "denoiser"),
    "PixArtTransformer2DModel": Network(_pixart, _call_pixart, "denoiser"),
    "DiTTransformer2DModel": Network(_dit, _call_transformer, "denoiser"),
    "CLIPTextModel": Network(_ids, _call_clip, "text"),
    "CLIPTextModelWithProjection": Network(_ids, _call_clip, "text"),
    "T5EncoderModel": Network(_masked_ids, _call_t5, "text"),
}
"""By the name of the class in `model_index.json`."""

AUTOENCODERS = {
    "AutoencoderKL": {
        DECODER: Network(_latent, _call_decode, "autoencoder"),
        ENCODER: Network(_image, _call_encode, "autoencoder"),
    },
}
"""The two halves of an autoencoder, by its class."""
