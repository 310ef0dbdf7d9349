"""Takes a checkpoint in codes apart, and puts its layers into a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.coded.description import NOTHING, refuse_undescribed
from graphwright.ir.files.coded.forms import Blocks, Expanded
from graphwright.ir.files.coded.layout import Layer, Layout
from graphwright.ir.files.coded.modules import CodedLinear, coded_linear
from graphwright.ir.files.pickles import listed
from graphwright.ir.files.weights import fill


class Parts:
    """A checkpoint, taken apart.

    Attributes:
        plain: the tensors that are no codes.
        layers: a linear layer without a bias for every weight in codes, by its name in the file.
        layout: how the file stores them.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], layout: Layout, known: Mapping[str, Tensor] = NOTHING
    ) -> None:
        """Args are the tensors of a file, their layout, and the model's own by name if known.

        Raises:
            ModelError: a layer's tensors are incomplete or do not fit each other, or some tensors
                are codes of another kind.
        """
        self.layout = layout
        self.plain = dict(tensors)
        self.layers: dict[str, CodedLinear | nn.Linear] = {}
        self._as_floats: dict[str, str] = {}
        for owner in layout.owners(tensors):
            layer = self._read(owner)
            self.layers[owner] = coded_linear(layer)
            if isinstance(layer.form, Expanded):
                self._as_floats[owner] = f"for no op rebuilds {layer.form.why}"
        refuse_undescribed(self.plain, layout.where, known, layout.name)

    def _read(self, owner: str) -> Layer:
        names = [part for part in self.layout.parts if f"{owner}.{part}" in self.plain]
        parts = {name: self.plain.pop(f"{owner}.{name}") for name in names}
        try:
            layer = self.layout.read(owner, parts)
        except ModelError as error:
            if error.where:
                raise
            raise ModelError(
                f"{owner!r}: {error.message}", where=self.layout.where, fix=error.fix
            ) from None
        except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError,
                ValueError) as error:  # fmt: skip
            raise ModelError(
                f"the quantized tensors of {owner!r} are incomplete or do not fit each other",
                where=self.layout.where,
                details=((str(error).splitlines() or [type(error).__name__])[0],),
            ) from error
        _check(owner, layer, self.layout.where)
        return layer

    def shape(self, owner: str) -> tuple[int, int]:
        """(out, in) of a weight in codes."""
        layer = self.layers[owner]
        return layer.out_features, layer.in_features

    def value(self, owner: str, like: nn.Module | None, dtype: torch.dtype) -> Tensor:
        """A weight in codes as floats, in the form that a module stores."""
        weight = self.layers[owner].to(dtype).weight.detach().to(dtype)
        return weight.T.contiguous() if is_turned(like) else weight

    def hold_as_floats(self, owner: str, why: str) -> None:
        """Notes for the summary that a weight does not stay in codes."""
        self._as_floats.setdefault(owner, why)

    def replace(self, module: nn.Module, path: str, owner: str) -> None:
        """Puts a layer in codes in the place of a linear one, or of a table of embeddings.

        Layers that the same weight is put into share its tensors.

        Raises:
            ModelError: it is of another size.
        """
        old: Any = module.get_submodule(path)
        shape = tuple(old.weight.shape)
        shape = shape[::-1] if is_turned(old) else shape
        if shape != self.shape(owner):
            raise ModelError(
                f"{owner!r} is {self.shape(owner)} in the file, {shape} in the module",
                where=self.layout.where,
            )
        held = self.layers[owner] = self.layers[owner].to(old.weight.dtype)
        if not isinstance(held, CodedLinear):
            turned = is_turned(old)  # else the very parameter, so that ties stay ties
            old.weight = nn.Parameter(held.weight.t(), False) if turned else held.weight
            return
        new = held.twin()
        if is_linear(old):
            new.bias = old.bias
        else:
            new.row_dtype, new.row_factor = old.weight.dtype, row_factor(old)
        above, _, attribute = path.rpartition(".")
        setattr(module.get_submodule(above), attribute, new)

    def notes(self) -> list[str]:
        """Notes for the user on the layers in codes, a line each."""
        notes = self.layout.remarks()
        if not self.layers:
            notes.append(f"the description of {self.layout.name} weights is not followed: none of "
                         "the tensors is in codes")  # fmt: skip
        for why in dict.fromkeys(self._as_floats.values()):
            names = [name for name, reason in self._as_floats.items() if reason == why]
            notes.append(f"{len(names)} quantized weights are held as floats, {why}: "
                         f"{', '.join(listed(names, 3))}")  # fmt: skip
        kinds = [str(layer.rounding) for layer in self.layers.values()
                 if isinstance(layer, CodedLinear) and layer.rounding]  # fmt: skip
        notes += [f"inputs of {kinds.count(kind)} layers are rounded as the checkpoint asks: to "
                  f"{kind}" for kind in dict.fromkeys(kinds)]  # fmt: skip
        return notes


def _check(owner: str, layer: Layer, where: str) -> None:
    form = layer.form
    out, inputs = form.shape
    if not isinstance(form, Blocks):
        return
    wanted = (out, -(-inputs // form.block))
    shapes = [tuple(t.shape) for t in (form.scale, form.zero) if t is not None]
    if any(shape != wanted for shape in shapes):
        raise ModelError(
            f"the scales of {owner!r} are {shapes[0]}, and its {inputs} inputs in groups of "
            f"{form.block} ask for {wanted}",
            where=where,
        )


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module computes x @ weight.T + bias, its weight stored either way round."""
    return isinstance(module, nn.Linear) or is_turned(module)


def is_turned(module: nn.Module | None) -> bool:
    """Whether it is transformers' Conv1D, a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_table(module: nn.Module | None) -> bool:
    """Whether it looks rows up and does no more than multiply them by a number."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    plain = type(module).forward is nn.Embedding.forward
    return plain or type(module).__name__.endswith("ScaledWordEmbedding")


def row_factor(table: nn.Module) -> float:
    """The number that a table's rows are multiplied by, in the precision of the rows."""
    factor: Any = getattr(table, "embed_scale", 1.0)
    if not isinstance(factor, Tensor):
        return float(factor)
    weight: Any = table.weight
    return float(factor.to(weight.dtype))


def fill_module(module: nn.Module, parts: Parts) -> list[str]:
    """Gives a module the tensors of a checkpoint in codes; returns what the user should know.

    Names in the file may have a prefix that the module does not know. Layers in codes take the
    place of linear layers; weights of other layers are filled in as floats.

    Raises:
        ModelError: as `Parts.replace` and `weights.fill`, or a weight belongs to no layer.
    """
    where = parts.layout.where
    modules = dict(module.named_modules())
    paths = {owner: _find(modules, owner) for owner in parts.layers}
    unknown = [owner for owner, path in paths.items() if path not in modules]
    if unknown:
        raise ModelError(
            f"{len(unknown)} quantized layers of the file are no layers of the model",
            where=where,
            details=tuple(listed(unknown)),
        )
    found = _without_empty_biases(parts, {o: modules[p] for o, p in paths.items()})
    for owner, path in paths.items():
        old: Any = modules[path]
        if not is_linear(old):
            parts.hold_as_floats(owner, f"for {type(old).__name__} is no linear layer")
        found[f"{owner}.weight"] = _placeholder(parts, owner, old)
    notes = fill(module, found, where)
    for owner, path in paths.items():
        if is_linear(modules[path]):
            parts.replace(module, path, owner)
    return [*notes, *parts.notes()]


def _placeholder(parts: Parts, owner: str, old: nn.Module) -> Tensor:
    """A filler for the weight of a layer until it is replaced: zeros, which take no memory."""
    weight: Any = getattr(old, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
    if not is_linear(old):
        return parts.value(owner, old, dtype).reshape(weight.shape)
    shape = parts.shape(owner)
    return torch.zeros((), dtype=dtype).expand(shape[::-1] if is_turned(old) else shape)


def _without_empty_biases(parts: Parts, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The plain tensors, less the biases of zeros that some tools write for layers without one."""
    found = dict(parts.plain)
    for owner, old in modules.items():
        bias = found.get(f"{owner}.bias")
        if getattr(old, "bias", None) is None and bias is not None and not bias.any():
            del found[f"{owner}.bias"]
    return found


def _find(modules: Mapping[str, nn.Module], name: str) -> str:
    while name not in modules and "." in name:
        name = name.partition(".")[2]
    return name
