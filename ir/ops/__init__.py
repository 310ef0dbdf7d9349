"""Our custom ops, namespace `graphwright`. Importing this package registers all of them."""

from __future__ import annotations

import importlib
import pkgutil

from graphwright.ir.ops.registry import OPS, Op, declare, kernels_enabled, onnx_translations

__all__ = ["OPS", "Op", "declare", "kernels_enabled", "onnx_translations"]

for _file in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_file}")
