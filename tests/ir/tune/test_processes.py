"""Several processes train as one does. On CPUs torchrun launches them; accelerate finds them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tune_jobs

from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune import processes

JOB = Path(tune_jobs.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", str(JOB), "together", str(folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same job in this process, with the doubled batch."""
    folder = tmp_path_factory.mktemp("single")
    tune_jobs.together(folder, size=8)
    return torch.load(folder / "0.pt", weights_only=False)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(results, single) -> None:
    one, two = single, results[0]
    assert len(two["losses"]) == 7
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    values = [[v for _, v in found["evaluations"]] for found in (two, one)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for name, tensor in one["program"].items():
        # float32 sums in another order, through 7 steps of AdamW
        torch.testing.assert_close(two["program"][name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_process_returns_the_same_program(results) -> None:
    first, second = results
    assert first["losses"] == second["losses"]
    assert first["evaluations"] == second["evaluations"]
    for part in ("program", "norm"):
        for name, tensor in first[part].items():
            assert torch.equal(second[part][name], tensor), name


@pytest.mark.slow
def test_running_statistics_are_averaged(results, single) -> None:
    """The mean over two halves is that over the whole; the variance lacks that between halves."""
    one, two = single["norm"], results[0]["norm"]
    mean, var = "norm.running_mean", "norm.running_var"
    torch.testing.assert_close(two[mean], one[mean], rtol=1e-5, atol=1e-6)  # float32
    torch.testing.assert_close(two[var], one[var], rtol=0.1, atol=0.0)
    assert not torch.equal(two[var], one[var])


def test_without_accelerate_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ArgumentError) as caught:
        processes.Processes(torch.device("cpu"))
    assert str(caught.value) == "tuning needs accelerate. Install graphwright[tune]."
