"""safetensors: one file, or an index of shards. Tensors stay mapped from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from graphwright.ir.errors import ModelError
from graphwright.ir.files.bounds import refuse_special
from graphwright.ir.files.detect import read_json


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name in one file.

    Raises:
        ModelError: damaged or cut short.
    """
    from safetensors import SafetensorError, safe_open

    refuse_special(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise ModelError(
            "the safetensors file is damaged or cut short",
            where=str(path),
            fix="Copy or download the file again.",
            details=((str(error) or type(error).__name__).splitlines()[0],),
        ) from error


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, each checked to lie beside it.

    Raises:
        ModelError: not an index, a name that leaves the folder, or a missing file.
    """
    data: Any = read_json(index)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ModelError("this is not an index of safetensors shards", where=str(index))
    files = sorted(set(names.values()))
    for name in files:
        if not name or name != Path(name).name or "\\" in name or name in (".", ".."):
            raise ModelError(f"shard {name!r} lies outside the folder", where=str(index))
        if not (index.parent / name).is_file():
            raise ModelError(
                f"shard {name!r} is missing", where=str(index), fix="Download the whole model."
            )
    return [index.parent / name for name in files]


def read_shards(index: Path) -> dict[str, torch.Tensor]:
    """Tensors by name in all shards of an index.

    Raises:
        ModelError: as `shards_of`, or a tensor is not in the shard the index names.
    """
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards_of(index):
        tensors.update(read_safetensors(shard))
    data: Any = read_json(index)
    missing = [name for name in data["weight_map"] if name not in tensors]
    if missing:
        raise ModelError(
            f"tensor {missing[0]!r} is in none of the shards",
            where=str(index),
            fix="Download the whole model again.",
        )
    return tensors
