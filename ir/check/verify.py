"""Checks a pass's contract by numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from graphwright.ir.causes import innermost
from graphwright.ir.check import restated
from graphwright.ir.check.decode import DecodeCheck
from graphwright.ir.check.difference import MOST_NAMED, Difference, difference, first_difference
from graphwright.ir.check.exact import disagreements
from graphwright.ir.check.fidelity import Fidelity, compare, has_finite, merge
from graphwright.ir.check.interface import check_interface
from graphwright.ir.check.precision import Walk, roundoff, same_draws
from graphwright.ir.check.promise import Promise
from graphwright.ir.check.slices import slice_errors
from graphwright.ir.context import Batch
from graphwright.ir.data.far import far_inputs
from graphwright.ir.errors import ContractError, ModelError
from graphwright.ir.generation.visible import visible
from graphwright.ir.graph.nodes import gw_meta
from graphwright.ir.graph.random import named, random_nodes
from graphwright.ir.program import Program

Inputs = tuple[torch.Tensor, ...]
Outputs = tuple[torch.Tensor, ...]

FIRST_LOOK = 2**-21
"""Relative error in float32 below which an exact pass needs no look in float64: 4 roundings."""

SLICES_LOOK = 32.0
"""Multiple of it for one slice of an output: the worst of many is off by more."""


class Checker:
    """Runs every program of a chain once on the same inputs and compares neighbours.

    A decoder with a cache is run in steps too (`decode`); `decode_error` is what the last pass gave
    there.

    Args:
        program: first program of the chain.
        batches: inputs beside the example inputs; errors are measured on both.
        others: inputs of other sizes. A pass that is exact has to be so there too; a lossy one
            has to give numbers, of the same shapes.

    Raises:
        ModelError: no output of the program has a finite value at any of the inputs.
    """

    def __init__(
        self,
        program: Program,
        batches: Iterable[Batch] | None = None,
        others: Sequence[Inputs] = (),
    ) -> None:
        self.inputs = list(_inputs(program, batches))
        self.measured = len(self.inputs)
        self.inputs += others
        self.program = program
        self._first = restated.runner(program, wide=False)
        self.original = [run(program, inputs) for inputs in self.inputs]
        self.current = self.original
        self.decode = DecodeCheck.of(program)
        self.decode_error: float | None = None
        _refuse_without_numbers(program, self.original)

    def accept(self, after: Program, promise: Promise) -> Fidelity:
        """Measures `after` against the program before it, and takes its place.

        Returns:
            the distance of the outputs in the program's own precision, for the report. A lossy
            pass is judged by it; one that is exact is judged in float64, see `exact`.

        Raises:
            ContractError: the signature or the examples changed, the program fails at a size that
                it took before, or the error of an output is above the bound; names the first node
                that differs beyond rounding.
        """
        before = self.program
        if promise.expected is not None:
            fidelity = restated.check_restated(before, after, promise.by, promise.expected)
            self.resume(after, [promise])
            return fidelity
        check_interface(before, after, promise.by, declared=promise.changes_interface)
        if after.graph is before.graph and _same_tensors(before, after):
            self.program = after
            return self._distance(self.current, self.current)
        outputs = [_run_after(after, inputs, promise.by) for inputs in self.inputs]
        for inputs, old, new in zip(self.inputs, self.current, outputs, strict=True):
            if promise.contract == "lossy":
                _hold_to_form(before, after, promise, inputs, (old, new))
            else:
                _hold_to_equality(before, after, promise, inputs, (old, new))
        if promise.contract == "lossy":
            self._hold_to_bound(after, promise, outputs)
        else:
            _hold_far_away(before, after, promise)
        fidelity = self._distance(self.current, outputs)
        if self.decode is not None:
            self.decode_error = self.decode.hold_program(after, promise.by)
        self.program, self.current = after, outputs
        return fidelity

    def resume(self, program: Program, promises: Sequence[Promise] = ()) -> None:
        """Goes on from `program`, which has already been checked, behind passes of these promises.

        What a pass restated is compared from there on with the first program, restated alike.
        """
        self.program = program
        for expected in (p.expected for p in promises if p.expected is not None):
            self._first = restated.restated_run(expected, program, self._first)
            self.inputs, self.measured = restated.restated_inputs(program), 1
        if any(p.expected is not None for p in promises):
            self.original = [restated.flat(self._first, program, inputs) for inputs in self.inputs]
        self.current = [run(program, inputs) for inputs in self.inputs]

    def total(self, run_flat: Callable[[Inputs], Outputs] | None = None) -> Fidelity:
        """Distance from the first program: of the current one, or of what was made of it.

        Args:
            run_flat: an artifact: one tensor per input to one per output.
        """
        if run_flat is None:
            return self._distance(self.original, self.current)
        with same_draws():
            filled = [self.program.filled(inputs) for inputs in self.inputs[: self.measured]]
            outputs = [run_flat(inputs) for inputs in filled]
        if self.decode is None:
            return self._distance(self.original, outputs)
        record, signature = self.decode.record, self.program.signature
        sides = [
            [visible(record, signature, i, o) for i, o in zip(filled, side, strict=False)]
            for side in (self.original, outputs)
        ]
        return self._distance(*sides)

    def _distance(self, left: list[Outputs], right: list[Outputs]) -> Fidelity:
        count = self.measured
        return merge(compare(a, b) for a, b in zip(left[:count], right[:count], strict=True))

    def _hold_to_bound(self, after: Program, promise: Promise, outputs: list[Outputs]) -> None:
        """A lossy pass, on all measured inputs: every output by itself.

        None may vanish, and each has at most the error that the pass was given.
        """
        bound = math.inf if promise.max_error is None else promise.max_error
        pairs = list(zip(self.current, outputs, strict=True))[: self.measured]
        for index, spec in enumerate(self.program.signature.outputs):
            error = merge(compare(old[index], new[index]) for old, new in pairs)
            inputs = self.program.examples
            if error.wiped and spec.dtype.startswith(("float", "bfloat", "complex")):
                first = first_difference(self.program, after, math.inf, inputs)
                raise ContractError(
                    f"{promise.by} makes the output {spec.name!r} all zeros",
                    fix="Leave out layers that it depends on (`targets`, or `keep` of cast.dtype), "
                    "or ask for less.",
                    details=(f"it was {_rms(error):.3g} on average (root mean square)",
                             *_named(first)),
                )  # fmt: skip
            if not error.within(bound):
                first = first_difference(self.program, after, bound)
                allowed = f"{bound:.3g} (output {spec.name!r})"
                raise _broken(self.program, promise, inputs, error, error.relative, allowed, first)


def check_contract(
    before: Program,
    after: Program,
    promise: Promise,
    batches: Iterable[Batch] | None = None,
    others: Sequence[Inputs] = (),
) -> Fidelity:
    """Holds one pass to its word on the example inputs, `batches` and `others`; see `Checker`."""
    return Checker(before, batches, others).accept(after, promise)


def measure(before: Program, after: Program, batches: Iterable[Batch] | None = None) -> Fidelity:
    """Distance between two programs' outputs over the example inputs and `batches`."""
    return merge(
        compare(run(before, inputs), run(after, inputs)) for inputs in _inputs(before, batches)
    )


@torch.no_grad()
def run(program: Program, inputs: Inputs) -> Outputs:
    """The flat outputs, without recording gradients; random draws are the same at every call."""
    with same_draws():
        return program.run_flat(inputs)


def _inputs(program: Program, batches: Iterable[Batch] | None) -> Iterator[Inputs]:
    yield program.examples
    for batch in batches or ():
        yield program.bind(*batch) if isinstance(batch, tuple) else program.bind(**batch)


def _same_tensors(before: Program, after: Program) -> bool:
    names = list(before.state)
    return names == list(after.state) and all(before.state[n] is after.state[n] for n in names)


def _refuse_without_numbers(program: Program, outputs: list[Outputs]) -> None:
    """Where every value is NaN or infinite, any two programs would agree."""
    if any(tensor.numel() for flat in outputs for tensor in flat) and not has_finite(outputs):
        names = ", ".join(spec.name for spec in program.signature.outputs)
        raise ModelError(
            f"no output of the model has a finite value ({names}): nothing could be checked",
            fix="Give inputs that it makes numbers of (`range` in the spec's model.inputs, or "
            "calibration data), or look for weights that are not finite.",
            details=tuple(
                f"stored tensor with NaN or infinity: {name}"
                for name, tensor in program.state.items()
                if tensor.is_floating_point() and not tensor.isfinite().all()
            )[:MOST_NAMED],
        )


def _hold_far_away(before: Program, after: Program, promise: Promise) -> None:
    """An exact pass on inputs far from the examples, where the program gives numbers there."""
    for inputs in far_inputs(before).values():
        try:
            old = run(before, inputs)
        except (RuntimeError, IndexError, ValueError):
            continue
        if all(bool(tensor.isfinite().all()) for tensor in old):
            new = _run_after(after, inputs, promise.by)
            _hold_to_equality(before, after, promise, inputs, (old, new))


def _rms(error: Fidelity) -> float:
    return math.sqrt(error.reference_energy / max(error.elements, 1))


def _run_after(program: Program, inputs: Inputs, by: str) -> Outputs:
    try:
        return run(program, inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        node = _failing_node(program, inputs)
        raise ContractError(
            f"{by} made a program that fails on inputs of the sizes {_sizes(inputs)}, which the "
            f"program before it takes: {innermost(error)}",
            details=() if node is None else (f"first node that fails: {node}",),
        ) from error


def _failing_node(program: Program, inputs: Inputs) -> str | None:
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
    inputs: Inputs,
    outputs: tuple[Outputs, Outputs],
) -> None:
    """A lossy pass, on one set of inputs: numbers where there were numbers, of the same shapes."""
    fidelity = compare(*outputs)
    if fidelity.broken:
        first = first_difference(before, after, math.inf, inputs)
        raise _broken(before, promise, inputs, fidelity, fidelity.relative, "any finite", first)


def _hold_to_equality(
    before: Program,
    after: Program,
    promise: Promise,
    inputs: Inputs,
    outputs: tuple[Outputs, Outputs],
) -> None:
    """A pass that leaves the function as it is, on one set of inputs."""
    errors = [compare(a, b) for a, b in zip(*outputs, strict=True)]
    worst = max((e.relative for e in errors if not e.blank), default=0.0)
    broken = any(e.broken for e in errors)
    look = promise.tolerance if roundoff(before) < 2**-23 else FIRST_LOOK
    allowed_at_once = look if promise.tolerance else 0.0
    if all(e.within(allowed_at_once) for e in errors) and not bool(
        (slice_errors(*outputs) > SLICES_LOOK * allowed_at_once).any()
    ):
        return
    first, text = None, f"{promise.tolerance:.3g}"
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
        last = found[-1]
        worst, text = last.worst, f"{last.allowed:.3g}"
        if worst != last.error.relative:
            text += " (of a slice of the output; the rest hides it)"
    raise _broken(before, promise, inputs, merge(errors), worst, text, first)


def _broken(
    program: Program,
    promise: Promise,
    inputs: Inputs,
    fidelity: Fidelity,
    error: float,
    allowed: str,
    first: Difference | None,
) -> ContractError:
    drawn = _drawn(program)
    return ContractError(
        f"{promise.by} broke its contract ({promise.contract}): relative error {error:.3g}, "
        f"allowed {allowed}",
        details=(
            *fidelity.notes,
            f"inputs of the sizes {_sizes(inputs)}; outputs: {fidelity}",
            *_named(first),
            *drawn,
        ),
    )


def _drawn(program: Program) -> tuple[str, ...]:
    """Random numbers in a program may be all that differs."""
    nodes = random_nodes(program.graph)
    if not nodes:
        return ()
    return (
        f"{named(nodes)} random numbers: a pass that changes how many, or in which order, changes "
        "the outputs; make them an input of the model to tell",
    )


def _sizes(inputs: Inputs) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in inputs)


def _named(first: Difference | None) -> tuple[str, ...]:
    if first is None:
        return ("no node that both programs have differs",)
    return (f"first node that differs: {first}",)
