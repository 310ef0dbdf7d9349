from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.data.synthetic import other_size_inputs, other_sizes
from graphwright.ir.signature import DimRange, Signature, TensorSpec

DIMS = {"batch": DimRange(1, None), "seq": DimRange(1, 12)}
TOKENS = Signature((TensorSpec("ids", "int64", ("batch", "seq"), (0, 9)),), (), {}, DIMS)


def test_every_dimension_changes_at_once_first() -> None:
    first, *rest = other_sizes(TOKENS, {"batch": 2, "seq": 7})
    assert first == {"batch": 3, "seq": 10}
    assert {"batch": 3, "seq": 3} in rest  # half
    assert {"batch": 4, "seq": 7} in rest  # the batch alone
    assert all(sizes["seq"] <= 12 for sizes in rest)


def test_a_bound_is_kept_and_a_dimension_of_one_size_stays() -> None:
    fixed = Signature(TOKENS.inputs, (), {}, {"batch": DimRange(2, 2), "seq": DimRange(7, 8)})
    assert list(other_sizes(fixed, {"batch": 2, "seq": 7})) == [{"batch": 2, "seq": 8}]
    assert list(other_sizes(fixed, {})) == []


def program(dims: dict[str, DimRange], forward: nn.Module, x: Tensor) -> gw.Program:
    traced = gw.trace(forward, (x,), dynamic={"x": {0: "batch", 1: "length"}})
    return traced.replace(signature=gw_signature(traced, dims))


def gw_signature(traced: gw.Program, dims: dict[str, DimRange]) -> Signature:
    return replace(traced.signature, dims=dims)


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        left, right = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        return torch.log(left + right)


def test_one_sample_and_far_more_are_drawn() -> None:
    traced = gw.trace(
        nn.Linear(6, 2), (torch.ones(2, 5, 6),), dynamic={"input": {0: "batch", 1: "length"}}
    )
    (small,), (large,) = other_size_inputs(traced, seed=0)
    assert small.shape == (1, 8, 6)
    assert large.shape == (16, 20, 6)


def test_a_size_that_the_model_does_not_take_is_passed_over() -> None:
    traced = program({"batch": DimRange(), "length": DimRange()}, Halves(), torch.ones(2, 6))
    (small,), (large,) = other_size_inputs(traced, seed=0)
    assert small.shape[0] == 1
    assert small.shape[1] == 12  # odd lengths do not halve
    assert large.shape == (16, 24)


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] // 2, 2, x.shape[1]).sum(1)


def test_a_net_of_even_batches_gets_other_even_batches() -> None:
    dims = {"batch": DimRange(), "length": DimRange()}
    traced = program(dims, Pairs(), torch.ones(2, 6))
    sizes = [inputs[0].shape[0] for inputs in other_size_inputs(traced, seed=0)]
    assert sizes == [4, 16]


def test_a_net_of_heavy_products_is_run_on_at_most_four_times_as_much() -> None:
    dynamic = {"input": {0: "batch", 1: "length"}}
    traced = gw.trace(nn.Linear(2048, 2048), (torch.ones(2, 64, 2048),), dynamic=dynamic)
    small, large = other_size_inputs(traced, seed=0)
    assert small[0].shape[0] == 1
    assert large[0].numel() == 4 * 2 * 64 * 2048


def test_values_the_model_makes_no_numbers_of_are_replaced_by_the_examples() -> None:
    traced = program({"batch": DimRange(), "length": DimRange()}, Halves(), torch.ones(2, 6))
    for inputs in other_size_inputs(traced, seed=0):
        assert bool((inputs[0] == 1).all())  # the logarithm of a random number may not be one


def test_random_values_lie_in_the_range_and_repeat() -> None:
    dynamic = {"input": {0: "batch", 1: "seq"}}
    ids = torch.zeros(2, 7, dtype=torch.int64)
    traced = gw.trace(nn.Embedding(9, 4), (ids,), dynamic=dynamic, ranges={"input": (0, 9)})
    inputs = other_size_inputs(traced, seed=3)[-1]
    again = other_size_inputs(traced, seed=3)[-1]
    assert inputs[0].dtype == torch.int64
    assert 2 <= int(inputs[0].max()) < 9
    assert torch.equal(inputs[0], again[0])


@pytest.mark.parametrize("dims", [{"batch": DimRange(2, 2)}, {}])
def test_none_where_nothing_can_differ(dims: dict[str, DimRange]) -> None:
    dynamic = {"input": {0: "batch"}} if dims else None
    traced = gw.trace(nn.ReLU(), (torch.ones(2, 3),), dynamic=dynamic)
    assert other_size_inputs(traced.replace(signature=gw_signature(traced, dims)), 0) == []
