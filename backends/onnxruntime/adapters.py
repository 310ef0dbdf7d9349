"""Adapters as inputs of an ONNX model, which ONNX Runtime switches from run to run.

The factors of a low-rank adapter become initializers that are graph inputs too: what the file
holds is used unless a run brings others, from an `.onnx_adapter` file. Their rank is free. So one
session, and one copy of the base's weights, serves any adapter of that base, and the base itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from graphwright.ir.adapters.branch import Branch, results
from graphwright.ir.adapters.record import Adapter, adapters, find_adapter
from graphwright.ir.adapters.save import low_rank
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, LoweringError, ModelError
from graphwright.ir.graph.constants import weight_source
from graphwright.ir.graph.digest import tensor_digest
from graphwright.ir.graph.nodes import adapter_of, full_arguments
from graphwright.ir.layers.kinds import CONVOLUTIONS
from graphwright.ir.layers.products import weight_node
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program

aten = torch.ops.aten

FACT = "switchable"
"""Key among a program's facts: axis of the rank by name of the factor, and number of the base."""

RANK = "rank"
ADAPTER_VERSION = 1


def switchable(program: Program) -> Program:
    """The program with its one adapter as factors that are named after their layers.

    Raises:
        LoweringError: it has none or several, or one that is no low-rank change.
    """
    found = list(adapters(program).values())
    if len(found) != 1:
        raise LoweringError(
            f"adapters: switchable takes a program with one adapter, and this one has {len(found)}",
            fix="Merge the others (adapt.merge), or write them with gw.save_onnx_adapter.",
        )
    adapter = found[0]
    editor = Editor(program, by="lower.adapters")
    axes: dict[str, int] = {}
    factors = factors_of(program, adapter)
    for layer in layers(program):
        if layer.name not in adapter.layers:
            continue
        branch = Branch(editor, adapter.name, layer)
        old = next(r for r in results(branch.call, layer.name) if adapter_of(r) == adapter.name)
        branch.tip = branch.call
        name_a, name_b = names_of(layer.name)
        for name, axis in ((name_a, _rank_axis(layer, "a")), (name_b, _rank_axis(layer, "b"))):
            if name not in editor.state:
                editor.add_state(name, factors[name])
            axes[name] = axis
        a, b = editor.get(name_a), editor.get(name_b)
        total = branch.add(aten.add.Tensor, branch.call, _product(branch, layer, a, b))
        old.replace_all_uses_with(total)
    editor.facts[FACT] = {"axes": axes, "base": base_version(program, adapter)}
    return editor.finish()


def switch_record(program: Program) -> dict[str, Any]:
    """What a saved model says of the adapters that it takes: number of the base, and shapes."""
    fact = program.facts[FACT]
    shapes = {name: [None if at == axis else int(size)
                     for at, size in enumerate(program.state[name].shape)]
              for name, axis in fact["axes"].items()}  # fmt: skip
    return {"base": fact["base"], "shapes": shapes}


def _product(branch: Branch, layer: Layer, a: Any, b: Any) -> Any:
    if layer.kind in CONVOLUTIONS:
        spatial = len(branch.weight.meta["val"].shape) - 2
        low = branch.add(layer.node.target, branch.input, a, None, *branch.arguments[3:6])
        ones, zeros = [1] * spatial, [0] * spatial
        return branch.add(layer.node.target, low, b, None, ones, zeros, ones)
    if layer.kind == "embedding":
        low = branch.add(aten.embedding.default, a, *branch.arguments[1:])
    else:
        low = branch.add(aten.matmul.default, branch.input, a)
    return branch.add(aten.matmul.default, low, b)


def _rank_axis(layer: Layer, factor: str) -> int:
    if layer.kind in CONVOLUTIONS:
        return 0 if factor == "a" else 1
    return 1 if factor == "a" else 0


def names_of(layer: str) -> tuple[str, str]:
    """Names of the factors of a layer, whatever the adapter's own name."""
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def factors_of(program: Program, adapter: Adapter) -> dict[str, Tensor]:
    """Factors by name: a (in, rank) and b (rank, out) with the scale in b; kernels of a
    convolution as they are; a table's (rows, rank) and (rank, dim).

    Raises:
        LoweringError: the adapter is no low-rank change, or one that also scales.
    """
    found: dict[str, Tensor] = {}
    by_name = {layer.name: layer for layer in layers(program)}
    for name, parts in adapter.layers.items():
        tensors = {part: program.state[place].detach() for part, place in parts.items()}
        try:
            a, b, scale = low_rank(tensors, adapter.scales.get(name, 1.0), adapter, by_name[name])
        except ModelError as error:
            raise LoweringError(
                f"adapters: switchable takes low-rank changes alone, and {adapter.kind} is none",
                details=(error.message,),
            ) from None
        layer = by_name[name]
        if "magnitude" in tensors or _groups(layer) > 1:
            why = "scales the layer too" if "magnitude" in tensors else "has groups"
            raise LoweringError(f"adapters: switchable takes plain low-rank changes, and that of "
                                f"{name!r} {why}", fix="Merge it instead.")  # fmt: skip
        is_kernel = layer.kind in CONVOLUTIONS
        a = a if is_kernel or layer.kind == "embedding" else a.t()
        b = b if is_kernel else b.t()
        for place, tensor in zip(names_of(name), (a, b * scale), strict=True):
            found[place] = tensor.contiguous()
    return found


def _groups(layer: Layer) -> int:
    return int(full_arguments(layer.node)[0][6]) if layer.kind in CONVOLUTIONS else 1


def expose(model: ir.Model, program: Program) -> None:
    """Makes graph inputs of the factors, with a free rank; their values stay as defaults."""
    for name, axis in program.facts.get(FACT, {}).get("axes", {}).items():
        value = model.graph.initializers.get(name)
        if value is None:
            raise LoweringError(f"the factor {name!r} is not in the model as it is")
        sizes: list[Any] = [int(size) for size in program.state[name].shape]
        sizes[axis] = RANK
        value.shape = ir.Shape(sizes)
        model.graph.inputs.append(value)


def base_version(program: Program, adapter: Adapter) -> int:
    """A number for the weights that an adapter goes with: of the layers that it changes."""
    total = hashlib.sha256()
    by_name = {layer.name: layer for layer in layers(program)}
    for name in sorted(adapter.layers):
        source = weight_source(weight_node(by_name[name]))
        assert source is not None
        total.update(f"{name} {tensor_digest(program.state[str(source.target)])}\n".encode())
    return int.from_bytes(total.digest()[:4], "big") >> 1


def save_onnx_adapter(program: Program, path: str | Path, name: str = "default") -> None:
    """Writes one adapter of a program for a model that was lowered with `adapters: switchable`.

    Args:
        program: the base, with the adapter in it.
        path: of the file, `NAME.onnx_adapter` by custom.
        name: of the adapter.

    Raises:
        ArgumentError: the program has no such adapter.
        LoweringError: it is no low-rank change.
    """
    adapter = find_adapter(program, name)
    factors = {n: t.cpu().numpy() for n, t in factors_of(program, adapter).items()}
    write_adapter(Path(path), factors, base_version(program, adapter))


def write_adapter(path: Path, factors: Mapping[str, np.ndarray[Any, Any]], version: int) -> None:
    """Writes ONNX Runtime's file of an adapter."""
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(ADAPTER_VERSION)
    file.set_model_version(version)
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(f) for n, f in factors.items()}
    file.set_parameters(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.export_adapter(str(path))


def without_rank(program: Program) -> dict[str, np.ndarray[Any, Any]]:
    """Factors of rank 0: the base alone."""
    found = {}
    for name, axis in program.facts[FACT]["axes"].items():
        found[name] = program.state[name].detach().narrow(axis, 0, 0).cpu().numpy()
    return found


class Switch:
    """The adapters that a session takes, and the one that it runs with.

    Attributes:
        base: number of the weights that adapters must go with.
        shapes: of the factors, by name; None where the rank is.
    """

    def __init__(self, base: int, shapes: Mapping[str, list[int | None]]) -> None:
        self.base = base
        self.shapes = dict(shapes)
        self._kept: dict[Path, Any] = {}

    def options(self, path: Path) -> onnxruntime.RunOptions:
        """Options of a run with the adapter in a file; it is read once.

        Raises:
            ArgumentError: no readable file, or one of another base.
        """
        path = path.resolve()
        if path not in self._kept:
            self._check(path)
            adapter = onnxruntime.LoraAdapter()
            adapter.Load(str(path))
            self._kept[path] = adapter
        options = onnxruntime.RunOptions()
        options.add_active_adapter(self._kept[path])
        return options

    def _check(self, path: Path) -> None:
        try:
            file = onnxruntime.AdapterFormat.read_adapter(str(path))
            version, given = file.get_model_version(), file.get_parameters()
        except Exception as error:
            raise ArgumentError(f"this is no file of an adapter: {str(error).splitlines()[0]}",
                                where=str(path)) from None  # fmt: skip
        if version != self.base:
            raise ArgumentError("the adapter is of other base weights than the model's",
                                where=str(path))  # fmt: skip
        wrong = [n for n, value in given.items() if not _fits(value.shape(), self.shapes.get(n))]
        if wrong or not given:
            raise ArgumentError(f"the model has no factor {wrong[0]!r} of this shape" if wrong
                                else "the adapter is empty", where=str(path))  # fmt: skip


def _fits(shape: Any, wanted: list[int | None] | None) -> bool:
    sizes = list(shape)
    return wanted is not None and len(sizes) == len(wanted) and all(
        w is None or w == s for s, w in zip(sizes, wanted, strict=True)
    )  # fmt: skip
