"""The command line: what a user sees when something is wrong, and that nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import graphwright as gw
from graphwright.cli import main, optimize_main
from graphwright.ir.context import Context
from graphwright.ir.edit import Editor

INPUTS = "model: {inputs: {x: {dtype: float32, shape: [batch, 1, 8, 8], example: [4, 1, 8, 8]}}}"
PLAIN = "version: 1\npasses: [cleanup.fold_batch_norm]\nlower: []\n"


@gw.register("test.breaks")
class Breaks(gw.Pass):
    """Claims to be exact and is not."""

    contract = "exact"

    def run(self, program: gw.Program, context: Context) -> gw.Result:
        editor = Editor(program, by=self.id)
        editor.set_state("fc.bias", torch.nn.Parameter(program.state["fc.bias"] + 1.0))
        return gw.Result(editor.finish())


@gw.register("test.raises")
class Raises(gw.Pass):
    """Has a bug."""

    def run(self, program: gw.Program, context: Context) -> gw.Result:
        raise ZeroDivisionError("inside the pass")


@dataclass(frozen=True)
class Bad:
    """A command line that must fail: its spec, further arguments, the status and the message."""

    status: int
    message: str
    spec: str = PLAIN
    model: str = "program.pt2"
    arguments: tuple[str, ...] = ()
    prepare: Callable[[Path], None] | None = None


def spec(body: str) -> str:
    return f"version: 1\n{body}\n"


BAD = {
    "unknown pass": Bad(2, "did you mean 'cleanup.fold_batch_norm'?",
                        spec("passes: [cleanup.fold_bach_norm]\nlower: []")),
    "unknown option": Bad(2, "did you mean 'max_growth_mb'?",
                          spec("passes: [{cleanup.fold_constants: {max_grow_mb: 2}}]\nlower: []")),
    "unknown key": Bad(2, "did you mean 'passes'?", spec("pases: []\nlower: []")),
    "wrong type": Bad(2, "parameters", spec(
        "passes: [{cleanup.fold_constants: {parameters: 3}}]\nlower: []")),
    "unknown backend": Bad(2, "did you mean 'onnxruntime'?",
                           spec("passes: [cleanup.canonicalize]\nlower: [onnxruntim]")),
    "yaml syntax": Bad(2, "spec.yaml:2", spec("passes: [")),
    "empty spec": Bad(2, "spec.yaml", ""),
    "no such spec": Bad(2, "no_such_spec", arguments=("--spec", "no_such_spec")),
    "bad override": Bad(2, "max_growth_mb", spec("passes: [cleanup.fold_constants]\nlower: []"),
                        arguments=("--set", "passes.0.max_grwth_mb=1")),
    "override without value": Bad(2, "KEY=VALUE", arguments=("--set", "seed")),
    "override of nothing": Bad(2, "passes.7", arguments=("--set", "passes.7.x=1")),
    "a pass that needs calibration": Bad(2, "calibration", spec(
        "passes: [{quantize.int8: {activations: static}}]\nlower: [onnxruntime]")),
    "missing data": Bad(2, "nowhere.npz", spec(
        "evaluate: {data: nowhere.npz}\npasses: [cleanup.canonicalize]\nlower: []")),
    "no such model": Bad(3, "nothing.pt", model="nothing.pt"),
    "an empty model file": Bad(3, "empty", model="empty.pt",
                               prepare=lambda f: (f / "empty.pt").write_bytes(b"") and None),
    "no model at all": Bad(3, "text.pt", model="text.pt",
                           prepare=lambda f: (f / "text.pt").write_text("hello") and None),
    "a pickled module": Bad(3, "--allow-pickle", model="module.pt"),
    "a state dict without a factory": Bad(3, "factory", model="state.pt"),
    "a factory that is not there": Bad(3, "no_such_module_at_all", spec(
        f"{INPUTS[:-1]}, factory: 'no_such_module_at_all:build'}}\npasses: []\n"
        "lower: [onnxruntime]"), model="state.pt"),
    "a selector that matches nothing": Bad(3, "matches no layer", spec(
        "passes: [{cast.dtype: {keep: ['classifier.*']}}]\nlower: []")),
    "a broken contract": Bad(4, "test.breaks broke its contract (exact)",
                             spec("passes: [test.breaks]\nlower: []")),
    "an error bound": Bad(4, "allowed 1e-09", spec(
        "passes: [{cast.dtype: {to: bfloat16, max_error: 1.0e-9}}]\nlower: []")),
    "max_drop": Bad(6, "require.max_drop: ", spec(
        "evaluate: {data: synthetic, metric: cosine}\nrequire: {max_drop: 1.0e-12}\n"
        "passes: [{cast.dtype: {to: bfloat16}}]\nlower: []")),
    "max_file_mb": Bad(6, "require.max_file_mb: ", spec(
        "require: {max_file_mb: 0.001}\npasses: [cleanup.canonicalize]\nlower: []")),
    "max_rss_gb": Bad(6, "require.max_rss_gb: ", spec(
        "require: {max_rss_gb: 0.001}\npasses: [cleanup.canonicalize]\nlower: []")),
    "max_minutes": Bad(6, "max_minutes: ", spec(
        "require: {max_minutes: 1.0e-6}\npasses: [cleanup.canonicalize]\nlower: []")),
    "integer_kernels": Bad(6, "require.integer_kernels: not measured", spec(
        "require: {integer_kernels: all}\npasses: [cleanup.canonicalize]\nlower: []")),
    "min_speedup": Bad(6, "require.min_speedup: ", spec(
        "require: {min_speedup: 1000}\npasses: [cleanup.canonicalize]\nlower: [triton]")),
    "a bug in a pass": Bad(1, "internal error: ZeroDivisionError: inside the pass",
                           spec("passes: [test.raises]\nlower: []")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_clear_message_the_right_status_and_nothing_left(
    name: str,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(bad.spec)
    if bad.prepare is not None:
        bad.prepare(tmp_path)
    model = models / bad.model if (models / bad.model).exists() else tmp_path / bad.model
    chosen = () if "--spec" in bad.arguments else ("--spec", "spec.yaml")
    status = optimize_main([str(model), *chosen, *bad.arguments, "--out", "result", "--quiet"])
    shown = capsys.readouterr()
    assert status == bad.status, shown.err
    assert bad.message in shown.err
    assert "Traceback" not in shown.err
    assert shown.err.startswith("optimize: error: ") or status == 1
    assert not (tmp_path / "result").exists()
    left = {p.name for p in tmp_path.iterdir()} - {"spec.yaml", "empty.pt", "text.pt"}
    allowed = {4: {"result.reproducer"}, 6: {".result.graphwright"}}.get(bad.status, set())
    assert left <= allowed


def test_a_broken_contract_leaves_a_reproducer_that_reproduces_it(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(spec("passes: [cleanup.fold_batch_norm, test.breaks]\nlower: []"))
    out = str(tmp_path / "out")
    program = str(models / "program.pt2")
    assert optimize_main([program, "--spec", str(path), "--out", out, "--quiet"]) == 4
    said = capsys.readouterr().err
    assert "passes[1] (line 2)" in said
    assert "first node that differs: linear (aten.linear.default) in fc" in said
    folder = tmp_path / "out.reproducer"
    before, alone = str(folder / "before.pt2"), str(folder / "spec.yaml")
    again = str(tmp_path / "again")
    assert optimize_main([before, "--spec", alone, "--out", again, "--quiet"]) == 4
    assert "test.breaks broke its contract" in capsys.readouterr().err


def test_a_missed_requirement_keeps_the_result_where_it_says(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(spec("require: {max_file_mb: 0.001}\npasses: []\nlower: [triton]"))
    out = tmp_path / "out"
    program = str(models / "program.pt2")
    assert optimize_main([program, "--spec", str(path), "--out", str(out), "--quiet"]) == 6
    said = capsys.readouterr().err
    kept = Path(said.split("The result stays in ")[1].split(";")[0])
    report = json.loads((kept / "report.json").read_text())
    (row,) = report["require"]
    assert (row["name"], row["met"]) == ("max_file_mb", False)
    assert not out.exists()


def test_files_of_others_are_not_overwritten(models: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(PLAIN)
    mine = tmp_path / "out"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    arguments = [str(models / "program.pt2"), "--spec", str(tmp_path / "spec.yaml"), "--quiet"]
    assert optimize_main([*arguments, "--out", str(mine)]) == 2
    assert optimize_main([*arguments, "--out", str(mine / "thesis.txt")]) == 2
    assert (mine / "thesis.txt").read_text() == "all of it"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_an_earlier_result_is_replaced_and_the_lock_gives_the_same_bytes(
    models: Path, tmp_path: Path
) -> None:
    (tmp_path / "spec.yaml").write_text(
        spec("passes: [cleanup.fold_batch_norm, {cast.dtype: {to: float16}}]\nlower: []")
    )
    out = tmp_path / "out"
    program = str(models / "program.pt2")
    first = [program, "--spec", str(tmp_path / "spec.yaml"), "--out", str(out), "--quiet"]
    assert optimize_main(first) == 0
    before = (out / "program.pt2").read_bytes()
    lock = tmp_path / "kept.lock.yaml"
    lock.write_bytes((out / "spec.lock.yaml").read_bytes())
    assert optimize_main([program, "--spec", str(lock), "--out", str(out), "--quiet"]) == 0
    assert (out / "program.pt2").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_second_run_into_the_same_folder_is_refused(models: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "spec.yaml").write_text(PLAIN)
    work = tmp_path / ".out.graphwright"
    work.mkdir()
    with (work / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        arguments = [str(models / "program.pt2"), "--spec", str(tmp_path / "spec.yaml"), "--quiet"]
        assert optimize_main([*arguments, "--out", str(tmp_path / "out")]) == 2


def test_debug_shows_the_traceback(models: Path, tmp_path: Path) -> None:
    from graphwright.ir.errors import SpecError

    (tmp_path / "spec.yaml").write_text("version: 2\n")
    with pytest.raises(SpecError):
        optimize_main(["m.pt", "--spec", str(tmp_path / "spec.yaml"), "--debug"])


@pytest.mark.parametrize(
    "arguments",
    [[], ["m.pt"], ["m.pt", "--spec", "a", "--jobs", "many"], ["m.pt", "--spec", "a", "--wat"]],
)
def test_wrong_arguments_end_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        optimize_main(arguments)
    assert ended.value.code == 2


def test_the_toolbox_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.yaml").write_text(PLAIN)
    assert main(["check", str(tmp_path / "spec.yaml")]) == 0
    assert "ok: cleanup.fold_batch_norm" in capsys.readouterr().out
    assert main(["passes"]) == 0
    assert "cleanup.fold_batch_norm" in capsys.readouterr().out
    assert main(["passes", "cast.dtype"]) == 0
    assert "float16" in capsys.readouterr().out
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


def test_nothing_heavy_is_imported_for_help_or_a_broken_spec(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("version: 1\npases: []\n")
    code = (
        "import sys\nfrom graphwright.cli import optimize_main\n"
        "status = optimize_main(['m.pt', '--spec', 'spec.yaml'])\n"
        "heavy = {'torch', 'numpy', 'networkx', 'onnx'} & set(sys.modules)\n"
        "print(status, sorted(heavy))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "2 []"
    assert "did you mean 'passes'?" in ran.stderr
