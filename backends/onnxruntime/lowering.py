"""The backend: rewrite, translate, check, and only then hand over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from graphwright.backends.base import Backend
from graphwright.backends.onnxruntime.adapters import (
    FACT,
    Switch,
    switch_record,
    switchable,
    without_rank,
)
from graphwright.backends.onnxruntime.cache import cache_notes
from graphwright.backends.onnxruntime.compiled import FILE, OnnxCompiled, load
from graphwright.backends.onnxruntime.job import Job
from graphwright.backends.onnxruntime.options import OnnxRuntimeOptions
from graphwright.backends.onnxruntime.smallest import from_two, too_small
from graphwright.backends.onnxruntime.steps.blocks import FORMS_FACT
from graphwright.backends.onnxruntime.steps.cached_attention import CACHE_FACT
from graphwright.backends.onnxruntime.steps.catalog import STEPS
from graphwright.backends.onnxruntime.steps.leftovers import leftovers, rebuilt_warnings
from graphwright.backends.onnxruntime.ties import decided_by_ties
from graphwright.ir.adapters.record import adapters
from graphwright.ir.context import Context
from graphwright.ir.files.entropy.stream import FACT as ENTROPY_FACT
from graphwright.ir.generation.last_logits import last_logits
from graphwright.ir.generation.record import Generation
from graphwright.ir.graph.arrange import arranged
from graphwright.ir.program import Program

RUN_DTYPES = ("float64", "float32", "float16")
"""Floating-point dtypes whose kernels and arrays ONNX Runtime has: bfloat16 has next to no kernels
on a CPU, and arrays of it cannot be handed over."""


class Lowering(Backend):
    """Lowers a program to an ONNX model with dynamic dimensions that ONNX Runtime runs fast."""

    name = "onnxruntime"
    summary = "ONNX model with fused attention, norms and activations, run by ONNX Runtime."
    Options = OnnxRuntimeOptions
    computes_in = RUN_DTYPES

    @classmethod
    def open(cls, path: Path) -> OnnxCompiled | None:
        """A `model.onnx` that this backend wrote, or the folder it is in."""
        file = path / FILE if path.is_dir() else path
        return load(file) if file.suffix == ".onnx" and file.is_file() else None

    @classmethod
    def save_together(cls, parts: Mapping[str, OnnxCompiled], folder: Path) -> dict[str, Path]:
        """Models beside each other, with their weights in one file."""
        from graphwright.backends.onnxruntime.together import save_together

        return save_together(parts, folder)

    def lower(self, program: Program, context: Context) -> OnnxCompiled:
        """The program as an ONNX model, compared to it at three sizes of every dynamic dimension.

        A step that makes a model which does not load, or computes something else, is left out
        and named in the notes.

        Raises:
            LoweringError: an op has no ONNX form, or the model differs without any step.
        """
        options: OnnxRuntimeOptions = self.options
        if options.adapters == "switchable" and FACT not in program.facts:
            return self._switchable(program, context)
        program, cut = self._asked_logits(program)
        program = arranged(program)  # one program, one file, whatever it went through
        job = Job(program, options, TemporaryDirectory())
        steps = [step for step in STEPS if step.name not in options.skip]
        try:
            attempt, dropped = job.best(steps)
        except BaseException:
            job.folder.cleanup()
            raise
        assert attempt.session is not None
        is_cached = job.generation is not None  # whose cases have every smallest size
        wrong = {} if is_cached else too_small(job.program, job.judge(attempt))
        if wrong:
            job.folder.cleanup()
            return self._from_two(program, wrong, context)
        notes: dict[str, Any] = {
            "translator": attempt.translator,
            "steps": attempt.applied,
            "dropped": dropped,
            "left": leftovers(attempt.program),
            "weights": dict(attempt.program.facts.get(FORMS_FACT, {})),
            "products": attempt.products,
            "kernels": attempt.kernels,
            "session": {
                "providers": attempt.session.get_providers(),
                "threads": job.settings.thread_count(),
                "opset": options.opset,
            },
            "checked": attempt.errors,
        }
        if attempt.sparse:
            notes["sparse"] = attempt.sparse
        if attempt.lstms:
            notes["lstms"] = attempt.lstms
        if attempt.integer:
            notes["integer_kernels"] = attempt.integer
        if attempt.unoptimized:
            notes["unoptimized"] = attempt.unoptimized
        ties = decided_by_ties(program, job.program, job.bound)
        if ties:
            notes["ties"] = ties
        if job.generation is not None:
            notes["cache"] = cache_notes(attempt.program, cut)
        if ENTROPY_FACT in program.facts:
            notes["fixed_width"] = True
        notes["warnings"] = _warnings(notes)
        keep = job.folder if isinstance(attempt.model, Path) else None
        if keep is None:
            job.folder.cleanup()
        compiled = OnnxCompiled(attempt.model, program.signature, attempt.session, notes, keep)
        compiled.defaults = program.initial_state()
        compiled.generation = Generation.of(attempt.program)
        compiled.shares_cache = CACHE_FACT in attempt.program.facts
        return compiled

    def _asked_logits(self, program: Program) -> tuple[Program, str]:
        """The program with the logits that are asked for, and which it has; empty without any."""
        if Generation.of_decoder(program) is None:
            return program, ""
        cut = last_logits(program) if self.options.logits == "last" else None
        return (program, "all") if cut is None else (cut, "last")

    def _switchable(self, program: Program, context: Context) -> OnnxCompiled:
        """The model whose adapter's factors are inputs, with the adapter as it is for default."""
        exposed = switchable(program)
        compiled = self.lower(exposed, context)
        record = switch_record(exposed)
        compiled.switch = Switch(record["base"], record["shapes"])
        own = {name: exposed.state[name].detach().cpu().numpy() for name in record["shapes"]}
        (name,) = adapters(program)
        compiled.shipped = {name: own, "base": without_rank(exposed)}
        compiled.notes = {**compiled.notes, "adapters": sorted(record["shapes"])}
        return compiled

    def _from_two(self, program: Program, dims: dict[str, str], context: Context) -> OnnxCompiled:
        """The model for sizes of 2 or more of these dimensions; says so."""
        compiled = self.lower(from_two(program, dims), context)
        found = [f"dimension {dim!r} is 2 or more: {why}" for dim, why in sorted(dims.items())]
        warnings = [*found, *compiled.notes["warnings"]]
        compiled.notes = {**compiled.notes, "narrowed": found, "warnings": warnings}
        return compiled


def _warnings(notes: dict[str, Any]) -> list[str]:
    """The things that the user asked for and did not get, one line each."""
    found = [f"step {name} was left out: {why}" for name, why in notes["dropped"].items()]
    if notes["translator"] != "direct":
        found.append(f"translated by {notes['translator']}")
    if "unoptimized" in notes:
        found.append(f"runs with graph optimizations only: {notes['unoptimized']}")
    if "ties" in notes:
        found.append(notes["ties"])
    if "fixed_width" in notes:
        found.append(
            "ONNX files keep codes at their fixed width: what store.entropy saves, it saves in "
            "program.pt2 and in artifacts of the backend triton"
        )
    found += rebuilt_warnings(notes["left"])
    if "why" in notes.get("lstms", {}):
        found.append(f"LSTMs with int8 weights are computed in float: {notes['lstms']['why']}")
    if notes.get("cache", {}).get("left"):
        rows = notes["cache"]["left"]
        why = "; ".join(f"{name}: {reason}" for name, reason in rows.items())
        found.append(f"the cache is copied at every step, for attention has no fused form: {why}")
    if notes.get("cache", {}).get("rounded"):
        found.append(
            f"{notes['cache']['rounded']} quantized caches are rounded and stored in floats: the "
            "accuracy of codes without their memory, which the backend triton saves"
        )
    integer = notes.get("integer_kernels", {})
    if integer.get("float"):
        names = ", ".join(f"{name} ({kernel})" for name, kernel in integer["float"].items())
        found.append(
            f"{len(integer['float'])} of {integer['quantized']} layers with int8 weights are "
            f"computed in float: {names}"
        )
    return found
