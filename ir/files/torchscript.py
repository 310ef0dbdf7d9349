"""TorchScript archives, wrapped so that torch.export can trace them.

TorchScript runs its own interpreter, not Python; what it can do is what its operators do. So its
code is read first, and refused when it uses torch-bind objects (C++ classes that are unpickled), an
operator of an unknown namespace, or one that writes or reads files.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.files.pickles import listed
from graphwright.ir.files.zips import Archive

_OPERATOR = re.compile(r"\bops\.(\w+)\.(\w+)")
_TORCH_CALL = re.compile(r"\btorch\.(save|load|from_file|_load\w*|_save\w*)\s*\(")
_CLASS = re.compile(r"__torch__\.torch\.classes\.[\w.]+")
_NAMESPACES = {"aten", "prim", "quantized", "torchvision", "torchaudio"}
_SIDE_EFFECTS = {"save", "load", "from_file", "rpc_async", "rpc_sync", "rpc_remote"}


class ScriptedModule(nn.Module):
    """A TorchScript module behind a plain one with the same parameter and buffer names.

    torch.export replaces parameters while it traces, which a TorchScript module does not let it
    do. So the tensors are registered here, and put into the archived module around each call.

    Attributes:
        archived_script: the module of the archive; not a submodule.
    """

    def __init__(self, scripted: torch.jit.ScriptModule) -> None:
        super().__init__()
        self._hidden = [scripted]
        shared: dict[tuple[Any, ...], nn.Parameter] = {}
        for name, parameter in scripted.named_parameters(remove_duplicate=False):
            # The archive's own tensors are TorchScript's: a Parameter over the same memory.
            data = parameter.detach()
            identity = (data.data_ptr(), data.shape, data.stride(), data.dtype)
            made = nn.Parameter(data, requires_grad=parameter.requires_grad)
            owner, attribute = _owner(self, name)
            owner.register_parameter(attribute, shared.setdefault(identity, made))
        for name, buffer in scripted.named_buffers(remove_duplicate=False):
            owner, attribute = _owner(self, name)
            owner.register_buffer(attribute, buffer.detach())

    @property
    def archived_script(self) -> torch.jit.ScriptModule:
        """The archived module."""
        return self._hidden[0]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Calls the archived module; arguments by name are put in its own order."""
        order = [argument.name for argument in self.archived_script.forward.schema.arguments[1:]]  # type: ignore[attr-defined]
        if set(named) <= set(order):
            named = {name: named[name] for name in order if name in named}
        parameters = dict(self.named_parameters(remove_duplicate=False))
        buffers = dict(self.named_buffers(remove_duplicate=False))
        before = self._put({**parameters, **buffers})
        # The profiling executor writes down the sizes it sees, which fixes them in a trace.
        optimized = not torch.compiler.is_exporting()
        try:
            with torch.jit.optimized_execution(optimized):  # type: ignore[attr-defined]
                return self.archived_script(*inputs, *named.values())
        finally:
            self._put(before)

    def _put(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sets tensors of the archived module by name; returns those that were there."""
        before = {}
        for name, tensor in tensors.items():
            path, _, attribute = name.rpartition(".")
            owner = self.archived_script
            for part in path.split(".") if path else []:
                owner = getattr(owner, part)
            before[name] = getattr(owner, attribute)
            owner._c.setattr(attribute, tensor)
        return before


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The plain submodule a qualified name belongs to, made when absent, and the last part."""
    path, _, attribute = name.rpartition(".")
    for part in path.split(".") if path else []:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root, attribute


def read_torchscript(path: Path, *, allow_pickle: bool) -> ScriptedModule:
    """The wrapped module of a TorchScript archive, in eval mode.

    Raises:
        ModelError: damaged, or its code does more than compute and `allow_pickle` is off.
    """
    archive = Archive(path)
    found = sorted(set(_findings(archive)))
    if found and not allow_pickle:
        raise ModelError(
            "this TorchScript archive does more than compute",
            where=str(path),
            fix="Use the Python model it was made from; --allow-pickle if you trust its maker.",
            details=tuple(listed(found)),
        )
    _check_same_members(archive)
    try:
        with warnings.catch_warnings():
            # A deprecation, whose category and words depend on the versions of torch and Python.
            warnings.filterwarnings("ignore", message=".torch.jit.load")
            scripted = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise ModelError(
            "torch cannot read this TorchScript archive",
            where=str(path),
            details=(innermost(error),),
        ) from error
    scripted.eval()
    return ScriptedModule(scripted).eval()


def _findings(archive: Archive) -> Any:
    for name in archive.members:
        if not name.startswith("code/") or name.endswith(".debug_pkl"):
            continue
        text = archive.read(name).decode("utf-8", "replace")
        yield from (f"object of class {c}" for c in _CLASS.findall(text))
        yield from (f"operator torch.{call}" for call in _TORCH_CALL.findall(text))
        for namespace, operator in _OPERATOR.findall(text):
            if namespace not in _NAMESPACES or operator in _SIDE_EFFECTS:
                yield f"operator {namespace}::{operator}"
    for name in ("data.pkl", "constants.pkl"):
        if name in archive and b"torch.classes" in archive.read(name):
            yield f"a torch-bind object in {name}"


def _check_same_members(archive: Archive) -> None:
    """Torch's zip reader must see the very code that was scanned, and no other."""
    reader = torch._C.PyTorchFileReader(str(archive.path))
    same = set(reader.get_all_records()) == set(archive.members) and all(
        reader.get_record(name) == archive.read(name)
        for name in archive.members
        if name.startswith("code/") or name.endswith(".pkl")
    )
    if not same:
        raise ModelError("the zip archive reads in two different ways", where=str(archive.path))
