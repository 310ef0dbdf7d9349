"""The operator that computes what another one writes."""

from __future__ import annotations

from typing import Any

import torch

RESHAPED_IN_PLACE = {"unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}
"""Operators that write no value: they change how a tensor is seen."""


def functional_form(op: Any) -> Any:
    """The overload that takes the same arguments and gives a new tensor; None where there is none.

    `pow_.Scalar` and `pow.Scalar` have one name, and another order of arguments: overloads are told
    apart by what they take, not by their names.

    Args:
        op: an overload that writes to its first argument (`add_`, `__iand__`) or to `out`.
    """
    name = op._schema.name.split("::")[1]
    if name.startswith("__i") and name.endswith("__"):
        name = f"__{name[3:]}"
    elif name.endswith("_"):
        name = name[:-1]
    packet = getattr(getattr(torch.ops, op.namespace), name, None)
    if packet is None:
        return None
    wanted = _taken(op)
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if not writing(candidate) and _taken(candidate) == wanted:
            return candidate
    return None


def writing(op: Any) -> list[str]:
    """Names of the arguments that an overload writes to."""
    return [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]


def _taken(op: Any) -> list[tuple[str, str]]:
    """(name, type) of every argument but `out`."""
    return [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out]
