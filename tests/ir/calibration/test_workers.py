from __future__ import annotations

import threading

import pytest
import torch

from graphwright.ir.calibration.workers import Workers
from graphwright.ir.errors import ArgumentError


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


ITEMS = [torch.tensor(float(value)) for value in range(5)]


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_come_in_the_order_of_the_items(jobs: int) -> None:
    assert Workers(jobs).map(square, ITEMS) == [0.0, 1.0, 4.0, 9.0, 16.0]


def test_two_jobs_run_at_the_same_time() -> None:
    both_are_here = threading.Barrier(2, timeout=10)
    assert Workers(2).map(lambda item: both_are_here.wait() >= 0 and item, [1, 2]) == [1, 2]


def test_an_error_of_an_item_is_that_of_the_map() -> None:
    with pytest.raises(ZeroDivisionError):
        Workers(2).map(lambda item: 1 // item, [1, 0])


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ArgumentError, match="Ray is not installed"):
        Workers("ray").map(square, ITEMS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_local_ray_gives_the_same_layers() -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    import ray
    from torch import nn

    import graphwright as gw
    from graphwright.ir.calibration.walk import sweep
    from graphwright.ir.context import Context
    from graphwright.ir.layers.selectors import layers

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(6, 8)
    program = gw.trace(model, (x,))
    chosen = layers(program, ("linear",))
    here = sweep(program, chosen, [(x,)], Doubles(), Context())
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        there = sweep(program, chosen, [(x,)], Doubles(), Context(jobs="ray"))
    finally:
        ray.shutdown()
    assert list(here) == list(there)
    for name, solved in here.items():
        assert torch.equal(solved.state["twice"], there[name].state["twice"])


class Doubles:
    def gather(self, site):
        return next(iter(site.inputs())).sum()

    def solve(self, task):
        from graphwright.ir.calibration.site import Solved

        return Solved(task.weight * 2, state={"twice": task.weight * 2 + task.stats})
