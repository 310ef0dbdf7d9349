"""Files of torch.save, both formats, and bare pickles: opcodes are read before anything opens."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.files.bounds import refuse_repeated
from graphwright.ir.files.detect import Kind
from graphwright.ir.files.factory import current_folder
from graphwright.ir.files.pickles import (
    Content,
    is_module,
    listed,
    read_content,
    refuse_absurd,
    unsafe,
)
from graphwright.ir.files.zips import Archive
from graphwright.ir.user_code import admit

_PICKLES_IN_OLD_FORMAT = 5
_RESAVE = (
    "Save `model.state_dict()` instead and name a factory in the spec (model: {factory: "
    "package.module:function}), or, if you trust its maker, use --allow-pickle."
)


def read_checkpoint(path: Path, kind: Kind, *, allow_pickle: bool) -> Any:
    """Reads files of torch.save: tensors by name, or, where pickles are allowed, anything.

    Raises:
        ModelError: damaged, or it would run code and `allow_pickle` is off; lists what it would
            import.
    """
    contents = _contents(path, kind)
    found = unsafe(sorted({name for content in contents for name in content.globals}))
    if (found or kind is Kind.PICKLE) and not allow_pickle:
        raise _refusal(path, kind, found)
    if not allow_pickle:
        for content in contents:
            refuse_absurd(content, str(path))
    if found or kind is Kind.PICKLE:
        admit(str(path), "a pickle that --allow-pickle opens")
    try:
        if not found and kind is not Kind.PICKLE:
            mapped = kind is Kind.CHECKPOINT
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            refuse_repeated(value, path)
            return value
        # Classes of a trusted file may live beside where the command is run, as a factory's do.
        with current_folder():
            if kind is Kind.PICKLE:
                with path.open("rb") as file:
                    return pickle.load(file)
            return torch.load(path, map_location="cpu", weights_only=False)
    except ModelError:
        raise
    except (AttributeError, ModuleNotFoundError) as error:
        raise _missing_class(path, error, found) from error
    except Exception as error:  # torch and the file's own code raise anything
        raise ModelError(
            f"{kind.value} that cannot be read: it is damaged, cut short, or refused by torch",
            where=str(path),
            details=(innermost(error),),
        ) from error


def _contents(path: Path, kind: Kind) -> list[Content]:
    if kind is Kind.CHECKPOINT:
        archive = Archive(path)
        archive.check_reads_alike()
        pickles = [name for name in archive.members if name.endswith(".pkl")]
        return [read_content(archive.read(name)) for name in pickles]
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = read_content(file, _PICKLES_IN_OLD_FORMAT if kind is Kind.CHECKPOINT_OLD else 1)
        if kind is Kind.PICKLE and file.tell() > size:
            raise ModelError("the pickle is cut short", where=str(path))
        return [content]


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
