"""The `triton` backend: PyTorch with fused calls, Triton kernels on a GPU, eager on a CPU."""

from __future__ import annotations

import torch

from graphwright.backends.base import Backend
from graphwright.backends.base import Options as BackendOptions
from graphwright.backends.triton.compiled import FusedModule
from graphwright.backends.triton.fuse import BY, fuse
from graphwright.ir.context import Context
from graphwright.ir.errors import ContractError, LoweringError
from graphwright.ir.program import Program
from graphwright.ir.verify import Promise, check_contract

TOLERANCE = 1e-5
"""Largest relative error of a fused float32 program; other dtypes in proportion to roundoff."""


class Options(BackendOptions):
    """The triton backend takes no options."""


class Lowering(Backend):
    """Fuses a program, checks it against the original, and wraps it as a module."""

    name = "triton"
    summary = "PyTorch with fused ops: Triton kernels on a GPU, eager on a CPU."
    Options = Options

    @torch.no_grad()
    def lower(self, program: Program, context: Context) -> FusedModule:
        """The fused program as a module on `context.device`.

        Raises:
            LoweringError: the fused program computes something else; names the first node.
        """
        fused = fuse(program)
        try:
            check_contract(program, fused, Promise(BY, "exact", TOLERANCE))
        except ContractError as error:
            raise LoweringError(error.message, details=error.details) from error
        return FusedModule(fused).to(context.device)
