"""prune.otov2 in several processes: the same smaller program in each, that of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import otov2_job

JOB = Path(otov2_job.__file__)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("pair")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", str(JOB), str(folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same job in this process, with the doubled batch."""
    folder = tmp_path_factory.mktemp("single")
    otov2_job.together(folder, 16)
    return torch.load(folder / "0.pt", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hesso", "hesso_cric", "dhspg"])
def test_every_process_cuts_the_same(pair, method: str) -> None:
    first, second = (found[method] for found in pair)
    assert first["metrics"]["units_removed"] > 0
    assert first["actions"] == second["actions"]
    assert first["metrics"] == second["metrics"]
    for name, tensor in first["state"].items():
        assert torch.equal(second["state"][name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hesso", "hesso_cric", "dhspg"])
def test_two_processes_prune_what_one_does_with_the_doubled_batch(pair, single, method) -> None:
    two, one = pair[0][method], single[method]
    assert two["actions"] == one["actions"]
    for name, tensor in one["state"].items():
        # float32 sums in another order, through 80 steps of SGD
        torch.testing.assert_close(two["state"][name], tensor, rtol=1e-4, atol=1e-5)
