"""The chain checks every pass on real inputs and at another size, and goes on where it stopped."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ContractError, RequirementError
from graphwright.ir.signature import DimRange
from graphwright.job import chain
from graphwright.job.chain import run_chain
from graphwright.job.checkpoint import Checkpoints
from graphwright.job.place import OutputPlace
from graphwright.job.progress import Progress
from graphwright.job.run import JobSettings, Run
from graphwright.specs.spec import parse_spec

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


@gw.register("chaintest.cut_rows")
class CutRows(gw.Pass):
    """Says it is exact, and keeps as many rows as the example had."""

    def run(self, program: gw.Program, context: Context) -> gw.Result:
        editor = Editor(program, by=self.id)
        output = editor.graph.output_node()
        (last,) = output.all_input_nodes
        rows = program.examples[0].shape[0]
        output.args = ((editor.call(aten.slice.Tensor, last, 0, 0, rows, before=output),),)
        return gw.Result(editor.finish())


@gw.register("chaintest.cut_rows_lossy")
class CutRowsLossy(CutRows):
    contract = "lossy"


class ScaleOptions(gw.Options):
    factor: float = 1.0
    max_error: float | None = None


@gw.register("chaintest.scale")
class Scale(gw.Pass):
    """Scales the last layer."""

    Options = ScaleOptions
    contract = "lossy"

    def run(self, program: gw.Program, context: Context) -> gw.Result:
        editor = Editor(program, by=self.id)
        editor.set_state("b.weight", program.state["b.weight"] * self.options.factor)
        return gw.Result(editor.finish(), (gw.Action("b", "scaled", "asked for"),), {"seen": 2.0})


@gw.register("chaintest.fixed")
class Fixed(gw.Pass):
    """Says it is exact, and makes a program that runs at the example's size only."""

    def run(self, program: gw.Program, context: Context) -> gw.Result:
        editor = Editor(program, by=self.id)
        output = editor.graph.output_node()
        (last,) = output.all_input_nodes
        shape = [program.examples[0].shape[0], 3]
        fixed = editor.call(aten.view.default, last, shape, before=output)
        output.args = ((fixed,),)
        return gw.Result(editor.finish(propagate=False))


@pytest.fixture(scope="module")
def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Net(), (torch.randn(4, 6),), dynamic={"x": {0: "n"}})


def job(folder: Path, passes: list[Any], **settings: Any) -> Run:
    spec = parse_spec(yaml.safe_dump({"version": 1, "seed": 5, "passes": passes}), folder=folder)
    place = OutputPlace(folder / "out")
    return Run(
        spec, JobSettings(folder / "out", quiet=True, **settings), place, Progress(quiet=True), 0.0
    )


def batches(*rows: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(n, 6)} for n in rows]


@pytest.mark.parametrize("data", [None, (4, 4), (9, 4)])
@pytest.mark.parametrize("name", ["cut_rows", "cut_rows_lossy", "fixed"])
def test_a_size_that_a_pass_fixes_is_found_with_and_without_data(
    program: gw.Program, tmp_path: Path, name: str, data: tuple[int, ...] | None
) -> None:
    run = job(tmp_path, [f"chaintest.{name}"])
    calibration: Any = None if data is None else batches(*data)
    with pytest.raises(ContractError) as caught:
        run_chain(run, program, calibration)
    assert caught.value.exit_code == 4
    assert caught.value.where == "passes[0] (line 2)"
    assert str(tmp_path / "out.reproducer") in caught.value.fix
    reproducer = yaml.safe_load((tmp_path / "out.reproducer" / "spec.yaml").read_text())
    assert reproducer["lock"] == {"behind": []}
    assert run.warnings == []


@pytest.mark.parametrize(("name", "said"), [
    ("cut_rows", r"broke its contract \(exact\)"),
    ("cut_rows_lossy", r"broke its contract \(lossy\)"),
    ("fixed", r"fails on inputs of the sizes \(1, 6\)"),
])  # fmt: skip
def test_calling_a_pass_checks_another_size_too(program: gw.Program, name: str, said: str) -> None:
    step = {"cut_rows": CutRows, "cut_rows_lossy": CutRowsLossy, "fixed": Fixed}[name]()
    with pytest.raises(ContractError, match=said) as caught:
        step(program)
    assert any(line.startswith("first node that") for line in caught.value.details)
    assert "chaintest." in str(caught.value)
    assert step(program, check=False).graph.output_node() is not None


def test_one_size_only_is_said(program: gw.Program, tmp_path: Path) -> None:
    fixed = replace(program.signature, dims={"n": DimRange(4, 4)})
    run = job(tmp_path, [{"chaintest.scale": {"factor": 2.0}}])
    run_chain(run, program.replace(signature=fixed), None)
    assert run.warnings == ["passes were checked at the example sizes only"]
    run = job(tmp_path, [{"chaintest.scale": {"factor": 2.0}}], resume=False)
    run_chain(run, gw.trace(Net(), (torch.randn(4, 6),)), None)
    assert run.warnings == []


def test_what_a_pass_did_is_recorded(program: gw.Program, tmp_path: Path) -> None:
    run = job(tmp_path, [{"chaintest.scale": {"factor": 1.25}}, "chaintest.scale"])
    after, records, checker = run_chain(run, program, batches(4, 6, 8))
    assert [r["id"] for r in records] == ["chaintest.scale", "chaintest.scale"]
    first, second = records
    assert first["options"] == {"factor": 1.25, "max_error": None}
    assert first["contract"] == "lossy"
    assert first["actions"] == [["b", "scaled", "asked for", True]]
    assert first["metrics"] == {"seen": 2.0}
    assert 0 <= first["seconds"] < 60
    assert first["peak_rss_bytes"] > 1e6
    # measured on the examples and two batches, not on the third, nor on random inputs
    error = measure(program, after, batches(4, 6))
    assert first["error"]["relative"] == pytest.approx(error.relative)
    assert second["error"]["relative"] == 0.0
    assert checker.total().relative == pytest.approx(error.relative)


def test_a_chain_goes_on_behind_the_last_pass_that_was_saved(
    program: gw.Program, tmp_path: Path
) -> None:
    passes: list[Any] = [{"chaintest.scale": {"factor": f}} for f in (2.0, 3.0)]
    done, first, _ = run_chain(job(tmp_path, passes, checkpoint_seconds=0.0), program, None)
    calls: list[str] = []
    run = job(tmp_path, passes)
    run.progress.note = calls.append  # type: ignore[method-assign]
    again, second, checker = run_chain(run, program, None)
    assert calls == ["resumed after pass 1 (chaintest.scale)"]
    assert torch.equal(done.state["b.weight"], again.state["b.weight"])
    assert [r["error"] for r in first] == [r["error"] for r in second]
    assert checker.total().relative == pytest.approx(measure(program, done).relative, rel=0.2)
    fresh = job(tmp_path, passes, resume=False)
    fresh.progress.note = calls.append  # type: ignore[method-assign]
    run_chain(fresh, program, None)
    assert len(calls) == 1
    other = job(tmp_path, passes[::-1])
    other.progress.note = calls.append  # type: ignore[method-assign]
    run_chain(other, program, None)
    assert len(calls) == 1  # another chain: nothing of the old one is taken over


def test_a_longer_chain_goes_on_with_its_first_new_pass(
    program: gw.Program, tmp_path: Path
) -> None:
    passes: list[Any] = [{"chaintest.scale": {"factor": f}} for f in (2.0, 3.0, 5.0)]
    run_chain(job(tmp_path, passes[:1], checkpoint_seconds=0.0), program, None)
    run = job(tmp_path, passes)
    notes: list[str] = []
    run.progress.note = notes.append  # type: ignore[method-assign]
    after, records, _ = run_chain(run, program, None)
    assert notes == ["resumed after pass 0 (chaintest.scale)"]
    assert [r["options"]["factor"] for r in records] == [2.0, 3.0, 5.0]
    assert torch.equal(after.state["b.weight"], program.state["b.weight"] * 2 * 3 * 5)


@pytest.mark.parametrize("resume", [True, False])
def test_what_passes_left_stays_for_a_resume_only(
    program: gw.Program, tmp_path: Path, resume: bool
) -> None:
    run = job(tmp_path, ["chaintest.scale"], resume=resume)
    left = run.place.pass_work(0)
    left.mkdir(parents=True)
    run_chain(run, program, None)  # too quick a pass to be worth a checkpoint
    assert left.exists() == resume
    saved = job(tmp_path, ["chaintest.scale"], checkpoint_seconds=0.0)
    run_chain(saved, program, None)
    assert not left.exists()


def test_other_data_make_another_run(program: gw.Program, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"

    def run(values: float) -> Run:
        np.savez(data, x=np.full((8, 6), values, np.float32))
        text = yaml.safe_dump({
            "version": 1, "calibration": {"data": "data.npz", "batch_size": 4},
            "passes": ["chaintest.scale"],
        })  # fmt: skip
        spec = parse_spec(text, folder=tmp_path)
        settings = JobSettings(tmp_path / "out", quiet=True, checkpoint_seconds=0.0)
        return Run(spec, settings, OutputPlace(tmp_path / "out"), Progress(quiet=True), 0.0)

    notes: list[str] = []
    for values in (1.0, 1.0, 2.0):
        made = run(values)
        made.progress.note = notes.append  # type: ignore[method-assign]
        run_chain(made, program, None)
    assert notes == ["resumed after pass 0 (chaintest.scale)"]


@gw.register("chaintest.note")
class Note(gw.Pass):
    """Remembers the program that compression started from, and warns."""

    contract = "lossy"
    seen: ClassVar[list[Any]] = []

    def run(self, program: gw.Program, context: Context) -> gw.Result:
        assert context.uncompressed is not None
        self.seen.append(context.uncompressed.state["b.weight"].clone())
        place = context.scope[0]
        return gw.Result(program, warnings=(f"seen at {place}",))


def saves(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> list[int]:
    """Indices of the passes behind which a checkpoint is saved, where passes take so long."""
    saved: list[int] = []
    inner = chain._one_pass

    def timed(run: Run, index: int, *rest: Any) -> Any:
        program, uncompressed, record = inner(run, index, *rest)
        return program, uncompressed, {**record, "seconds": seconds[index]}

    monkeypatch.setattr(chain, "_one_pass", timed)
    monkeypatch.setattr(Checkpoints, "save", lambda self, index, *_: saved.append(index))
    return saved


def test_what_passes_took_adds_up_to_a_checkpoint(
    program: gw.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = saves(monkeypatch, [1.0, 0.5, 0.5, 2.0, 1.9, 0.05])
    run_chain(job(tmp_path, ["chaintest.scale"] * 6, checkpoint_seconds=2.0), program, None)
    assert saved == [2, 3]


def test_of_several_processes_one_saves(
    program: gw.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = saves(monkeypatch, [5.0])
    run = job(tmp_path, ["chaintest.scale"])
    run.place.is_main = False
    run_chain(run, program, None)
    assert saved == []


def test_a_checkpoint_that_cannot_be_saved_is_told_and_the_run_goes_on(
    program: gw.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/there")

    monkeypatch.setattr("graphwright.ir.files.archive.replacing", full)
    run = job(tmp_path, ["chaintest.scale", "chaintest.scale"], checkpoint_seconds=0.0)
    run.place.pass_work(0).mkdir(parents=True)
    result, records, _ = run_chain(run, program, None)
    assert len(records) == 2
    assert torch.equal(result.state["b.weight"], program.state["b.weight"])
    assert [text.partition(": ")[0] for text in run.warnings] == [
        "no checkpoint behind pass 0 (chaintest.scale)",
        "no checkpoint behind pass 1 (chaintest.scale)",
    ]
    assert all("No space left on device" in text for text in run.warnings)
    assert run.place.pass_work(0).exists()  # what the pass kept is all there is


def test_a_resumed_run_knows_what_compression_started_from_and_what_was_warned_of(
    program: gw.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [{"chaintest.scale": {"factor": 0.5}}, "chaintest.note", "chaintest.note"]
    monkeypatch.setattr(Note, "seen", [])
    (tmp_path / "a").mkdir()
    straight = job(tmp_path / "a", passes)
    run_chain(straight, program, None)
    (tmp_path / "b").mkdir()
    run_chain(job(tmp_path / "b", passes[:2], checkpoint_seconds=0.0), program, None)
    resumed = job(tmp_path / "b", passes)
    run_chain(resumed, program, None)
    assert len(Note.seen) == 4
    assert all(torch.equal(seen, program.state["b.weight"]) for seen in Note.seen)
    assert resumed.warnings == straight.warnings
    assert "chaintest.note: seen at 1" in straight.warnings


@pytest.mark.parametrize(("bound", "missed"), [(1.0, False), (0.999, True)])
def test_a_bound_on_the_time_ends_the_chain_behind_the_pass_that_missed_it(
    program: gw.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: float, missed: bool
) -> None:
    document = {"version": 1, "passes": ["chaintest.scale"] * 2, "require": {"max_minutes": bound}}
    run = job(tmp_path, ["chaintest.scale"])
    run = replace(run, spec=parse_spec(yaml.safe_dump(document), folder=tmp_path))
    monkeypatch.setattr(Run, "seconds", lambda self: 60.0)
    if not missed:
        assert len(run_chain(run, program, None)[1]) == 2
        return
    with pytest.raises(RequirementError) as caught:
        run_chain(run, program, None)
    said = "require.max_minutes: 1 minutes after pass 0 (chaintest.scale), bound 0.999"
    assert caught.value.message == said
    assert caught.value.exit_code == 6


def test_a_broken_contract_is_told_where_no_reproducer_can_be_written(
    program: gw.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = job(tmp_path, ["chaintest.cut_rows"])
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ContractError, match="broke its contract") as caught:
        run_chain(run, program, None)
    assert caught.value.details[-1] == "no reproducer: [Errno 28] No space left on device"
