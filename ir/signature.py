"""The interface of a program: names, dtypes, symbolic sizes and structure of inputs and outputs.

Everything here is plain data that goes to JSON and back, so that a saved program needs no class
of the user's to rebuild the model's own output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Dim = int | str
"""A size: a number, or the name of a dynamic dimension."""


@dataclass(frozen=True)
class DimRange:
    """Sizes that a dynamic dimension may take, both ends included; `max` None has no bound.

    The least is 1 unless an empty tensor makes sense, as a cache of keys before the first token.
    """

    min: int = 1
    max: int | None = None


Default = Literal["zeros", "ones", "positions"]
"""Value of an input that a call leaves out: see `ir/data/defaults.py`."""


def derived_size(sum_of: str, sizes: Mapping[str, int]) -> int:
    """The size that a sum of names and whole numbers gives: `past + seq`, `seq + 1`.

    Raises:
        KeyError: a name is not among the sizes.
    """
    terms = [term.strip() for term in sum_of.split("+")]
    return sum(int(term) if term.isdecimal() else sizes[term] for term in terms)


def completed(derived: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, int]:
    """`sizes` with those of the derived dimensions whose terms are known."""
    full = dict(sizes)
    for dim, sum_of in derived.items():
        with contextlib.suppress(KeyError):
            full[dim] = derived_size(sum_of, full)
    return full


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the signature.

    Attributes:
        name: name of the input or output.
        dtype: as `float32`, `int64`.
        shape: sizes and names of dynamic dimensions.
        range: half-open range of sensible values [low, high), when known (token ids, say).
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Signature:
    """Inputs, outputs, dynamic dimensions and output structure of a program.

    Attributes:
        inputs: tensor inputs, in call order.
        outputs: tensor outputs, in the order of the graph's output tuple.
        structure: tree that rebuilds the model's own output from the flat tuple; see `rebuild`.
        dims: range of every dynamic dimension by name.
        constants: non-tensor arguments that tracing baked in, by name.
        state: names of inputs that are the model's state, or another tensor that it has a default
            for; a call that leaves them out starts from the model's own.
        derived: dynamic dimensions that follow from others, by name: `{"total": "past + seq"}`.
            Whoever chooses sizes chooses the others and goes through `completed`.
        defaults: inputs that a call may leave out because their values follow from the rest.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    structure: Any
    dims: dict[str, DimRange] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    derived: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Default] = field(default_factory=dict)

    def completed(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes with those of derived dimensions made to follow, where their terms are known.

        A size of a derived dimension that was given is replaced.
        """
        return completed(self.derived, sizes)

    def to_json(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Signature:
        """Inverse of `to_json` (lists come back as tuples)."""

        def spec(item: dict[str, Any]) -> TensorSpec:
            bounds = item.get("range")
            return TensorSpec(
                item["name"], item["dtype"], tuple(item["shape"]), tuple(bounds) if bounds else None
            )

        return cls(
            inputs=tuple(spec(i) for i in data["inputs"]),
            outputs=tuple(spec(o) for o in data["outputs"]),
            structure=data["structure"],
            dims={name: DimRange(**bounds) for name, bounds in data["dims"].items()},
            constants=dict(data["constants"]),
            state=tuple(data.get("state", ())),
            derived=dict(data.get("derived", {})),
            defaults=dict(data.get("defaults", {})),
        )


class Outputs(dict[str, Any]):
    """A model's named outputs: a dict that also answers to attributes and to integer indices."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | slice):
            return tuple(self.values())[key]
        return super().__getitem__(key)


def flatten(value: Any, leaves: list[Any]) -> Any:
    """Structure tree of `value`; appends its tensors to `leaves`.

    The tree is JSON: `{"leaf": i}`, `{"tuple": [...]}`, `{"list": [...]}`, `{"dict": {...}}`,
    `{"named": {...}}` (a record such as a transformers ModelOutput), `{"value": constant}`. A trace
    with explicit state adds `{"state": [the model's own, {"dict": new state}]}` around it.

    Raises:
        TypeError: a part is neither a tensor, a container nor a plain constant.
    """
    import dataclasses

    import torch

    if isinstance(value, torch.Tensor | torch.fx.Node):
        leaves.append(value)
        return {"leaf": len(leaves) - 1}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        names = value._fields
        return {"named": {n: flatten(v, leaves) for n, v in zip(names, value, strict=True)}}
    if isinstance(value, tuple):
        return {"tuple": [flatten(v, leaves) for v in value]}
    if isinstance(value, list):
        return {"list": [flatten(v, leaves) for v in value]}
    if isinstance(value, dict):
        kind = "dict" if type(value) is dict else "named"
        return {kind: {str(k): flatten(v, leaves) for k, v in value.items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"named": {k: flatten(v, leaves) for k, v in fields.items()}}
    raise TypeError(f"an output of type {type(value).__name__} holds no tensors we can name")


def rebuild(structure: Any, leaves: Sequence[Any]) -> Any:
    """The model's own output from the flat tuple; records come back as `Outputs`."""
    ((kind, body),) = structure.items()
    if kind == "leaf":
        return leaves[body]
    if kind == "value":
        return body
    if kind in ("tuple", "state"):
        return tuple(rebuild(part, leaves) for part in body)
    if kind == "list":
        return [rebuild(part, leaves) for part in body]
    items = {name: rebuild(part, leaves) for name, part in body.items()}
    return items if kind == "dict" else Outputs({k: v for k, v in items.items() if v is not None})


def leaf_of(structure: Any, outputs: Any, index: int) -> Any:
    """The leaf with a number of the flat tuple, out of the model's own output."""
    ((kind, body),) = structure.items()
    if kind == "leaf":
        return outputs if body == index else None
    if kind == "value":
        return None
    items = body.items() if isinstance(body, dict) else enumerate(body)
    for key, part in items:
        try:
            inner = outputs[key]
        except KeyError:  # a record leaves out what is None
            continue
        if (found := leaf_of(part, inner, index)) is not None:
            return found
    return None


def leaf_names(structure: Any, prefix: str = "") -> Iterator[tuple[int, str]]:
    """(leaf index, readable name) for every leaf: `logits`, `hidden_states_0`, `output`."""
    ((kind, body),) = structure.items()
    if kind == "leaf":
        yield body, prefix or "output"
    elif kind in ("tuple", "list"):
        for index, part in enumerate(body):
            name = f"{prefix}_{index}" if prefix else f"output_{index}"
            yield from leaf_names(part, name)
    elif kind == "state":
        for part in body:
            yield from leaf_names(part, prefix)
    elif kind in ("dict", "named"):
        for key, part in body.items():
            yield from leaf_names(part, f"{prefix}_{key}" if prefix else key)
