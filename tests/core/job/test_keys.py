"""The key of a step changes with whatever its result depends on, contents of data included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.data.batches import load_data
from graphwright.ir.graph.digest import digest
from graphwright.job.keys import chain_keys
from graphwright.job.place import OutputPlace
from graphwright.job.progress import Progress
from graphwright.job.run import JobSettings, Run
from graphwright.specs.spec import load_spec

PASSES = "passes: [{prune.wanda: {sparsity: 0.5}}, {tune.finetune: {tune: {loss: 'losses:mine'}}}]"


@pytest.fixture(scope="module")
def program() -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(nn.Linear(4, 4), (torch.randn(4, 4),), {"input": {0: "n"}})


def keys(
    folder: Path, program: gw.Program, data: str, seed: int = 0, passes: str = PASSES
) -> list[str]:
    """Keys of a chain that calibrates on `data`."""
    text = f"version: 1\nseed: {seed}\ncalibration: {{data: '{data}', batch_size: 2}}\n{passes}\n"
    text += f"training: {{data: '{data}'}}\nlower: []\n"
    (folder / "spec.yaml").write_text(text)
    spec = load_spec(folder / "spec.yaml")
    run = Run(spec, JobSettings(), OutputPlace(folder / "out"), Progress(quiet=True), 0.0)
    assert spec.calibration is not None
    section = spec.calibration.model_dump(exclude_none=True)
    batches = load_data(section, program.signature, seed, root=spec.folder)
    return chain_keys(run, digest(program), batches, batches)


def as_file(folder: Path, array: Any) -> str:
    np.savez(folder / "data.npz", input=array)
    return "data.npz"


def as_folder(folder: Path, array: Any) -> str:
    (folder / "data").mkdir(exist_ok=True)
    np.save(folder / "data" / "input.npy", array)
    return "data"


def as_function(folder: Path, array: Any) -> str:
    """The code stays the same: only what it gives changes."""
    np.save(folder / "hidden.npy", array)
    (folder / "given_batches.py").write_text(
        "import numpy, pathlib, torch\n"
        "def batches():\n"
        "    found = numpy.load(pathlib.Path(__file__).with_name('hidden.npy'))\n"
        "    return [{'input': torch.from_numpy(found)}]\n"
    )
    return "given_batches:batches"


@pytest.mark.parametrize("write", [as_file, as_folder, as_function])
def test_contents_of_data_count(
    tmp_path: Path, program: gw.Program, write: Callable[[Path, Any], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delitem(__import__("sys").modules, "given_batches", raising=False)
    array = np.arange(16, dtype=np.float32).reshape(4, 4)
    data = write(tmp_path, array)
    first = keys(tmp_path, program, data)
    assert len(set(first)) == 2
    assert keys(tmp_path, program, data) == first
    array[3, 3] += 1e-3
    write(tmp_path, array)
    second = keys(tmp_path, program, data)
    assert not set(first) & set(second)
    array[3, 3] = 15
    write(tmp_path, array)
    assert keys(tmp_path, program, data) == first


def test_files_and_functions_that_options_name_count(tmp_path: Path, program: gw.Program) -> None:
    data = as_file(tmp_path, np.zeros((4, 4), np.float32))
    (tmp_path / "losses.py").write_text("def mine(a, b): return (a - b).sum()\n")
    first = keys(tmp_path, program, data)
    (tmp_path / "losses.py").write_text("def mine(a, b): return (a - b).abs().sum()\n")
    second = keys(tmp_path, program, data)
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_files_that_a_pass_writes_do_not_count(tmp_path: Path, program: gw.Program) -> None:
    """Else the run that wrote one would not find its own checkpoint again."""
    passes = "passes: [{resize.neumeta: {width: 0.5, save: manifold}}]"
    first = keys(tmp_path, program, "synthetic", passes=passes)
    (tmp_path / "manifold").write_bytes(b"written by the run")
    assert keys(tmp_path, program, "synthetic", passes=passes) == first
    assert keys(tmp_path, program, "synthetic", passes=passes.replace("0.5", "0.75")) != first


def test_the_seed_counts(tmp_path: Path, program: gw.Program) -> None:
    one, two = (keys(tmp_path, program, "synthetic", seed) for seed in (0, 1))
    assert not set(one) & set(two)


def test_folders_that_options_name_count(tmp_path: Path, program: gw.Program) -> None:
    """An adapter's folder, whose weights are another file than the one that describes them."""
    passes = "passes: [{adapt.load: {path: adapter}}]"
    (tmp_path / "adapter").mkdir()
    found = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(content)
        found.append(keys(tmp_path, program, "synthetic", passes=passes))
    assert found[0] == found[2] != found[1]
