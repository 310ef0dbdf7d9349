"""Searches on a small net: the known best, bounds, failures, and a search that is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import graphwright as gw
from graphwright.ir.errors import ArgumentError, GraphwrightError, RequirementError
from graphwright.search.worker import Answer, Bench

SPEC = """\
version: 1
passes:
  - cleanup.fold_batch_norm
  - quantize.rtn: {{block: 16}}
require: {{{require}}}
search:
  space:
    passes.1: {{choices: [quantize.rtn: {{block: 16}}, none]}}
    passes.1.bits: {{choices: {bits}}}
  objective: [{objective}]
  {strategy}
"""


class InProcess(Bench):
    """Candidates in this process, without the seconds that one of its own takes to start."""

    fail_at: int | None = None
    """Number of the call at which the search is killed."""
    calls = 0

    def run(self, spec, limit) -> Answer:
        type(self).calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        try:
            return Answer(self.figures(spec), "", 0.25)
        except GraphwrightError as error:
            return Answer(None, error.message, 0.25)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    fresh = type("Fresh", (InProcess,), {})
    monkeypatch.setattr("graphwright.search.search.Worker", fresh)
    return fresh


def _search(models: Path, folder: Path, out: str = "out", **parts):
    given = {"require": "", "bits": [8, 2, 4], "objective": "file_mb", "strategy": "strategy: grid"}
    (folder / "spec.yaml").write_text(SPEC.format(**{**given, **parts}))
    return gw.optimize(
        models / "program.pt2", folder / "spec.yaml", out=folder / out, checkpoint_seconds=0.0
    )


def test_a_grid_finds_the_smallest_and_its_lock_file_repeats_it(models, tmp_path) -> None:
    found = _search(models, tmp_path)
    search = found.report["search"]
    sizes = {t["number"]: t["measured"]["file_mb"] for t in search["trials"]}
    assert len(sizes) == 4
    assert search["trials"][3]["values"] == {"passes.1": "none"}
    winner = search["winner"]
    assert winner == min(sizes, key=sizes.__getitem__)
    assert (
        sizes[winner]
        == min(sizes.values())
        == found.report["result"]["artifacts"][0]["file_bytes"] / 1e6
    )
    lock = tmp_path / "out" / "spec.lock.yaml"
    assert "search" not in lock.read_text()
    again = gw.optimize(models / "program.pt2", lock, out=tmp_path / "again")
    assert again.report["search"] is None
    first, second = ((tmp_path / name / "program.pt2").read_bytes() for name in ("out", "again"))
    assert first == second


def test_a_measure_that_is_made_large(models, tmp_path) -> None:
    search = _search(models, tmp_path, objective="cosine").report["search"]
    assert search["winner"] == 3  # the one without codes
    found = [trial["measured"]["cosine"] for trial in search["trials"]]
    assert found[1] < found[2] < found[0] < found[3]  # 2, 4, 8 bits, and none


def test_a_bound_is_kept_by_the_winner(models, tmp_path) -> None:
    found = _search(models, tmp_path, require="min_cosine: 0.99").report
    trials = found["search"]["trials"]
    assert [trial["met"] for trial in trials] == [True, False, True, True]
    kept = {t["number"]: t["measured"]["file_mb"] for t in trials if t["met"]}
    assert found["search"]["winner"] == min(kept, key=kept.__getitem__)
    assert found["fidelity"]["cosine"] >= 0.99


def test_two_measures_give_a_front_and_a_winner_on_it(models, tmp_path) -> None:
    parts = {"objective": "file_mb, cosine", "bits": [2, 3, 4, 8]}
    search = _search(models, tmp_path, **parts).report["search"]
    points = {
        t["number"]: (t["measured"]["file_mb"], -t["measured"]["cosine"]) for t in search["trials"]
    }
    front = [
        number
        for number, own in points.items()
        if not any(o != own and o[0] <= own[0] and o[1] <= own[1] for o in points.values())
    ]
    assert search["front"] == front
    assert search["winner"] in front
    assert (tmp_path / "out" / "report.html").read_text().count('class="point') == len(points)


def test_where_none_keeps_the_bounds_the_nearest_miss_is_named(models, tmp_path) -> None:
    with pytest.raises(RequirementError) as raised:
        _search(models, tmp_path, bits=[2, 3], require="min_cosine: 0.9999, max_file_mb: 0.001")
    assert "none of 3 candidates keeps all bounds; the nearest miss is trial" in str(raised.value)
    assert "bound 0.001 (missed by" in str(raised.value)
    assert not (tmp_path / "out").exists()
    kept = tmp_path / ".out.graphwright" / "result" / "report.json"
    assert str(kept.parent) in str(raised.value)
    trials = json.loads(kept.read_text())["search"]["trials"]
    nearest = min(trials, key=lambda trial: trial["missed_by"])
    assert f"nearest miss is trial {nearest['number']} " in str(raised.value)


def test_an_impossible_file_is_refused_before_any_candidate_runs(models, tmp_path, bench) -> None:
    weights = 8 * 1 * 9 + 10 * 128
    with pytest.raises(
        RequirementError, match=f"{weights} weight elements x 2 bits / 8 are 0.000338"
    ):
        _search(models, tmp_path, require="max_file_mb: 0.0003")
    assert bench.calls == 0


@pytest.mark.parametrize("strategy", ["grid", "random", "tpe", "nsga2"])
def test_a_killed_search_goes_on_and_ends_the_same(models, tmp_path, bench, strategy) -> None:
    parts = {"bits": [2, 3, 4, 5, 8], "strategy": f"strategy: {strategy}\n  trials: 12"}
    whole = _search(models, tmp_path, "whole", **parts)
    calls, bench.calls, bench.fail_at = bench.calls, 0, 3
    with pytest.raises(KeyboardInterrupt):
        _search(models, tmp_path, "killed", **parts)
    bench.fail_at = None
    killed = _search(models, tmp_path, "killed", **parts)
    assert bench.calls == calls + 1  # the one that was killed
    rows = [
        [(t["values"], t["measured"], t["same_as"]) for t in run.report["search"]["trials"]]
        for run in (whole, killed)
    ]
    assert rows[0] == rows[1]
    files = [(tmp_path / name / "program.pt2").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert not (tmp_path / ".killed.graphwright" / "search").exists()


def test_a_candidate_that_fails_does_not_end_the_search(models, tmp_path) -> None:
    (tmp_path / "spec.yaml").write_text("""\
version: 1
passes:
  - quantize.rtn: {block: 16}
search:
  space:
    passes.0.targets: {choices: [["no_such_layer"], ["fc"]]}
  objective: [file_mb]
  strategy: grid
""")
    model = models / "program.pt2"
    search = gw.optimize(model, tmp_path / "spec.yaml", out=tmp_path / "out").report["search"]
    assert "no_such_layer" in search["trials"][0]["failed"]
    assert (search["winner"], search["trials"][1]["failed"]) == (1, "")


def test_without_optuna_the_extra_is_named(models, tmp_path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ArgumentError, match=r"pip install 'graphwright\[search\]'"):
        _search(models, tmp_path, strategy="trials: 2")
