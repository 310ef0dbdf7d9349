"""A training run killed at any moment and started again ends in the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import tune_jobs

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches
from graphwright.ir.tune import Hook, TuneOptions, tune

JOB = Path(tune_jobs.__file__)
Data = Callable[[int], Batches]


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(JOB), "resume", str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def result(folder: Path) -> tuple[str, str]:
    program = hashlib.sha256((folder / "result.pt2").read_bytes()).hexdigest()
    return program, (folder / "history.txt").read_text()


def saved_step(folder: Path) -> int:
    """The step of the last checkpoint; 0 where there is none, or the next one just replaced it."""
    for file in (folder / "work").glob("tune-*.pt"):
        with contextlib.suppress(FileNotFoundError):
            return int(torch.load(file, weights_only=True)["state"]["step"])
    return 0


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path) -> None:
    """Dropout, Adam's moments, a hook's state and the best evaluation survive SIGKILL."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir(), killed.mkdir()
    tune_jobs.resume(straight)
    process = start(killed)
    try:
        deadline = time.monotonic() + 120
        while saved_step(killed) < 10:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 10 <= saved_step(killed) < 40
    tune_jobs.resume(killed)
    assert result(killed) == result(straight)


class Interrupt(Hook):
    """Ends the process's run, as a kill would, before a step."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def before_step(self, at) -> None:
        self.seen += 1
        if at.step == self.step:
            raise KeyboardInterrupt


def test_the_second_run_repeats_nothing(program: gw.Program, data: Data, tmp_path: Path) -> None:
    context = Context(work=tmp_path, checkpoint_seconds=0.0)
    options = TuneOptions(steps=6)
    with pytest.raises(KeyboardInterrupt):
        tune(program, data(8), options, context, hooks=[Interrupt(4)])
    again = Interrupt(-1)
    resumed = tune(program, data(8), options, context, hooks=[again])
    assert again.seen == 2
    straight = tune(program, data(8), options, Context(), hooks=[Interrupt(-1)])
    assert resumed.history == straight.history
    for name, tensor in straight.program.state.items():
        assert torch.equal(resumed.program.state[name], tensor)
    finished = Interrupt(-1)
    assert tune(program, data(8), options, context, hooks=[finished]).history == straight.history
    assert finished.seen == 0


def test_a_state_of_another_run_counts_as_none(
    program: gw.Program, data: Data, tmp_path: Path
) -> None:
    context = Context(work=tmp_path)
    options = TuneOptions(steps=3)
    tune(program, data(8), options, context)

    def steps(given: TuneOptions = options, **changes) -> int:
        watch = Interrupt(-1)
        changed = changes.pop("program", program)
        tune(changed, data(8), given, context.replace(**changes), hooks=[watch])
        return watch.seen

    assert steps() == 3, "hooks are part of the run"
    assert steps() == 0
    assert steps(seed=1) == 3
    assert steps(seed=1, key="other data") == 3
    assert steps(TuneOptions(steps=3, lr=0.5)) == 3
    (file,) = tmp_path.glob("tune-*.pt")
    file.write_bytes(file.read_bytes()[:-100])
    assert steps(TuneOptions(steps=3, lr=0.5)) == 3, "damaged"


def test_runs_of_one_pass_keep_apart(program: gw.Program, data: Data, tmp_path: Path) -> None:
    context = Context(work=tmp_path)
    for phase in ("first", "second"):
        tune(program, data(8), TuneOptions(steps=1), context.within(phase))
    assert len(list(tmp_path.glob("tune-*.pt"))) == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
