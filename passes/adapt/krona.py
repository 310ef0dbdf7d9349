"""adapt.krona: a Kronecker product of two small matrices beside each layer."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import CONVOLUTIONS, PRODUCTS, TURNED
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass, weight_shape
from graphwright.passes.adapt._form.low_rank import groups_of

aten = torch.ops.aten

Size = Annotated[int, Field(ge=1)]


class KronaOptions(AdapterOptions):
    """Options of adapt.krona."""

    factor_out: Size = 64
    """Rows of the first factor, a1: divides the outputs of every layer."""

    factor_in: Size = 8
    """Columns of the first factor, a2: divides the inputs of every layer."""

    layout: Literal["kron", "interleaved"] = "kron"
    """Order of the outputs: that of the Kronecker product, or the one that the published code
    computes, whose checkpoints need it."""


class Krona(AdapterPass[KronaOptions]):
    """Adds (A kron B) x to every chosen layer's output, and trains A and B.

    A is (a1, a2) and B (out / a1, in / a2); the product is never formed: x becomes a matrix
    X (a2, in / a2), and A X B^T is the result. Beside a convolution A mixes the a2 parts of the
    inputs, and B is a convolution with the layer's kernel that runs on each. A starts normal with
    deviation 1 / a1, B at zero.

    Source: Marjit et al. 2024, "DiffuseKronA", equations 4 and 5. The published code flattens the
    result in another order than the product has (`layout: interleaved`).
    """

    papers = ("P04",)
    kinds = PRODUCTS

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        a1, a2, b1, b2 = self._sizes(layer)
        start = torch.randn((a1, a2), generator=generator) / a1
        shape = (b1, b2, *weight_shape(layer)[2:]) if layer.kind in CONVOLUTIONS else (b1, b2)
        add_kronecker(branch, layer, start, torch.zeros(shape), self.options.layout)
        return f"({a1}, {a2}) kron ({b1}, {b2})"

    def _sizes(self, layer: Layer) -> tuple[int, int, int, int]:
        shape = weight_shape(layer)
        out, inputs = (shape[1], shape[0]) if layer.kind in TURNED else shape[:2]
        a1, a2 = self.options.factor_out, self.options.factor_in
        for name, size, factor in (("factor_out", out, a1), ("factor_in", inputs, a2)):
            if size % factor:
                raise ModelError(
                    f"{name} {factor} does not divide the {size} "
                    f"{'outputs' if name == 'factor_out' else 'inputs'} of {layer.name!r}",
                    fix=f"Its divisors are {', '.join(map(str, _divisors(size)))}.",
                )
        return a1, a2, out // a1, inputs // a2

    def refusal(self, layer: Layer) -> str:
        if groups_of(layer) > 1:
            return "a grouped convolution is no Kronecker product"
        self._sizes(layer)
        return ""

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        change = product(layer.parts["krona_a"], layer.parts["krona_b"], layer.options["layout"])
        if layer.kind in TURNED:
            change = change.t()
        return layer.weight + change, layer.bias


def add_kronecker(branch: Branch, layer: Layer, a: Tensor, b: Tensor, layout: str) -> None:
    """Adds (a kron b) x to a layer's output.

    Args:
        branch: beside the layer.
        layer: the layer.
        a: (a1, a2).
        b: (b1, b2), and the kernel of a convolution.
        layout: order of the outputs, as `KronaOptions.layout`.
    """
    (a1, a2), b2 = a.shape, b.shape[1]
    stored_a, stored_b = branch.parameter("krona_a", a), branch.parameter("krona_b", b)
    if layer.kind in CONVOLUTIONS:
        axis = 1
        x = branch.add(aten.unflatten.int, branch.input, 1, [a2, b2])
        x = branch.add(aten.linear.default, branch.add(aten.movedim.int, x, 1, -1), stored_a)
        x = branch.add(aten.flatten.using_ints, branch.add(aten.movedim.int, x, -1, 1), 0, 1)
        x = branch.add(layer.node.target, x, stored_b, None, *branch.arguments[3:6])
        x = branch.add(aten.unflatten.int, x, 0, [-1, a1])
    else:
        axis = -2
        x = branch.add(aten.unflatten.int, branch.input, -1, [a2, b2])
        x = branch.add(aten.matmul.default, stored_a, branch.add(aten.linear.default, x, stored_b))
    if layout == "interleaved":
        x = branch.add(aten.transpose.int, x, axis, axis + 1)
    x = branch.add(aten.flatten.using_ints, x, axis, axis + 1)
    branch.finish(branch.add(aten.add.Tensor, branch.tip, x))


def product(a: Tensor, b: Tensor, layout: str) -> Tensor:
    """The change of a weight (out, in, *kernel) that two factors stand for."""
    whole = torch.einsum("ij,kl...->ikjl...", a, b)
    if layout == "interleaved":
        whole = whole.transpose(0, 1)
    return whole.flatten(0, 1).flatten(1, 2)


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]
