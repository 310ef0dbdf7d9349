"""adapt.load: an adapter that Hugging Face PEFT has written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.peft_files import PeftFolder, kronecker_factors, read_peft
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.program import Program
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass, weight_shape
from graphwright.passes.adapt._form.low_rank import add_low_rank, matrix_shape, shapes
from graphwright.passes.adapt.dora import add_decomposed
from graphwright.passes.adapt.ia3 import inputs_of, scale_inputs, scale_outputs
from graphwright.passes.adapt.krona import add_kronecker
from graphwright.passes.base import Context, Result

KINDS = {"IA3": "adapt.ia3", "LOKR": "adapt.krona"}


class LoadOptions(AdapterOptions):
    """Options of adapt.load."""

    path: Annotated[str, Field(min_length=1, examples=["my-adapter"])]
    """Folder with `adapter_config.json` and `adapter_model.safetensors`; relative to the spec's."""


class Load(AdapterPass[LoadOptions]):
    """Puts an adapter from a folder of PEFT beside the layers that it names.

    LoRA (rank-stabilized, DoRA, with ranks and alphas by pattern), IA3 and LoKr are read, on
    linear layers, convolutions and tables. Names are those of the traced model. Every tensor of
    the file finds its place, or the file is refused with the names; so is an adapter that goes
    with a residual of its own (an unconverted PiSSA).
    """

    contract = "lossy"
    weights = "trained"
    kinds = (*PRODUCTS, "embedding")

    def run(self, program: Program, context: Context) -> Result:
        path = Path(self.options.path)
        folder = read_peft(path if path.is_absolute() else context.folder / path)
        known = {name for layer in layers(program, self.kinds) for name in layer.names}
        missing = [name for name in folder.layers if name not in known]
        if missing:
            near = difflib.get_close_matches(missing[0], known, n=3, cutoff=0.3)
            raise ModelError(
                f"the program has no layer {missing[0]!r}, which the adapter changes"
                + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""),
                where=str(path),
                fix=f"The adapter is of another base model. Near names: {', '.join(near)}.",
            )
        program = _with_saved(program, folder, self.id)
        named = [layer for layer in layers(program, self.kinds)
                 if any(name in folder.layers for name in layer.names)]  # fmt: skip
        chosen, left = self.sorted_out(program, named)
        if left:
            raise ModelError(
                f"the adapter cannot be put beside {left[0].layer!r}: {left[0].reason}",
                where=str(path),
            )
        lora = "adapt.dora" if folder.config.get("use_dora") else "adapt.lora"
        given = {**self.resolved_options(), "layout": "kron"}
        kind = KINDS.get(folder.kind, lora)
        return self.insert(program, context, chosen, [], folder, kind, given)

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        folder: PeftFolder = branch.found
        name = next(n for n in layer.names if n in folder.layers)
        parts = folder.layers[name]
        if folder.kind == "IA3":
            return _scale(branch, layer, parts["ia3"], folder.config)
        if folder.kind == "LOKR":
            first, second = kronecker_factors(parts, torch.Size(weight_shape(layer)[2:]))
            scale = folder.scale(name, 1)
            _expect(layer, "Kronecker product", _sizes(layer),
                    (len(first) * len(second), first.shape[1] * second.shape[1]))  # fmt: skip
            add_kronecker(branch, layer, first * scale, second, "kron")
            return f"{tuple(first.shape)} kron {tuple(second.shape)}"
        a, b = parts["lora_a"], parts["lora_b"]
        a = a.t().contiguous() if layer.kind == "embedding" else a
        rank = a.shape[1] if layer.kind == "embedding" else len(a)
        size_a, size_b = shapes(layer, rank)
        _expect(layer, "lora_A", size_a, tuple(a.shape))
        _expect(layer, "lora_B", size_b, tuple(b.shape))
        scale = folder.scale(name, rank)
        dropout = float(folder.config.get("lora_dropout") or 0.0)
        if "magnitude" in parts:
            add_decomposed(branch, layer, a, b, parts["magnitude"].flatten(), scale, dropout)
        else:
            add_low_rank(branch, layer, branch.parameter("lora_a", a),
                         branch.parameter("lora_b", b), scale, dropout)  # fmt: skip
        return f"rank {rank}, scale {scale:.3g}"


def _scale(branch: Branch, layer: Layer, stored: Tensor, config: Mapping[str, Any]) -> str:
    """IA3: a feed-forward layer, whose factors are a row, has its inputs scaled."""
    factors = stored.flatten()
    is_inner = stored.dim() == 2 and stored.shape[0] == 1
    if stored.dim() > 2 or len(factors) == 1:  # the shape does not tell
        listed = config.get("feedforward_modules") or []
        listed = [listed] if isinstance(listed, str) else listed
        is_inner = any(layer.name == m or layer.name.endswith(f".{m}") for m in listed)
    size = inputs_of(layer) if is_inner else _sizes(layer)[0]
    _expect(layer, "ia3_l", (size,), tuple(factors.shape))
    (scale_inputs if is_inner else scale_outputs)(branch, layer, factors)
    return f"{size} {'inputs' if is_inner else 'outputs'} scaled"


def _with_saved(program: Program, folder: PeftFolder, by: str) -> Program:
    """The program with the whole tensors that were trained beside the adapter."""
    editor = Editor(program, by=by)
    stored = {alias: name for name, aliases in program.aliases.items() for alias in aliases}
    for name, tensor in folder.saved.items():
        place = name if name in program.state else stored.get(name, "")
        if not place or program.state[place].shape != tensor.shape:
            raise ModelError(f"the program has no tensor {name!r} of shape "
                             f"{tuple(tensor.shape)}, which the adapter replaces")  # fmt: skip
        old = program.state[place]
        new = tensor.to(old.dtype)
        is_parameter = isinstance(old, nn.Parameter)
        editor.set_state(place, nn.Parameter(new, old.requires_grad) if is_parameter else new)
    return editor.finish()


def _sizes(layer: Layer) -> tuple[int, int]:
    return matrix_shape(layer)[0], inputs_of(layer)


def _expect(layer: Layer, what: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
    if tuple(wanted) != tuple(found):
        raise ModelError(f"{what} of {layer.name!r} has shape {found}, and the layer takes "
                         f"{tuple(wanted)}: the adapter is of another base model")  # fmt: skip
