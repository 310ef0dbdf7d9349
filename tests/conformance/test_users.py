"""The harness of run_users.py, without the packages that it is for."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from conformance import run_users
from conformance.children import Limits, Send, each_in_a_child
from conformance.users import catalog
from conformance.users.columns import COLUMNS, examine, settle_
from conformance.users.page import render
from conformance.users.remarks import REMARKS
from conformance.zoo import Architecture, floats


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv(x)).relu().mean((2, 3))
        scores: Tensor = self.head(hidden)
        return scores


class Branching(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class BatchOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + torch.zeros(2, 3, 6, 6)).relu()


class Missing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        raise ImportError("No module named 'nowhere'")


def entry(model: type[nn.Module]) -> Architecture:
    return Architecture(model.__name__, "test", model, {"x": floats("batch", 3, 6, 6)}, ())


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Architecture]]:
    listed = {m.__name__: entry(m) for m in (Small, Missing)}
    monkeypatch.setattr(catalog, "USERS", listed)
    monkeypatch.setattr(run_users, "_imported", lambda: listed)
    monkeypatch.setattr(run_users, "PAGE", tmp_path / "page.md")
    yield listed
    gc.unfreeze()


def test_a_small_network_is_ok_in_every_column() -> None:
    row = examine(entry(Small))
    assert {column: cell.state for column, cell in row.cells.items()} == dict.fromkeys(
        COLUMNS, "ok"
    )
    assert row.cells["int8"].detail == "2/2"
    assert row.cells["cut"].detail.endswith("%")
    assert row.figures["folded"] < 1e-5


def test_a_network_that_cannot_be_traced_fails_with_the_reason_and_the_rest_is_not_reached() -> (
    None
):
    row = examine(entry(Branching))
    assert row.cells["trace"].state == "fails"
    assert "test_users.py" in row.cells["trace"].detail
    assert {row.cells[column].state for column in COLUMNS[1:]} == {"n/a"}
    assert row.cells["int8"].detail == "not traced"


def test_a_batch_that_the_model_itself_fixes_is_not_applicable() -> None:
    row = examine(entry(BatchOfTwo))
    assert row.cells["trace"].state == "ok"
    assert row.cells["free batch"].state == "n/a"
    assert "does not run at batch 3" in row.cells["free batch"].detail


def test_an_artifact_that_computes_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import graphwright as gw

    real = gw.lower

    class Off:
        def __init__(self, compiled: object) -> None:
            self.compiled, self.notes = compiled, compiled.notes  # type: ignore[attr-defined]

        def __call__(self, **inputs: Tensor) -> Tensor:
            result: Tensor = self.compiled(**inputs)  # type: ignore[operator]
            return result * 1.001

    monkeypatch.setattr(gw, "lower", lambda *a, **k: Off(real(*a, **k)))
    row = examine(entry(Small))
    assert row.cells["onnxruntime"].state == "fails"
    assert "the bound is" in row.cells["onnxruntime"].detail


def test_statistics_of_batch_norms_are_those_of_the_data() -> None:
    model, batch = Small(), torch.randn(64, 3, 6, 6)
    settle_(model, [{"x": batch}])
    values = model.conv(batch)
    torch.testing.assert_close(model.norm.running_mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(model.norm.running_var, values.var((0, 2, 3)))
    assert not model.norm.training
    assert model.norm.momentum == 0.1


def test_a_child_that_hangs_or_dies_costs_its_own_row() -> None:
    def work(name: str, send: Send) -> None:
        send({"name": name, "cells": 1})
        if name == "hangs":
            time.sleep(60)
        if name == "dies":
            os._exit(9)
        if name == "eats":
            torch.zeros(1 << 46)
        send({"name": name, "cells": 2})

    def lost(name: str, row: dict[str, Any] | None, why: str) -> dict[str, Any]:
        return {**(row or {}), "why": why}

    names = ("fine", "hangs", "dies", "eats")
    found = {row["name"]: row for row in each_in_a_child(names, work, Limits(5, 64, 4), lost)}
    assert found["fine"] == {"name": "fine", "cells": 2}
    assert found["hangs"] == {"name": "hangs", "cells": 1, "why": "took longer than 5 s"}
    assert found["dies"] == {"name": "dies", "cells": 1, "why": "the process ended with status 9"}
    assert found["eats"] == {"name": "eats", "cells": 1, "why": "the process ended with status 1"}


def test_cells_that_were_not_reached_say_so(users: dict[str, Architecture]) -> None:
    begun = {"name": "Small", "cells": {"trace": {"state": "ok", "detail": ""}}}
    row = run_users.complete("Small", begun, "took longer than 5 s")
    assert list(row["cells"]) == list(COLUMNS)
    assert row["cells"]["trace"]["state"] == "ok"
    assert row["cells"]["free batch"] == {"state": "fails", "detail": "took longer than 5 s"}
    assert row["cells"]["cut"] == {
        "state": "n/a",
        "detail": "not reached: free batch: took longer than 5 s",
    }


def test_a_run_goes_on_where_it_was_stopped(
    users: dict[str, Architecture], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    done = run_users.complete("Small", None, "an earlier run")
    out.write_text(json.dumps(done) + "\n")
    arguments = ["--only", "Small", "Missing", "--resume", "--out", str(out)]
    assert run_users.main(arguments) == 1
    first, second = run_users.read(out)
    assert first == done
    assert second["name"] == "Missing"
    assert second["cells"]["trace"]["state"] == "n/a"
    assert "1 of 2 architectures have no failing cell" in capsys.readouterr().out
    assert "- **Small**: trace: an earlier run" in run_users.PAGE.read_text()


def test_rows_that_are_named_are_run_again_in_place_of_their_old_ones(
    users: dict[str, Architecture], tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    old = [run_users.complete(name, None, "an earlier run") for name in users]
    out.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert run_users.main(["--only", "Small", "--out", str(out)]) == 0
    kept, new = run_users.read(out)
    assert kept == old[1]
    assert new["name"] == "Small"
    assert {cell["state"] for cell in new["cells"].values()} == {"ok"}
    assert new["commit"] == run_users._commit()


def test_the_page_says_why_a_cell_is_not_ok() -> None:
    good = {**examine(entry(Small)).as_json(), "commit": "abc"}
    bad = {**good, "name": "Bad", "commit": "", "cells": {**good["cells"],
           "cut": {"state": "fails", "detail": "/some/where/file.py:3: no | way"}}}  # fmt: skip
    page = render([good, bad])
    assert "| cut | 1 | 1 | 0 |" in page
    assert "4 integer kernels for 4 quantized layers; 2 of them lack none" in page
    assert "- **Bad**: cut: file.py:3: no \\| way" in page
    assert "not applicable" not in page
    assert "Not run" not in page
    assert "before these 1:\n\n- Slow\n" in render([good], ["Slow"])
    assert "Commits of the compiler: abc (1 of 2 rows), unknown (1 of 2 rows)." in page


def test_the_catalog_is_wide_and_loads_without_its_packages() -> None:
    names = catalog.load()
    assert len(names) >= 150
    assert len({name.partition(".")[0] for name in names}) >= 12
    assert len({a.family for a in names.values()}) >= 12
    assert REMARKS.keys() <= names.keys()


def test_the_page_in_the_docs_lists_the_catalog() -> None:
    text = (Path(__file__).parents[2] / "docs" / "conformance-users.md").read_text()
    table, _, rest = text.partition("## Every architecture")[2].partition("\n## ")
    listed = re.findall(r"^\| ([^ |]+) \|", table, flags=re.MULTILINE)
    listed += re.findall(r"^- (\S+)$", rest.partition("## Not run")[2], flags=re.MULTILINE)
    assert sorted(listed[2:]) == sorted(catalog.load()), "run `make conformance-users`"
