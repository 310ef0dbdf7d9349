"""ONNX Runtime sessions on the threads of a benchmark, called in turn."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnxruntime


def threads() -> int:
    """`OMP_NUM_THREADS`, or two."""
    return int(os.environ.get("OMP_NUM_THREADS", "2"))


def session(path: Path) -> onnxruntime.InferenceSession:
    """A CPU session on the threads of the benchmark."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    # A pool that spins after its call would take the cores from the candidate that comes next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def caller(one: onnxruntime.InferenceSession, feeds: Mapping[str, Any]) -> Callable[[], object]:
    """A call without arguments, with those of the feeds that the model takes."""
    wanted = {item.name for item in one.get_inputs()}
    given = {name: array for name, array in feeds.items() if name in wanted}
    return lambda: one.run(None, given)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing is printed within it: exporters and quantizers do."""
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink):
        yield
