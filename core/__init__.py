"""Graphwright: a declarative compiler for trained PyTorch models.

    import graphwright as gw
    program = gw.trace(model, example_inputs, dynamic={"x": {0: "batch"}})
    program = gw.passes.cleanup.FoldBatchNorm()(program)
    compiled = gw.lower(program, "onnxruntime")

Importing this package is cheap: torch and the rest are imported when they are first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright import backends, ir, passes, specs
    from graphwright.api import load, lower, optimize
    from graphwright.backends.onnxruntime.adapters import save_onnx_adapter
    from graphwright.backends.stand_in import stand_in
    from graphwright.ir.adapters.patch import extract_patch, save_patch
    from graphwright.ir.adapters.routed import route_adapters
    from graphwright.ir.adapters.save import save_adapter
    from graphwright.ir.channels import channel_groups, cut, zero
    from graphwright.ir.check.fidelity import compare
    from graphwright.ir.context import Context
    from graphwright.ir.edit import Editor
    from graphwright.ir.files.export_checkpoint import export_checkpoint
    from graphwright.ir.generation.language_model import language_model
    from graphwright.ir.generation.trace import trace_decoder
    from graphwright.ir.options import Options
    from graphwright.ir.program import Program
    from graphwright.ir.rewrite import Rewrite
    from graphwright.ir.trace.capture import trace
    from graphwright.passes.base import Action, Pass, Result
    from graphwright.passes.prune._oto.loop import oto
    from graphwright.passes.registry import register
    from graphwright.specs.spec import load_spec

__version__ = "0.1.0"

_HOMES = {
    "load": "graphwright.api",
    "lower": "graphwright.api",
    "optimize": "graphwright.api",
    "channel_groups": "graphwright.ir.channels",
    "cut": "graphwright.ir.channels",
    "zero": "graphwright.ir.channels",
    "extract_patch": "graphwright.ir.adapters.patch",
    "save_patch": "graphwright.ir.adapters.patch",
    "route_adapters": "graphwright.ir.adapters.routed",
    "save_adapter": "graphwright.ir.adapters.save",
    "save_onnx_adapter": "graphwright.backends.onnxruntime.adapters",
    "export_checkpoint": "graphwright.ir.files.export_checkpoint",
    "Context": "graphwright.ir.context",
    "Editor": "graphwright.ir.edit",
    "compare": "graphwright.ir.check.fidelity",
    "language_model": "graphwright.ir.generation.language_model",
    "Options": "graphwright.ir.options",
    "Program": "graphwright.ir.program",
    "Rewrite": "graphwright.ir.rewrite",
    "trace": "graphwright.ir.trace.capture",
    "trace_decoder": "graphwright.ir.generation.trace",
    "trace_encoder_decoder": "graphwright.ir.generation.seq2seq_trace",
    "Action": "graphwright.passes.base",
    "Pass": "graphwright.passes.base",
    "Result": "graphwright.passes.base",
    "register": "graphwright.passes.base",
    "oto": "graphwright.passes.prune._oto.loop",
    "load_spec": "graphwright.specs.spec",
    "stand_in": "graphwright.backends.stand_in",
}
_PACKAGES = ("backends", "ir", "passes", "specs")

__all__ = [
    "Action",
    "Context",
    "Editor",
    "Options",
    "Pass",
    "Program",
    "Result",
    "Rewrite",
    "backends",
    "channel_groups",
    "compare",
    "cut",
    "export_checkpoint",
    "extract_patch",
    "ir",
    "language_model",
    "load",
    "load_spec",
    "lower",
    "optimize",
    "oto",
    "passes",
    "register",
    "route_adapters",
    "save_adapter",
    "save_onnx_adapter",
    "save_patch",
    "specs",
    "stand_in",
    "trace",
    "trace_decoder",
    "trace_encoder_decoder",
    "zero",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used."""
    import importlib

    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted(__all__)
