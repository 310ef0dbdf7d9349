"""The interface of a program: what a pass may not change, and what its graph has to keep."""

from __future__ import annotations

import torch

from graphwright.ir.errors import ContractError
from graphwright.ir.program import Program


def check_interface(before: Program, after: Program, by: str, *, declared: bool = False) -> None:
    """Inputs, outputs, free sizes and examples are those of the program before.

    Args:
        before, after: the programs around a pass.
        by: id of the pass.
        declared: the pass says that it changes the interface; then only what a comparison needs
            has to stay, the names of the inputs and the number of the outputs; inputs may come to
            the end that have a default (`Signature.state` and `defaults`).

    Raises:
        ContractError: they are not, or the graph has others than the signature says.
    """
    old, new = before.signature, after.signature
    if not declared:
        for part in ("inputs", "outputs", "structure", "dims", "derived", "defaults"):
            if getattr(old, part) != getattr(new, part):
                raise ContractError(
                    f"{by} changed the {part} of the program, and does not declare it",
                    fix="Declare `changes_interface = True` in the pass if that is meant.",
                    details=(f"before: {getattr(old, part)}", f"after: {getattr(new, part)}"),
                )
        _check_examples(before, after, by)
    names, more = ([s.name for s in signature.inputs] for signature in (old, new))
    added = more[len(names) :]
    if names != more[: len(names)] or not set(added) <= {*new.state, *new.defaults}:
        raise ContractError(f"{by} changed the program's inputs")
    if len(old.outputs) != len(new.outputs):
        raise ContractError(f"{by} changed the number of outputs")
    _check_graph(after, by)


def _check_examples(before: Program, after: Program, by: str) -> None:
    for spec, old, new in zip(
        before.signature.inputs, before.examples, after.examples, strict=True
    ):
        same = old is new or (
            old.dtype == new.dtype and old.shape == new.shape and _same_bits(old, new)
        )
        if not same:
            raise ContractError(
                f"{by} changed the example of the input {spec.name!r}, on which it is checked"
            )


def _same_bits(old: torch.Tensor, new: torch.Tensor) -> bool:
    both = (old.detach().cpu(), new.detach().cpu())
    if not old.is_floating_point():
        return torch.equal(*both)
    return torch.equal(*(torch.nan_to_num(tensor) for tensor in both))


def _check_graph(program: Program, by: str) -> None:
    """The graph has the inputs of the signature, in its order, and outputs of its kinds."""
    names = [str(node.target) for node in program.graph.find_nodes(op="placeholder")]
    specs = [spec.name for spec in program.signature.inputs]
    if names != specs:
        raise ContractError(f"{by} left a graph with the inputs {names}, declared are {specs}")
    produced = program.graph.output_node().args[0]
    assert isinstance(produced, tuple)
    for spec, node in zip(program.signature.outputs, produced, strict=True):
        value = node.meta["val"]
        dtype = str(value.dtype).removeprefix("torch.")
        if len(value.shape) != len(spec.shape) or dtype != spec.dtype:
            raise ContractError(
                f"{by} changed output {spec.name!r} from {spec.dtype} {spec.shape} to "
                f"{dtype} {tuple(value.shape)}"
            )
