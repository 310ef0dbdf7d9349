"""`load_model`: one entry for every kind of model file, safe unless the user says otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.files.bounds import bounded
from graphwright.ir.files.checkpoint import read_checkpoint
from graphwright.ir.files.coded.description import (
    description_beside,
    layout_of,
    refuse_undescribed,
    undescribed,
)
from graphwright.ir.files.coded.insert import Parts, fill_module
from graphwright.ir.files.detect import Kind, detect
from graphwright.ir.files.dtypes import Change, DtypeChoice, convert, float_dtypes
from graphwright.ir.files.export_file import quiet, read_export
from graphwright.ir.files.export_inputs import declared_inputs
from graphwright.ir.files.factory import build_module
from graphwright.ir.files.nested import module_in, weights_in
from graphwright.ir.files.safetensor_files import read_safetensors, read_shards, shards_of
from graphwright.ir.files.size_expressions import is_plain_guard
from graphwright.ir.files.target import Target
from graphwright.ir.files.wanted import WITH_GRAPH, Wanted
from graphwright.ir.files.weights import fill, not_finite
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature
from graphwright.ir.user_code import admit


@dataclass(frozen=True)
class LoadedModel:
    """The content of a model file.

    Attributes:
        source: file or folder it came from.
        kind: what the file is, in words.
        sha256: hex digest of the file; of names and digests of the files, for several.
        file_bytes: size of the file or files.
        module: the model as a module in eval mode; None when the file holds a program of ours.
        program: the program, when the file was written by `Program.save`.
        exported: the ExportedProgram of another's `.pt2` file, whose `module` is its module.
        inputs: what the file says about its inputs, by name: dtype, shape, example, range.
        tokenizer: folder of a text model's tokenizer.
        made: a folder of ours with the configuration and tokenizer of a model that is one file.
        change: what became of the stored dtype. `is_fixed` tells that the file holds a graph
            whose dtypes are fixed, so that the traced program has to be converted.
        warnings: what the user should know, one line each.
    """

    source: Path
    kind: str
    sha256: str
    file_bytes: int
    module: nn.Module | None = None
    program: Program | None = None
    exported: ExportedProgram | None = None
    inputs: dict[str, dict[str, Any]] | None = None
    tokenizer: Path | None = None
    made: Path | None = None
    change: Change = field(default_factory=Change)
    is_fixed: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path | None:
        """The folder with config.json and the tokenizer beside the weights, where there is one."""
        if self.made is not None:
            return self.made
        return self.source if self.source.is_dir() else None

    def runner(
        self, signature: Signature, pinned: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """The original model as a function of the program's inputs, in signature order.

        Inputs that are its state are left out of the call: the module has its own.

        Args:
            signature: the program's.
            pinned: arguments that are no inputs, as the model takes them.
        """
        own = [spec.name for spec in signature.inputs if spec.name not in signature.state]
        module, names = self.module, own
        if module is None:
            raise ModelError("the file holds a program, not a module", where=str(self.source))
        by_name = _takes_names(module, names)
        if not by_name and not signature.state:
            return module
        constants = {**signature.constants, **(pinned or {})}

        def run(*inputs: torch.Tensor) -> Any:
            own = inputs[: len(names)]
            if not by_name:
                return module(*own)
            return module(**dict(zip(names, own, strict=True)), **constants)

        return run


@bounded
def load_model(
    source: str | Path,
    *,
    section: Any = None,
    allow_pickle: bool = False,
    device: str = "cpu",
    refusal: Callable[[str], str] | None = None,
) -> LoadedModel:
    """Opens a model file or folder, told by its content.

    Args:
        source: `.pt2` (torch's or ours), TorchScript, torch.save file, safetensors or an index of
            its shards, GGUF, or a folder of transformers or diffusers.
        section: the spec's `model` section, or a mapping with its keys: `factory` and `kwargs` for
            files that hold weights only, `key` and `strip_prefix` for where in them, `dtype`.
        allow_pickle: open files that can run code. The user's word that their maker is trusted.
        device: where the model goes.
        refusal: why the chosen backends cannot run a dtype, empty where they can; a model stored
            in one they cannot run is converted to float32, and a warning says so.

    Raises:
        ModelError: cannot be opened, is not what it should be, or could run code.
    """
    path = Path(source)
    kind = detect(path)
    wanted = Wanted.of(section, refusal)
    wanted.check(path, kind)
    if kind in (Kind.EXPORT, Kind.EXPORT_OLD):
        parts = _load_export(path, kind, allow_pickle, device)
    elif kind is Kind.TORCHSCRIPT:
        from graphwright.ir.files.torchscript import read_torchscript

        parts = {"module": read_torchscript(path, allow_pickle=allow_pickle)}
    elif kind in (Kind.HUGGING_FACE, Kind.DIFFUSERS):
        parts = _load_folder(path, kind, wanted)
    elif kind is Kind.GGUF:
        parts = _load_gguf(path, wanted)
    elif kind in (Kind.SAFETENSORS, Kind.SAFETENSORS_INDEX):
        tensors = read_safetensors(path) if kind is Kind.SAFETENSORS else read_shards(path)
        parts = _fill(tensors, wanted, path)
    else:
        parts = _load_checkpoint(path, kind, wanted, allow_pickle)
    notes = [*parts.pop("warnings", []), *_convert(parts, kind, wanted.choice, path)]
    parts["is_fixed"] = kind in WITH_GRAPH
    if parts.get("module") is not None and "exported" not in parts:
        parts["module"] = parts["module"].to(device).eval()
    sha256, size = _identity(parts.pop("files", None) or _files(path, kind))
    return LoadedModel(
        source=path, kind=kind.value, sha256=sha256, file_bytes=size, **parts,
        warnings=[*notes, *not_finite(_tensors(parts))],
    )  # fmt: skip


def _convert(parts: dict[str, Any], kind: Kind, choice: DtypeChoice, path: Path) -> list[str]:
    """Brings the model into the chosen dtype: a module now, a fixed graph once it is traced."""
    if kind in (Kind.HUGGING_FACE, Kind.DIFFUSERS, Kind.GGUF):
        # Built in the dtype asked for already; what the library keeps wider stays so where it runs.
        choice = replace(choice, asked=None)
    before: Change = parts.pop("change", Change())
    change = choice.decide(float_dtypes(_tensors(parts).values()))
    parts["change"] = change if before.dtype is None else before
    if kind not in WITH_GRAPH and change.dtype is not None:
        convert(parts["module"], change.dtype)
    elif change.dtype not in (None, torch.float32):
        raise ModelError(
            f"the dtypes of {kind.value} are fixed, and model.dtype asks for {choice.asked}",
            where=str(path),
            fix=f"Leave it out, and begin the passes with cast.dtype: {{to: {choice.asked}}}.",
        )
    return list(before.notes or change.notes)


def _load_export(path: Path, kind: Kind, allow_pickle: bool, device: str) -> dict[str, Any]:
    from graphwright.ir.files.archive import RECORD, program_from

    try:
        if kind is Kind.EXPORT_OLD:
            raise ModelError(
                "this export archive was written by torch 2.7 or before, as pickles",
                where=str(path),
                fix="Save it again with torch 2.8 or later, or, if you trust its maker, use "
                "--allow-pickle.",
            )
        exported, extras = read_export(path)
    except ModelError:
        if not allow_pickle:
            raise
        admit(str(path), "an export archive that --allow-pickle opens")
        exported, extras = _load_trusted(path), {}
    guards = tuple(exported._guards_code)
    if device != "cpu" or any(t.device.type != "cpu" for t in exported.state_dict.values()):
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, device)
    if RECORD in extras:
        return {"program": program_from(exported, extras, str(path))}
    module = _module_of(exported, guards)
    return {"exported": exported, "module": module, "inputs": declared_inputs(exported)}


def _load_trusted(path: Path) -> ExportedProgram:
    """Torch's own loader, which may run code: only where the user allowed it."""
    try:
        with path.open("rb") as file, quiet("torch._export.serde.serialize", "torch.export"):
            return torch.export.load(file)
    except Exception as error:  # the loader raises anything
        raise ModelError(
            "torch cannot open this export archive", where=str(path), details=(innermost(error),)
        ) from error


def _module_of(exported: ExportedProgram, guards: tuple[str, ...]) -> nn.Module:
    """A module that takes and returns what the exported one did. A fresh GraphModule, for torch's
    own form has no eval mode; without guards, for they are strings that would be executed.

    Those that are plain arithmetic are kept as text in `size_guards`, where tracing reads them.
    """
    module = exported.module(check_guards=False)
    fresh = torch.fx.GraphModule(module, module.graph).eval()
    plain: Any = tuple(guard for guard in guards if is_plain_guard(guard))
    fresh.size_guards = plain
    return fresh


def _load_folder(path: Path, kind: Kind, wanted: Wanted) -> dict[str, Any]:
    from graphwright.ir.files.hugging_face import input_hints, read_folder

    module, change, notes = read_folder(path, kind, wanted.choice, strip_prefix=wanted.strip_prefix)
    return {
        "module": module, "inputs": input_hints(module), "tokenizer": path, "warnings": notes,
        "change": change,
    }  # fmt: skip


def _load_gguf(path: Path, wanted: Wanted) -> dict[str, Any]:
    from graphwright.ir.files.gguf.model import read_gguf
    from graphwright.ir.files.hugging_face import input_hints

    found = read_gguf(path, wanted.choice)
    return {
        "module": found.module, "inputs": input_hints(found.module), "warnings": found.notes,
        "tokenizer": found.folder, "made": found.folder, "change": found.change,
        "files": found.files,
    }  # fmt: skip


def _load_checkpoint(path: Path, kind: Kind, wanted: Wanted, allow_pickle: bool) -> dict[str, Any]:
    value = read_checkpoint(path, kind, allow_pickle=allow_pickle)
    module, notes = module_in(value, str(path), wanted.key)
    if module is not None:
        if wanted.factory is not None:
            notes.append("the file holds a whole module: the factory is not used")
        return {"module": module.eval(), "warnings": notes}
    return _fill(value, wanted, path)


def _fill(value: Any, wanted: Wanted, path: Path) -> dict[str, Any]:
    """The factory's module with the tensors by name, or with those of a checkpoint."""
    if wanted.factory is None:
        tensors, _ = weights_in(value, str(path), key=wanted.key)
        raise ModelError(
            f"this file holds {len(tensors)} tensors by name, and not the model they belong to",
            where=str(path),
            fix="Name what builds it in the spec: model: {factory: package.module:function}.",
        )
    module = build_module(wanted.factory, wanted.kwargs)
    tensors, notes = weights_in(
        value, str(path), target=Target.of(module), key=wanted.key, strip_prefix=wanted.strip_prefix
    )
    known = module.state_dict()
    described = description_beside(path.parent) if undescribed(tensors, known) else None
    if described is not None:
        notes += fill_module(module, Parts(tensors, layout_of(described[0], str(path)), known))
    else:
        refuse_undescribed(tensors, str(path), known)
        notes += fill(module, tensors, str(path), strip_prefix=wanted.strip_prefix)
    return {"warnings": notes, "module": module.eval()}


def _takes_names(module: nn.Module, names: list[str]) -> bool:
    import inspect

    known = getattr(module, "argument_kinds", None) or inspect.signature(module.forward).parameters
    return all(name in known for name in names)


def _tensors(parts: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if parts.get("program") is not None:
        return dict(parts["program"].state)
    if "exported" in parts:
        return dict(parts["exported"].state_dict)
    module: nn.Module = parts["module"]
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _files(path: Path, kind: Kind) -> list[Path]:
    if kind is Kind.SAFETENSORS_INDEX:
        return [path, *shards_of(path)]
    if kind in (Kind.HUGGING_FACE, Kind.DIFFUSERS):
        from graphwright.ir.files.hugging_face import weight_files

        return [path / "config.json", *weight_files(path, kind)]
    return [path]


def _identity(files: list[Path]) -> tuple[str, int]:
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    size = sum(path.stat().st_size for path in files)
    if len(files) == 1:
        return digests[0], size
    lines = "".join(f"{d}  {p.name}\n" for d, p in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest(), size
