"""The compiled object: a fused program as an `nn.Module` that saves and loads by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx, nn

from graphwright.backends.base import Artifact, Compiled
from graphwright.backends.triton.decoder.runner import StaticRunner
from graphwright.backends.triton.decoder.static_graph import StaticGraph, static_graph
from graphwright.backends.triton.fuse import count_ops, largest_leftovers
from graphwright.ir.generation.concat import ConcatRunner
from graphwright.ir.generation.folder import write_text_files
from graphwright.ir.generation.record import Generation
from graphwright.ir.generation.runner import Runner
from graphwright.ir.generation.text import TOKENIZER
from graphwright.ir.graph.cached import NotCached
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
        self.generation: Generation | None = Generation.of(program)
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

    def static_graph(self, *, last: bool) -> StaticGraph:
        """The graph of a step over buffers, where the module is now; see `static_graph`.

        Raises:
            NotCached: the cache has to be handed in and out.
        """
        assert self.generation is not None
        program = self.program.replace(graph=self.body.graph)
        return static_graph(program, self.generation, last=last)

    def runner(self) -> Runner:
        """The model over a cache of its own: written in place where its attention allows it.

        Raises:
            ArgumentError: it is no decoder with a cache.
        """
        if self.generation is None:
            return Compiled.runner(self)
        device = next((t.device for t in self.body.state_dict().values()), torch.device("cpu"))
        try:
            graph = self.static_graph(last=True)
        except NotCached:
            return ConcatRunner(
                self.generation,
                self.signature,
                lambda inputs: self.run_flat(tuple(tensor.to(device) for tensor in inputs)),
            )
        return StaticRunner(graph, lambda: self.static_graph(last=False), self.body, device)

    def save(self, folder: str | Path) -> Artifact:
        """Writes `program.pt2` into `folder`; `load` or `graphwright.load` reads it back.

        Beside a decoder stand the files of its tokenizer.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        # from the body, for moving it may have replaced its tensors
        state = {name: _attribute(self.body, name).cpu() for name in self.program.state}
        graph = copy_graph(self.body.graph)
        set_device(graph, torch.device("cpu"))
        self.program.replace(graph=graph, state=state).save(path / FILE)
        written = [path / FILE]
        if self.generation is not None:
            source = self.generation.tokenizer
            files, said = write_text_files(
                Path(source) if source else None, path, self.generation.context_length
            )
            written += files
            self.notes["text"] = said
        return Artifact(self.backend, path / FILE, sum(file.stat().st_size for file in written))

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

    compiled = FusedModule(load_program(Path(folder) / FILE))
    if compiled.generation is not None:
        has_text = (Path(folder) / TOKENIZER).is_file()
        compiled.generation = replace(
            compiled.generation, tokenizer=str(folder) if has_text else None
        )
    return compiled


def _own(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor


def _attribute(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), last)
    return found
