"""Checks a pass's contract by numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from graphwright.ir.check.difference import Difference, difference, first_difference
from graphwright.ir.check.exact import disagreements
from graphwright.ir.check.fidelity import Fidelity, compare, merge
from graphwright.ir.check.precision import Walk, roundoff, same_draws
from graphwright.ir.check.promise import Promise
from graphwright.ir.context import Batch
from graphwright.ir.errors import ContractError
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.program import Program

FIRST_LOOK = 2**-21
"""Relative error in float32 below which an exact pass needs no look in float64: 4 roundings."""


class Checker:
    """Runs every program of a chain once on the same inputs and compares neighbours.

    Args:
        program: first program of the chain.
        batches: inputs beside the example inputs; errors are measured on both.
        other: inputs at another size. A pass that is exact has to be so there too; a lossy one
            has to give numbers, of the same shapes.
    """

    def __init__(
        self,
        program: Program,
        batches: Iterable[Batch] | None = None,
        other: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.inputs = list(_inputs(program, batches))
        self.measured = len(self.inputs)
        self.inputs += [] if other is None else [other]
        self.program = program
        self.original = [run(program, inputs) for inputs in self.inputs]
        self.current = self.original

    def accept(self, after: Program, promise: Promise) -> Fidelity:
        """Measures `after` against the program before it, and takes its place.

        Returns:
            the distance of the outputs in the program's own precision, for the report. A lossy
            pass is judged by it; one that is exact is judged in float64, see `exact`.

        Raises:
            ContractError: the signature changed, the program fails at a size that it took before,
                or the error is above the bound; names the first node that differs beyond rounding.
        """
        before = self.program
        _check_signature(before, after, promise.by)
        if after.graph is before.graph and _same_tensors(before, after):
            self.program = after
            return self._distance(self.current, self.current)
        outputs = [_run_after(after, inputs, promise.by) for inputs in self.inputs]
        fidelity = self._distance(self.current, outputs)
        for inputs, old, new in zip(self.inputs, self.current, outputs, strict=True):
            if promise.contract == "lossy":
                _hold_to_form(before, after, promise, inputs, (old, new))
            else:
                _hold_to_equality(before, after, promise, inputs, (old, new))
        if promise.contract == "lossy":
            _hold_to_bound(before, after, promise, fidelity)
        self.program, self.current = after, outputs
        return fidelity

    def resume(self, program: Program) -> None:
        """Goes on from `program`, which an earlier run has already checked."""
        self.program = program
        self.current = [run(program, inputs) for inputs in self.inputs]

    def total(self) -> Fidelity:
        """Distance of the current program from the first one."""
        return self._distance(self.original, self.current)

    def _distance(self, left: list[Any], right: list[Any]) -> Fidelity:
        count = self.measured
        return merge(compare(a, b) for a, b in zip(left[:count], right[:count], strict=True))


def check_contract(
    before: Program,
    after: Program,
    promise: Promise,
    batches: Iterable[Batch] | None = None,
    other: tuple[torch.Tensor, ...] | None = None,
) -> Fidelity:
    """Holds one pass to its word on the example inputs, `batches` and `other`; see `Checker`."""
    return Checker(before, batches, other).accept(after, promise)


def measure(before: Program, after: Program, batches: Iterable[Batch] | None = None) -> Fidelity:
    """Distance between two programs' outputs over the example inputs and `batches`."""
    return merge(
        compare(run(before, inputs), run(after, inputs)) for inputs in _inputs(before, batches)
    )


@torch.no_grad()
def run(program: Program, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The flat outputs, without recording gradients; random draws are the same at every call."""
    with same_draws():
        return program.run_flat(inputs)


def _inputs(
    program: Program, batches: Iterable[Batch] | None
) -> Iterator[tuple[torch.Tensor, ...]]:
    yield program.examples
    for batch in batches or ():
        yield program.bind(*batch) if isinstance(batch, tuple) else program.bind(**batch)


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


def _run_after(
    program: Program, inputs: tuple[torch.Tensor, ...], by: str
) -> tuple[torch.Tensor, ...]:
    try:
        return run(program, inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        node = _failing_node(program, inputs)
        raise ContractError(
            f"{by} made a program that fails on inputs of the sizes {_sizes(inputs)}, which the "
            f"program before it takes: {str(error).strip().splitlines()[0]}",
            details=() if node is None else (f"first node that fails: {node}",),
        ) from error


def _failing_node(program: Program, inputs: tuple[torch.Tensor, ...]) -> str | None:
    walk = Walk(program, inputs, wide=False)
    for node in program.graph.nodes:
        try:
            walk.step(node)
            walk.release(node)
        except (RuntimeError, IndexError, ValueError):
            return f"{node.name} ({node.target}), made by {gw_meta(node).get('by', 'trace')}"
    return None


def _hold_to_form(
    before: Program,
    after: Program,
    promise: Promise,
    inputs: tuple[torch.Tensor, ...],
    outputs: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]],
) -> None:
    """A lossy pass, on one set of inputs: numbers where there were numbers, of the same shapes."""
    fidelity = compare(*outputs)
    if fidelity.broken:
        first = first_difference(before, after, math.inf, inputs)
        raise _broken(promise, inputs, fidelity, fidelity.relative, "any finite", first)


def _hold_to_bound(before: Program, after: Program, promise: Promise, fidelity: Fidelity) -> None:
    """A lossy pass, on all measured inputs: at most the error that it was given."""
    bound = promise.max_error
    if bound is not None and not fidelity.relative <= bound:
        first = first_difference(before, after, bound)
        inputs = before.examples
        raise _broken(promise, inputs, fidelity, fidelity.relative, f"{bound:.3g}", first)


def _hold_to_equality(
    before: Program,
    after: Program,
    promise: Promise,
    inputs: tuple[torch.Tensor, ...],
    outputs: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]],
) -> None:
    """A pass that leaves the function as it is, on one set of inputs."""
    errors = [compare(a, b) for a, b in zip(*outputs, strict=True)]
    worst = max((e.relative for e in errors), default=0.0)
    broken = any(e.broken for e in errors)
    look = promise.tolerance if roundoff(before) < 2**-23 else FIRST_LOOK
    if not broken and worst <= (look if promise.tolerance else 0.0):
        return
    first, allowed = None, promise.tolerance
    if broken or not promise.tolerance:
        first = first_difference(before, after, 0.0 if not promise.tolerance else look, inputs)
    else:
        found = disagreements(before, after, inputs, promise.tolerance)
        if not found:
            return
        fault = found[0]
        culprits = fault.rewritten or (fault.node,)
        first = difference(culprits[0], fault.error, fault.allowed, culprits[1:])
        # the last is the output, or what stands nearest to it
        worst, allowed = found[-1].error.relative, found[-1].allowed
    raise _broken(promise, inputs, merge(errors), worst, f"{allowed:.3g}", first)


def _broken(
    promise: Promise,
    inputs: tuple[torch.Tensor, ...],
    fidelity: Fidelity,
    error: float,
    allowed: str,
    first: Difference | None,
) -> ContractError:
    return ContractError(
        f"{promise.by} broke its contract ({promise.contract}): relative error {error:.3g}, "
        f"allowed {allowed}",
        details=(
            *fidelity.notes,
            f"inputs of the sizes {_sizes(inputs)}; outputs: {fidelity}",
            *_named(first),
        ),
    )


def _sizes(inputs: tuple[torch.Tensor, ...]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in inputs)


def _named(first: Difference | None) -> tuple[str, ...]:
    if first is None:
        return ("no node that both programs have differs",)
    return (f"first node that differs: {first}",)
