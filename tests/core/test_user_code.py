"""Code that a spec names is said when it runs, noted in the report, and refused by --no-code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from graphwright.cli import main, optimize_main

CODE = """
import pathlib
import torch
from torch import nn
pathlib.Path("ran.txt").touch()
def build(): return nn.Linear(4, 2)
def batches(): return [{"input": torch.ones(2, 4)}]
def score(outputs, batch): return 1.0
"""
SPEC = """version: 1
model:
  factory: nets_of_tests:build
  inputs: {input: {dtype: float32, shape: [batch, 4]}}
evaluate: {data: "nets_of_tests:batches", metric: "nets_of_tests:score"}
passes: [cleanup.remove_identities]
lower: []
"""
PLAIN = """version: 1
model: {inputs: {input: {dtype: float32, shape: [batch, 4]}}}
passes: [cleanup.remove_identities]
lower: []
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("nets_of_tests", None)
    Path("nets_of_tests.py").write_text(CODE)
    Path("spec.yaml").write_text(SPEC)
    torch.save(nn.Linear(4, 2).state_dict(), "m.pt")
    torch.save(nn.Linear(4, 2), "whole.pt")
    return tmp_path


def test_what_runs_is_said_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert optimize_main(["m.pt", "--spec", "spec.yaml"]) == 0
    said = capsys.readouterr()
    names = ["build", "batches", "score"]
    report = json.loads(Path("out/report.json").read_text())
    assert [line.rpartition(":")[2] for line in report["code"]] == names
    assert all(f"nets_of_tests:{name}" in said.err for name in names)
    assert said.out.count("ran code") == 3
    assert Path("out/report.html").read_text().count("nets_of_tests:") >= 3


COMMANDS = {
    "optimize": ["optimize", "m.pt", "--spec", "spec.yaml"],
    "check": ["check", "spec.yaml"],
    "inspect": ["inspect", "m.pt", "--spec", "spec.yaml"],
    "compare": ["compare", "m.pt", "m.pt", "--spec", "spec.yaml"],
    "bench": ["bench", "m.pt", "--spec", "spec.yaml"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_code_refuses_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMANDS[command], "--no-code"]) == 2
    said = capsys.readouterr().err
    assert "nets_of_tests:build" in said
    assert "--no-code" in said
    assert not Path("ran.txt").exists()
    assert "nets_of_tests" not in sys.modules


def test_no_code_refuses_data_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plain.yaml").write_text(PLAIN)
    torch.export.save(
        torch.export.export(nn.Linear(4, 2), (torch.ones(2, 4),), strict=False), "m.pt2"
    )
    arguments = ["compare", "m.pt2", "m.pt2", "--data", "nets_of_tests:batches"]
    assert main([*arguments, "--no-code"]) == 2
    assert not Path("ran.txt").exists()
    assert main(arguments) == 0
    assert "runs code: the data: nets_of_tests:batches" in capsys.readouterr().err


def test_a_trusted_pickle_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plain.yaml").write_text(PLAIN)
    assert main(["inspect", "whole.pt", "--spec", "plain.yaml", "--allow-pickle"]) == 0
    assert "runs code: a pickle that --allow-pickle opens: whole.pt" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "whole.pt", "--allow-pickle", "--no-code"])
    assert caught.value.code == 2


@pytest.mark.parametrize("short", ["--allow", "--allow-pick", "--spe=spec.yaml", "--no-c"])
def test_flags_have_no_abbreviations(short: str) -> None:
    for command in (
        lambda: optimize_main(["whole.pt", "--spec", "spec.yaml", short]),
        lambda: main(["inspect", "whole.pt", short]),
    ):
        with pytest.raises(SystemExit) as caught:
            command()
        assert caught.value.code == 2
    assert not Path("ran.txt").exists()
