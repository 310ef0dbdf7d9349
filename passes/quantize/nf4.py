"""quantize.nf4: 4-bit weights on the quantiles of a normal distribution, without any data."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import CODABLE
from graphwright.ir.layers.products import weight_node, weight_value
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Bounded, Targets, also
from graphwright.ir.program import Program
from graphwright.ir.stored.insert import matrix_of, replace_weight
from graphwright.ir.stored.refusals import refusals
from graphwright.ir.stored.table import Table, quantize, rebuild_table
from graphwright.passes.base import WEIGHTS, Action, Context, Pass, Result


class Nf4Options(Bounded, Targets):
    """Options of quantize.nf4."""

    kind: Literal["nf4", "fp4"] = "nf4"
    """The 16 levels: `nf4`, quantiles of a normal distribution, or `fp4`, a 4-bit float."""

    block: Annotated[
        Literal[16, 32, 64, 128, 256], Field(validation_alias=also("block", "group_size"))
    ] = 64
    """Neighbouring weights that share a scale."""

    double_quantization: bool = True
    """Store the scales as 8-bit codes too: 0.127 instead of 0.5 bits per weight at block 64."""

    embeddings: bool = True
    """Store embedding tables in 4 bits too."""


class Figures(NamedTuple):
    """Stored bits of a weight, its elements, and ||w - w'|| / ||w||."""

    bits: int
    elements: int
    error: float


class Nf4(Pass[Nf4Options]):
    """Stores weights as 4-bit codes of NormalFloat4 (or FP4) with one scale per block.

    Codes, the order of the blocks and the double quantization of their scales are those of
    bitsandbytes: blocks run over the flattened weight, (out, in), across the ends of its rows.
    `graphwright::dequantize_table` rebuilds the weight in front of its layer. A tied weight stays
    tied: when one of its layers is quantized, all are.

    In ONNX Runtime a matrix product becomes one MatMulBnb4, which keeps the weight in 4 bits (its
    CPU kernel rebuilds it at every call: slower than float for few rows, the price of the memory);
    an embedding gathers 4-bit rows; a convolution is stored in 4 bits and rebuilt when the session
    is made. Weights only: activations stay in float.

    Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
    """

    contract = "lossy"
    stored_bits = 4
    takes = WEIGHTS
    codes = WEIGHTS
    stores_weights = True
    after = ("cleanup.*", "prune.*", "quantize.smoothquant")
    lowers_to = ("onnxruntime", "triton")

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        chosen = select(program, options.targets, CODABLE)
        refused = refusals(program, chosen, embeddings=options.embeddings)
        if len(refused) == len(chosen):
            reasons = sorted({f"{layer.name}: {refused[layer]}" for layer in chosen})
            raise ModelError(f"{self.id} can quantize none of its targets", details=tuple(reasons))
        editor = Editor(program, by=self.id)
        actions: list[Action] = []
        figures: list[Figures] = []
        done: dict[fx.Node, str] = {}
        for index, layer in enumerate(chosen):
            weight = weight_node(layer)
            if layer in refused:
                actions.append(Action.left(layer.name, refused[layer]))
            elif weight in done:
                reason = f"shares the weight of {done[weight]}"
                actions.append(Action(layer.name, options.kind, reason))
            else:
                done[weight] = layer.name
                found = self._quantize(editor, program, layer)
                figures.append(found)
                what = f"{options.kind}, {found.bits / found.elements:.3f} bits per weight"
                actions.append(Action(layer.name, f"{what}, relative error {found.error:.2e}"))
            context.progress("quantizing", index + 1, len(chosen))
        return Result(editor.finish(), tuple(actions), _metrics(figures))

    def _quantize(self, editor: Editor, program: Program, layer: Layer) -> Figures:
        options = self.options
        value = weight_value(program, layer)
        matrix = matrix_of(layer.kind, value)
        stored = quantize(matrix, options.kind, options.block, double=options.double_quantization)
        replace_weight(editor, layer, rebuild_table(stored, value.dtype))
        return Figures(stored.nbytes * 8, value.numel(), relative_error(matrix, stored))


def relative_error(matrix: Tensor, stored: Table) -> float:
    """||w - w'|| / ||w||; 0 for a weight of zeros."""
    size = float(matrix.double().norm())
    return float((stored.value().double() - matrix.double()).norm()) / size if size else 0.0


def _metrics(figures: list[Figures]) -> dict[str, float]:
    errors = [each.error for each in figures]
    return {
        "weights": float(len(figures)),
        "bits_per_weight": sum(f.bits for f in figures) / sum(f.elements for f in figures),
        "weight_error_mean": sum(errors) / len(errors),
        "weight_error_max": max(errors),
    }
