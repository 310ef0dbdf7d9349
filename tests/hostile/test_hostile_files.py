"""Hostile files of every container: none runs, none hangs, none crashes; one message each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hostile import archives, folders, pickled, scripts
from hostile.case import FACTORY, FLAG, SECTION, Hostile, content

import graphwright as gw
from graphwright.ir.errors import GraphwrightError
from graphwright.ir.files import load_model

SECONDS = 20
"""Until a file counts as one that hangs; most take some hundredths of one."""


def scripted() -> Iterator[tuple[str, Hostile]]:
    """TorchScript: spellings of forbidden calls, and code that runs at load."""
    speller = scripts.Speller(seed=1, flag=FLAG)
    for number in range(25):
        _, body = speller.spelling()
        yield f"TorchScript: spelling {number}", _script(scripts.calls(body))
    writes = f'torch.save(torch.ones([1]), "{FLAG}")'
    start = scripts.method(f"{writes}\nself.n = 4", "s: int", "__setstate__")
    plain = scripts.HEAD + scripts.method("return x")
    default = f'x: Tensor, y: Tensor=torch.from_file("{FLAG}", True, 2)'
    yield "TorchScript: at load", _script(scripts.with_code(plain + start))
    yield (
        "TorchScript: a default",
        _script(scripts.with_code(scripts.HEAD + scripts.method("return x", default))),
    )
    endless = scripts.method("while True:\n  pass", "s: int", "__setstate__")
    yield "TorchScript: endless load", _script(scripts.with_code(plain + endless))
    loop = _script(scripts.calls("while True:\n  x = x + 1\nreturn x"), says="never ends")
    yield "TorchScript: an endless loop", loop
    twice = "".join(
        f"def f{i}(x: Tensor) -> Tensor:\n"
        f"  return __torch__.f{i + 1}(__torch__.f{i + 1}(x, ), )\n" for i in range(300)
    )  # fmt: skip
    yield (
        "TorchScript: functions that double",
        _script(scripts.with_code(twice + "def f300(x: Tensor) -> Tensor:\n  return x\n" + plain)),
    )
    for depth in (5_000, 100_000):
        nested = "return " + "(" * depth + "x" + ")" * depth
        yield f"TorchScript: nested {depth}", _script(scripts.calls(nested))
    lists = scripts.with_pickle(b"]" * 20_000 + b"a" * (20_000 - 1))
    yield "TorchScript: nested pickle", _script(lists)
    bound = scripts.with_pickle(b"c__torch__.torch.classes.rpc\nX\n)\x81")
    yield "TorchScript: a C++ object", _script(bound)
    yield "TorchScript: cut", _script(scripts.script_archive()[:-50], says="damaged")
    yield "TorchScript: bytes", _script(scripts.with_code(b"\x00\xff" * 99))


def _script(data: bytes, says: str = "more than compute") -> Hostile:
    return Hostile(content(lambda: data), says)


CASES: dict[str, Hostile] = {
    **dict(scripted()), **pickled.CASES, **archives.CASES, **folders.CASES,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, a factory beside it, and a clock that ends what hangs."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "factory_of_tests.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("factory_of_tests", None)

    def hang(*_: object) -> None:
        raise AssertionError(f"hangs for {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    yield work
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def opened(path: Path, *, factory: bool) -> None:
    """What the commands do with a path: an artifact, or else a model."""
    from graphwright.backends.opening import open_artifact

    if path.exists() and open_artifact(path) is not None:
        return
    loaded = load_model(path, section=SECTION if factory else None)
    if loaded.module is not None and not factory:
        with contextlib.suppress(TypeError, RuntimeError), torch.no_grad():
            loaded.module(torch.ones(2, 4))


def test_there_are_enough() -> None:
    containers = {name.partition(":")[0] for name in CASES}
    assert len(CASES) >= 150
    assert containers >= {"torch.save", "torch.save, old", "TorchScript", ".pt2", "safetensors",
                          "index", "folder", "artifact", "ours", "no file"}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused_with_one_message_and_nothing_run(name: str, folder: Path) -> None:
    case = CASES[name]
    path = case.make(folder)
    before = {p.name for p in folder.rglob("*")}
    with contextlib.ExitStack() as stack:
        if case.is_harmless:
            stack.enter_context(contextlib.suppress(GraphwrightError))
        else:
            caught = stack.enter_context(pytest.raises(GraphwrightError))
        opened(path, factory=case.factory)
    if not case.is_harmless:
        message = str(caught.value)
        assert caught.value.exit_code in (2, 3), message
        assert case.says in message, message
        assert caught.value.message.count("\n") == 0
        assert len(message) < 2000
    assert {p.name for p in folder.rglob("*")} == before
    assert not Path(FLAG).exists()


SAMPLE = (
    "TorchScript: spelling 0", "TorchScript: nested 100000", "torch.save: nested tuples",
    "torch.save: object, shell", "torch.save: repeats itself", ".pt2: size 9**9**9**9",
    ".pt2: deep graph", "ours: deep record", "folder: layers", "artifact: bytes outside",
    "no file: a pipe", "no file: a device without end", "safetensors: deep header",
)  # fmt: skip


@pytest.mark.slow
def test_the_command_line(folder: Path) -> None:
    """Every command, in one process without a clock of its own: status 3 (or 2), one message."""
    signal.alarm(180)
    jobs = []
    for number, name in enumerate(SAMPLE):
        place = folder / str(number)
        place.mkdir()
        os.chdir(place)
        path = str(CASES[name].make(place))
        commands = [["inspect", path], ["compare", path, path], ["bench", path]]
        jobs += [[command, name] for command in (commands if number < 2 else commands[:1])]
    os.chdir(folder)
    code = """
import contextlib, io, json, sys
from graphwright.cli import main
out = []
for command, name in json.loads(sys.stdin.read()):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        out.append([name, main(command), said.getvalue()])
print(json.dumps(out))
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=json.dumps(jobs), text=True,
        capture_output=True, timeout=150, check=True,
    )  # fmt: skip
    for name, status, said in json.loads(ran.stdout.splitlines()[-1]):
        assert status in (2, 3), (name, said)
        assert "Traceback" not in said
        assert "bug in graphwright" not in said
        assert said.count("error:") == 1, (name, said)
    assert not list(folder.rglob(FLAG))


def test_data_and_tokenizers_that_are_hostile(folder: Path) -> None:
    """Data that a spec or the command line names ends with exit status 2."""
    from graphwright.ir.data.sources import open_source

    os.mkfifo("pipe.npz")
    Path("texts.txt").write_text("one\n")
    Path("tokenizer.json").write_bytes(archives.deep())
    Path("objects.npz").write_bytes(pickled.saved({"x": 1}))
    for data in ("pipe.npz", "texts.txt", "objects.npz"):
        with pytest.raises(GraphwrightError) as caught:
            open_source(data, folder)
        assert caught.value.exit_code == 2
    Path("tokenizer.json").unlink()
    Path("vocab.txt").write_text("a\nb\n")
    Path("tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"})
    )
    Path("evil.py").write_text(folders.CODE.decode())
    with contextlib.suppress(GraphwrightError):
        open_source("texts.txt", folder)
    assert not Path(FLAG).exists()


def test_gw_load_refuses_too(folder: Path) -> None:
    for name in ("ours: operator", "no file: a pipe", "artifact: bytes outside"):
        place = folder / name[:3]
        place.mkdir()
        with pytest.raises(GraphwrightError) as caught:
            gw.load(CASES[name].make(place))
        assert caught.value.exit_code == 3


def test_names_do_not_command_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Messages quote what a file says; escape sequences in it are shown and not obeyed."""
    from graphwright.cli import main

    name = "\x1b]0;title\x07\x1b[2J.pt"
    Path(name).write_bytes(b"hello")
    assert main(["inspect", name]) == 3
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "\\x1b]0;title\\x07" in said
