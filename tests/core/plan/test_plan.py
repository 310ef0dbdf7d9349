"""`optimize --plan`, and estimates beside what happened; rates are made up, so nothing is timed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.cli import optimize_main
from graphwright.ir.work import TIMED, DataSize, Work
from graphwright.passes.base import find_pass
from graphwright.plan import fits, measure, rates
from graphwright.plan.facts import load_of
from graphwright.plan.rates import Lowered, Rates

RATES = Rates(
    macs=1e10, moved=1e9, calls=1e5, factored=1e10, decomposed=1e9, edited=1e3, written=1e8,
    lowered={"onnxruntime": Lowered(0.5, 0.002, 5e7), "triton": Lowered(0.1, 0.002, 1e6)},
    seconds=1.0,
)  # fmt: skip
SPEC = """
version: 1
calibration: {data: synthetic, samples: 16, batch_size: 8}
passes: [cleanup.fold_batch_norm, {quantize.gptq: {block: 16}}]
lower: [onnxruntime]
"""


class Stack(nn.Module):
    """Layers of one width."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def stack(depth: int, width: int) -> gw.Program:
    program: gw.Program = gw.trace(Stack(depth, width).eval(), (torch.randn(4, width),))
    return program


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a spec, and made-up rates."""
    monkeypatch.setattr(rates, "measured_rates", lambda device, say=None: RATES)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(1024, 10),
    ).eval()  # fmt: skip
    program = gw.trace(model, (torch.randn(4, 1, 8, 8),), {"input": {0: "batch"}})
    program.save(tmp_path / "model.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path


def ran(*more: str) -> int:
    return optimize_main(["model.pt2", "--spec", "spec.yaml", *more])


def test_a_plan_names_every_stage_and_runs_none(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a pass ran")

    monkeypatch.setattr(find_pass("quantize.gptq"), "run", never)
    monkeypatch.setattr(find_pass("cleanup.fold_batch_norm"), "run", never)
    before = sorted(job.iterdir())
    assert ran("--plan") == 0
    told = capsys.readouterr().out
    for name in ("load", "trace", "0 cleanup.fold_batch_norm", "0 check", "1 quantize.gptq",
                 "1 check", "onnxruntime", "write", "fidelity", "latency", "report",
                 "whole run"):  # fmt: skip
        assert any(line.startswith(name) for line in told.splitlines()), name
    assert sorted(job.iterdir()) == before


def test_a_plan_of_a_search_is_of_one_candidate(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = "search: {space: {passes.1.bits: {choices: [4, 8]}}, objective: [file_mb], trials: 2}"
    (job / "spec.yaml").write_text(f"{SPEC}{search}\n")
    assert ran("--plan") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "one for every candidate, 2 of them at most, and then the winner's" in said
    assert "quantize.gptq" in said


def test_a_plan_refuses_what_a_run_refuses(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    (job / "spec.yaml").write_text(SPEC.replace("gptq", "gtpq"))
    for more in ([], ["--plan"]):
        assert ran(*more) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    (job / "spec.yaml").write_text(SPEC)
    (job / "out").write_text("a file")
    assert ran("--plan") == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "name", "spec"),
    [("available_memory", "memory:", SPEC), ("free_disk", "disk:", SPEC),
     ("", "require.max_minutes", SPEC + "require: {max_minutes: 0.001}\n")],
)  # fmt: skip
def test_what_will_not_fit_is_said(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    what: str, name: str, spec: str,
) -> None:  # fmt: skip
    (job / "spec.yaml").write_text(spec)
    if what:
        monkeypatch.setattr(fits, what, lambda *_: 1000)
    assert ran("--plan") == 2
    told = capsys.readouterr()
    assert "1 quantize.gptq" in told.out
    assert name in told.err


def test_a_report_has_what_was_estimated_beside_what_happened(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran() == 0
    assert "estimated" in capsys.readouterr().out
    report = json.loads((job / "out" / "report.json").read_text())
    told = {row["name"]: row["estimated"] for row in report["stages"]}
    assert told["load"] is None
    for name in ("1 quantize.gptq", "1 check", "onnxruntime", "fidelity", "report"):
        assert told[name]["seconds"] > 0, name
        assert told[name]["peak_rss_bytes"] > 1e7, name
    assert report["passes"][1]["estimated"] == told["1 quantize.gptq"]
    # the report's own total ends before the report's stage does
    took = sum(row["seconds"] for row in report["stages"] if row["name"] != "report")
    assert 0.5 * report["seconds"] < took <= report["seconds"]  # no stage is left out
    assert "Time and memory" in (job / "out" / "report.html").read_text()


def test_a_pass_whose_cost_cannot_be_told_fails_no_run(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Work:
        raise ValueError("no layers")

    monkeypatch.setattr(find_pass("quantize.gptq"), "cost", broken)
    assert ran() == 0
    report = json.loads((job / "out" / "report.json").read_text())
    assert "nothing is estimated: ValueError: no layers" in report["warnings"]
    assert all(row["estimated"] is None for row in report["stages"])


def test_threads_that_wait_for_each_other_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine: with all threads every kernel is slower than with one."""
    rate = {1: 4.0, 2: 0.5}
    monkeypatch.setattr(measure, "_kernels", lambda device: {"macs": rate[torch.get_num_threads()]})
    for name in ("_calls", "_edits", "_lowering", "_disk"):
        monkeypatch.setattr(measure, name, lambda *_: 1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert measure.measure("cpu")["macs"] == 4.0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def seconds(program: gw.Program, name: str, runs: float = 100.0) -> float:
    data = DataSize(400, 50, runs)
    step = find_pass(name)()
    return RATES.time(step.cost(load_of(program, data, data, 2)))


@pytest.mark.parametrize("name", ["quantize.rtn", "quantize.gptq", "decompose.svd", "prune.wanda"])
def test_twice_as_many_layers_take_twice_as_long(name: str) -> None:
    ratio = seconds(stack(16, 64), name) / seconds(stack(8, 64), name)
    assert ratio == pytest.approx(2, rel=0.05)


def test_wide_layers_take_the_cube_of_their_width() -> None:
    """Second moments and factors of GPTQ: k^3 where there are as many rows as columns."""
    ratio = seconds(stack(2, 2048), "quantize.gptq") / seconds(stack(2, 1024), "quantize.gptq")
    assert 4 < ratio < 8.5


def test_training_takes_as_long_as_it_has_steps() -> None:
    load = load_of(stack(2, 64), None, DataSize(400, 50, 100.0), 2)
    costs = [
        RATES.time(find_pass("tune.finetune")(tune={"epochs": count}).cost(load))
        for count in (2, 4, 8)
    ]
    assert (costs[2] - costs[1]) / (costs[1] - costs[0]) == pytest.approx(2)


def test_work_adds_up_and_peaks_do_not() -> None:
    both = Work(macs=1, memory=5, kept=2) + Work(macs=2, memory=3, kept=2)
    assert both == Work(macs=3, memory=5, kept=4)
    assert both.times(3) == Work(macs=9, memory=5, kept=4)


def test_rates_are_measured_once_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {kind: 1.0 for kind in (*TIMED, "written", "seconds")}
    found = {**plain, "lowered": {"triton": {"first": 0.0, "node": 1.0, "memory": 0.0}}}
    asked = []
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "_measured", lambda device: asked.append(device) or found)
    monkeypatch.setattr(rates, "_KNOWN", {})
    first = rates.measured_rates("cpu")
    assert first is not None
    assert rates.measured_rates("cpu") == first
    rates._KNOWN.clear()  # as another process
    assert rates.measured_rates("cpu") == first
    assert asked == ["cpu"]
    rates._KNOWN.clear()
    for file in tmp_path.iterdir():
        file.write_text(file.read_text().replace('"macs": 1.0', '"macs": -1.0'))
    assert rates.measured_rates("cpu") == first  # a broken file is measured anew
    assert asked == ["cpu", "cpu"]
    assert math.isfinite(first.time(Work(macs=1, calls=2)))
