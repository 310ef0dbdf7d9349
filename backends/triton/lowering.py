"""The `triton` backend: PyTorch with fused calls, Triton kernels on a GPU, eager on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from graphwright.backends.base import Backend
from graphwright.backends.triton.compiled import FILE, FusedModule, load
from graphwright.backends.triton.fuse import BY, fuse
from graphwright.backends.triton.settled import settled
from graphwright.ir.check.decode import ROUNDINGS, distance, in_steps, texts
from graphwright.ir.check.precision import roundoff
from graphwright.ir.check.promise import Promise
from graphwright.ir.check.verify import check_contract
from graphwright.ir.context import Context
from graphwright.ir.data.synthetic import other_size_inputs
from graphwright.ir.errors import ContractError, LoweringError
from graphwright.ir.generation.concat import runner_of
from graphwright.ir.graph.arrange import arranged
from graphwright.ir.graph.cached import NotCached
from graphwright.ir.options import Options as BaseOptions
from graphwright.ir.program import Program


class Options(BaseOptions):
    """The triton backend takes no options."""


class Lowering(Backend):
    """Fuses a program, checks it at three sizes of its dynamic dimensions, wraps it as a module."""

    name = "triton"
    summary = "PyTorch with fused ops: Triton kernels on a GPU, eager on a CPU."
    Options = Options

    @classmethod
    def open(cls, path: Path) -> FusedModule | None:
        """A folder with the `program.pt2` that this backend wrote; the file by itself is a program
        like any other."""
        if not path.is_dir() or not (path / FILE).is_file():
            return None
        return load(path)

    @torch.no_grad()
    def lower(self, program: Program, context: Context) -> FusedModule:
        """The fused program as a module on `context.device`.

        Raises:
            LoweringError: the fused program computes something else; names the first node.
        """
        program = arranged(program)  # one program, one file, whatever it went through
        fused = fuse(settled(program, BY))
        others = other_size_inputs(program, context.seed)
        try:
            check_contract(program, fused, Promise(BY, "exact"), others=others)
        except ContractError as error:
            raise LoweringError(error.message, details=error.details) from error
        compiled = FusedModule(fused)
        _hold_cache(compiled, program)
        return compiled.to(context.device)


def _hold_cache(compiled: FusedModule, program: Program) -> None:
    """A decoder that writes its cache in place says in steps what the program does, which hands
    it in and out; where it cannot, a warning says why.

    Raises:
        LoweringError: it says something else.
    """
    record = compiled.generation
    if record is None or not record.layers:
        return
    try:
        compiled.static_graph(last=True)
    except NotCached as why:
        compiled.notes["warnings"] = [f"the cache is copied at every step: {why}"]
        return
    compiled.notes["cache"] = f"written in place: {len(record.layers)} layers"
    ids = texts(record)
    expected = in_steps(runner_of(program, record), record, ids)
    error = distance(expected, in_steps(compiled.runner(), record, ids))
    if not error.within(ROUNDINGS * roundoff(program)):
        raise LoweringError(
            f"with its cache written in place the decoder is another: relative error "
            f"{error.relative:.3g}",
            fix="Please report it; the backend onnxruntime lowers the same program.",
        )
