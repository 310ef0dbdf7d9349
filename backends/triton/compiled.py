"""The compiled object: a fused program as an `nn.Module` that saves and loads by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx, nn

from graphwright.backends.base import Artifact, Compiled
from graphwright.backends.triton.fuse import count_ops, largest_leftovers
from graphwright.ir.graph.device import set_device
from graphwright.ir.graph.nodes import copy_graph
from graphwright.ir.program import Program
from graphwright.ir.signature import rebuild

FILE = "program.pt2"


class FusedModule(nn.Module, Compiled):
    """A fused program. `.to("cuda")` moves it; the ops then run their Triton kernels.

    Works under `torch.compile(fullgraph=True)` and trains like any module: every fused op has
    the gradient of its eager reference.

    Attributes:
        body: the graph as a module, flat tensors in and out; its state has the names of the
            model the program was traced from.
        notes: `fused`, calls of each of our ops; `left`, the most frequent ops that stay torch's.
    """

    backend: ClassVar[str] = "triton"

    def __init__(self, program: Program, notes: Mapping[str, Any] | None = None) -> None:
        nn.Module.__init__(self)
        # Own parameter objects and an own graph: moving this module leaves the program alone.
        state = {name: _own(tensor) for name, tensor in program.state.items()}
        self.program = program.replace(graph=copy_graph(program.graph), state=state)
        self.signature = program.signature
        self.body: fx.GraphModule = self.program.module
        found = {"fused": count_ops(program.graph), "left": largest_leftovers(program.graph)}
        Compiled.__init__(self, found if notes is None else notes)
        self.train(False)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The model's own output.

        Raises:
            ArgumentError: as `Program.__call__` says; unchecked inside `torch.compile`.
        """
        signature = self.program.signature
        if torch.compiler.is_compiling():
            names = [spec.name for spec in signature.inputs]
            flat = (*inputs, *(named[name] for name in names[len(inputs) :]))
        else:
            flat = self.program.bind(*inputs, **named)
        return rebuild(signature.structure, self.body(*flat))

    @torch.no_grad()
    def run_flat(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Flat outputs for one tensor per input, unchecked and without gradients."""
        found: tuple[torch.Tensor, ...] = self.body(*inputs)
        return found

    def save(self, folder: str | Path) -> Artifact:
        """Writes `program.pt2` into `folder`; `load` or `graphwright.load` reads it back."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        # from the body, for moving it may have replaced its tensors
        state = {name: _attribute(self.body, name).cpu() for name in self.program.state}
        graph = copy_graph(self.body.graph)
        set_device(graph, torch.device("cpu"))
        self.program.replace(graph=graph, state=state).save(path / FILE)
        return Artifact(self.backend, path / FILE, (path / FILE).stat().st_size)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        tensors = [_attribute(self.body, name) for name in self.program.state]
        if tensors and set_device(self.body.graph, tensors[0].device):
            self.body.recompile()
        return self


def load(folder: str | Path) -> FusedModule:
    """The compiled module that `FusedModule.save` wrote; needs nothing of the source model.

    Raises:
        ModelError: there is no such file, or it is no program of ours.
    """
    from graphwright.ir.files.archive import load_program

    return FusedModule(load_program(Path(folder) / FILE))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor


def _attribute(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), last)
    return found
