"""The model of a GGUF file: configuration, weights as codes, tokenizer, all from what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.folder import load_coded
from graphwright.ir.files.coded.insert import Parts
from graphwright.ir.files.coded.layout import Layer, Layout
from graphwright.ir.files.config_size import fits, refuse_counts
from graphwright.ir.files.dtypes import Change, DtypeChoice
from graphwright.ir.files.gguf.architectures import (
    Placed,
    architecture_of,
    placed,
    rotary_factors,
)
from graphwright.ir.files.gguf.blocks import form_of
from graphwright.ir.files.gguf.configs import config_of
from graphwright.ir.files.gguf.reader import Stored
from graphwright.ir.files.gguf.split import read_gguf_parts
from graphwright.ir.files.gguf.tokenizer import write_tokenizer
from graphwright.ir.files.gguf.writer import write_gguf_file
from graphwright.ir.files.made import made_folder
from graphwright.ir.files.pretrained import build_pretrained


class GgufLayout(Layout):
    """Matrices of a GGUF file in blocks, one tensor each."""

    name = "GGUF"
    parts = ("blocks",)

    def __init__(self, stored: Mapping[str, Stored], where: str) -> None:
        super().__init__({}, where)
        self.stored = stored

    def read(self, owner: str, parts: Mapping[str, Tensor]) -> Layer:
        return Layer(form_of(self.stored[owner]))


METADATA = "metadata.gguf"
"""The file's own metadata, without its tensors, in the folder that is made of it."""


NOTES = "notes.json"
"""What was said of the tokenizer when that folder was made."""


@dataclass(frozen=True)
class GgufModel:
    """A model, read.

    Attributes:
        module: of transformers, in eval mode; its matrices in blocks are `CodedLinear`s.
        change: what became of the stored dtype.
        folder: config.json, generation_config.json and the tokenizer, as in a folder of
            transformers.
        files: that were read.
        notes: what the user should know, a line each.
    """

    module: nn.Module
    change: Change
    folder: Path
    files: list[Path]
    notes: list[str]


def read_gguf(path: Path, choice: DtypeChoice) -> GgufModel:
    """The model of a file.

    Args:
        path: of the file, or of one of several that a model is split into.
        choice: of the dtype. Matrices in blocks compute in float32 where none is asked for.

    Raises:
        ModelError: a damaged file, an architecture or a variant that is not read, tensors that are
            missing or too many, or transformers is not installed.
    """
    file, files = read_gguf_parts(path)
    architecture = architecture_of(file)
    config = config_of(file, architecture)
    refuse_counts(config, path)
    heads = config["num_attention_heads"]
    tensors = placed(file, (heads, config.get("num_key_value_heads", heads)))
    stored = {torch.float32} if tensors.codes else {
        tensor.dtype for tensor in tensors.floats.values() if tensor.dim() == 2
    }  # fmt: skip
    change = choice.decide(stored)
    dtype = change.dtype or next(iter(stored), torch.float32)
    config["dtype"] = str(dtype).removeprefix("torch.")
    with fits({name: tensor.data for name, tensor in file.tensors.items()}, path):
        module, notes = _built(path, config, tensors, dtype)
    _divide_frequencies(module, rotary_factors(file), path)
    said = json.dumps([config, file.digest, version("graphwright")])

    def fill(folder: Path) -> None:
        _write_config(folder, config, module)
        write_gguf_file(folder / METADATA, file.entries, {})
        lines = write_tokenizer(file, folder, config["max_position_embeddings"])
        (folder / NOTES).write_text(json.dumps(lines), encoding="utf-8")

    folder = made_folder(hashlib.sha256(said.encode()).hexdigest()[:32], fill)
    notes += json.loads((folder / NOTES).read_text(encoding="utf-8"))
    return GgufModel(module, change, folder, files, notes)


def _built(
    path: Path, config: dict[str, Any], tensors: Placed, dtype: torch.dtype
) -> tuple[nn.Module, list[str]]:
    """The module with the weights in it, and notes."""
    where = str(path)
    cls, settings = model_class(config, path)
    try:
        with torch.device("meta"):
            blank = cls(settings)
    except ModelError:
        raise
    except Exception as error:  # the library raises anything
        raise _no_model(path, error) from error
    config["architectures"] = [cls.__name__]
    marks = {f"{owner}.blocks": stored.data for owner, stored in tensors.codes.items()}
    parts = Parts({**tensors.floats, **marks}, GgufLayout(tensors.codes, where))
    warnings: list[str] = []

    def build(state: Mapping[str, Tensor]) -> nn.Module:
        model, warnings[:] = build_pretrained(cls, path, state, config=settings, dtype=dtype)
        return model

    model = load_coded(parts, build, blank, dtype)
    notes = parts.notes() if tensors.codes else []
    return model.eval(), [*warnings, *notes]


def model_class(config: Mapping[str, Any], path: Path) -> tuple[Any, Any]:
    """The class of a decoder, and its configuration from the entries of config.json.

    Raises:
        ModelError: transformers is not installed, or takes no such configuration.
    """
    transformers = _transformers(path)
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    try:
        cls = getattr(transformers, names[config["model_type"]])
        return cls, transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # the library raises anything
        raise _no_model(path, error) from error


def _no_model(path: Path, error: Exception) -> ModelError:
    return ModelError(
        "transformers builds no model of these entries",
        where=str(path),
        details=(innermost(error),),
    )


def _divide_frequencies(module: nn.Module, factors: Tensor | None, path: Path) -> None:
    """Puts the file's own factors into the frequencies of the rotary embedding."""
    if factors is None:
        return
    parts: list[Any] = list(module.modules())
    found = [part for part in parts if isinstance(getattr(part, "inv_freq", None), Tensor)]
    if not found or any(part.inv_freq.shape != factors.shape for part in found):
        raise ModelError("rope_freqs.weight fits no rotary embedding of the model",
                         where=str(path))  # fmt: skip
    for part in found:
        part.inv_freq = part.inv_freq / factors


def _write_config(folder: Path, config: dict[str, Any], module: Any) -> None:
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if getattr(module, "generation_config", None) is not None:
        module.generation_config.save_pretrained(str(folder))


def _transformers(path: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "transformers is needed to read a GGUF file",
            where=str(path),
            fix="pip install 'graphwright[hub]'",
        ) from error
    return transformers
