"""Compiled parts in the place of the networks of a diffusers pipeline.

A pipeline reads a few attributes of its networks (`config`, `dtype`, `device`) and calls them as
diffusers does. A stand-in has these attributes, and runs a compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.backends.base import Compiled
from graphwright.backends.bundle import Bundle
from graphwright.ir.errors import ArgumentError
from graphwright.ir.pipeline.networks import (
    DECODER,
    EMBEDS,
    ENCODER,
    LAST,
    NEXT_TO_LAST,
    POOLED,
)  # fmt: skip
from graphwright.ir.sampling.parameterization import output_of
from graphwright.ir.sampling.record import ALPHA, DENOISED, NEGATIVE, NOISE, SIGMA, Denoiser
from graphwright.ir.sampling.variants import FULL

DENOISERS = ("unet", "transformer")


def stand_in(pipe: Any, compiled: Mapping[str, Compiled]) -> Any:
    """Puts compiled parts in the place of the networks of a diffusers pipeline.

    The pipeline keeps its scheduler, tokenizer and arithmetic, and is otherwise used as before. Of
    a bundle that guides, the guidance takes the place of the pipeline's own, which then leads
    nowhere: both halves of its batch get the guided prediction.

    Args:
        pipe: a pipeline of diffusers; changed.
        compiled: parts by name, as `gw.load(folder)` gives them: `unet` or `transformer`,
            `text_encoder` (`_2`, `_3`), `vae_decoder`, `vae_encoder`; any of them.

    Returns:
        The pipeline.

    Raises:
        ArgumentError: the pipeline has no such network, or a bundle keeps a state from step to
            step, which a pipeline does not carry.
    """
    for name, part in compiled.items():
        own = "vae" if name in (DECODER, ENCODER) else name
        network = getattr(pipe, own, None)
        if network is None:
            raise ArgumentError(f"the pipeline has no network {own!r}, which {name!r} would be")
        stand: StandIn
        if own == "vae":
            known = isinstance(network, AutoencoderStandIn)
            halves = network if known else AutoencoderStandIn(network)
            halves.parts[name] = part
            stand = halves
        elif own in DENOISERS:
            stand = DenoiserStandIn(network, part)
        else:
            stand = TextStandIn(network, part)
        setattr(pipe, own, stand)
    return pipe


class StandIn(nn.Module):
    """What a pipeline reads of a network besides its results.

    Attributes:
        config: the network's own configuration.
        dtype: of its floats. device: where inputs are.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.config = network.config
        self.dtype: torch.dtype = network.dtype
        self.device: torch.device = network.device


class DenoiserStandIn(StandIn):
    """A compiled denoiser, called as a U-Net or transformer of diffusers.

    Attributes:
        part: the program: a bundle, or the network itself.
    """

    def __init__(self, network: Any, part: Compiled) -> None:
        super().__init__(network)
        self.part = part
        # diffusers' pipelines split off a learned variance by this count, and programs give none
        if self.config.get("out_channels") != self.config.get("in_channels"):
            self.config = type(self.config)(
                {**self.config, "out_channels": self.config["in_channels"]}
            )
        if isinstance(part, Bundle):
            _refuse_state(part.record)
            if part.record.doubles and self.config.get("_class_name") == "DiTTransformer2DModel":
                raise ArgumentError(
                    "a bundle that guides cannot stand in for a DiT, whose pipeline puts what is "
                    "led away from behind, and not in front",
                    fix="Compile the network without guidance, or sample with `bundle.sample`.",
                )

    def forward(self, sample: Any = None, timestep: Any = None, *more: Any, **given: Any) -> Any:
        """The network's output.

        Args:
            sample: [batch, channels, height, width], also as `hidden_states`.
            timestep: a number, or one per row.
            more: a U-Net's third argument, `encoder_hidden_states`.
            given: conditions; `added_cond_kwargs` is opened; arguments that are None are left out.

        Returns:
            A tuple of one tensor with `return_dict=False`, else an object with `sample`.

        Raises:
            ArgumentError: an argument that the program has no input for, or lacks; or another
                number of rows than the program takes.
        """
        as_dict = given.pop("return_dict", True)
        given = {**given, **(given.pop("added_cond_kwargs", None) or {})}
        given |= dict(zip(("encoder_hidden_states",), more, strict=False))
        given = {name: value for name, value in given.items() if value is not None}
        x = given.pop("hidden_states", sample)
        time = torch.as_tensor(timestep).reshape(-1).expand(len(x))
        out = self._bundle(x, time, given) if isinstance(self.part, Bundle) else self._plain(
            x, time, given
        )  # fmt: skip
        return _Output(sample=out) if as_dict else (out,)

    def _plain(self, x: Tensor, time: Tensor, given: dict[str, Any]) -> Tensor:
        first, second = (spec.name for spec in self.part.signature.inputs[:2])
        return _run(self.part, {first: x, second: time, **given})[0]

    def _bundle(self, x: Tensor, time: Tensor, given: dict[str, Any]) -> Tensor:
        """D and E of the program at the level of the time, as the network's own output."""
        assert isinstance(self.part, Bundle)
        record, program = self.part.record, self.part.parts[FULL]
        schedule = record.noise_schedule
        level = schedule.level(float(time[0]) / schedule.time_scale)
        rows = len(x)
        if record.doubles:
            if rows % 2:
                raise ArgumentError(
                    f"the bundle guides, and is given {rows} rows without a prediction to lead "
                    "away from",
                    fix="Call the pipeline with a guidance_scale above 1, or compile the network "
                    "without guidance.",
                )
            rows //= 2
            given = _halved(record, given, rows)
            x, time = x[rows:], time[rows:]
        a, s = (torch.full((rows,), value) for value in (level.a, level.s))
        asked = {record.sample: x, ALPHA: a, SIGMA: s, **given}
        if record.time is not None:
            asked[record.time] = time
        if record.guidance is not None:
            asked |= {n: torch.tensor(v) for n, v in record.guidance.parameters.items()}
        found = dict(zip((s.name for s in program.signature.outputs), _run(program, asked),
                         strict=True))  # fmt: skip
        out = _own_output(record, found[DENOISED], found[NOISE], x, level.a, level.s)
        return torch.cat([out, out]) if record.doubles else out


def _refuse_state(record: Denoiser) -> None:
    """A pipeline asks one question at a time, and carries nothing between them."""
    resting = record.guidance is not None and record.guidance.may_rest
    if record.carried or record.cached or record.settings or record.latent or resting:
        raise ArgumentError(
            "this bundle goes by the number of the step, or keeps a state from step to step, and a "
            "pipeline of diffusers tells it neither",
            fix="Sample with `bundle.sample`, or compile the network with `sample.denoiser` and "
            "`sample.cfg` over the whole trajectory.",
        )


def _halved(record: Denoiser, given: dict[str, Any], rows: int) -> dict[str, Any]:
    """Conditions of both halves of a batch: what is led away from comes first in it."""
    assert record.guidance is not None
    found = {name: value[rows:] for name, value in given.items()}
    for name in record.guidance.negatives:
        found[name] = given[name.removeprefix(NEGATIVE)][:rows]
    return found


def _own_output(
    record: Denoiser, data: Tensor, noise: Tensor, x: Tensor, a: float, s: float
) -> Tensor:
    """What the network itself would have given for this pair."""
    if record.parameterization == "epsilon":
        return noise
    alpha, sigma = (torch.tensor(value, dtype=data.dtype) for value in (a, s))
    out: Tensor = output_of(record.parameterization, data, x, alpha, sigma, record.sigma_data)
    return out


class TextStandIn(StandIn):
    """A compiled text encoder, called as one of transformers.

    Attributes:
        part: the program.
    """

    def __init__(self, network: Any, part: Compiled) -> None:
        super().__init__(network)
        self.part = part

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **given: Any) -> Any:
        """Hidden states and what is pooled from them, by name and by number.

        Args:
            input_ids: [batch, tokens].
            attention_mask: [batch, tokens]; all tokens are text where it is absent.
            given: flags of transformers, which change nothing here.

        Raises:
            ArgumentError: a mask for an encoder that takes none.
        """
        asked = {"input_ids": input_ids}
        if any(spec.name == "attention_mask" for spec in self.part.signature.inputs):
            whole = torch.ones_like(input_ids)
            asked["attention_mask"] = whole if attention_mask is None else attention_mask
        elif attention_mask is not None:
            raise ArgumentError("this text encoder was compiled without a mask, and is given one")
        flat = _run(self.part, asked)
        names = [spec.name for spec in self.part.signature.outputs]
        layers = bool(given.get("output_hidden_states"))
        return _TextOutput(dict(zip(names, flat, strict=True)), layers=layers)

    @property
    def text_model(self) -> Any:
        """What pipelines read of CLIP to skip layers."""
        raise _skips("norm behind its last layer")


class _TextOutput:
    """Outputs of a text encoder by name, and in transformers' order by number."""

    def __init__(self, found: dict[str, Tensor], *, layers: bool) -> None:
        self.found = found
        names = (EMBEDS, LAST) if EMBEDS in found else (LAST, POOLED)
        self.order: list[Any] = [found[name] for name in names if name in found]
        self.order += [self.hidden_states] if layers else []

    def __getitem__(self, place: int) -> Any:
        return self.order[place]

    def __getattr__(self, name: str) -> Tensor:
        if name in (LAST, POOLED, EMBEDS) and name in self.found:
            return self.found[name]
        raise AttributeError(name)

    @property
    def hidden_states(self) -> _HiddenStates:
        """Of the layers; the compiled encoder gives the last but one."""
        return _HiddenStates(self.found)


class _HiddenStates:
    def __init__(self, found: dict[str, Tensor]) -> None:
        self.found = found

    def __getitem__(self, place: int) -> Tensor:
        if place != -2 or NEXT_TO_LAST not in self.found:
            raise _skips(f"hidden state {place}")
        return self.found[NEXT_TO_LAST]


def _skips(what: str) -> ArgumentError:
    return ArgumentError(
        f"the compiled text encoder gives no {what}", fix="Call the pipeline without clip_skip."
    )


class AutoencoderStandIn(StandIn):
    """Compiled halves of an autoencoder, called as AutoencoderKL; a half that is not there is the
    network's own.

    Attributes:
        parts: programs by name.
    """

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self.parts: dict[str, Compiled] = {}
        self._own: Callable[[], Any] = lambda: network  # no module of this one

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """[batch, channels, height, width] of an image, from its latent."""
        if DECODER not in self.parts:
            return self._own().decode(z, return_dict=return_dict, generator=generator)
        (image,) = _run(self.parts[DECODER], {"latent": z})
        return _Output(sample=image) if return_dict else (image,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """The distribution of an image's latent."""
        if ENCODER not in self.parts:
            return self._own().encode(x, return_dict=return_dict)
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        (moments,) = _run(self.parts[ENCODER], {"image": x})
        found = DiagonalGaussianDistribution(moments)
        return _Output(latent_dist=found) if return_dict else (found,)


class _Output:
    """Results by name, and by number."""

    def __init__(self, **found: Any) -> None:
        vars(self).update(found)
        self._all = tuple(found.values())

    def __getitem__(self, place: int) -> Any:
        return self._all[place]


def _run(part: Compiled, given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """A program's flat outputs, on arguments by name.

    Raises:
        ArgumentError: there is no input of a name, one is missing, or sizes do not fit.
    """
    specs = {spec.name: spec for spec in part.signature.inputs}
    unknown = [name for name in given if name not in specs]
    missing = [name for name in specs if name not in given]
    if unknown or missing:
        told = [f"{word} {', '.join(names)}" for word, names in
                (("has no input", unknown), ("lacks", missing)) if names]  # fmt: skip
        raise ArgumentError(f"the compiled program takes {', '.join(specs)}: it "
                            f"{' and '.join(told)}")  # fmt: skip
    ready = []
    for name, spec in specs.items():
        tensor = given[name].to(getattr(torch, spec.dtype))
        for size, wanted in zip(tensor.shape, spec.shape, strict=True):
            if isinstance(wanted, int) and size != wanted:
                raise ArgumentError(
                    f"{name} is {tuple(tensor.shape)}, and the program was compiled for "
                    f"{tuple(spec.shape)}"
                )
        ready.append(tensor)
    return part.run_flat(tuple(ready))
