"""A run killed at any moment and started again ends in the same bytes."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import resume_job
from torch import nn

import graphwright as gw

JOB = Path(resume_job.__file__)
SPEC = """
version: 1
seed: 3
passes: [test.jitter, test.jitter, test.jitter, test.jitter]
lower: []
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 128)
        self.b = nn.Linear(128, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def prepare(folder: Path) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    gw.trace(Net().eval(), (torch.randn(4, 64),), {"x": {0: "n"}}).save(folder / "model.pt2")
    (folder / "spec.yaml").write_text(SPEC)
    return folder


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(JOB), str(folder)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def finish(folder: Path) -> None:
    process = start(folder)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()[-2000:]


def result(folder: Path) -> dict[str, str]:
    """Digest of every file of the result whose bytes must not depend on the clock."""
    timed = {"report.json", "report.html"}
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted((folder / "out").iterdir())
        if f.name not in timed
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = prepare(tmp_path_factory.mktemp("straight") / "job")
    finish(folder)
    return result(folder)


def checkpoints(folder: Path) -> int:
    return len(list((folder / ".out.graphwright" / "checkpoints").glob("00*.pt2")))


def index_of_checkpoint(folder: Path) -> int:
    names = [p.name for p in (folder / ".out.graphwright" / "checkpoints").glob("00*.pt2")]
    return max((int(name[:3]) for name in names), default=-1)


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "while it waits for its first pass": lambda f: (f / ".out.graphwright" / "lock").exists(),
    "while a checkpoint is being written": lambda f: any(
        not p.name.startswith("00")
        for p in (f / ".out.graphwright" / "checkpoints").glob("*")
        if p.name != "manifest.json"
    ),
    "in the second pass": lambda f: index_of_checkpoint(f) >= 0,
    "in the fourth pass": lambda f: index_of_checkpoint(f) >= 2,
    "while the result is being written": lambda f: (f / ".out.graphwright" / "result").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(
    moment: str, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    folder = prepare(tmp_path / "job")
    process = start(folder)
    deadline = time.monotonic() + 120
    while not MOMENTS[moment](folder):
        assert time.monotonic() < deadline, "the moment never came"
        assert process.poll() is None or (folder / "out").exists()
        if process.poll() is not None:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_in_time = not (folder / "out").exists()
    finish(folder)
    assert result(folder) == uninterrupted
    assert not (folder / ".out.graphwright").exists()
    assert killed_in_time or moment in (
        "while a checkpoint is being written", "while the result is being written"
    )  # fmt: skip


def test_a_finished_pass_is_not_run_again(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "job")
    process = start(folder)
    manifest = folder / ".out.graphwright" / "checkpoints" / "manifest.json"
    while not (manifest.exists() and '"002-' in manifest.read_text()):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(folder)
    finished = (folder / "finished.txt").read_text().split()
    assert [finished.count(index) for index in "012"] == [1, 1, 1]
    assert "3" in finished
