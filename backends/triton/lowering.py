"""The `triton` backend: PyTorch with fused calls, Triton kernels on a GPU, eager on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from graphwright.backends.base import Backend
from graphwright.backends.triton.compiled import FILE, FusedModule, load
from graphwright.backends.triton.fuse import BY, fuse
from graphwright.backends.triton.settled import settled
from graphwright.ir.check.promise import Promise
from graphwright.ir.check.verify import check_contract
from graphwright.ir.context import Context
from graphwright.ir.data.synthetic import other_size_inputs
from graphwright.ir.errors import ContractError, LoweringError
from graphwright.ir.graph.arrange import arranged
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
        return FusedModule(fused).to(context.device)
