"""The conformance zoo: published architectures at toy width with random weights.

An entry says how to build a model, what its inputs are, which dims are free, and at which other
sizes the compiled program must still equal the model. Nothing here knows how a model is traced.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Sizes = Mapping[str, int]
FAMILY_MODULES = (
    "torch_only",
    "papers",
    "vision",
    "vision_more",
    "encoders",
    "decoders",
    "encoder_decoders",
    "mixtures",
    "speech_and_series",
    "multimodal",
    "diffusion",
)


@dataclass(frozen=True)
class Field:
    """One tensor input: how to draw it, and its shape in ints and dim names."""

    draw: Callable[[tuple[int, ...], torch.Generator], Tensor]
    shape: tuple[int | str, ...]

    def sample(self, sizes: Sizes, generator: torch.Generator) -> Tensor:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)
        return self.draw(shape, generator)


def floats(*shape: int | str) -> Field:
    """Standard normal float32."""
    return Field(lambda s, g: torch.randn(s, generator=g), shape)


def ints(*shape: int | str, low: int = 3, high: int = 90) -> Field:
    """Uniform int64 in [low, high); `low` keeps clear of the usual padding ids."""
    return Field(lambda s, g: torch.randint(low, high, s, generator=g), shape)


def padding(*shape: int | str) -> Field:
    """An int64 attention mask, (batch, seq): right padding, at least half of each row kept."""

    def draw(s: tuple[int, ...], g: torch.Generator) -> Tensor:
        lengths = torch.randint((s[1] + 1) // 2, s[1] + 1, (s[0], 1), generator=g)
        return (torch.arange(s[1])[None] < lengths).long()

    return Field(draw, shape)


def boxes(*shape: int | str) -> Field:
    """Int64 boxes (left, top, right, bottom) below 100."""

    def draw(s: tuple[int, ...], g: torch.Generator) -> Tensor:
        corners = torch.randint(0, 100, (*s[:-1], 2, 2), generator=g)
        return corners.sort(dim=-2).values.reshape(s)

    return Field(draw, shape)


def ones(*shape: int | str) -> Field:
    """Float32 ones, as masks of time-series models."""
    return Field(lambda s, g: torch.ones(s), shape)


@dataclass(frozen=True)
class Architecture:
    """One row of the conformance table."""

    name: str
    family: str
    make: Callable[[], nn.Module]
    fields: Mapping[str, Field]
    checks: tuple[Sizes, ...]
    """Sizes that differ from the example's, each a partial override of `base`."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Non-tensor keyword arguments of the call."""
    base: Sizes = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    """Dims that the architecture itself ties to its configuration: used, but not declared free."""

    def build(self) -> nn.Module:
        """The model in eval mode, same weights at every call."""
        torch.manual_seed(0)
        model = self.make().eval()
        randomize_(model)
        return model

    def inputs(self, **sizes: int) -> dict[str, Tensor]:
        """Example inputs at the base sizes, or at others."""
        chosen = {"batch": 2, "seq": 8, **self.base, **sizes}
        generator = torch.Generator().manual_seed(sum(chosen.values()))
        return {name: f.sample(chosen, generator) for name, f in self.fields.items()}

    @property
    def dynamic(self) -> dict[str, dict[int, str]]:
        """Free dims by input name and axis."""
        return {
            name: {
                axis: dim
                for axis, dim in enumerate(f.shape)
                if isinstance(dim, str) and dim not in self.fixed
            }
            for name, f in self.fields.items()
        }


@torch.no_grad()
def randomize_(model: nn.Module) -> None:
    """Give every weight a scale at which signals live, so that no comparison is vacuous.

    Fresh models have zero biases, unit norms, layer scales of 1e-6 and untouched running
    statistics: much of the graph could be dropped and nothing would change.
    """
    g = torch.Generator().manual_seed(1)
    seen: set[int] = set()
    for p in model.parameters():
        if id(p) in seen or not p.is_floating_point():
            continue
        seen.add(id(p))
        if p.ndim >= 2:
            std = 1.0 / math.sqrt(max(1, p.numel() // p.shape[0]))
            scale = std / p.std().clamp_min(1e-12) if p.numel() > 1 and p.std() > 1e-6 else None
            p.copy_(p * scale if scale is not None else p + std * _normal(p, g))
        else:
            p.add_(0.1 * _normal(p, g))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(0.1 * _normal(module.running_mean, g))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=g))


def _normal(like: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=g).to(like.dtype)


ZOO: dict[str, Architecture] = {}


def add(
    name: str,
    family: str,
    make: Callable[[], nn.Module],
    fields: Mapping[str, Field],
    *checks: Sizes,
    **options: Any,
) -> None:
    """Enter one architecture; without `checks` it is tried again at batch 1 and 3."""
    if name in ZOO:
        raise ValueError(f"two architectures are called {name}")
    ZOO[name] = Architecture(
        name, family, make, fields, checks or ({"batch": 1}, {"batch": 3}), **options
    )


def published(package: str, name: str, *arguments: Any, **settings: Any) -> Callable[[], nn.Module]:
    """Builder that calls `package.name(*arguments, **settings)`."""

    def make() -> nn.Module:
        built: nn.Module = getattr(importlib.import_module(package), name)(*arguments, **settings)
        return built

    return make


def hub(package: str, model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """Builder of a Hugging Face model from its class names and a small configuration."""

    def make() -> nn.Module:
        library = importlib.import_module(package)
        return getattr(library, model)(getattr(library, config)(**settings))

    return make


def transformers(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """Builder of a transformers model, e.g. `transformers("BertModel", "BertConfig", ...)`."""
    return hub("transformers", model, config, **settings)


def diffusers(model: str, **settings: Any) -> Callable[[], nn.Module]:
    """Builder of a diffusers model, whose settings are keyword arguments."""
    return published("diffusers", model, **settings)


def load() -> dict[str, Architecture]:
    """All architectures by name, in the order of the table."""
    for module in FAMILY_MODULES:
        importlib.import_module(f"conformance.architectures.{module}")
    return ZOO
