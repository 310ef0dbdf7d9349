"""The main job: load -> trace -> [pass -> verify]* -> lower -> measure -> report.

`run` reads as the list of steps. Everything is written below a work folder beside the output
folder, and renamed into place at the end: a killed run leaves nothing half-written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.checkpoint import Checkpoints, chain_key
from graphwright.ir.errors import ArgumentError, ContractError, RequirementError
from graphwright.memory import peak_rss_bytes, reset_peak

if TYPE_CHECKING:
    from graphwright.backends.base import Compiled
    from graphwright.ir.data import Batches
    from graphwright.ir.fidelity import Fidelity
    from graphwright.ir.load import LoadedModel
    from graphwright.ir.program import Program
    from graphwright.ir.verify import Checker
    from graphwright.progress import Progress
    from graphwright.specs.spec import Spec

CHECK_BATCHES = 2
"""Calibration batches that every pass is checked on, beside the example inputs."""


@dataclass(frozen=True)
class Settings:
    """How to run, as opposed to what to do.

    Attributes:
        out: folder for the results; replaced as a whole when it holds an earlier result.
        allow_pickle: open model files that can run code.
        device: `cpu` or `cuda`.
        jobs: parallel workers, or `ray`.
        resume: go on after the last finished pass of a killed run.
        quiet: no progress, no summary.
        checkpoint_seconds: work worth saving; quicker passes are repeated on resume.
    """

    out: str | Path = "out"
    allow_pickle: bool = False
    device: str = "cpu"
    jobs: int | str = 1
    resume: bool = True
    quiet: bool = False
    checkpoint_seconds: float = 2.0


@dataclass
class Outcome:
    """What a run produced.

    Attributes:
        folder: the output folder.
        report: contents of `report.json`.
        program: the program after all passes.
        compiled: the lowered program per backend.
    """

    folder: Path
    report: dict[str, Any]
    program: Program
    compiled: dict[str, Compiled] = field(default_factory=dict)


def run(source: str | Path, spec: Spec, settings: Settings) -> Outcome:
    """Compiles `source` by `spec` and writes artifacts, report and lock file under `settings.out`.

    Raises:
        GraphwrightError: with the exit status that says which stage failed.
    """
    started = time.monotonic()
    place = _Place(Path(settings.out))
    with place.locked(), _deterministic():
        from graphwright.progress import Progress

        progress = Progress(quiet=settings.quiet)
        with progress:
            job = _Job(spec, settings, place, progress, started)
            outcome = job.run(source)
    if not settings.quiet:
        from graphwright.report import print_summary

        print_summary(outcome.report, outcome.folder)
    return outcome


class _Place:
    """The output folder, and the work folder beside it."""

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        self.work = self.out.parent / f".{self.out.name}.graphwright"
        self.staging = self.work / "result"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time per output folder; refuses to replace a folder that is not ours."""
        import fcntl

        if self.out.exists() and not self.out.is_dir():
            raise ArgumentError(f"--out {self.out} is a file", fix="Name a folder.")
        if self.out.is_dir() and any(self.out.iterdir()) and not self._is_ours():
            raise ArgumentError(
                f"--out {self.out} holds other files, which would be lost",
                fix="Name a new folder, or an earlier result.",
            )
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            handle = (self.work / "lock").open("w")
        except OSError as error:
            raise ArgumentError(f"cannot write beside --out {self.out}: {error.strerror}") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ArgumentError(f"another run is writing to {self.out}") from None
            try:
                yield
            finally:
                self._tidy()

    def _is_ours(self) -> bool:
        return (self.out / "report.json").is_file() and (self.out / "spec.lock.yaml").is_file()

    def _tidy(self) -> None:
        """Removes a work folder in which nothing is left that a later run could use."""
        if not (self.work / "checkpoints").exists() and not self.staging.exists():
            shutil.rmtree(self.work, ignore_errors=True)

    def fresh_staging(self) -> Path:
        """An empty folder for the result."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        return self.staging

    def publish(self) -> None:
        """Puts the finished result in its place and drops the checkpoints."""
        old = self.work / f"old-{os.getpid()}"
        if self.out.exists():
            self.out.rename(old)
        self.staging.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.work / "checkpoints", ignore_errors=True)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels for the run; the caller's setting is put back."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@dataclass
class _Job:
    spec: Spec
    settings: Settings
    place: _Place
    progress: Progress
    started: float
    peak: int = 0
    warnings: list[str] = field(default_factory=list)

    def run(self, source: str | Path) -> Outcome:
        reset_peak()
        loaded = self._load(source)
        original = self._trace(loaded)
        calibration = self._data(self.spec.calibration, original, loaded)
        held_out = self._data(self.spec.evaluate, original, loaded)
        program, records, checker = self._passes(original, calibration)
        compiled = self._lower(program)
        staging = self.place.fresh_staging()
        artifacts = self._save(program, compiled, staging)
        evaluation = self._evaluate(original, program, compiled, held_out)
        latency = self._latency(original, loaded, compiled)
        report = self._report(
            loaded, original, program, records, checker.total(), compiled, artifacts,
            evaluation, latency,
        )  # fmt: skip
        self._write(report, program, staging, loaded)
        self._require(report)
        self.place.publish()
        return Outcome(self.place.out, report, program, compiled)

    # ---- stages

    def _load(self, source: str | Path) -> LoadedModel:
        from graphwright.ir.load import load_model

        with self.progress.stage("load"):
            loaded = load_model(
                source,
                section=self.spec.model,
                allow_pickle=self.settings.allow_pickle,
                device=self.settings.device,
            )
        for text in loaded.warnings:
            self._warn(text)
        return loaded

    def _trace(self, loaded: LoadedModel) -> Program:
        import warnings

        from graphwright.build import build_program
        from graphwright.ir.trace import TraceWarning

        with self.progress.stage("trace"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TraceWarning)
            program = build_program(loaded, self.spec.model, self.spec.seed)
        for warning in caught:
            if issubclass(warning.category, TraceWarning):
                self._warn(str(warning.message))
        return program

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.progress.note(f"warning: {text}")

    def _data(self, section: Any, program: Program, loaded: LoadedModel) -> Batches | None:
        if section is None:
            return None
        from graphwright.ir.data import example_sizes, load_data

        return load_data(
            section.model_dump(exclude_none=True),
            program.signature,
            self.spec.seed,
            root=self.spec.folder,
            sizes=example_sizes(program.signature, program.examples),
            tokenizer=loaded.tokenizer,
        )

    def _passes(
        self, original: Program, calibration: Batches | None
    ) -> tuple[Program, list[dict[str, Any]], Checker]:
        from graphwright.ir.digest import digest
        from graphwright.ir.verify import Checker

        keys = self._keys(digest(original)) if self.spec.passes else []
        program, records, begin = original, [], 0
        checkpoints = Checkpoints(self.place.work / "checkpoints")
        checker = Checker(original, self._check_batches(original, calibration))
        found = checkpoints.load(keys) if self.settings.resume else None
        if found is not None:
            index, program, records = found
            begin = index + 1
            checker.resume(program)
            self.progress.note(f"resumed after pass {index} ({self.spec.passes[index].id})")
        unsaved = 0.0
        for index in range(begin, len(self.spec.passes)):
            program, record = self._one_pass(index, program, checker, calibration)
            records.append(record)
            unsaved += record["seconds"]
            if unsaved >= self.settings.checkpoint_seconds:
                checkpoints.save(index, keys[index], program, records)
                unsaved = 0.0
            self._check_time(f"pass {index} ({record['id']})")
        return program, records, checker

    def _keys(self, base: str) -> list[str]:
        keys, key = [], base
        for index, call in enumerate(self.spec.passes):
            key = chain_key(
                key, id=call.id, options=call.options, index=index, seed=self.spec.seed,
                environment=environment(), calibration=self._calibration_digest(),
            )  # fmt: skip
            keys.append(key)
        return keys

    def _calibration_digest(self) -> str:
        """Calibration data is an input like any other: a changed file makes another run."""
        section = self.spec.calibration
        if section is None:
            return ""
        file = Path(self.spec.folder) / section.data
        if file.is_file():
            from graphwright.checkpoint import file_sha256

            return chain_key(file_sha256(file), **section.model_dump(mode="json"))
        return chain_key("", **section.model_dump(mode="json"))

    def _check_batches(self, program: Program, calibration: Batches | None) -> list[Any]:
        """Inputs that passes are checked on: real ones where there are any, another size too."""
        if calibration is not None:
            found = []
            for batch in calibration:
                found.append(batch)
                if len(found) == CHECK_BATCHES:
                    break
            return found
        from graphwright.build import other_size_inputs

        other = other_size_inputs(program, self.spec.seed)
        if other is None and program.signature.dims:
            self._warn("passes were checked at the example sizes only")
        return [] if other is None else [other]

    def _one_pass(
        self, index: int, program: Program, checker: Checker, calibration: Batches | None
    ) -> tuple[Program, dict[str, Any]]:
        import torch

        from graphwright.ir.context import Context
        from graphwright.passes.base import find_pass

        call = self.spec.passes[index]
        step = find_pass(call.id)(**call.options)
        context = Context(
            seed=self.spec.seed,
            calibration=calibration,
            device=torch.device(self.settings.device),
            jobs=self.settings.jobs,
            work=self.place.work / "passes" / f"{index:03d}",
            progress=self.progress.update,
            scope=(index, call.id),
        )
        self._note_peak()
        begin = time.monotonic()
        with self.progress.stage(call.id):
            result = step.execute(program, context)
            peak = self._note_peak()
            seconds = time.monotonic() - begin
            try:
                error = checker.accept(result.program, step.promise())
            except ContractError as failure:
                raise self._with_reproducer(failure, program, index) from failure
        record = {
            "id": call.id,
            "options": step.resolved_options(),
            "contract": step.contract,
            "seconds": seconds,
            "peak_rss_bytes": peak,
            "error": error.as_dict(),
            "actions": [[a.layer, a.what, a.reason] for a in result.actions],
            "metrics": dict(result.metrics),
        }
        return result.program, record

    def _with_reproducer(
        self, failure: ContractError, program: Program, index: int
    ) -> ContractError:
        """The same failure, with the program before the pass and a spec of that pass on disk."""
        from graphwright.specs.emit import to_yaml

        call = self.spec.passes[index]
        folder = self.place.out.with_name(f"{self.place.out.name}.reproducer")
        folder.mkdir(parents=True, exist_ok=True)
        program.save(folder / "before.pt2")
        document: dict[str, Any] = {"version": 1, "seed": self.spec.seed}
        if self.spec.calibration is not None:
            section = self.spec.calibration.model_dump(mode="json", exclude_none=True)
            data = Path(self.spec.folder) / section["data"]
            document["calibration"] = (
                {**section, "data": str(data.absolute())} if (data.exists()) else section
            )
        document["passes"] = [{call.id: call.options} if call.options else call.id]
        (folder / "spec.yaml").write_text(to_yaml(document))
        return ContractError(
            failure.message,
            where=f"passes[{index}] (line {call.line})",
            fix=f"Reproduce it: optimize {folder}/before.pt2 --spec {folder}/spec.yaml",
            details=failure.details,
        )

    def _lower(self, program: Program) -> dict[str, Compiled]:
        from graphwright.backends.base import find_backend
        from graphwright.ir.context import Context

        compiled: dict[str, Compiled] = {}
        for call in self.spec.lower:
            context = Context(
                seed=self.spec.seed,
                progress=self.progress.update,
                work=self.place.work / "lower",
                scope=("lower", call.id),
            )
            with self.progress.stage(call.id):
                compiled[call.id] = find_backend(call.id)(**call.options).lower(program, context)
            self._note_peak()
            self._check_time(f"lowering to {call.id}")
        return compiled

    def _save(
        self, program: Program, compiled: dict[str, Compiled], staging: Path
    ) -> list[dict[str, Any]]:
        rows = []
        for lowered in compiled.values():
            artifact = lowered.save(staging)
            path = str(artifact.path.relative_to(staging))
            row = {"backend": artifact.backend, "path": path, "file_bytes": artifact.file_bytes}
            rows.append(row)
        if not compiled:
            program.save(staging / "program.pt2")
            size = (staging / "program.pt2").stat().st_size
            rows.append({"backend": "program", "path": "program.pt2", "file_bytes": size})
        return rows

    def _evaluate(
        self,
        original: Program,
        program: Program,
        compiled: dict[str, Compiled],
        data: Batches | None,
    ) -> dict[str, Any] | None:
        if data is None or self.spec.evaluate is None:
            return None
        from graphwright.evaluate import evaluate

        result = next(iter(compiled.values()), program)
        with self.progress.stage("evaluate"):
            return evaluate(
                original,
                result,
                data,
                self.spec.evaluate.metric,
                root=self.spec.folder,
                progress=self.progress.update,
            ).to_json()

    def _latency(
        self, original: Program, loaded: LoadedModel, compiled: dict[str, Compiled]
    ) -> list[dict[str, Any]]:
        from graphwright.latency import measure_latency

        before = original if loaded.module is None else loaded.runner(original.signature)
        with self.progress.stage("latency"):
            return measure_latency(before, compiled, original.examples, device=self.settings.device)

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
        from graphwright.report import build_report
        from graphwright.require import check_bounds

        self._note_peak()
        seconds = time.monotonic() - self.started
        bounds = check_bounds(
            self.spec.require,
            drop=None if evaluation is None else evaluation["drop"],
            latency=latency,
            artifacts=artifacts,
            peak_rss_bytes=self.peak,
            seconds=seconds,
        )
        return build_report(
            source=loaded, original=original, program=program, passes=records,
            artifacts=artifacts, fidelity=fidelity, evaluation=evaluation, latency=latency,
            notes={name: lowered.notes for name, lowered in compiled.items()},
            require=[bound.to_json() for bound in bounds], warnings=self.warnings,
            seconds=seconds, peak_rss_bytes=self.peak, environment=environment(),
        )  # fmt: skip

    def _write(
        self, report: dict[str, Any], program: Program, staging: Path, loaded: LoadedModel
    ) -> None:
        from graphwright.report import write_report
        from graphwright.specs.spec import write_lock

        write_report(report, program, staging)
        lock = {"environment": environment(), "model": {"sha256": loaded.sha256}}
        write_lock(self.spec, lock, staging / "spec.lock.yaml", home=self.place.out)

    def _require(self, report: dict[str, Any]) -> None:
        missed = [row for row in report["require"] if not row["met"]]
        if missed:
            kept = self.place.staging
            raise RequirementError(
                "; ".join(_missed(row) for row in missed),
                fix=f"The result stays in {kept}; {self.place.out} was not written.",
            )

    # ---- bookkeeping

    def _note_peak(self) -> int:
        peak = peak_rss_bytes()
        self.peak = max(self.peak, peak)
        reset_peak()
        return peak

    def _check_time(self, where: str) -> None:
        bound = self.spec.require.max_minutes if self.spec.require is not None else None
        minutes = (time.monotonic() - self.started) / 60
        if bound is not None and minutes > bound:
            raise RequirementError(
                f"max_minutes: {minutes:.2f} minutes after {where}, bound {bound:g}"
            )


def _missed(row: dict[str, Any]) -> str:
    from graphwright.require import Bound

    return f"require.{Bound(row['name'], row['bound'], row['measured'], row['what'])}"


def environment() -> dict[str, Any]:
    """What the bytes of a result depend on beside the spec and the model."""
    import platform

    import torch

    from graphwright import __version__

    return {
        "graphwright": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a finished run."""
    found: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text())
    return found
