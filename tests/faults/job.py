"""A job that can be killed, starved and damaged: a long chain on a small network.

Runs are forked from one process that has imported everything: each is a process of its own, with
its own limits, and starts in no time. Nothing is computed before the fork.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

SPEC = """\
version: 1
seed: 3
calibration: {data: data.npz, batch_size: 4}
training: {data: data.npz, batch_size: 4}
passes:
  - cleanup.canonicalize
  - prune.magnitude: {sparsity: 0.2}
  - tune.finetune: {tune: {epochs: 6, lr: 0.001, loss: teacher_mse}}
  - quantize.smoothquant
  - quantize.gptq: {block: 16, targets: ["*", "!query", "!up"]}
  - quantize.rtn: {block: 16, bits: 8, targets: [query, up]}
  - compensate.eora: {rank: 2}
lower: [onnxruntime, triton]
"""
PREPARE = """
import numpy, sys
from models import every_pass
every_pass.traced("text").save(sys.argv[1] + "/model.pt2")
ids = numpy.random.default_rng(0).integers(0, 32, (16, 8))
numpy.savez(sys.argv[1] + "/data.npz", ids=ids)
"""
TIMED = {"report.json", "report.html"}
"""Files of a result that hold durations."""
_OUTPUTS: dict[int, int] = {}
"""Process id of a run to the pipe that it writes to."""


@dataclass(frozen=True)
class Ended:
    """A run that has ended: its exit status (minus the signal that killed it) and its words."""

    status: int
    text: str


def import_all() -> None:
    """Imports what a run needs, so that a forked one need not."""
    for name in ("onnxruntime", "onnx", "onnxscript", "torch._dynamo", "torch._export",
                 "torch.onnx._internal.exporter._core", "graphwright.backends.onnxruntime.lowering",
                 "graphwright.backends.triton.lowering", "graphwright.job.pipeline",
                 "graphwright.report.build", "graphwright.report.page", "rich.progress",
                 "graphwright.ir.files", "graphwright.ir.trace.capture"):  # fmt: skip
        importlib.import_module(name)
    from graphwright.passes.registry import all_passes

    all_passes()


def prepare(folder: Path) -> Path:
    """Model, data and spec in `folder`, made in another process."""
    import subprocess

    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-c", PREPARE, str(folder)], check=True)
    (folder / "spec.yaml").write_text(SPEC)
    return folder


def start(folder: Path, *arguments: str, before: Callable[[], None] | None = None) -> int:
    """Forks a run of the command line in `folder`; gives its process id.

    Every pass, layer and step of training is kept.

    Args:
        arguments: added to `optimize model.pt2 --spec spec.yaml`.
        before: called in the new process, to set its limits.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        _OUTPUTS[child] = reading
        return child
    status = 99
    try:
        os.chdir(folder)
        for descriptor in (1, 2):
            os.dup2(writing, descriptor)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            raw = io.FileIO(descriptor, "w")
            lines = io.TextIOWrapper(raw, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, lines)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from graphwright import cli
        from graphwright.job import pipeline

        pipeline.JobSettings = partial(pipeline.JobSettings, checkpoint_seconds=0.0)  # type: ignore[misc, assignment]
        if before is not None:
            before()
        status = cli.optimize_main(["model.pt2", "--spec", "spec.yaml", *arguments])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> Ended:
    """Waits for the end of a run."""
    with open(_OUTPUTS.pop(child), errors="replace") as output:
        text = output.read()
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), text)


def finish(folder: Path, *arguments: str) -> Ended:
    """A run to its end."""
    return wait(start(folder, *arguments))


def kill_after(folder: Path, seconds: float, sent: signal.Signals) -> Ended:
    """Starts a run, sends it a signal after some time, and waits for its end."""
    child = start(folder)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, sent)
    return wait(child)


def result(folder: Path, out: str = "out") -> dict[str, str]:
    """Digest of every file of the result whose bytes must not depend on the clock."""
    return {
        str(file.relative_to(folder / out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((folder / out).rglob("*"))
        if file.is_file() and file.name not in TIMED
    }


def work(folder: Path) -> Path:
    """The work folder of the job's output."""
    return folder / ".out.graphwright"


def clear(folder: Path) -> None:
    """Takes results and work folders away."""
    for made in ("out", ".out.graphwright", "out.reproducer"):
        shutil.rmtree(folder / made, ignore_errors=True)
