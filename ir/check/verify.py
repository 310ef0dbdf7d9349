"""Checks a pass's contract by numbers, and finds the first node where two programs part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.check.fidelity import Fidelity, compare, merge
from graphwright.ir.context import Batch
from graphwright.ir.errors import ContractError
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.program import Program

EPSILON = {"float16": 2**-10, "bfloat16": 2**-7}
"""Unit roundoff of the half formats; exact passes are judged by the program's own precision."""


@dataclass(frozen=True)
class Difference:
    """The first node at which two programs compute different values.

    Attributes:
        node: name of the node in the later program.
        op: what it calls.
        scope: module it belongs to.
        by: pass that made it (`trace` when it was there from the start).
        error: how far its value is from the earlier program's.
    """

    node: str
    op: str
    scope: str
    by: str
    error: Fidelity

    def __str__(self) -> str:
        place = f" in {self.scope}" if self.scope else ""
        return f"{self.node} ({self.op}){place}, made by {self.by}: {self.error}"


@dataclass(frozen=True)
class Promise:
    """What a pass says of its effect on the function.

    Attributes:
        by: id of the pass.
        contract: `exact`, `identity_at_init` or `lossy`.
        tolerance: largest relative error ||a-b||/||a|| of the first two contracts, for float32.
        max_error: largest relative error of a lossy pass; None for no bound.
    """

    by: str
    contract: str
    tolerance: float = 1e-5
    max_error: float | None = None


class Checker:
    """Runs every program of a chain once on the same inputs and compares neighbours.

    Args:
        program: first program of the chain.
        batches: inputs beside the example inputs.
    """

    def __init__(self, program: Program, batches: Iterable[Batch] | None = None) -> None:
        self.inputs = list(_inputs(program, batches))
        self.program = program
        self.original = [run(program, inputs) for inputs in self.inputs]
        self.current = self.original

    def accept(self, after: Program, promise: Promise) -> Fidelity:
        """Measures `after` against the program before it, and takes its place.

        Raises:
            ContractError: the signature changed, or the error is above the bound; names the first
                node whose value differs.
        """
        before = self.program
        _check_signature(before, after, promise.by)
        if after.graph is before.graph and _same_tensors(before, after):
            self.program = after
            return merge(compare(out, out) for out in self.current)
        outputs = [run(after, inputs) for inputs in self.inputs]
        fidelity = merge(compare(a, b) for a, b in zip(self.current, outputs, strict=True))
        bound = promise.max_error
        if promise.contract != "lossy":
            bound = promise.tolerance * max(1.0, _roundoff(before) / 2**-23)
        if fidelity.broken or (bound is not None and not fidelity.relative <= bound):
            raise ContractError(
                f"{promise.by} broke its contract ({promise.contract}): relative error "
                f"{fidelity.relative:.3g}, allowed {bound if bound is not None else 'any finite'}",
                details=_diagnosis(before, after, bound or 0.0, fidelity),
            )
        self.program, self.current = after, outputs
        return fidelity

    def resume(self, program: Program) -> None:
        """Goes on from `program`, which an earlier run has already checked."""
        self.program = program
        self.current = [run(program, inputs) for inputs in self.inputs]

    def total(self) -> Fidelity:
        """Distance of the current program from the first one."""
        return merge(compare(a, b) for a, b in zip(self.original, self.current, strict=True))


def check_contract(
    before: Program, after: Program, promise: Promise, batches: Iterable[Batch] | None = None
) -> Fidelity:
    """Holds one pass to its word on the example inputs and `batches`; see `Checker.accept`."""
    return Checker(before, batches).accept(after, promise)


def measure(before: Program, after: Program, batches: Iterable[Batch] | None = None) -> Fidelity:
    """Distance between two programs' outputs over the example inputs and `batches`."""
    return merge(
        compare(run(before, inputs), run(after, inputs)) for inputs in _inputs(before, batches)
    )


@torch.no_grad()
def run(program: Program, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The flat outputs, without recording gradients."""
    return program.run_flat(inputs)


def _inputs(
    program: Program, batches: Iterable[Batch] | None
) -> Iterator[tuple[torch.Tensor, ...]]:
    yield program.examples
    for batch in batches or ():
        yield program.bind(*batch) if isinstance(batch, tuple) else program.bind(**batch)


def _roundoff(program: Program) -> float:
    """Coarsest roundoff among the program's own tensors and outputs."""
    names = {str(t.dtype).removeprefix("torch.") for t in program.state.values()}
    names |= {spec.dtype for spec in program.signature.outputs}
    return max((EPSILON.get(name, 2**-23) for name in names), default=2**-23)


def _same_tensors(before: Program, after: Program) -> bool:
    names = list(before.state)
    return names == list(after.state) and all(before.state[n] is after.state[n] for n in names)


def _check_signature(before: Program, after: Program, pass_id: str) -> None:
    old, new = before.signature, after.signature
    if [s.name for s in old.inputs] != [s.name for s in new.inputs]:
        raise ContractError(f"{pass_id} changed the program's inputs")
    if len(old.outputs) != len(new.outputs):
        raise ContractError(f"{pass_id} changed the number of outputs")
    produced = after.graph.output_node().args[0]
    assert isinstance(produced, tuple)
    for spec, node in zip(new.outputs, produced, strict=True):
        value = node.meta["val"]
        if len(value.shape) != len(spec.shape):
            raise ContractError(
                f"{pass_id} changed output {spec.name!r} from {spec.shape} to {tuple(value.shape)}"
            )


def _diagnosis(
    before: Program, after: Program, bound: float, fidelity: Fidelity
) -> tuple[str, ...]:
    first = first_difference(before, after, bound)
    lines = list(fidelity.notes)
    lines.append(f"outputs: {fidelity}")
    lines.append(f"first node that differs: {first}" if first else "no common node differs alone")
    return tuple(lines)


def first_difference(
    before: Program,
    after: Program,
    bound: float,
    inputs: tuple[torch.Tensor, ...] | None = None,
) -> Difference | None:
    """First node of `after`, in graph order, that parts from `before` by more than `bound`.

    Both graphs are run once on the same inputs. Nodes correspond when they carry the same name
    (edits keep the names of nodes they do not replace); a replaced node is judged by the first
    node behind it that has a counterpart, and the answer then names the new node among that
    node's operands, which is where the fault lies.
    """
    inputs = before.examples if inputs is None else inputs
    reference = _Recorder(before).values(inputs)
    recorder = _Recorder(after)
    actual = recorder.values(inputs)
    for node in after.graph.nodes:
        expected = reference.get(node.name)
        got = actual.get(node.name)
        if expected is None or got is None or node.op == "placeholder":
            continue
        error = compare(expected, got)
        if error.broken or error.relative > bound:
            culprit = _newest_operand(node, reference)
            return Difference(
                culprit.name,
                str(culprit.target),
                next(reversed(culprit.meta.get("nn_module_stack", {})), ""),
                gw_meta(culprit).get("by", "trace"),
                error,
            )
    return None


def _newest_operand(node: fx.Node, reference: dict[str, Any]) -> fx.Node:
    """Among a differing node and the new nodes feeding it, the one nearest to the node."""
    for operand in node.all_input_nodes:
        if operand.name not in reference and operand.op == "call_function":
            return operand
    return node


class _Recorder(fx.Interpreter):
    """Runs a program and keeps every tensor it computes, by node name."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op == "call_function":
            self.kept[n.name] = value
        return value

    def values(self, inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
        with torch.no_grad():
            self.run(*inputs)
        return self.kept
