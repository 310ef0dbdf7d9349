"""Files of torch.save, both formats, and bare pickles: opcodes are read before anything opens."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.detect import Kind
from graphwright.ir.files.factory import current_folder
from graphwright.ir.files.pickles import globals_in, globals_in_bytes, is_module, listed, unsafe
from graphwright.ir.files.zips import Archive

NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights",
          "params", "ema_state_dict", "ema")  # fmt: skip
"""Keys under which training scripts keep the weights, in order of preference."""

_PICKLES_IN_OLD_FORMAT = 5
_RESAVE = (
    "Save `model.state_dict()` instead and name a factory in the spec (model: {factory: "
    "package.module:function}), or, if you trust its maker, use --allow-pickle."
)


def read_checkpoint(path: Path, kind: Kind, *, allow_pickle: bool) -> Any:
    """What torch.save wrote: tensors by name, or, where pickles are allowed, anything.

    Raises:
        ModelError: damaged, or it would run code and `allow_pickle` is off; lists what it would
            import.
    """
    found = unsafe(_globals(path, kind))
    if (found or kind is Kind.PICKLE) and not allow_pickle:
        raise _refusal(path, kind, found)
    try:
        if not found and kind is not Kind.PICKLE:
            mapped = kind is Kind.CHECKPOINT
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        # Classes of a trusted file may live beside where the command is run, as a factory's do.
        with current_folder():
            if kind is Kind.PICKLE:
                with path.open("rb") as file:
                    return pickle.load(file)
            return torch.load(path, map_location="cpu", weights_only=False)
    except (AttributeError, ModuleNotFoundError) as error:
        raise _missing_class(path, error, found) from error
    except Exception as error:  # torch and the file's own code raise anything
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{kind.value} that cannot be read: it is damaged, cut short, or refused by torch",
            where=str(path),
            details=(text[0][:300],),
        ) from error


def weights_in(value: Any, where: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors by name in a loaded checkpoint, and notes on where they were.

    Raises:
        ModelError: there are none; says what the file holds.
    """
    notes: list[str] = []
    if isinstance(value, Mapping) and not any(isinstance(v, torch.Tensor) for v in value.values()):
        keys = [key for key in NESTED if _holds_tensors(value.get(key))]
        if keys:
            others = [str(key) for key in value if key != keys[0]]
            notes.append(f"weights were taken from {keys[0]!r}; left aside: {', '.join(others)}"
                         if others else f"weights were taken from {keys[0]!r}")  # fmt: skip
            value = value[keys[0]]
        elif {"state", "param_groups"} <= set(value):
            raise ModelError("this is the state of an optimizer, without the model", where=where)
    if not isinstance(value, Mapping):
        raise ModelError(
            f"the file holds a {type(value).__name__}, not tensors by name",
            where=where,
            fix="Save `model.state_dict()`.",
        )
    tensors = {str(k): v for k, v in value.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        keys = [str(key) for key in value]
        raise ModelError(
            "the file holds no tensors by name",
            where=where,
            fix="Save `model.state_dict()`.",
            details=tuple(f"key: {key}" for key in listed(keys)),
        )
    rest = [str(key) for key, v in value.items() if not isinstance(v, torch.Tensor)]
    if rest:
        notes.append(f"entries that are no tensors were left aside: {', '.join(listed(rest, 4))}")
    return tensors, notes


def module_in(value: Any) -> nn.Module | None:
    """The module a pickled file holds, itself or under one of the usual keys."""
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, Mapping):
        return next((value[k] for k in NESTED if isinstance(value.get(k), nn.Module)), None)
    return None


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())


def _globals(path: Path, kind: Kind) -> list[str]:
    if kind is Kind.CHECKPOINT:
        archive = Archive(path)
        pickles = [name for name in archive.members if name.endswith(".pkl")]
        return sorted({g for name in pickles for g in globals_in_bytes(archive.read(name))})
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        names = globals_in(file, _PICKLES_IN_OLD_FORMAT if kind is Kind.CHECKPOINT_OLD else 1)
        if kind is Kind.PICKLE and file.tell() > size:
            raise ModelError("the pickle is cut short", where=str(path))
        return names


def _refusal(path: Path, kind: Kind, found: list[str]) -> ModelError:
    if kind is Kind.PICKLE:
        what = "a bare pickle, which can run code when it is opened"
    elif is_module(found):
        what = "a pickled nn.Module, which runs code when it is opened"
    else:
        what = f"{kind.value} with a pickle inside that would import and call"
    return ModelError(
        f"this is {what}", where=str(path), fix=_RESAVE,
        details=tuple(f"would import: {name}" for name in listed(found)),
    )  # fmt: skip


def _missing_class(path: Path, error: Exception, found: list[str]) -> ModelError:
    scripts = [name for name in found if name.startswith("__main__.")]
    if scripts:
        return ModelError(
            f"class {scripts[0].removeprefix('__main__.')!r} was defined in a script, and cannot "
            "be found again",
            where=str(path),
            fix="Save `model.state_dict()` and name a factory in the spec.",
        )
    return ModelError(
        f"the pickle needs code that is not here: {error}",
        where=str(path),
        fix="Run where its package can be imported, or save `model.state_dict()` instead.",
    )
