"""The stages of a run: load -> trace -> [pass -> verify]* -> lower -> measure -> report.

Everything is written below a work folder beside the output folder, and renamed into place at the
end: a killed run leaves nothing half-written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import LoweringError, RequirementError
from graphwright.ir.user_code import watched
from graphwright.job.chain import run_chain
from graphwright.job.data import all_data
from graphwright.job.decode import decode_error
from graphwright.job.diffusion import build_diffusion, is_diffusion
from graphwright.job.environment import environment
from graphwright.job.left import left_as_they_are
from graphwright.job.memory import reset_peak
from graphwright.job.multipart import build_parts, refuse_parts
from graphwright.job.rules import dtype_refusal
from graphwright.job.run import Run
from graphwright.plan.stages import estimated
from graphwright.plan.table import compared

if TYPE_CHECKING:
    from graphwright.backends.base import Compiled
    from graphwright.ir.check.fidelity import Fidelity
    from graphwright.ir.check.verify import Checker
    from graphwright.ir.files import LoadedModel
    from graphwright.ir.files.exports import Export
    from graphwright.ir.parts import Parts
    from graphwright.ir.program import Program
    from graphwright.job.place import OutputPlace
    from graphwright.job.run import JobSettings
    from graphwright.specs.spec import Spec


@dataclass
class Outcome:
    """The products of a run.

    Attributes:
        folder: the output folder.
        report: contents of `report.json`.
        program: the program after all passes; by name of the parts where there are several.
        compiled: the lowered program per backend, of a part as `encoder.onnxruntime`.
    """

    folder: Path
    report: dict[str, Any]
    program: Program | Parts
    compiled: dict[str, Compiled] = field(default_factory=dict)


def compiled(
    source: str | Path,
    spec: Spec,
    settings: JobSettings,
    place: OutputPlace,
    search: dict[str, Any] | None = None,
) -> Outcome:
    """One run in a place that is locked; `search` goes into the report."""
    from graphwright.job.progress import Progress

    started = time.monotonic()
    progress = Progress(quiet=settings.quiet or not place.is_main)
    with progress, watched(no_code=settings.no_code, say=progress.note) as door:
        run = Run(spec, settings, place, progress, started, code=door.ran, search=search)
        return Job(run).compile(source)


class Job:
    """The stages of a run; of each part of a model that is several programs, those of `build`."""

    def __init__(self, run: Run, parts: Parts | None = None) -> None:
        self.run = run
        self.parts = parts
        self.spec = run.spec
        self.progress = run.progress

    def compile(self, source: str | Path) -> Outcome:
        """The whole job."""
        reset_peak()
        if is_diffusion(source):
            built, loaded = build_diffusion(
                self.run, source, lambda run, parts, part, p: Job(run, parts).build(part, p)
            )
            outcome = Outcome(self.run.place.out, built.report, built.programs, built.compiled)
            return self.finish(outcome, loaded)
        loaded = self.load(source)
        return self.finish(self.built(loaded, self.trace(loaded)), loaded)

    def built(self, loaded: LoadedModel, original: Program | Parts) -> Outcome:
        """Everything but the files of the report, of one program or of several."""
        if not isinstance(original, Mapping):
            refuse_parts(self.spec)
            return self.build(loaded, original)
        parts: Any = original
        built = build_parts(self.run, parts, lambda run, p: Job(run, parts).build(loaded, p))
        return Outcome(self.run.place.out, built.report, built.programs, built.compiled)

    def build(self, loaded: LoadedModel, original: Program) -> Outcome:
        """Everything but the files of the report; no report in a process that only helps."""
        exports = self.exports(original)
        data = all_data(self.run, original, loaded.tokenizer, self.parts)
        steps = estimated(self.run, original, data)
        program, records, checker = run_chain(
            self.run, original, data["calibration"], data["training"]
        )
        if not self.run.place.is_main:
            return Outcome(self.run.place.out, {}, program)
        for line in left_as_they_are(program, records):
            self.run.warn(line)
        staging = self.run.place.fresh_staging()
        exported = self._export(exports, program, staging, loaded)
        compiled = self._lower(program)
        with self.run.stage("write"):
            artifacts = self._save(program, compiled, staging)
        with self.run.stage("fidelity"):
            fidelity = self._fidelity(checker, compiled, artifacts)
        artifacts += exported
        evaluation = self._evaluate(original, program, compiled, data["evaluate"])
        latency = self._latency(original, loaded, compiled)
        with self.run.stage("report"):
            report = self._report(
                loaded, original, program, records, fidelity, compiled, artifacts,
                evaluation, latency,
            )  # fmt: skip
        compared(report, steps, self.run.stages)
        return Outcome(self.run.place.out, report, program, compiled)

    def finish(self, outcome: Outcome, loaded: LoadedModel) -> Outcome:
        """Writes the report, looks at the bounds, and puts the result in its place."""
        if self.run.place.is_main:
            self._write(outcome, loaded)
            self._require(outcome.report)
            self.run.publish()
        return outcome

    # ---- stages

    def load(self, source: str | Path) -> LoadedModel:
        """Opens the model."""
        from graphwright.ir.files import load_model

        with self.run.stage("load"):
            loaded = load_model(
                source,
                section=self.spec.model,
                allow_pickle=self.run.settings.allow_pickle,
                refusal=dtype_refusal(self.spec),
            )
        for text in loaded.warnings:
            self.run.warn(text)
        return loaded

    def trace(self, loaded: LoadedModel) -> Program | Parts:
        """Traces it, into several programs where it is several."""
        import warnings

        from graphwright.ir.trace.capture import TraceWarning
        from graphwright.job.build import build_traced

        with self.run.stage("trace"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TraceWarning)
            program = build_traced(loaded, self.spec.model, self.spec.seed)
        for warning in caught:
            if issubclass(warning.category, TraceWarning):
                self.run.warn(str(warning.message))
        return program

    def _lower(self, program: Program) -> dict[str, Compiled]:
        from graphwright.backends.bundle import lower_program
        from graphwright.ir.context import Context

        compiled: dict[str, Compiled] = {}
        for call in self.spec.lower:
            context = Context(
                seed=self.spec.seed,
                progress=self.progress.update,
                warn=self.run.warn,
                work=self.run.place.work / "lower",
                scope=("lower", call.id),
            )
            with self.run.stage(call.id):
                compiled[call.id] = lower_program(program, call.id, call.options, context)
            for text in compiled[call.id].notes.get("warnings", ()):
                self.run.warn(f"{call.id}: {text}")
            self.run.note_peak()
            self.run.check_time(f"lowering to {call.id}")
        return compiled

    def _save(
        self, program: Program, compiled: dict[str, Compiled], staging: Path
    ) -> list[dict[str, Any]]:
        rows = []
        for lowered in compiled.values():
            artifact = lowered.save(staging)
            for text in artifact.notes:
                self.run.warn(f"{artifact.backend}: {text}")
            path, size = str(artifact.path.relative_to(staging)), artifact.file_bytes
            rows.append({"backend": artifact.backend, "path": path, "file_bytes": size})
        if not compiled:
            program.save(staging / "program.pt2")
            size = (staging / "program.pt2").stat().st_size
            rows.append({"backend": "program", "path": "program.pt2", "file_bytes": size})
        return rows

    def _fidelity(
        self, checker: Checker, compiled: dict[str, Compiled], artifacts: list[dict[str, Any]]
    ) -> Fidelity:
        """Distance from the original of what is handed over, noted at every artifact.

        Passes and lowering lose together: of several artifacts, the one furthest away.
        """
        found = {name: checker.total(lowered.run_flat) for name, lowered in compiled.items()}
        found = found or {"program": checker.total()}
        for row in artifacts:
            row["fidelity"] = found[row["backend"]].as_dict()
            row["decode"] = decode_error(checker, compiled.get(row["backend"]))
        for name, error in found.items():
            if error.broken:
                raise LoweringError(f"{name}: {'; '.join(error.notes)}")
        return max(found.values(), key=lambda error: 0.0 if error.blank else error.relative)

    def exports(self, program: Program) -> list[Export]:
        """The formats to write, looked at before the passes run."""
        from graphwright.ir.files.exports import EXPORTS

        exports = [EXPORTS[call.id](**call.options) for call in self.spec.export]
        for export in exports:
            export.check(program, [call.id for call in self.spec.passes])
        return exports

    def _export(
        self, exports: list[Export], program: Program, staging: Path, loaded: LoadedModel
    ) -> list[dict[str, Any]]:
        rows = []
        for export in exports:
            with self.run.stage(f"export {export.name}"):
                notes = export.write(program, staging, loaded.folder)
            for text in notes:
                self.run.warn(f"export {export.name}: {text}")
            size = sum(file.stat().st_size for file in (staging / export.folder).iterdir())
            rows.append({"backend": export.name, "path": export.folder, "file_bytes": size})
        return rows

    def _evaluate(
        self, original: Program, program: Program, compiled: dict[str, Compiled], data: Any
    ) -> dict[str, Any] | None:
        if data is None or self.spec.evaluate is None:
            return None
        from graphwright.evaluation.stage import evaluated

        result = next(iter(compiled.values()), program)
        with self.run.stage("evaluate"):
            say, root = self.progress.update, self.spec.folder
            return evaluated(self.spec.evaluate, original, result, data, root=root, progress=say)

    def _latency(
        self, original: Program, loaded: LoadedModel, compiled: dict[str, Compiled]
    ) -> list[dict[str, Any]]:
        from graphwright.job.latency import against_the_original

        if not self.run.settings.latency:
            return []
        with self.run.stage("latency"):
            return against_the_original(loaded, original, compiled, self.run)

    def _report(
        self,
        loaded: LoadedModel,
        original: Program,
        program: Program,
        records: list[dict[str, Any]],
        fidelity: Fidelity,
        compiled: dict[str, Compiled],
        artifacts: list[dict[str, Any]],
        evaluation: dict[str, Any] | None,
        latency: list[dict[str, Any]],
    ) -> dict[str, Any]:
        from graphwright.job.require import check_bounds
        from graphwright.report.build import build_report

        self.run.note_peak()
        seconds = self.run.seconds()
        bounds = check_bounds(
            self.spec.require,
            evaluation=evaluation,
            cosine=fidelity.as_dict()["cosine"],
            latency=latency,
            artifacts=artifacts,
            peak_rss_bytes=self.run.peak,
            seconds=seconds,
            notes={name: lowered.notes for name, lowered in compiled.items()},
        )
        return build_report(
            source=loaded, original=original, program=program, passes=records,
            artifacts=artifacts, fidelity=fidelity, evaluation=evaluation, latency=latency,
            notes={name: lowered.notes for name, lowered in compiled.items()},
            require=[bound.to_json() for bound in bounds], warnings=self.run.warnings,
            code=self.run.code,
            seconds=seconds, peak_rss_bytes=self.run.peak, environment=environment(),
        )  # fmt: skip

    def _write(self, outcome: Outcome, loaded: LoadedModel) -> None:
        from graphwright.report.build import write_report
        from graphwright.specs.spec import write_lock

        staging = self.run.place.staging
        outcome.report["files"] = self.run.place.files()
        outcome.report["search"] = self.run.search
        write_report(outcome.report, outcome.program, staging)
        lock = {"environment": environment(), "model": {"sha256": loaded.sha256}}
        write_lock(self.spec, lock, staging / "spec.lock.yaml", home=self.run.place.out)

    def _require(self, report: dict[str, Any]) -> None:
        from graphwright.job.require import missed

        if lines := missed(report["require"]):
            kept = self.run.place.staging
            raise RequirementError(
                "; ".join(lines),
                fix=f"The result stays in {kept}; {self.run.place.out} was not written.",
            )
