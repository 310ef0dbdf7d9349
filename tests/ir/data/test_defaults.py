"""Sizes that follow from others, and inputs that a call may leave out."""

from __future__ import annotations

import json

import pytest
import torch

import graphwright as gw
from graphwright.ir.data.defaults import started, with_defaults
from graphwright.ir.data.synthetic import other_sizes
from graphwright.ir.program import bind_inputs
from graphwright.ir.signature import DimRange, Signature, TensorSpec

CACHED = Signature(
    inputs=(
        TensorSpec("input_ids", "int64", ("batch", "seq")),
        TensorSpec("attention_mask", "int64", ("batch", "total")),
        TensorSpec("position_ids", "int64", ("batch", "seq")),
        TensorSpec("past_key_0", "float32", ("batch", 2, "past", 4)),
    ),
    outputs=(),
    structure=None,
    dims={"batch": DimRange(), "seq": DimRange(), "past": DimRange(0), "total": DimRange()},
    derived={"total": "past + seq"},
    defaults={"attention_mask": "ones", "position_ids": "positions", "past_key_0": "zeros"},
)
IDS = torch.arange(6).reshape(2, 3)


def test_json_and_back():
    assert Signature.from_json(json.loads(json.dumps(CACHED.to_json()))) == CACHED


def test_other_sizes_stay_consistent_and_reach_an_empty_past():
    found = list(
        other_sizes(CACHED, {"batch": 2, "seq": 3, "past": 5, "total": 8}, [(1, 0), (1, 3)])
    )
    assert found[0] == {"batch": 3, "seq": 1, "past": 0, "total": 1}
    assert found[1] == {"batch": 3, "seq": 6, "past": 8, "total": 14}


def test_a_prompt_alone_is_enough():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    full = with_defaults(CACHED, {"input_ids": IDS, "attention_mask": mask})
    assert full["past_key_0"].shape == (2, 2, 0, 4)
    assert full["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]


def test_positions_go_on_behind_the_past():
    past, mask = torch.zeros(2, 2, 2, 4), torch.ones(2, 5, dtype=torch.int64)
    full = with_defaults(CACHED, {"input_ids": IDS, "past_key_0": past})
    assert torch.equal(full["attention_mask"], mask)
    assert full["position_ids"].tolist() == [[2, 3, 4]] * 2


def test_a_mask_that_does_not_cover_the_past_is_refused():
    past = torch.zeros(2, 2, 2, 4)
    named = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "past_key_0": past}
    with pytest.raises(gw.ir.errors.ArgumentError, match="'total' is 3 and has to be 5"):
        bind_inputs(CACHED, (), named)


def test_a_past_of_another_batch_is_refused():
    named = {"input_ids": IDS, "past_key_0": torch.zeros(3, 2, 2, 4)}
    with pytest.raises(gw.ir.errors.ArgumentError, match="'batch' is 2 and, in input 'past_key_0'"):
        bind_inputs(CACHED, (), named)


def test_data_has_to_bring_what_a_prompt_is():
    own = started(CACHED)
    assert [(spec.name, spec.shape) for spec in own.inputs] == [
        ("input_ids", ("batch", "seq")), ("attention_mask", ("batch", "seq"))]  # fmt: skip
    assert not own.derived
