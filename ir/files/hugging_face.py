"""Model folders of transformers and diffusers: local files only, never the folder's own code."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.checkpoint import read_checkpoint
from graphwright.ir.files.detect import Kind, detect, read_json
from graphwright.ir.files.safetensor_files import read_safetensors, shards_of

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
    raise ModelError(
        "this folder has a config.json and no weights",
        where=str(folder),
        fix="It needs model.safetensors, its shards with an index, or pytorch_model.bin.",
    )


def read_folder(folder: Path, kind: Kind) -> nn.Module:
    """The model of a folder, in eval mode, weights in the dtype they are stored in.

    Raises:
        ModelError: the library is not installed, the architecture needs the folder's own code, or
            the weights are missing, damaged or would run code.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ModelError("config.json holds no object", where=str(folder))
    _refuse_code(config, folder)
    for file in weight_files(folder, kind):
        if file.suffix == ".bin":
            # Reads the opcodes, then with weights_only; refuses what would run code.
            read_checkpoint(file, detect(file), allow_pickle=False)
    find = _transformers_class if kind is Kind.HUGGING_FACE else _diffusers_class
    cls = find(config, folder)
    if kind is Kind.HUGGING_FACE and isinstance(config.get("quantization_config"), dict):
        return _read_coded(cls, config["quantization_config"], folder)
    with _quiet_libraries():
        try:
            key = "dtype" if kind is Kind.HUGGING_FACE else "torch_dtype"
            dtype: Any = "auto" if kind is Kind.HUGGING_FACE else _stored_dtype(folder, kind)
            model = cls.from_pretrained(str(folder), local_files_only=True, **{key: dtype})
        except Exception as error:  # the libraries raise anything
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ModelError(
                f"{cls.__name__} cannot be built from this folder",
                where=str(folder),
                details=((lines or [type(error).__name__])[0][:300],),
            ) from error
    assert isinstance(model, nn.Module)
    return model.eval()


def _read_coded(cls: Any, quantization: dict[str, Any], folder: Path) -> nn.Module:
    """A model whose linear layers are stored in codes, which stay codes."""
    from graphwright.ir.files.coded import put_codes, scheme_of, split, with_placeholders

    where = str(folder)
    scheme = scheme_of(quantization, where)
    files = [f for f in weight_files(folder, Kind.HUGGING_FACE) if f.suffix == ".safetensors"]
    if not files:
        raise ModelError("quantized weights are read from safetensors only", where=where)
    tensors = {name: t for file in files for name, t in read_safetensors(file).items()}
    plain, coded = split(tensors, scheme, where)
    with _quiet_libraries():
        try:
            config = cls.config_class.from_pretrained(where, local_files_only=True)
            del config.quantization_config
            dtype = getattr(config, "dtype", None) or torch.float32
            model = cls.from_pretrained(
                None, config=config, dtype=dtype,
                state_dict=with_placeholders(nn.Module(), plain, coded, dtype),
            )  # fmt: skip
        except Exception as error:  # the library raises anything
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ModelError(
                f"{cls.__name__} cannot be built from this folder",
                where=where,
                details=((lines or [type(error).__name__])[0][:300],),
            ) from error
    put_codes(model, coded, where)
    assert isinstance(model, nn.Module)
    return model.eval()


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
    names = config.get("architectures") or []
    model_type = config.get("model_type")
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


def _stored_dtype(folder: Path, kind: Kind) -> torch.dtype:
    """dtype of the first float tensor: diffusers has no `auto`."""
    files = [f for f in weight_files(folder, kind) if f.suffix == ".safetensors"]
    tensors = read_safetensors(files[0]).values() if files else ()
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


class _quiet_libraries:  # noqa: N801  (reads as a statement)
    """Holds back the libraries' progress bars and advice while they load."""

    def __enter__(self) -> None:
        self._loggers = [logging.getLogger(n) for n in ("transformers", "diffusers")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
