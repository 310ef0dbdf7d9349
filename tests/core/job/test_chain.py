"""The chain checks every pass on real inputs and at another size, and goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ContractError
from graphwright.ir.signature import DimRange
from graphwright.job.chain import run_chain
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
