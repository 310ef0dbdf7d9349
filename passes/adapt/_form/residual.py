"""A part of a layer's weight that moves into its adapter, and the residual that stays."""

from __future__ import annotations

from torch import Tensor, nn

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.kinds import TURNED
from graphwright.ir.layers.selectors import Layer
from graphwright.passes.adapt._form.low_rank import groups_of


def weight_matrix(branch: Branch, layer: Layer) -> Tensor:
    """The stored weight of a layer as a matrix (out, columns), float64.

    Raises:
        ModelError: it is rebuilt from codes, or a grouped convolution's.
    """
    tensor = branch.editor.tensor(branch.weight)
    if tensor is None:
        raise ModelError(
            f"the weight of {layer.name!r} is rebuilt from codes, and this adapter starts from "
            "its values",
            fix="Put the adapter before the pass that quantizes.",
        )
    if groups_of(layer) > 1:
        raise ModelError(f"{layer.name!r} is a grouped convolution, whose weight is no one matrix")
    wide = tensor.detach().double()
    return wide.t() if layer.kind in TURNED else wide.flatten(1)


def take_out(branch: Branch, layer: Layer, part: Tensor) -> None:
    """Subtracts a part (out, columns) from the stored weight of a layer.

    Raises:
        ModelError: a layer without the adapter reads the weight too.
    """
    branch.residual = True
    node = branch.weight
    others = [reader.name for reader in node.users if reader is not branch.call]
    if others:
        raise ModelError(
            f"the weight of {layer.name!r} is also read by {others[0]!r}, which would lose what "
            "moves into the adapter",
            fix="Use adapt.lora, which leaves the weight as it is.",
        )
    name = str(node.target)
    old = branch.editor.state[name]
    part = part.t() if layer.kind in TURNED else part.reshape(old.shape)
    rest = (old.detach().double() - part.double()).to(old.dtype).contiguous()
    is_parameter = isinstance(old, nn.Parameter)
    new: Tensor = nn.Parameter(rest, old.requires_grad) if is_parameter else rest
    branch.editor.set_state(name, new)
