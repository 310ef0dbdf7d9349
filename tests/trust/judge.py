"""Whether the checks catch a fault, and leave right passes alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from unittest import mock

from trust.faults import Fault
from trust.nets import NETS

import graphwright as gw
from graphwright.backends.onnxruntime import lowering as onnx
from graphwright.backends.onnxruntime.steps.catalog import Step
from graphwright.backends.triton import lowering as triton
from graphwright.ir.check.promise import Promise
from graphwright.ir.check.verify import check_contract
from graphwright.ir.data.synthetic import other_size_inputs
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ContractError, LoweringError
from graphwright.passes.registry import find_pass

STAGES = ("pass", "onnxruntime", "triton")
"""Places that a fault is put in: an exact pass, a step of a lowering, the fuser."""


def is_caught(fault: Fault, stage: str) -> bool:
    """Whether a run with the fault at a stage says so.

    A step of a lowering is caught where it is left out, or where the model is said to be for sizes
    of 2 or more.
    """
    try:
        if stage == "pass":
            others = other_size_inputs(fault.program, 0)
            promise = Promise("test.fault", "exact")
            check_contract(fault.program, fault.inject(fault.program), promise, others=others)
            return False
        if stage == "triton":
            fuse = triton.fuse
            with mock.patch.object(triton, "fuse", lambda p: fuse(fault.inject(p))):
                gw.lower(fault.program, "triton")
            return False
        with mock.patch.object(onnx, "STEPS", (_step(fault),)):
            notes = gw.lower(fault.program, "onnxruntime").notes
            return "low_rank" in notes["dropped"] or "narrowed" in notes
    except (ContractError, LoweringError):
        return True


def _step(fault: Fault) -> Step:
    """A rewriting step that makes the fault, in the place of the first one."""

    def run(editor: Editor) -> int:
        wrong = fault.inject(editor.program)
        editor.__init__(wrong, by="lower.low_rank")  # type: ignore[misc]
        return 1

    return Step("low_rank", run)


Right = tuple[str, int, str]
"""A net, the seed of its weights, and a pass or a backend that is right."""


def draw_right() -> Iterator[Right]:
    """Without end: every net with every exact pass and both backends, then with other weights."""
    for seed in itertools.count():
        for name in NETS:
            for what in (*RIGHT, "onnxruntime", "triton"):
                if (name, what) != ("Signal", "quantize.smoothquant"):  # it has no linear layer
                    yield name, seed, what


RIGHT = ("cleanup.canonicalize", "cleanup.fold_constants", "cleanup.fold_batch_norm",
         "cleanup.merge_linear", "cleanup.remove_identities", "quantize.smoothquant",
         "cleanup.eliminate_common_subexpressions")  # fmt: skip


def false_alarm(program: gw.Program, what: str) -> str:
    """What is said against a right pass, or against a lowering; empty where nothing is."""
    try:
        if what in ("onnxruntime", "triton"):
            dropped = gw.lower(program, what).notes.get("dropped", {})
            return str(dropped) if dropped else ""
        batches = [{program.signature.inputs[0].name: program.examples[0]}]
        find_pass(what)()(program, calibration=batches)
    except (ContractError, LoweringError) as error:
        return str(error)
    return ""
