"""TorchScript archives, wrapped so that torch.export can trace them.

TorchScript runs its own interpreter, not Python; what it can do is what its operators do. So its
code is read first (`script_scan`), and refused when it could do more than compute.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.ir.causes import innermost
from graphwright.ir.errors import ModelError
from graphwright.ir.files.bounds import refuse_repeated
from graphwright.ir.files.pickles import listed
from graphwright.ir.files.script_scan import findings
from graphwright.ir.files.script_state import (
    read_attribute,
    set_attribute,
    settled_values,
    written_attributes,
)
from graphwright.ir.files.zips import Archive
from graphwright.ir.user_code import admit

NUMBERS = ("int", "float", "bool", "number")
"""TorchScript's types of plain numbers."""


class ScriptedModule(nn.Module):
    """A TorchScript module behind a plain one with the same parameter and buffer names.

    torch.export replaces parameters while it traces, which a TorchScript module does not let it
    do. So the tensors are registered here, and put into the archived module around each call.
    Tensors in attributes that `forward` assigns are buffers here too: a trace sees what is state.

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
        self._written = written_attributes(scripted)
        for name in self._written:
            self._hold(name, read_attribute(scripted, name))

    @property
    def archived_script(self) -> torch.jit.ScriptModule:
        """The archived module."""
        return self._hidden[0]

    @property
    def argument_kinds(self) -> dict[str, str]:
        """TorchScript types of the arguments of `forward`, by name and in order."""
        return {argument.name: str(argument.type) for argument in self._schema()}

    def settle(self, *inputs: Any, **named: Any) -> None:
        """Gives written attributes the values of `settled_values` for these arguments of a call.

        Raises:
            ModelError: the first call makes its state in a way that no value stands for.
        """
        if self._written:
            arguments = self._in_order(inputs, named)
            found = settled_values(self.archived_script, self._written, arguments)
            for name, value in found.items():
                self._hold(name, value)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Calls the archived module.

        Raises:
            ModelError: a tensor is given where its code wants a number.
        """
        arguments = self._in_order(inputs, named)
        parameters = dict(self.named_parameters(remove_duplicate=False))
        buffers = dict(self.named_buffers(remove_duplicate=False))
        before = self._put({**parameters, **buffers})
        exporting = torch.compiler.is_exporting()
        constants = {n: read_attribute(self.archived_script, n) for n in self._written}
        try:
            # The profiling executor writes down the sizes it sees, which fixes them in a trace.
            # And the code may switch gradients, which is put back.
            with (
                torch.jit.optimized_execution(not exporting),  # type: ignore[attr-defined]
                torch.set_grad_enabled(torch.is_grad_enabled()),
            ):
                result = self.archived_script(*arguments)
            for name in self._written:
                self._keep(name, buffers.get(name), exporting)
            return result
        finally:
            self._put({**before, **constants} if exporting else before)

    def _schema(self) -> list[Any]:
        return list(self.archived_script.forward.schema.arguments[1:])  # type: ignore[attr-defined]

    def _in_order(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments by position; names that are not the module's are in its order already."""
        schema = self._schema()
        if not set(named) <= {argument.name for argument in schema}:
            inputs, named = (*inputs, *named.values()), {}
        given = list(inputs)
        last = max((i for i, a in enumerate(schema) if a.name in named), default=-1)
        rest = schema[len(given) : last + 1]
        given += [named.get(argument.name, argument.default_value) for argument in rest]
        for argument, value in zip(schema, given, strict=False):
            _refuse_tensor_for_number(argument.name, str(argument.type), value)
        return tuple(given)

    def _hold(self, name: str, value: Any) -> None:
        """A tensor becomes a buffer (of no state dict, if it is new); all else stays there."""
        owner, attribute = _owner(self, name)
        if not isinstance(value, torch.Tensor):
            set_attribute(self.archived_script, name, value)
        elif attribute in owner._buffers:
            owner._buffers[attribute] = value.detach()
        else:
            owner.register_buffer(attribute, value.detach(), persistent=False)

    def _keep(self, name: str, buffer: torch.Tensor | None, exporting: bool) -> None:
        """Takes over what a call has assigned."""
        value = read_attribute(self.archived_script, name)
        if value is buffer or not isinstance(value, torch.Tensor):
            return
        if exporting and buffer is not None:
            buffer.copy_(value)  # what a trace shows as a buffer that is written
        else:
            self._hold(name, value)

    def _put(self, values: dict[str, Any]) -> dict[str, Any]:
        """Sets attributes of the archived module by name; returns the values that were there."""
        before = {}
        for name, value in values.items():
            before[name] = read_attribute(self.archived_script, name)
            set_attribute(self.archived_script, name, value)
        return before


def _refuse_tensor_for_number(name: str, kind: str, value: Any) -> None:
    if isinstance(value, torch.Tensor) and kind in NUMBERS:
        raise ModelError(
            f"the model's code takes {name!r} as a number ({kind}), which an input cannot be",
            fix=f"Pin it in the spec: model: {{inputs: {{{name}: {{value: ...}}}}}}.",
        )


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
    found = findings(archive)
    if found and not allow_pickle:
        raise ModelError(
            "this TorchScript archive does more than compute",
            where=str(path),
            fix="Use the Python model it was made from; --allow-pickle if you trust its maker.",
            details=tuple(listed(found)),
        )
    if found:
        admit(str(path), "a TorchScript archive that --allow-pickle opens")
    archive.check_reads_alike()
    try:
        with warnings.catch_warnings():
            # A deprecation, whose category and words depend on the versions of torch and Python.
            warnings.filterwarnings("ignore", message=".torch.jit.load")
            scripted = torch.jit.load(str(path), map_location="cpu").eval()
        tensors = {**dict(scripted.named_parameters()), **dict(scripted.named_buffers())}
        refuse_repeated(tensors, path)
        return ScriptedModule(scripted).eval()
    except ModelError:
        raise
    except Exception as error:  # torch raises many types over an archive that is damaged
        raise ModelError(
            "torch cannot read this TorchScript archive",
            where=str(path),
            details=(innermost(error),),
        ) from error
