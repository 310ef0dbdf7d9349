"""Model folders of transformers and diffusers: local files only, never the folder's own code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.files.checkpoint import read_checkpoint
from graphwright.ir.files.coded.description import (
    description_beside,
    layout_of,
    refuse_undescribed,
)
from graphwright.ir.files.config_size import fits, refuse_counts
from graphwright.ir.files.detect import Kind, detect, read_json
from graphwright.ir.files.dtypes import STORED, Change, DtypeChoice
from graphwright.ir.files.mapped import IN_MEMORY
from graphwright.ir.files.pretrained import build_mapped, build_pretrained
from graphwright.ir.files.safetensor_files import read_safetensors, shards_of
from graphwright.ir.files.target import WRAPPERS, stripped
from graphwright.ir.files.weights import fill

_CODE_KEYS = ("attn_implementation", "experts_implementation", "_attn_implementation_internal")


def weight_files(folder: Path, kind: Kind) -> list[Path]:
    """The files the weights will be read from; safetensors where there are any.

    Raises:
        ModelError: none, or an index names one that is not there.
    """
    stems = ("model",) if kind is Kind.HUGGING_FACE else ("diffusion_pytorch_model", "model")
    for stem in stems:
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return [index, *shards_of(index)]
    pickled = "pytorch_model" if kind is Kind.HUGGING_FACE else "diffusion_pytorch_model"
    if (folder / f"{pickled}.bin").is_file():
        return [folder / f"{pickled}.bin"]
    index = folder / f"{pickled}.bin.index.json"
    if index.is_file():
        return [index, *shards_of(index)]
    own = _of_its_own_name(folder)
    if own:
        return own
    raise ModelError(
        "this folder has a config.json and no weights",
        where=str(folder),
        fix="It needs model.safetensors, its shards with an index, or pytorch_model.bin.",
    )


def _of_its_own_name(folder: Path) -> list[Path]:
    """Weights in codes under a name of their tool's choice, as gptq_model-4bit-128g.safetensors."""
    if description_beside(folder) is None:
        return []
    indexes = list(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return [*indexes, *shards_of(indexes[0])]
    files = list(folder.glob("*.safetensors"))
    return files if len(files) == 1 else []


def read_folder(
    folder: Path,
    kind: Kind,
    choice: DtypeChoice = STORED,
    *,
    strip_prefix: str | None = None,
) -> tuple[nn.Module, Change, list[str]]:
    """The model of a folder, in eval mode, what became of its dtype, and warnings.

    Args:
        folder: with config.json and the weights.
        kind: of transformers or of diffusers.
        choice: of the dtype that the weights are loaded in; else the stored one.
        strip_prefix: what to take off the names of tensors.

    Raises:
        ModelError: the library is not installed, the architecture needs the folder's own code, or
            tensors are missing, of another shape, damaged or would run code.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ModelError("config.json holds no object", where=str(folder))
    _refuse_code(config, folder)
    refuse_counts(config, folder)
    weights = _weights(folder, kind)
    with fits(weights, folder):
        return _built(config, weights, folder, kind, choice, strip_prefix)


def _built(
    config: dict[str, Any], weights: dict[str, torch.Tensor], folder: Path, kind: Kind,
    choice: DtypeChoice, strip_prefix: str | None,
) -> tuple[nn.Module, Change, list[str]]:  # fmt: skip
    """The model of the folder, by its library."""
    find = _transformers_class if kind is Kind.HUGGING_FACE else _diffusers_class
    cls = find(config, folder)
    inner, more = _wrapped(weights, strip_prefix, folder)
    described = description_beside(folder)
    if described is not None:
        model, change, notes = _read_coded(
            cls, described[0], inner or weights, folder, kind, choice
        )
        return model, change, [*more, *notes]
    refuse_undescribed(weights, str(folder))
    stored = _stored_dtype(config, weights)
    change = choice.decide({stored})
    dtype = change.dtype or stored
    key = "dtype" if kind is Kind.HUGGING_FACE else "torch_dtype"
    arguments: dict[str, Any] = {key: dtype}
    if inner is None and kind is Kind.HUGGING_FACE and _is_large(weights, change):
        model, warnings = build_mapped(cls, folder, weights, dtype)
    elif inner is None:
        model, warnings = build_pretrained(cls, folder, **arguments)
    elif kind is Kind.HUGGING_FACE:
        model, warnings = build_pretrained(cls, folder, inner, **arguments)
    else:
        try:
            with torch.device("meta"):
                cls.from_config(cls.load_config(str(folder)))  # to see that its size is sane
            model = cls.from_config(cls.load_config(str(folder))).to(dtype).eval()
        except ModelError:
            raise
        except Exception as error:  # the library raises anything
            raise ModelError(
                f"{cls.__name__} cannot be built from config.json",
                where=str(folder),
                details=(innermost(error),),
            ) from error
        given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inner.items()}
        warnings = fill(model, given, str(folder))
    return model, change, [*more, *warnings]


def _is_large(weights: dict[str, torch.Tensor], change: Change) -> bool:
    """Whether the weights in another dtype are more than is kept in memory."""
    dtype = change.dtype
    if dtype is None:
        return False
    floats = [t for t in weights.values() if t.is_floating_point() and t.dtype is not dtype]
    return sum(tensor.numel() * dtype.itemsize for tensor in floats) > IN_MEMORY


def _weights(folder: Path, kind: Kind) -> dict[str, torch.Tensor]:
    """The folder's tensors by name. Pickled ones are refused where they would run code."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder, kind):
        if file.suffix == ".safetensors":
            tensors.update(read_safetensors(file))
        elif file.suffix == ".bin":
            value = read_checkpoint(file, detect(file), allow_pickle=False)
            tensors.update(_tensors(value, file))
    return tensors


def _tensors(value: Any, file: Path) -> dict[str, torch.Tensor]:
    if not isinstance(value, dict):
        raise ModelError("the file holds no tensors by name", where=str(file))
    return {str(name): t for name, t in value.items() if isinstance(t, torch.Tensor)}


def _wrapped(
    weights: dict[str, torch.Tensor], asked: str | None, folder: Path
) -> tuple[dict[str, torch.Tensor] | None, list[str]]:
    """The weights without the prefix that a wrapper left; None where they are as they should be."""
    prefix = asked or next(
        (p for p in WRAPPERS if weights and all(name.startswith(p) for name in weights)), None
    )
    return (None, []) if prefix is None else stripped(weights, prefix, str(folder))


def _read_coded(
    cls: Any, description: dict[str, Any], weights: dict[str, torch.Tensor], folder: Path,
    kind: Kind, choice: DtypeChoice,
) -> tuple[nn.Module, Change, list[str]]:  # fmt: skip
    """A model whose weights are stored in codes, which stay codes in its linear layers."""
    where = str(folder)
    try:
        return _coded_model(cls, description, weights, folder, kind, choice)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
            RuntimeError) as error:  # fmt: skip
        raise ModelError(
            "the folder's description of its quantized weights does not fit them",
            where=where,
            details=(innermost(error),),
        ) from error


def _coded_model(
    cls: Any, description: dict[str, Any], weights: dict[str, torch.Tensor], folder: Path,
    kind: Kind, choice: DtypeChoice,
) -> tuple[nn.Module, Change, list[str]]:  # fmt: skip
    from graphwright.ir.files.coded.folder import load_coded
    from graphwright.ir.files.coded.insert import Parts

    where = str(folder)
    layout = layout_of(description, where)
    if kind is not Kind.HUGGING_FACE:
        raise ModelError("quantized folders of diffusers are not read", where=where)
    parts = Parts(weights, layout)
    config = _plain_config(cls, where)
    stored = getattr(config, "dtype", None) or torch.float32
    change = choice.decide({stored})
    dtype = change.dtype or stored
    warnings: list[str] = []

    def build(state: Mapping[str, torch.Tensor]) -> nn.Module:
        model, warnings[:] = build_pretrained(cls, folder, state, config=config, dtype=dtype)
        return model

    try:
        with torch.device("meta"):
            blank = cls(config)
    except ModelError:
        raise
    except Exception as error:  # the library raises anything
        raise ModelError(
            f"{cls.__name__} cannot be built from config.json",
            where=where,
            details=(innermost(error),),
        ) from error
    model = load_coded(parts, build, blank, dtype)
    return model.eval(), change, [*warnings, *parts.notes()]


def _plain_config(cls: Any, where: str) -> Any:
    """The configuration without its description of codes."""
    try:
        config = cls.config_class.from_pretrained(where, local_files_only=True)
    except Exception as error:  # the library raises anything
        raise ModelError(
            "config.json is not what the architecture needs",
            where=where,
            details=(innermost(error),),
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def input_hints(module: nn.Module) -> dict[str, dict[str, Any]] | None:
    """Inputs of a text encoder or decoder by its configuration; None where they are not known."""
    config = getattr(module, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    main = getattr(module, "main_input_name", None)
    if main != "input_ids" or not vocabulary or getattr(config, "is_encoder_decoder", False):
        return None
    shape = ("batch", "seq")
    return {
        "input_ids": {"dtype": "int64", "shape": shape, "example": (2, 16),
                      "range": (0, float(vocabulary))},
        "attention_mask": {"dtype": "int64", "shape": shape, "example": (2, 16), "range": (1, 2)},
    }  # fmt: skip


def _refuse_code(config: dict[str, Any], folder: Path) -> None:
    for path, value in _strings(config):
        if path.rpartition(".")[2].lstrip("_") in _CODE_KEYS and "/" in value:
            raise ModelError(
                f"config.json asks for a kernel from the network: {path} = {value!r}",
                where=str(folder),
                fix="Take that entry out.",
            )


def _strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _strings(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, str):
        yield path, value


def _transformers_class(config: dict[str, Any], folder: Path) -> Any:
    transformers = _import("transformers", folder)
    names, model_type = config.get("architectures") or [], config.get("model_type")
    if not isinstance(names, list) or not isinstance(model_type, str | None):
        raise ModelError("config.json names no architecture", where=str(folder))
    known = model_type in transformers.CONFIG_MAPPING
    for name in names if known else []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if known and not config.get("auto_map"):
        return transformers.AutoModel
    raise ModelError(
        f"transformers {transformers.__version__} does not know the architecture "
        f"{(names or [model_type])[0]!r}" + (
            "; it is defined by code in the folder, which is never run"
            if config.get("auto_map") else ""
        ),
        where=str(folder),
        fix="Install a version that has it, or load the weights with a factory of your own.",
    )  # fmt: skip


def _diffusers_class(config: dict[str, Any], folder: Path) -> Any:
    diffusers = _import("diffusers", folder)
    name = str(config.get("_class_name"))
    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, diffusers.ModelMixin):
        return found
    raise ModelError(
        f"diffusers {diffusers.__version__} has no model {name!r}",
        where=str(folder),
        fix="Install a version that has it.",
    )


def _import(name: str, folder: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"{name} is needed to read this folder",
            where=str(folder),
            fix="pip install 'graphwright[hub]'",
        ) from error


def _stored_dtype(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.dtype:
    """dtype that config.json names, or else that of the first float tensor."""
    named = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
    if isinstance(named, torch.dtype):
        return named
    return next((t.dtype for t in weights.values() if t.is_floating_point()), torch.float32)
