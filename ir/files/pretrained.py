"""Models of transformers and diffusers, with what the libraries invent or drop said."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.files.mapped import in_dtype
from graphwright.ir.files.pickles import counted, listed
from graphwright.ir.files.weights import unexpected_note


def build_pretrained(
    cls: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None, **arguments: Any
) -> tuple[nn.Module, list[str]]:
    """The model of a folder in eval mode, and warnings.

    Both libraries fill tensors that a folder lacks with random numbers, and say so in a report
    only. Here such tensors, and those of another shape, are an error. What the architecture ties
    or computes by itself is not in that report.

    Args:
        cls: a model class with `from_pretrained`.
        folder: where config.json and, without `state`, the weights are.
        state: the weights by name, where they are not the folder's as they are.
        arguments: further ones of `from_pretrained`.

    Raises:
        ModelError: tensors are missing or of another shape, or the library fails.
    """
    if cls.__module__.startswith("transformers"):
        arguments["trust_remote_code"] = False  # the folder's own code is never run
    with quiet_libraries():
        try:
            if state is not None:
                config = arguments.pop("config", None)
                if config is None:
                    config = cls.config_class.from_pretrained(str(folder), local_files_only=True)
                arguments |= {"config": config, "state_dict": dict(state)}
            model, report = cls.from_pretrained(
                str(folder) if state is None else None, local_files_only=True,
                output_loading_info=True, ignore_mismatched_sizes=True, **arguments,
            )  # fmt: skip
        except ModelError:
            raise
        except Exception as error:  # the libraries raise anything
            raise ModelError(
                f"{cls.__name__} cannot be built from this folder",
                where=str(folder),
                details=(innermost(error),),
            ) from error
    _refuse_other_shapes(report["mismatched_keys"], folder)
    unexpected = sorted(report["unexpected_keys"])
    _refuse_missing(report["missing_keys"], unexpected, cls.__name__, folder)
    assert isinstance(model, nn.Module)
    return model.eval(), unexpected_note(unexpected)


def build_mapped(
    cls: Any, folder: Path, weights: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> tuple[nn.Module, list[str]]:
    """As `build_pretrained`, in a dtype other than the stored one, with weights in mapped files.

    The library would convert them in memory, all of them.

    Args:
        cls: a model class of transformers.
        folder: where config.json is.
        weights: the folder's, by name.
        dtype: to convert them to.

    Raises:
        ModelError: as `build_pretrained`.
    """
    if not hasattr(cls, "config_class"):  # a class that looks for the architecture itself
        return build_pretrained(cls, folder, dtype=dtype)
    model, notes = build_pretrained(cls, folder, in_dtype(weights, dtype), dtype=dtype)
    _read_generation_config(model, folder)
    return model, notes


def _read_generation_config(model: Any, folder: Path) -> None:
    """What the library does where it reads the weights itself."""
    if not hasattr(model, "adjust_generation_fn") or not model.can_generate():
        return
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except OSError:
        found = GenerationConfig.from_pretrained(
            str(folder), config_file_name="config.json", local_files_only=True,
            _from_model_config=True,
        )  # fmt: skip
    model.generation_config = found


def _refuse_missing(missing: Iterable[str], unexpected: list[str], what: str, folder: Path) -> None:
    names = sorted(missing)
    if not names:
        return
    prefix = _prefix(names, unexpected)
    raise ModelError(
        f"{counted(len(names), 'tensor')} of {what} missing in the folder would be random numbers",
        where=str(folder),
        fix=f"They are there with the prefix {prefix!r}: say model: {{strip_prefix: {prefix}}}."
        if prefix
        else "Download the whole model; or name the architecture that the weights belong to in "
        "config.json.",
        details=(
            *(f"missing: {name}" for name in listed(names, 5)),
            *(f"unexpected: {name}" for name in listed(unexpected, 5)),
        ),
    )


def _prefix(missing: list[str], unexpected: list[str]) -> str:
    """The prefix that all unexpected names have before missing ones; empty when there is none."""
    found = next((n.removesuffix(m) for n in unexpected for m in missing if n.endswith(m)), "")
    if found and all(n.startswith(found) and n.removeprefix(found) in missing for n in unexpected):
        return found
    return ""


def _refuse_other_shapes(mismatched: Iterable[tuple[str, Any, Any]], folder: Path) -> None:
    wrong = [
        f"{name}: {tuple(given)} in the folder, {tuple(wanted)} in the model"
        for name, given, wanted in sorted(mismatched, key=lambda row: row[0])
    ]
    if wrong:
        raise ModelError(
            f"{counted(len(wrong), 'tensor')} of another shape than config.json asks for",
            where=str(folder),
            fix="Download config.json and the weights from one place.",
            details=tuple(listed(wrong, 5)),
        )


class quiet_libraries:  # noqa: N801  (reads as a statement)
    """Holds back the libraries' progress bars and advice while they load."""

    def __enter__(self) -> None:
        self._loggers = [logging.getLogger(n) for n in ("transformers", "diffusers")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)
        switches = [sys.modules.get(f"{n}.utils.logging") for n in ("transformers", "diffusers")]
        self._bars = [s for s in switches if s is not None and s.is_progress_bar_enabled()]
        for switch in self._bars:
            switch.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
        for switch in self._bars:
            switch.enable_progress_bar()
